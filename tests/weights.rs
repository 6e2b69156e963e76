//! Weights matched by their role, from any source, into packages: the library, and the commands `weights`, `strip` and
//! `refit`.

#[path = "weights/bad.rs"]
mod bad;
#[path = "weights/config.rs"]
mod config;
#[path = "weights/contents.rs"]
mod contents;
#[path = "weights/invariants.rs"]
mod invariants;
#[path = "weights/lora.rs"]
mod lora;
#[path = "weights/modules.rs"]
mod modules;
#[path = "support/nf4.rs"]
mod nf4;
#[path = "weights/quantized.rs"]
mod quantized;
#[path = "weights/quantized_checkpoints.rs"]
mod quantized_checkpoints;
#[path = "weights/read_only.rs"]
mod read_only;
#[path = "weights/refit.rs"]
mod refit;
#[path = "cli/support.rs"]
mod support;
#[cfg(all(feature = "engines", not(feature = "tensorrt")))]
#[path = "weights/workflows.rs"]
mod workflows;
#[path = "weights/written.rs"]
mod written;
