//! Runs a [`Network`](crate::network::Network) on the CPU.
//!
//! This is the default on a machine without a GPU, and the oracle of the lowerings' tests. It executes networks with
//! static shapes ([`bind_tokens`] makes one from a dynamic profile) and implements TensorRT's documented meaning of
//! each layer. `decode` does sampling, sessions and the choice of shapes.
//!
//! ```text
//! let program = Program::compile(&network, &CompileOptions::default())?;      // a few ms; weights stay mapped
//! let mut caches = KvCaches::new(&network)?;                             // owned by the session
//! let mut logits = vec![0f32; vocabulary];
//! program.run(
//!     Bindings::new()
//!         .input(Role::TokenIds, &ids[..])                             // i32, [batch, tokens]
//!         .input(Role::PositionIds, &positions[..])
//!         .input(Role::WriteIndices, &[past][..])
//!         .input(Role::LogitRows, &[last][..])
//!         .caches(&mut caches)                                         // updated in place
//!         .output(Role::Logits, &mut logits[..]),
//! )?;
//! caches.grow(1024, live);                                             // then run a program for capacity 1024
//! ```
//!
//! # Arithmetic
//!
//! Floats are f32 in memory and in every operation, whatever the network's dtype: a cast between float dtypes changes
//! nothing. Weights are read in place in their own dtype (f16, bf16, f32), caches are stored in theirs; both are
//! converted inside the kernels. Quantized weights stay codes: products and gathers compute `(code - zero point) *
//! scale` in f32 registers, and activations are not rounded. NaN and infinities behave as in IEEE 754, with `Max` and
//! `Min` propagating NaN. Integers wrap around; an integer division by 0 gives 0. A query that attends to nothing gives
//! zeros (TensorRT does not define it); masked slots must hold finite values, as the canonical graph guarantees.
//! Results do not depend on the number of threads; they differ by rounding between instruction sets.
//!
//! # Modules
//!
//! `compile` turns layers into steps (views, fusion, phases, arena), `program` runs them, alone or several sequences in
//! one pass over the weights ([`Batch`]), `kernels` are the inner loops, `simd` the three instruction sets for which
//! they are compiled, `quantized` the weights that they read as codes, `pool` the threads, `strided_view` and
//! `aligned_bytes` memory as steps see it, `mapped_pages` the release of memory, `kv_cache` the [`KvCaches`] of a
//! session, `bindings` a caller's arguments, `oracle` whole tensors in and out for tests.

mod aligned_bytes;
mod bind_tokens;
mod bindings;
mod compile;
mod error;
mod kernels;
mod kv_cache;
mod mapped_pages;
mod oracle;
mod pool;
mod program;
mod quantized;
mod simd;
mod strided_view;

pub use bind_tokens::bind_tokens;
pub use bindings::{Bindings, Input, Output, PortKey};
pub use compile::CompileOptions;
pub use error::{CpuError, Indexed};
pub use kv_cache::{KvCache, KvCaches};
pub use oracle::execute;
pub use pool::{Pool, available_threads};
pub use program::{Batch, Member, Port, Program, StepTimes};
pub use simd::Isa;
