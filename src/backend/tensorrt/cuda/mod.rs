//! The CUDA driver, libcuda: its GPUs, and its objects, which are released when they are dropped.
//!
//! `driver` checks whether there is a driver and which GPUs it has; it works without a context and is compiled into
//! every binary. `context` opens the first GPU, `memory` allocates on it and in page-locked host memory, `stream`
//! queues copies and marks time, `graph` records queued work and launches it again as a whole. Everything belongs to
//! the first GPU and to one thread, because TensorRT's engines cannot move between threads. `run` decides what is
//! computed.

#[cfg(feature = "engines")]
mod context;
pub(super) mod driver;
#[cfg(feature = "engines")]
mod graph;
#[cfg(feature = "engines")]
mod memory;
#[cfg(feature = "engines")]
mod stream;

#[cfg(feature = "engines")]
pub use context::Cuda;
#[cfg(feature = "engines")]
pub(super) use context::failed;
#[cfg(feature = "engines")]
pub(super) use graph::Graph;
#[cfg(feature = "engines")]
pub use memory::{Buffer, Pinned, Rows};
#[cfg(feature = "engines")]
pub use stream::{Event, Stream};
