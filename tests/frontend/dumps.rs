//! The text form of whole graphs, typed. A change here means that the reader, inference or the text form changed.

use std::path::Path;

use lapidary::graph::{dump, infer};
use lapidary::onnx;

fn text(export: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/exports/{export}/model.onnx"));
    let mut graph = onnx::read(path).unwrap();
    infer(&mut graph).unwrap();
    dump(&graph).to_string()
}

#[test]
fn ort_genai() {
    insta::assert_snapshot!("ort-genai", text("llama-ort-genai"));
}

#[test]
fn mobius_static() {
    insta::assert_snapshot!("mobius-static", text("llama-mobius-static"));
}

#[test]
fn dynamo_opset_23() {
    insta::assert_snapshot!("dynamo-opset23", text("llama-dynamo-opset23"));
}
