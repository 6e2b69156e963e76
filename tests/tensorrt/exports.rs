//! Every export under fixtures/exports becomes engines: decode, prefill chunk and dynamic prefill, bound and embedded.
//!
//! Exports of one family have the same weights. If two lower to the same network except for names, one engine is built.

use std::collections::HashSet;
use std::fmt::Write;
use std::path::Path;

use lapidary::dim::Dim;
use lapidary::graph::{Constant, EMBEDDING_TABLE};
use lapidary::interface::Role;
use lapidary::lower::{LowerOptions, lower};
use lapidary::network::{Network, WeightMode};
use lapidary::tensor::DType;
use lapidary::{onnx, passes};

use crate::models::{profiles, try_build};

/// One test per family, so that they run in parallel.
const FAMILIES: [&str; 5] = ["gpt2", "llama", "mistral", "qwen2", "qwen3"];

fn exports() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let folders = entries
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().join("model.onnx").exists());
    let mut names: Vec<String> = folders.map(|e| e.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// The parts of a network that TensorRT gets, without names: layers, types, and dtypes and shapes of weights.
fn structure(network: &Network) -> String {
    let mut text = format!("{}\n{:?} {:?}\n", network.profile, network.inputs, network.outputs);
    for tensor in &network.tensors {
        writeln!(text, "{} {:?}", tensor.dtype, tensor.shape).unwrap();
    }
    for layer in &network.layers {
        writeln!(text, "{:?} {:?} {:?}", layer.kind, layer.inputs, layer.outputs).unwrap();
    }
    for weight in &network.weights {
        let constant = &weight.constant;
        writeln!(text, "{:?} {} {:?}", weight.mode, constant.dtype(), constant.shape()).unwrap();
    }
    text
}

fn family_builds(family: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports");
    let of_family = |name: &String| name.split('-').next() == Some(family);
    let names: Vec<String> = exports().into_iter().filter(of_family).collect();
    assert!(names.len() >= 5, "{family}: {names:?}");
    let (mut failed, mut built, mut repeated) = (Vec::new(), HashSet::new(), 0);
    for name in names {
        let model = folder.join(&name).join("model.onnx");
        let graph = onnx::read(&model).unwrap_or_else(|error| panic!("{error}"));
        let options = passes::CanonicalizeOptions {
            max_positions: 64,
            ..Default::default()
        };
        let canonical = match passes::canonicalize(graph, &options) {
            Ok(canonical) => canonical.graph,
            Err(error) => {
                failed.push(format!("{name}: {error}"));
                continue;
            }
        };
        for weight_mode in [WeightMode::Bind, WeightMode::Embed] {
            let options = LowerOptions {
                weight_mode,
                ..LowerOptions::default()
            };
            // Logits of every token are for `verify`, on the CPU; the models' tests build them.
            for profile in &profiles(32)[..3] {
                if let Ok(network) = lower(&canonical, profile, &options)
                    && !built.insert(structure(&network))
                {
                    repeated += 1;
                    continue;
                }
                if let Err(error) = try_build(&canonical, profile, &options) {
                    failed.push(format!("{name} {error}"));
                }
            }
        }
    }
    println!("{family}: {} engines, {repeated} networks like another", built.len());
    assert!(failed.is_empty(), "{} failures:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn no_export_is_left_out() {
    for name in exports() {
        let family = name.split('-').next().unwrap();
        assert!(FAMILIES.contains(&family), "{name} has no test: add its family");
    }
}

#[test]
fn gpt2_exports_build() {
    family_builds("gpt2");
}

#[test]
fn llama_exports_build() {
    family_builds("llama");
}

#[test]
fn mistral_exports_build() {
    family_builds("mistral");
}

#[test]
fn qwen2_exports_build() {
    family_builds("qwen2");
}

#[test]
fn qwen3_exports_build() {
    family_builds("qwen3");
}

/// A decoder that takes embeddings, with and without half types, as in a multimodal model's folder.
#[test]
fn a_decoder_of_embeddings_builds() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports/llama-optimum/model.onnx");
    for dtype in [None, Some(DType::F16)] {
        let mut graph = onnx::read(&model).unwrap();
        let ids = graph.find("input_ids").unwrap();
        let gather = graph
            .node_ids()
            .find(|id| graph.node(*id).inputs.contains(&Some(ids)))
            .unwrap();
        let embedded = graph.node(gather).output(0).unwrap();
        let shape = ["batch_size", "sequence_length", "32"].map(Dim::parse).to_vec();
        let embeddings = graph.add_input("inputs_embeds", DType::F32, shape);
        graph.replace_uses(embedded, embeddings);
        graph.inputs.retain(|id| *id != ids);
        let options = passes::CanonicalizeOptions {
            max_positions: 64,
            dtype,
            ..Default::default()
        };
        let mut canonical = passes::canonicalize(graph, &options).unwrap().graph;
        canonical.set_embedding(Constant::absent(dtype.unwrap_or(DType::F32), vec![97, 32]));
        for profile in &profiles(32) {
            let network = lower(&canonical, profile, &LowerOptions::for_engines()).unwrap();
            let interface = network.interface.as_ref().unwrap();
            let port = network.tensor(interface.input(Role::Embeddings).unwrap());
            assert_eq!(port.dtype, dtype.unwrap_or(DType::F32));
            assert!(network.weights.iter().all(|weight| weight.name != EMBEDDING_TABLE));
            try_build(&canonical, profile, &LowerOptions::for_engines()).unwrap();
        }
    }
}
