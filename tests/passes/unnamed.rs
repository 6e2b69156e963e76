//! Inputs whose names say nothing are matched by what the graph does with them.

use lapidary::graph::{Graph, dump};
use lapidary::passes::{CanonicalizeOptions, canonicalize};

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
        // Of each exporter's ways of giving positions, masks and lengths.
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
