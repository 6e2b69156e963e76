//! Real TensorRT-RTX builds, with no GPU and no driver. They need the library: `source scripts/setup.sh tensorrt`.
//! Compiled for full TensorRT, only tests without the library run, since it cannot build without a GPU.
#![cfg(feature = "engines")]

#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/cancel.rs"]
mod cancel;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/dynamic.rs"]
mod dynamic;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/experts.rs"]
mod experts;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/exports.rs"]
mod exports;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/layers.rs"]
mod layers;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/library.rs"]
mod library;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/llama.rs"]
mod llama;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/models.rs"]
mod models;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/net.rs"]
mod net;
#[path = "tensorrt/no_library.rs"]
mod no_library;
#[cfg(not(feature = "tensorrt"))]
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/quantized.rs"]
mod quantized;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/refusals.rs"]
mod refusals;
#[cfg(not(feature = "tensorrt"))]
#[path = "support/rounded.rs"]
mod rounded;
#[cfg(not(feature = "tensorrt"))]
#[path = "tensorrt/weights.rs"]
mod weights;
