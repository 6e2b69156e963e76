//! The CPU executor against simple definitions, on every instruction set of this machine.

#[path = "executor/attention.rs"]
mod attention;
#[path = "executor/batch.rs"]
mod batch;
#[path = "executor/bindings.rs"]
mod bindings;
#[path = "executor/caches.rs"]
mod caches;
#[path = "executor/experts.rs"]
mod experts;
#[path = "executor/fusion.rs"]
mod fusion;
#[path = "executor/kernel_layers.rs"]
mod kernel_layers;
#[path = "executor/layers.rs"]
mod layers;
#[path = "executor/matmul.rs"]
mod matmul;
#[path = "executor/movement.rs"]
mod movement;
#[path = "support/node_case.rs"]
mod node_case;
#[path = "support/node_tensors.rs"]
mod node_tensors;
#[path = "executor/node_tests.rs"]
mod node_tests;
#[path = "executor/quantized.rs"]
mod quantized;
#[path = "executor/quantized_layers.rs"]
mod quantized_layers;
#[path = "executor/reference.rs"]
mod reference;
#[path = "executor/soundness.rs"]
mod soundness;
#[path = "executor/support.rs"]
mod support;
