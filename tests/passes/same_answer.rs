//! `inspect` and `convert` agree: a graph that one refuses, the other refuses with the same message.

use std::path::Path;

use lapidary::convert::{ConvertError, ConvertOptions, convert, examine, find_model};
use lapidary::dim::Dim;
use lapidary::graph::op::{Binary, Op, Unary};
use lapidary::graph::{Graph, infer};
use lapidary::help::{Fault, Help};
use lapidary::spec::{Conversion, Spec};
use lapidary::tensor::DType;

use crate::canonical::exports;
use crate::refusals::{export, nodes};

fn conversion() -> Conversion {
    Spec::parse("capacity: [32]").unwrap().resolve().unwrap()
}

/// Converts the model at `path` into `folder`, and compares with an inspection. Returns whether it was refused.
fn compare(path: &Path, folder: &Path) -> Result<bool, String> {
    let Ok(mut graph) = lapidary::onnx::read(path) else {
        return Ok(true);
    };
    let converted = convert(path, &folder.join("pkg"), conversion(), &ConvertOptions::default());
    let _ = std::fs::remove_dir_all(folder.join("pkg"));
    let error = converted.err();
    if let Some(error) = &error
        && error.fault() == Fault::Bug
    {
        return Err(format!("a bug in Lapidary: {error}"));
    }
    if graph.sort().is_err() {
        return error.map(|_| true).ok_or("a cycle was converted".into());
    }
    let found = examine(&find_model(path, None).unwrap(), &graph, &conversion());
    match error {
        None if found.reasons.is_empty() => Ok(false),
        None => Err(format!("converted, but: {:?}", found.reasons)),
        // Invalid weights are not a property of the graph.
        Some(ConvertError::Numbers { .. }) => Ok(true),
        Some(error) if found.reasons.is_empty() => Err(format!("refused by convert alone: {error}")),
        Some(error) => {
            let text = error.to_string();
            let said = |reason: &&String| text.contains(reason.strip_prefix("model: ").unwrap_or(reason));
            match found.reasons.iter().take(8).find(|reason| !said(reason)) {
                None if found.help == error.help() || error.help().is_some_and(|h| h.contains("inspect")) => Ok(true),
                None => Err(format!("help {:?} and {:?}", found.help, error.help())),
                Some(reason) => Err(format!("inspect: {reason}\nconvert: {text}")),
            }
        }
    }
}

fn check_all(models: impl IntoIterator<Item = (String, Result<bool, String>)>) -> usize {
    let (mut refused, mut failed) = (0, Vec::new());
    for (name, result) in models {
        match result {
            Ok(was) => refused += usize::from(was),
            Err(problem) => failed.push(format!("{name}: {problem}")),
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    refused
}

#[test]
fn on_the_fixtures() {
    let folder = tempfile::tempdir().unwrap();
    let bad = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/bad");
    let bad = std::fs::read_dir(bad).unwrap().map(|entry| entry.unwrap().path());
    let bad = bad.map(|path| if path.is_dir() { path.join("model.onnx") } else { path });
    let good = exports().into_iter().map(|export| export.path);
    let compared = good
        .chain(bad)
        .map(|path| (path.display().to_string(), compare(&path, folder.path())));
    assert!(check_all(compared) > 10);
}

/// Exports with one thing changed, each in a way that stops the passes somewhere else or not at all.
#[test]
fn on_edited_exports() {
    let dims = |name: &'static str, to: Dim| {
        move |graph: &mut Graph| {
            for id in graph.inputs.clone() {
                let mut shape = graph.shape(id).cloned().unwrap();
                for dim in shape.iter_mut().filter(|dim| **dim == Dim::named(name)) {
                    *dim = to.clone();
                }
                graph.value_mut(id).shape = Some(shape);
            }
        }
    };
    let each = |wanted: fn(&Op) -> bool, to: Op| {
        move |graph: &mut Graph| {
            for id in nodes(graph, wanted) {
                graph.node_mut(id).op = to.clone();
            }
        }
    };
    type Edit = Box<dyn Fn(&mut Graph)>;
    let edits: Vec<(&str, Edit)> = vec![
        ("nothing", Box::new(|_| {})),
        ("batch 1", Box::new(dims("batch_size", Dim::from(1usize)))),
        ("batch 2", Box::new(dims("batch_size", Dim::from(2usize)))),
        ("batch 99", Box::new(dims("batch_size", Dim::from(99usize)))),
        ("one token", Box::new(dims("sequence_length", Dim::from(1usize)))),
        ("seven tokens", Box::new(dims("sequence_length", Dim::from(7usize)))),
        ("fixed past", Box::new(dims("past_sequence_length", Dim::from(7usize)))),
        (
            "past named as tokens",
            Box::new(dims("past_sequence_length", Dim::named("sequence_length"))),
        ),
        (
            "batch named as tokens",
            Box::new(dims("batch_size", Dim::named("sequence_length"))),
        ),
        (
            "no activation",
            Box::new(each(
                |op| matches!(op, Op::Unary(Unary::Sigmoid)),
                Op::Unary(Unary::Floor),
            )),
        ),
        (
            "future visible",
            Box::new(each(
                |op| matches!(op, Op::Binary(Binary::LessOrEqual)),
                Op::Binary(Binary::GreaterOrEqual),
            )),
        ),
        (
            "softmax over queries",
            Box::new(each(|op| matches!(op, Op::Softmax { .. }), Op::Softmax { axis: -2 })),
        ),
        (
            "no logits",
            Box::new(|graph| graph.outputs = graph.outputs.split_off(1)),
        ),
        ("no caches out", Box::new(|graph| graph.outputs.truncate(1))),
        ("logits twice", Box::new(|graph| graph.outputs.push(graph.outputs[0]))),
        (
            "another output",
            Box::new(|graph| {
                let logits = graph.outputs[0];
                let other = graph.add_node("other", Op::Unary(Unary::Tanh), &[logits]);
                graph.outputs.push(other);
            }),
        ),
        (
            "fixed sizes in a reshape",
            Box::new(|graph| {
                let logits = graph.outputs[0];
                let name = graph.value(logits).name.clone();
                graph.rename(logits, "logits.flat");
                let target = graph.add_i64("baked", &[1, 7, 97]);
                graph.outputs[0] = graph.add_node("reshaped", Op::Reshape { allowzero: false }, &[logits, target]);
                let shaped = graph.outputs[0];
                graph.rename(shaped, &name);
            }),
        ),
    ];
    let folder = tempfile::tempdir().unwrap();
    let mut results = Vec::new();
    for base in ["llama-optimum", "gpt2-optimum"] {
        for (i, (name, edit)) in edits.iter().enumerate() {
            let mut graph = export(base);
            edit(&mut graph);
            // A file declares its outputs.
            let _ = infer(&mut graph);
            for id in graph.outputs.clone() {
                let value = graph.value_mut(id);
                value.dtype = value.dtype.or(Some(DType::F32));
                value.shape.get_or_insert_with(|| vec![Dim::named("any"); 3]);
            }
            let path = folder.path().join(format!("{base}-{i}.onnx"));
            lapidary::onnx::write_with_data(&graph, &path).unwrap_or_else(|e| panic!("{name}: {e}"));
            results.push((format!("{base}, {name}"), compare(&path, folder.path())));
        }
    }
    assert!(check_all(results) > 20);
}

/// Random changes of a model's bytes, if it can still be read.
#[test]
fn on_damaged_exports() {
    let folder = tempfile::tempdir().unwrap();
    let mut results = Vec::new();
    for base in ["fixtures/exports/llama-mobius-static", "fixtures/exports/qwen2-mobius"] {
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join(base);
        let original = std::fs::read(base.join("model.onnx")).unwrap();
        let data = base.join("model.onnx.data");
        if data.exists() {
            std::fs::copy(&data, folder.path().join("model.onnx.data")).unwrap();
        }
        let mut state = 0x2545_F491_4F6C_DD1Du64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 33) as usize
        };
        for case in 0..30 {
            let mut bytes = original.clone();
            for _ in 0..1 + random() % 3 {
                let at = random() % bytes.len();
                bytes[at] ^= 1 << (random() % 8);
            }
            let name = base.file_name().unwrap().to_string_lossy().into_owned();
            let path = folder.path().join(format!("{name}-{case}.onnx"));
            std::fs::write(&path, &bytes).unwrap();
            results.push((format!("{name} {case}"), compare(&path, folder.path())));
        }
    }
    let refused = check_all(results);
    assert!(refused > 5, "{refused}");
}
