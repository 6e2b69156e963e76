//! The cases of ONNX's node tests (fixtures/onnx-node-tests): a one-node model each, with inputs and outputs.

use std::fs;
use std::path::{Path, PathBuf};

use lapidary::onnx::proto::ModelProto;
use prost::Message;

/// Calls `check` with the name of each case, its folder, and an empty folder for files: a file that was read stays
/// mapped and must not be overwritten. Returns the number of cases.
pub fn each_case(mut check: impl FnMut(String, &Path, &Path)) -> usize {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/onnx-node-tests");
    let mut cases: Vec<PathBuf> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|p| p.is_dir())
        .collect();
    cases.sort();
    let scratch = tempfile::tempdir().unwrap();
    for case in &cases {
        let name = case.file_name().unwrap().to_string_lossy().into_owned();
        let scratch = scratch.path().join(&name);
        fs::create_dir(&scratch).unwrap();
        check(name, case, &scratch);
    }
    cases.len()
}

/// A case's model. Its opset is the one that introduced its operator, which has the same meaning in the nearest
/// supported one.
pub fn model(case: &Path) -> ModelProto {
    let mut model = ModelProto::decode(fs::read(case.join("model.onnx")).unwrap().as_slice()).unwrap();
    for opset in &mut model.opset_import {
        opset.version = opset.version.map(|v| v.clamp(14, 24));
    }
    model
}
