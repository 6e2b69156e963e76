//! Every vector of fixtures/onnx-node-tests: read the one-node model, run it, compare all outputs.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use lapidary::graph::Op;
use lapidary::graph::eval::Evaluator;
use lapidary::tensor::DType;
use prost::Message;

use crate::node_case::{each_case, model};
use crate::node_tensors::{compare, tensors};

/// Attributes and dtypes that are beyond opset 24 or that the reader refuses by design; each a part of a node's name.
fn is_out_of_scope(op: &Op) -> bool {
    let Op::Unknown { op_type, .. } = op else {
        return false;
    };
    [
        // Opset 25.
        "Attention(left_window_size",
        "Attention(right_window_size",
        // The contents of the scores output; no exporter uses it.
        "Attention(qk_matmul_output_mode",
    ]
    .iter()
    .any(|known| op_type.starts_with(known))
}

/// `Ok(false)`: out of scope.
fn run(case: &Path, scratch: &Path) -> Result<bool, String> {
    let file = scratch.join("model.onnx");
    fs::write(&file, model(case).encode_to_vec()).unwrap();
    let graph = lapidary::onnx::read(&file).map_err(|e| e.to_string())?;
    if graph.node_ids().any(|n| is_out_of_scope(&graph.node(n).op)) {
        return Ok(false);
    }
    let inputs = tensors(case, "input", scratch);
    let wanted = tensors(case, "output", scratch);
    let bindings: HashMap<_, _> = graph.inputs.iter().copied().zip(inputs).collect();
    let found = Evaluator::new(&graph, bindings)
        .values(&graph.outputs)
        .map_err(|e| e.to_string())?;
    if found.len() != wanted.len() {
        return Err(format!("{} outputs, not {}", found.len(), wanted.len()));
    }
    for (n, (found, wanted)) in found.iter().zip(&wanted).enumerate() {
        compare(found, wanted, tolerance).map_err(|e| format!("output {n}: {e}"))?;
    }
    Ok(true)
}

/// ONNX's own runner allows 1e-3; one unit in the last place or two of the halves.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 2e-3,
        DType::Bf16 => 1.6e-2,
        DType::F32 | DType::F64 => 2e-5,
        _ => 0.0,
    }
}

#[test]
fn node_tests_pass() {
    let (mut passed, mut skipped, mut failed) = (0, Vec::new(), Vec::new());
    let all = each_case(|name, case, scratch| match run(case, scratch) {
        Ok(true) => passed += 1,
        Ok(false) => skipped.push(name),
        Err(error) => failed.push(format!("{name}: {error}")),
    });
    println!("{passed} passed, {} out of scope: {}", skipped.len(), skipped.join(" "));
    let count = failed.len();
    assert!(failed.is_empty(), "{count} of {all} failed:\n{}", failed.join("\n"));
    // A case that stops being recognized must not go unnoticed.
    assert!(passed >= 400, "only {passed} cases were run");
}
