//! Whole exports, not rewritten, against ONNX Runtime: prefill and eight greedy steps. This tests the reader and the
//! evaluator together.

use super::replay::{exports, replay, unknown_op};

#[test]
fn exports_give_what_onnx_runtime_gives() {
    let (mut failed, mut unknown) = (Vec::new(), Vec::new());
    for folder in exports() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let graph = lapidary::onnx::read(folder.join("model.onnx")).unwrap();
        if let Some(op) = unknown_op(&graph) {
            unknown.push(format!("{name} ({op})"));
        } else if let Err(error) = replay(&folder, &graph) {
            failed.push(format!("{name}: {error}"));
        }
    }
    assert!(failed.is_empty(), "{} failed:\n{}", failed.len(), failed.join("\n"));
    assert!(unknown.len() <= 1, "unknown operators: {unknown:?}");
}
