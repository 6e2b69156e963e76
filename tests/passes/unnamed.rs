//! Names of inputs and labels of dims are ignored: inputs are matched by their use in the graph.

use std::collections::HashMap;

use lapidary::graph::{Graph, dump};
use lapidary::onnx::proto::ModelProto;
use lapidary::passes::{CanonicalizeOptions, canonicalize};

use prost::Message;

use crate::canonical::exports;

/// The inputs are `arg0`, `arg1` and so on from here on.
fn unnamed(mut graph: Graph) -> Graph {
    for (i, id) in graph.inputs.clone().into_iter().enumerate() {
        let name = graph.fresh_name(&format!("arg{i}"));
        graph.rename(id, &name);
    }
    graph
}

fn canonical(graph: Graph) -> Result<String, String> {
    let options = CanonicalizeOptions {
        max_positions: 32,
        ..CanonicalizeOptions::default()
    };
    let made = canonicalize(graph, &options).map_err(|error| error.to_string())?;
    Ok(dump(&made.graph).to_string())
}

#[test]
fn names_of_inputs_change_nothing() {
    let mut failed = Vec::new();
    let mut count = 0;
    for export in exports() {
        // One of each exporter's forms of positions, masks and lengths.
        let kinds = [
            "llama-optimum",
            "llama-dynamo",
            "llama-torchscript",
            "gpt2-optimum",
            "gpt2-dynamo-opset18",
        ];
        let others = ["llama-ort-genai", "llama-mobius", "qwen3-optimum"];
        if !kinds.iter().chain(&others).any(|kind| export.name.starts_with(kind)) || export.name.ends_with("fp16") {
            continue;
        }
        count += 1;
        let expected = canonical(export.read()).unwrap_or_else(|error| panic!("{}: {error}", export.name));
        match canonical(unnamed(export.read())) {
            Ok(text) if text == expected => {}
            Ok(_) => failed.push(format!("{}: another graph", export.name)),
            Err(error) => failed.push(format!("{}: {error}", export.name)),
        }
    }
    assert!(count >= 10, "{count}");
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// In ONNX a label may be any text, even a number or a formula: the graph is the same.
#[test]
fn labels_that_look_like_numbers_are_labels() {
    let export = exports().into_iter().find(|export| export.name == "llama-optimum");
    let export = export.expect("the fixture is there");
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/exports/llama-optimum/model.onnx");
    let mut model = ModelProto::decode(&std::fs::read(path).unwrap()[..]).unwrap();
    let odd = ["7", "x.1", "2*3", "dim 2", "-1"];
    let mut renamed: HashMap<String, &str> = HashMap::new();
    for input in &mut model.graph.as_mut().unwrap().input {
        let tensor = input.r#type.as_mut().unwrap().tensor_type.as_mut().unwrap();
        for dim in tensor.shape.iter_mut().flat_map(|shape| &mut shape.dim) {
            let Some(label) = dim.dim_param.clone() else { continue };
            let next = odd[renamed.len() % odd.len()];
            dim.dim_param = Some((*renamed.entry(label).or_insert(next)).to_string());
        }
    }
    assert!(renamed.len() >= 4, "{renamed:?}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    let found = canonical(lapidary::onnx::read(&path).unwrap());
    assert_eq!(found, canonical(export.read()));
}
