//! Networks with Lapidary's own layers: every fixture in 16 bits decodes to the same logits with and without them, and
//! the number of layers that they cover.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lapidary::backend::cpu::{self, Bindings, KvCaches, Program};
use lapidary::graph::Graph;
use lapidary::interface::Role;
use lapidary::lower::{LowerOptions, QuantizedForm, lower};
use lapidary::network::{LayerKind, Network, Profile, WeightMode, parse, verify};
use lapidary::passes::{CanonicalizeOptions, canonicalize};
use lapidary::tensor::DType;

const CAPACITY: usize = 32;
const PROMPT: [i32; 7] = [3, 41, 17, 8, 29, 36, 5];
const STEPS: [i32; 2] = [11, 42];

/// Folders with an export below `fixtures`; `LAPIDARY_EXPORT` keeps those whose name contains it.
fn exports() -> Vec<PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let wanted = std::env::var("LAPIDARY_EXPORT").unwrap_or_default();
    let folders = ["exports", "families", "experts"].map(|group| std::fs::read_dir(fixtures.join(group)).unwrap());
    let mut found: Vec<PathBuf> = folders
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect();
    // Two exports of families that every exporter has.
    let others = ["dynamo-dynamiccache", "static", "dynamo-opset18", "mobius", "fp16"];
    found.retain(|folder| {
        let name = folder.to_string_lossy();
        let listed = !name.contains("fixtures/exports") || !others.iter().any(|other| name.contains(other));
        folder.join("model.onnx").exists() && name.contains(&wanted) && (listed || !wanted.is_empty())
    });
    found.sort();
    found
}

pub fn with_kernels() -> LowerOptions {
    LowerOptions {
        kernels: true,
        ..LowerOptions::default()
    }
}

/// The logits of the last of `tokens`, after `past` others.
fn step(graph: &Graph, options: &LowerOptions, caches: &mut Option<KvCaches>, past: usize, tokens: &[i32]) -> Vec<f32> {
    let network = lower(graph, &Profile::prefill(tokens.len(), CAPACITY), options).unwrap();
    let mut program = Program::compile(&network, &cpu::CompileOptions::default()).unwrap();
    let caches = caches.get_or_insert_with(|| KvCaches::new(&network).unwrap());
    let interface = network.interface.as_ref().unwrap();
    let vocabulary = network.tensor(interface.logits()).shape[2].as_const().unwrap() as usize;
    let mut logits = vec![0f32; vocabulary];
    let positions: Vec<i32> = (past..past + tokens.len()).map(|p| p as i32).collect();
    let (at, last, total) = ([past as i32], [tokens.len() as i32 - 1], [(past + tokens.len()) as i32]);
    let mut bindings = Bindings::new();
    bindings
        .input(Role::TokenIds, tokens)
        .input(Role::PositionIds, &positions[..])
        .input(Role::WriteIndices, &at[..])
        .input(Role::LogitRows, &last[..])
        .caches(caches)
        .output(Role::Logits, &mut logits[..]);
    if interface.input(Role::TotalLengths).is_some() {
        bindings.input(Role::TotalLengths, &total[..]);
    }
    program.run(&mut bindings).unwrap();
    drop(bindings);
    logits
}

/// The logits of every step after the prompt, which is always computed without kernels.
fn decoded(graph: &Graph, options: &LowerOptions) -> Vec<Vec<f32>> {
    let mut caches = None;
    step(graph, &LowerOptions::default(), &mut caches, 0, &PROMPT);
    let steps = STEPS.iter().enumerate();
    steps
        .map(|(i, token)| step(graph, options, &mut caches, PROMPT.len() + i, &[*token]))
        .collect()
}

/// Number of layers of each relevant kind.
fn count(network: &Network) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    for layer in &network.layers {
        let kind = match layer.kind {
            LayerKind::MatrixMultiply { .. } | LayerKind::Attention | LayerKind::RotaryEmbedding { .. } => "TensorRT",
            LayerKind::RowProduct(_) => "products",
            LayerKind::DecodeAttention(_) => "attentions",
            _ => continue,
        };
        *counts.entry(kind).or_insert(0) += 1;
    }
    counts
}

fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

#[test]
fn every_export_decodes_the_same_with_kernels() {
    for folder in exports() {
        let name = folder.file_name().unwrap().to_string_lossy();
        let options = CanonicalizeOptions {
            max_positions: 64,
            dtype: Some(DType::F16),
            ..CanonicalizeOptions::default()
        };
        let export = lapidary::onnx::read(folder.join("model.onnx")).unwrap();
        let graph = canonicalize(export, &options)
            .unwrap_or_else(|error| panic!("{name}: {error}"))
            .graph;
        let network = lower(&graph, &Profile::decode(CAPACITY), &with_kernels()).unwrap();
        let counts = count(&network);
        if ["llama", "mistral", "qwen2-", "qwen3-", "dynamo18-gemma2"]
            .iter()
            .any(|all| name.starts_with(all))
        {
            // Of each of two layers q, k and v; output; gate and up; down; and the logits.
            assert_eq!(counts, BTreeMap::from([("attentions", 2), ("products", 9)]), "{name}");
        }
        let plain = decoded(&graph, &LowerOptions::default());
        let kernels = decoded(&graph, &with_kernels());
        let worst = worst(&plain, &kernels);
        assert!(worst < 2e-2, "{name}: {counts:?}, {worst:e}");
        // The text of such a network can be read back.
        let text = network.to_string();
        let read = parse(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        verify(&read).unwrap();
        assert_eq!(read.to_string(), text, "{name}");
    }
}

/// Prompts of three sequences, and how many of their tokens count.
const PROMPTS: [([i32; 7], usize); 3] = [
    (PROMPT, 7),
    ([9, 9, 30, 1, 12, 25, 40], 3),
    ([20, 6, 33, 18, 2, 27, 11], 5),
];

/// One call of a network for several sequences: the logits of each.
fn call(
    network: &Network,
    caches: &mut KvCaches,
    tokens: &[i32],
    positions: &[i32],
    at: &[i32],
    last: &[i32],
) -> Vec<Vec<f32>> {
    let mut program = Program::compile(network, &cpu::CompileOptions::default()).unwrap();
    let interface = network.interface.as_ref().unwrap();
    let vocabulary = network.tensor(interface.logits()).shape[2].as_const().unwrap() as usize;
    let mut logits = vec![0f32; vocabulary * at.len()];
    let mut bindings = Bindings::new();
    bindings
        .input(Role::TokenIds, tokens)
        .input(Role::PositionIds, positions)
        .input(Role::WriteIndices, at)
        .input(Role::LogitRows, last)
        .caches(caches)
        .output(Role::Logits, &mut logits[..]);
    program.run(&mut bindings).unwrap();
    drop(bindings);
    logits.chunks(vocabulary).map(<[f32]>::to_vec).collect()
}

/// The logits of a step of these sequences, after their prompts.
fn step_of_batch(graph: &Graph, sequences: &[usize]) -> (Network, Vec<Vec<f32>>) {
    let batch = sequences.len();
    let profile = |tokens| Profile {
        batch,
        ..Profile::prefill(tokens, CAPACITY)
    };
    let prefill = lower(graph, &profile(PROMPT.len()), &LowerOptions::default()).unwrap();
    let mut caches = KvCaches::new(&prefill).unwrap();
    let prompts: Vec<i32> = sequences.iter().flat_map(|s| PROMPTS[*s].0).collect();
    let positions: Vec<i32> = sequences.iter().flat_map(|_| 0..PROMPT.len() as i32).collect();
    call(
        &prefill,
        &mut caches,
        &prompts,
        &positions,
        &vec![0; batch],
        &vec![0; batch],
    );
    let decode = lower(graph, &profile(1), &with_kernels()).unwrap();
    let tokens: Vec<i32> = sequences.iter().map(|s| 5 + *s as i32).collect();
    let at: Vec<i32> = sequences.iter().map(|s| PROMPTS[*s].1 as i32).collect();
    let logits = call(&decode, &mut caches, &tokens, &at, &at, &vec![0; batch]);
    (decode, logits)
}

/// The network of a batch engine: kernels for all products and attentions, and independent sequences.
#[test]
fn sequences_of_a_batch_get_what_they_get_alone() {
    for name in ["llama-optimum", "qwen3-optimum", "gpt2-optimum"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/exports")
            .join(name);
        let options = CanonicalizeOptions {
            max_positions: 64,
            dtype: Some(DType::F16),
            ..CanonicalizeOptions::default()
        };
        let export = lapidary::onnx::read(folder.join("model.onnx")).unwrap();
        let graph = canonicalize(export, &options).unwrap().graph;
        let (network, together) = step_of_batch(&graph, &[0, 1, 2]);
        for (sequence, logits) in together.iter().enumerate() {
            let (_, alone) = step_of_batch(&graph, &[sequence]);
            let worst = worst(std::slice::from_ref(logits), &alone);
            assert!(worst < 2e-3, "{name} {sequence}: {worst:e}");
        }
        // TensorRT computes layer norms, and may order their sums by the number of rows.
        let across = network.layer_across_sequences().map(|layer| layer.kind.name());
        match name {
            "gpt2-optimum" => assert!(across.is_some()),
            _ => assert_eq!(across, None, "{name}"),
        }
    }
}

/// A graph in fp16 whose matrices have codes, head and embedding included.
fn quantized(export: &str, format: &str) -> Graph {
    let options = CanonicalizeOptions {
        max_positions: 64,
        dtype: Some(DType::F16),
        ..CanonicalizeOptions::default()
    };
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures/exports")
        .join(export);
    let mut graph = canonicalize(lapidary::onnx::read(path.join("model.onnx")).unwrap(), &options)
        .unwrap()
        .graph;
    let quantization = format!("{format},keep=none").parse().unwrap();
    lapidary::quantize::quantize(&mut graph, &quantization, None).unwrap();
    graph
}

/// A head and an embedding of one matrix are read by a kernel as codes and by a gather as bytes, in one network.
#[test]
fn codes_decode_the_same_with_kernels() {
    let formats = [
        "int4",
        "int4,asymmetric",
        "int8",
        "int8,asymmetric",
        "int8,group=channel",
    ];
    for export in ["llama-optimum", "qwen3-optimum", "gpt2-optimum"] {
        for format in formats {
            let graph = quantized(export, format);
            let plain = decoded(&graph, &LowerOptions::default());
            for form in [QuantizedForm::Elementwise, QuantizedForm::DequantizeApart] {
                let options = LowerOptions {
                    weight_mode: WeightMode::Bind,
                    quantized: form,
                    ..with_kernels()
                };
                let network = lower(&graph, &Profile::decode(CAPACITY), &options)
                    .unwrap_or_else(|error| panic!("{export}, {format}: {error}"));
                let counts = count(&network);
                assert!(counts["products"] >= 5, "{export}, {format}: {counts:?}");
                let worst = worst(&plain, &decoded(&graph, &options));
                assert!(worst < 2e-2, "{export}, {format}: {counts:?}, {worst:e}");
            }
        }
    }
}
