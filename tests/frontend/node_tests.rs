//! Inference and the writer on the ONNX project's node tests: every operator, in every form of the specification.
//!
//! A case's inputs become initializers of its model. The inferred types, and the inferred elements of small tensors,
//! must equal those of the case's outputs, and the node must be unchanged after being written and read again.

use std::fs;
use std::path::Path;

use lapidary::dim::Dim;
use lapidary::graph::{Graph, Op, dump, infer, verify};
use lapidary::onnx;
use lapidary::onnx::proto::{ModelProto, TensorProto};
use prost::Message;

use crate::node_case::{each_case, model};

/// The model with inputs and expected outputs (`expected.N`) as initializers.
fn with_data(case: &Path) -> ModelProto {
    let mut model = model(case);
    let graph = model.graph.as_mut().unwrap();
    let tensor = |kind: &str, n: usize, name: String| {
        let file = case.join(format!("test_data_set_0/{kind}_{n}.pb"));
        let mut tensor = TensorProto::decode(fs::read(file).unwrap().as_slice()).unwrap();
        tensor.name = Some(name);
        tensor
    };
    for (n, input) in graph.input.iter().enumerate() {
        graph.initializer.push(tensor("input", n, input.name.clone().unwrap()));
    }
    for n in 0..graph.output.len() {
        graph.initializer.push(tensor("output", n, format!("expected.{n}")));
    }
    model
}

fn typed(file: &Path) -> Result<Graph, String> {
    let mut graph = onnx::read(file).map_err(|e| e.to_string())?;
    infer(&mut graph).map_err(|e| e.to_string())?;
    verify(&graph).map_err(|e| e.to_string())?;
    Ok(graph)
}

/// `Ok(false)`: an unsupported attribute.
fn check(case: &Path, scratch: &Path) -> Result<bool, String> {
    let file = scratch.join("model.onnx");
    fs::write(&file, with_data(case).encode_to_vec()).unwrap();
    let mut graph = onnx::read(&file).map_err(|e| e.to_string())?;
    if graph.node_ids().any(|n| matches!(graph.node(n).op, Op::Unknown { .. })) {
        return Ok(false);
    }
    let facts = infer(&mut graph).map_err(|e| e.to_string())?;
    verify(&graph).map_err(|e| e.to_string())?;
    for (n, output) in graph.outputs.iter().enumerate() {
        let expected = graph.find(&format!("expected.{n}")).unwrap();
        let expected = graph.constant(expected).unwrap().materialize().unwrap();
        let value = graph.value(*output);
        if value.dtype != Some(expected.dtype()) {
            return Err(format!("output {n} is {:?}, not {}", value.dtype, expected.dtype()));
        }
        let shape = value.shape.as_ref().ok_or(format!("output {n} has no shape"))?;
        let counted = graph.node_ids().any(|n| matches!(graph.node(n).op, Op::NonZero));
        let wanted: Vec<i64> = expected.shape().iter().map(|d| *d as i64).collect();
        let fits = |(size, wanted): (&Dim, &i64)| match size.as_const() {
            Some(size) => size == *wanted,
            None => counted,
        };
        if shape.len() != wanted.len() || !shape.iter().zip(&wanted).all(fits) {
            return Err(format!("output {n} is {shape:?}, not {wanted:?}"));
        }
        if let Some(elements) = facts.contents(*output).and_then(|c| c.as_consts())
            && elements.iter().map(|e| *e as f64).ne(expected.to_f64())
        {
            return Err(format!("output {n} holds {elements:?}, not {:?}", expected.to_f64()));
        }
    }
    let copy = scratch.join("copy.onnx");
    onnx::write(&graph, &copy, None).map_err(|e| e.to_string())?;
    let lines = |graph: &Graph| dump(graph).to_string().lines().skip(1).collect::<Vec<_>>().join("\n");
    let (before, after) = (lines(&graph), lines(&typed(&copy)?));
    if before != after {
        return Err(format!("written:\n{before}\nread:\n{after}"));
    }
    Ok(true)
}

#[test]
fn every_operator_is_typed_and_written() {
    let (mut passed, mut failed) = (0, Vec::new());
    let all = each_case(|name, case, scratch| match check(case, scratch) {
        Ok(known) => passed += usize::from(known),
        Err(error) => failed.push(format!("{name}: {error}")),
    });
    let count = failed.len();
    assert!(failed.is_empty(), "{count} of {all} failed:\n{}", failed.join("\n"));
    assert!(passed >= 400, "only {passed} cases were run");
}
