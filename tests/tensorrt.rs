//! Real TensorRT-RTX builds, with no GPU and no driver. They need the library: `source scripts/setup.sh tensorrt`.
#![cfg(feature = "tensorrt-rtx")]

#[path = "tensorrt/cancel.rs"]
mod cancel;
#[path = "tensorrt/dynamic.rs"]
mod dynamic;
#[path = "tensorrt/exports.rs"]
mod exports;
#[path = "tensorrt/layers.rs"]
mod layers;
#[path = "tensorrt/library.rs"]
mod library;
#[path = "tensorrt/llama.rs"]
mod llama;
#[path = "tensorrt/models.rs"]
mod models;
#[path = "tensorrt/net.rs"]
mod net;
#[path = "tensorrt/refusals.rs"]
mod refusals;
#[path = "tensorrt/weights.rs"]
mod weights;
