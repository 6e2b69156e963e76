//! The inner loops. Each takes raw pointers that the compiler (`super::compile`) has proven to lie inside their
//! buffers, does its share of a step (an *item*), and neither allocates nor synchronises. They run through
//! [`Isa::run`](super::simd::Isa::run), under the contract of [`Kernel`](super::simd::Kernel).

pub mod attention;
pub mod gemm;
pub mod gemv;
pub mod math;
pub mod moves;
pub mod rows;
