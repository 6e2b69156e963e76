//! Runs the exports of fixtures/exports in the evaluator, optionally rewritten, and compares with ONNX Runtime's
//! results.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lapidary::graph::eval::Evaluator;
use lapidary::graph::{Graph, Op, ValueId};
use lapidary::tensor::{DType, Tensor};

/// `reference.json` of an export.
#[derive(serde::Deserialize)]
struct Reference {
    dtype: String,
    cache: Cache,
    model: Model,
    prompt: Vec<i64>,
    greedy_tokens: Vec<i64>,
    prefill_last_logits: Vec<f64>,
    step_logits: Vec<Vec<f64>>,
}

#[derive(serde::Deserialize)]
struct Cache {
    capacity: Option<usize>,
    logits: String,
    pairs: Vec<(String, String)>,
}

#[derive(serde::Deserialize)]
struct Model {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
}

struct Run<'g> {
    graph: &'g Graph,
    reference: &'g Reference,
    /// By cache input.
    caches: HashMap<ValueId, Tensor>,
    past: usize,
}

impl<'g> Run<'g> {
    fn new(graph: &'g Graph, reference: &'g Reference) -> Self {
        let mut run = Run {
            graph,
            reference,
            caches: HashMap::new(),
            past: 0,
        };
        for (past, _) in &reference.cache.pairs {
            let id = graph.find(past).expect("a cache input");
            run.caches.insert(id, run.empty_cache(id));
        }
        run
    }

    /// Zeros; a symbolic dim is the batch at the front, the width at the end, and the length in between.
    fn empty_cache(&self, id: ValueId) -> Tensor {
        let value = self.graph.value(id);
        let dims = value.shape.as_ref().expect("a typed input");
        let slots = self.reference.cache.capacity.unwrap_or(0);
        let model = &self.reference.model;
        let shape: Vec<usize> = dims
            .iter()
            .enumerate()
            .map(|(i, dim)| match dim.as_const() {
                Some(n) => n as usize,
                None if i == 0 => 1,
                None if i == dims.len() - 1 && dims.len() == 3 => model.kv_heads * model.head_dim,
                None if i == dims.len() - 1 => model.head_dim,
                None => slots,
            })
            .collect();
        let zeros = vec![0.0; shape.iter().product()];
        Tensor::from_f64_as(value.dtype.unwrap(), shape, &zeros)
    }

    /// The tensor of an input that is not a cache, by exporters' names.
    fn other_input(&self, id: ValueId, tokens: &[i64]) -> Tensor {
        let value = self.graph.value(id);
        let rank = value.shape.as_ref().expect("a typed input").len();
        let (past, count) = (self.past as i64, tokens.len());
        let total = self.past + count;
        let shaped = |values: Vec<i64>| {
            let shape = if rank == 1 {
                vec![values.len()]
            } else {
                vec![1, values.len()]
            };
            let tensor = Tensor::from_i64(shape, &values);
            if value.dtype == Some(DType::I32) {
                Tensor::from_i32(
                    tensor.shape().to_vec(),
                    &values.iter().map(|v| *v as i32).collect::<Vec<_>>(),
                )
            } else {
                tensor
            }
        };
        match value.name.as_str() {
            "input_ids" => shaped(tokens.to_vec()),
            "attention_mask" => shaped(vec![1; total]),
            "position_ids" | "cache_position" => shaped((past..total as i64).collect()),
            "write_indices" => shaped(vec![past]),
            "nonpad_kv_seqlen" => shaped(vec![total as i64]),
            name => panic!("an input this test does not know: {name}"),
        }
    }

    /// Feeds tokens, keeps the caches, returns the logits of the last position.
    fn step(&mut self, tokens: &[i64]) -> Result<Vec<f64>, String> {
        let mut bindings = self.caches.clone();
        for id in &self.graph.inputs {
            if !bindings.contains_key(id) {
                bindings.insert(*id, self.other_input(*id, tokens));
            }
        }
        let mut evaluator = Evaluator::new(self.graph, bindings);
        let find = |name: &str| self.graph.find(name).unwrap_or_else(|| panic!("no value {name}"));
        let logits = evaluator
            .value(find(&self.reference.cache.logits))
            .map_err(|e| e.to_string())?;
        for (past, present) in &self.reference.cache.pairs {
            let tensor = evaluator.value(find(present)).map_err(|e| e.to_string())?;
            self.caches.insert(find(past), tensor);
        }
        self.past += tokens.len();
        let vocabulary = *logits.shape().last().unwrap();
        Ok(logits.to_f64().split_off(logits.len() - vocabulary))
    }
}

/// Every folder with a reference, sorted: of fixtures/exports, or of the folder that LAPIDARY_EXPORTS names.
pub fn exports() -> Vec<PathBuf> {
    let fixtures = || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let root = std::env::var_os("LAPIDARY_EXPORTS").map_or_else(fixtures, PathBuf::from);
    let mut folders: Vec<PathBuf> = fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.join("reference.json").exists())
        .collect();
    folders.sort();
    assert!(
        folders.len() > 40,
        "only {} exports in {}",
        folders.len(),
        root.display()
    );
    folders
}

/// How many layers the model in a folder has.
#[allow(dead_code, reason = "not every test that replays exports asks")]
pub fn layers(folder: &Path) -> usize {
    let text = fs::read_to_string(folder.join("reference.json")).unwrap();
    let reference: Reference = serde_json::from_str(&text).unwrap();
    reference.model.layers
}

/// The first operator Lapidary does not know.
pub fn unknown_op(graph: &Graph) -> Option<String> {
    graph.node_ids().find_map(|n| match &graph.node(n).op {
        Op::Unknown { op_type, .. } => Some(op_type.clone()),
        _ => None,
    })
}

/// Prefill and eight greedy steps of a graph that is equal to the export in `folder`, against its reference.
pub fn replay(folder: &Path, graph: &Graph) -> Result<(), String> {
    replay_within(folder, graph, None)
}

/// The same with another tolerance of the logits; tokens may differ if their logits are within it.
pub fn replay_within(folder: &Path, graph: &Graph, tolerance: Option<f64>) -> Result<(), String> {
    let text = fs::read_to_string(folder.join("reference.json")).unwrap();
    let reference: Reference = serde_json::from_str(&text).unwrap();
    let mut run = Run::new(graph, &reference);
    // Engines round differently in half types; if that is coarse, two tokens may swap ranks.
    let exact = tolerance.is_none() && reference.dtype != "bf16";
    let tolerance = tolerance.unwrap_or(match reference.dtype.as_str() {
        "fp16" => 3e-2,
        "bf16" => 2e-1,
        _ => 1e-4,
    });
    let mut fed = reference.prompt.clone();
    let wanted = std::iter::once(&reference.prefill_last_logits).chain(&reference.step_logits);
    for (step, wanted) in wanted.enumerate() {
        let logits = run.step(&fed)?;
        let worst = logits
            .iter()
            .zip(wanted)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        // A NaN anywhere must not pass as "not larger".
        if !(worst <= tolerance && logits.len() == wanted.len() && logits.iter().all(|l| l.is_finite())) {
            return Err(format!("step {step}: logits differ by {worst:e}"));
        }
        let best = logits
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.total_cmp(b.1))
            .expect("a vocabulary")
            .0;
        if exact && best as i64 != reference.greedy_tokens[step] {
            return Err(format!(
                "step {step}: token {best} instead of {}",
                reference.greedy_tokens[step]
            ));
        }
        fed = vec![reference.greedy_tokens[step]];
    }
    Ok(())
}
