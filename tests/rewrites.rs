//! Passes on real exports: the rewritten graph computes what ONNX Runtime computed from the original, and what should have
//! been recognised was.

#[path = "rewrites/exports.rs"]
mod exports;
#[path = "support/replay.rs"]
mod replay;
