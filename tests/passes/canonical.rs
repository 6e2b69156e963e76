//! Every fixture becomes canonical, and the canonical graph gives ONNX Runtime's logits and tokens.

use std::fs;
use std::path::{Path, PathBuf};

use lapidary::graph::Graph;
use lapidary::passes::{Canonical, CanonicalizeOptions, canonicalize};

use crate::decoder::{Decoder, argmax, distance};

#[derive(serde::Deserialize)]
pub struct Reference {
    pub family: String,
    pub exporter: String,
    pub dtype: String,
    pub model: Model,
    pub prompt: Vec<i64>,
    pub greedy_tokens: Vec<i64>,
    pub prefill_last_logits: Vec<f64>,
    pub step_logits: Vec<Vec<f64>>,
}

#[derive(serde::Deserialize)]
pub struct Model {
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub hidden: usize,
    pub vocabulary: usize,
    pub window: Option<usize>,
    pub tied: bool,
}

pub struct Export {
    pub name: String,
    pub reference: Reference,
    pub path: PathBuf,
}

impl Export {
    /// On logits. ONNX Runtime computes much of an fp16 graph in fp32, the evaluator rounds after every operator.
    pub fn tolerance(&self) -> f64 {
        match self.reference.dtype.as_str() {
            "fp16" => 3e-2,
            "bf16" => 2.5e-1,
            _ => 1e-4,
        }
    }
    pub fn read(&self) -> Graph {
        lapidary::onnx::read(&self.path).unwrap_or_else(|e| panic!("{}: {e}", self.name))
    }
    /// The window of the graph; some exporters drop it.
    pub fn window(&self) -> Option<usize> {
        let dropped = matches!(
            self.reference.exporter.as_str(),
            "ort-genai" | "mobius" | "mobius-static"
        );
        self.reference.model.window.filter(|_| !dropped)
    }
}

/// The fixtures, or the folder in `LAPIDARY_EXPORTS`; `LAPIDARY_EXPORT` keeps those whose name contains it.
pub fn exports() -> Vec<Export> {
    let root = std::env::var_os("LAPIDARY_EXPORTS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports"),
        PathBuf::from,
    );
    let wanted = std::env::var("LAPIDARY_EXPORT").unwrap_or_default();
    let mut found: Vec<Export> = fs::read_dir(&root)
        .unwrap_or_else(|e| panic!("{}: {e}", root.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|folder| folder.join("reference.json").exists())
        .map(|folder| {
            let text = fs::read_to_string(folder.join("reference.json")).unwrap();
            Export {
                name: folder.file_name().unwrap().to_string_lossy().into_owned(),
                reference: serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", folder.display())),
                path: folder.join("model.onnx"),
            }
        })
        .filter(|export| export.name.contains(&wanted))
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(!found.is_empty(), "no exports in {}", root.display());
    found
}

/// Runs a check on every export and fails with all that failed.
pub fn for_each(check: impl Fn(&Export) -> Result<(), String>) {
    let mut failed = Vec::new();
    for export in exports() {
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&export)));
        match result {
            Ok(Ok(())) => {}
            Ok(Err(reason)) => failed.push(format!("{}: {reason}", export.name)),
            Err(_) => failed.push(format!("{}: panicked", export.name)),
        }
    }
    assert!(
        failed.is_empty(),
        "{} exports failed:\n{}",
        failed.len(),
        failed.join("\n")
    );
}

pub fn canonical(export: &Export) -> Result<Canonical, String> {
    let options = CanonicalizeOptions {
        max_positions: 64,
        ..CanonicalizeOptions::default()
    };
    canonicalize(export.read(), &options).map_err(|e| e.to_string())
}

/// Prefill in the given chunks, then greedy steps, all against the reference.
fn decode(export: &Export, graph: &Graph, batch: usize, capacity: usize, chunks: &[usize]) -> Result<(), String> {
    let reference = &export.reference;
    let mut decoder = Decoder::new(graph, batch, capacity);
    let (mut logits, mut start) = (Vec::new(), 0);
    for count in chunks {
        let chunk = reference.prompt[start..start + count].to_vec();
        logits = decoder.step(&vec![chunk; batch]);
        start += count;
    }
    assert_eq!(start, reference.prompt.len());
    let expected = std::iter::once(&reference.prefill_last_logits).chain(&reference.step_logits);
    for (step, (expected, token)) in expected.zip(&reference.greedy_tokens).enumerate() {
        for row in &logits {
            let worst = distance(row, expected);
            if worst > export.tolerance() {
                return Err(format!(
                    "batch {batch}, chunks {chunks:?}: logits of step {step} differ by {worst:e}"
                ));
            }
            if argmax(row) != *token && export.reference.dtype == "fp32" {
                return Err(format!(
                    "batch {batch}, chunks {chunks:?}: token {step} is {}",
                    argmax(row)
                ));
            }
        }
        if step < reference.step_logits.len() {
            logits = decoder.step(&vec![vec![*token]; batch]);
        }
    }
    Ok(())
}

#[test]
fn canonical_graphs_compute_what_the_exports_did() {
    for_each(|export| {
        let canonical = canonical(export)?;
        let tokens = export.reference.prompt.len();
        decode(export, &canonical.graph, 1, 24, &[tokens])?;
        decode(export, &canonical.graph, 1, 37, &[4, 1, tokens - 5])?;
        if canonical.architecture.batch.is_none() {
            decode(export, &canonical.graph, 2, 24, &[tokens])?;
        }
        Ok(())
    });
}

#[test]
fn architectures_are_read_off_the_graph() {
    for_each(|export| {
        let found = canonical(export)?.architecture;
        let model = &export.reference.model;
        let checks = [
            ("layers", found.layers == model.layers && found.caches == model.layers),
            ("heads", found.heads == model.heads && found.kv_heads == model.kv_heads),
            (
                "head_dim",
                found.head_dim == model.head_dim && found.value_dim == model.head_dim,
            ),
            ("hidden", found.hidden == Some(model.hidden)),
            // See fixtures/exports/README.md.
            ("intermediate", found.intermediate == Some(48)),
            ("vocabulary", found.vocabulary == Some(model.vocabulary)),
            // Some models have a sliding window in only some of their layers.
            (
                "windows",
                found.windows.iter().all(|w| w.is_none() || *w == export.window()),
            ),
            ("windows", found.windows.contains(&export.window())),
            ("tied", found.tied_embeddings == Some(model.tied) || !model.tied),
            ("positions", found.max_positions == Some(64)),
            ("rotary", found.rotary.is_some() == (export.reference.family != "gpt2")),
        ];
        match checks.iter().find(|(_, holds)| !holds) {
            Some((what, _)) => Err(format!("{what}: {found:?}")),
            None => Ok(()),
        }
    });
}
