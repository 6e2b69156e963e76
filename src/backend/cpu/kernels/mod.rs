//! The inner loops. Each takes raw pointers, computes one part of a step (an *item*), and neither allocates nor
//! synchronizes. They run through [`Isa::run`](super::simd::Isa::run), under the contract of
//! [`Kernel`](super::simd::Kernel).
//!
//! # Why their pointers are valid
//!
//! A kernel cannot check its pointers; `program::run` builds it from a step of `compile`, and it relies on this:
//!
//! - Every view is inside its buffer: `compile` verifies the network first, derives every view from the dense view of a
//!   whole buffer by the rules of `strided_view`, and the shapes of a step's views agree with one another.
//! - A buffer has the bytes that its view requires: the arena and scratch are allocated for them, weights and constants
//!   are tensors whose bytes match their shape, and the caller's bindings are checked against the program's ports.
//! - Items of one step write different elements. Steps of one phase also write different elements, and read no buffer
//!   that another of them writes (`compile::schedule`). Phases are separated by a barrier.
//! - Memory of weights, constants and the caller's inputs is only read. It carries **no alignment promise** (a mapped file
//!   puts tensors anywhere), so it is read with unaligned loads. The arena, scratch and the caller's outputs are aligned
//!   for their elements.
//! - Indices computed by a run are checked where they are used ([`moves`]).

pub(super) mod attention;
mod codes;
pub(super) mod experts;
pub(super) mod gemm;
pub(super) mod gemv;
mod math;
pub(super) mod moves;
pub(super) mod quantized;
pub(super) mod quantized_gemm;
pub(super) mod quantized_gemv;
pub(super) mod rows;
