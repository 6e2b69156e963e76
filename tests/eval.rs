//! The evaluator against the ONNX project's node tests, and against ONNX Runtime on whole exports.

#[path = "eval/exports.rs"]
mod exports;
#[path = "support/node_case.rs"]
mod node_case;
#[path = "support/node_tensors.rs"]
mod node_tensors;
#[path = "eval/node_tests.rs"]
mod node_tests;
#[path = "support/replay.rs"]
mod replay;
