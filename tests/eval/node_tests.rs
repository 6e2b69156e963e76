//! Every vector of fixtures/onnx-node-tests: read the one-node model, run it, compare all outputs.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use lapidary::graph::Op;
use lapidary::graph::eval::Evaluator;
use lapidary::onnx::proto::ModelProto;
use lapidary::tensor::{DType, Tensor};
use prost::Message;

use crate::node_case::tensors;

/// Attributes and dtypes that are beyond opset 24 or that the reader refuses by design; each a part of a node's name.
fn is_out_of_scope(op: &Op) -> bool {
    let Op::Unknown { op_type, .. } = op else {
        return false;
    };
    [
        // Opset 25.
        "Attention(left_window_size",
        "Attention(right_window_size",
        // What the scores output holds; no exporter asks for it.
        "Attention(qk_matmul_output_mode",
    ]
    .iter()
    .any(|known| op_type.starts_with(known))
}

/// `Ok(false)`: out of scope.
fn run(case: &Path, scratch: &Path) -> Result<bool, String> {
    let mut model = ModelProto::decode(fs::read(case.join("model.onnx")).unwrap().as_slice()).unwrap();
    for opset in &mut model.opset_import {
        // The vectors carry the opset that introduced the op; what Lapidary reads means the same for these.
        opset.version = opset.version.map(|v| v.clamp(14, 24));
    }
    let file = scratch.join("model.onnx");
    fs::write(&file, model.encode_to_vec()).unwrap();
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
        compare(found, wanted).map_err(|e| format!("output {n}: {e}"))?;
    }
    Ok(true)
}

fn compare(found: &Tensor, wanted: &Tensor) -> Result<(), String> {
    if (found.dtype(), found.shape()) != (wanted.dtype(), wanted.shape()) {
        return Err(format!("{found:?} instead of {wanted:?}"));
    }
    // ONNX's own runner allows 1e-3; one unit in the last place or two of the halves.
    let tolerance = match wanted.dtype() {
        DType::F16 => 2e-3,
        DType::Bf16 => 1.6e-2,
        DType::F32 | DType::F64 => 2e-5,
        _ => 0.0,
    };
    for (i, (f, w)) in found.to_f64().into_iter().zip(wanted.to_f64()).enumerate() {
        let equal = f == w || (f.is_nan() && w.is_nan()) || (f - w).abs() <= tolerance * (1.0 + w.abs());
        if !equal {
            return Err(format!("element {i} of {wanted:?} is {f} instead of {w}"));
        }
    }
    Ok(())
}

#[test]
fn node_tests_pass() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx-node-tests");
    let scratch = tempfile::tempdir().unwrap();
    let mut cases: Vec<PathBuf> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    cases.sort();
    let (mut passed, mut skipped, mut failed) = (0, Vec::new(), Vec::new());
    for case in &cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        // A folder of its own: what was read stays mapped, and a mapped file must not be written again.
        let scratch = scratch.path().join(&name);
        fs::create_dir(&scratch).unwrap();
        match run(case, &scratch) {
            Ok(true) => passed += 1,
            Ok(false) => skipped.push(name),
            Err(error) => failed.push(format!("{name}: {error}")),
        }
    }
    println!("{passed} passed, {} out of scope: {}", skipped.len(), skipped.join(" "));
    assert!(
        failed.is_empty(),
        "{} of {} failed:\n{}",
        failed.len(),
        cases.len(),
        failed.join("\n")
    );
    // A case that stops being recognised must not go unnoticed.
    assert!(passed >= 400, "only {passed} cases were run");
}
