//! Passes on real exports: the rewritten graph gives ONNX Runtime's results for the original, and all expected patterns
//! were recognized. Passes on small graphs: every spelling, and graphs that must not change.

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
