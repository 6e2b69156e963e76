//! Exports in floating point that are quantized while they are converted.

#[path = "quantize/act_order.rs"]
mod act_order;
#[path = "quantize/calibrate.rs"]
mod calibrate;
#[path = "quantize/packages.rs"]
mod packages;
#[path = "quantize/refit.rs"]
mod refit;
#[path = "cli/support.rs"]
mod support;
