//! Lapidary cuts ONNX language models into TensorRT engines, layer by layer.
//!
//! Data flows one way, and each level knows only those before it:
//!
//! 1. [`onnx`] reads an export into a [`graph::Graph`]: typed ONNX operators over symbolic dims.
//! 2. [`passes`] rewrite it into the canonical graph: static KV cache, fused normalization, rotary embedding, attention.
//! 3. [`lower`] turns the canonical graph into a [`network::Network`]: TensorRT layers as plain data, for one profile.
//! 4. [`backend`] builds TensorRT engines from a network, or executes it on the CPU.
//!    `tune` times lowerings on the GPU at hand.
//! 5. [`package`] keeps graph, weights, engines and tokenizer on disk; [`decode`] generates from it.
//! 6. [`bench`] measures that, and [`report`] makes tables, plots and text of what was measured.

pub mod backend;
pub mod bench;
pub mod cli;
pub mod decode;
pub mod dim;
pub mod graph;
pub mod lower;
pub mod network;
pub mod onnx;
pub mod package;
pub mod passes;
pub mod report;
pub mod sample;
pub mod spec;
pub mod tensor;
pub mod tune;
pub mod weights;
