//! Passes on real exports: the rewritten graph computes what ONNX Runtime computed from the original, and what should have
//! been recognized was. Passes on small graphs: every spelling, and what must stay.

#[path = "rewrites/exports.rs"]
mod exports;
#[path = "rewrites/norms.rs"]
mod norms;
#[path = "support/replay.rs"]
mod replay;
#[path = "rewrites/small.rs"]
mod small;
#[path = "rewrites/tidy.rs"]
mod tidy;
