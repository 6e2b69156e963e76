//! ONNX files in and out.
//!
//! Owns the protobuf messages ([`proto`]), the encodings of tensors, external data, and the operators of opsets 11 to 25 and of
//! ONNX Runtime's contrib domain. [`read`] maps a file and returns a [`Graph`](crate::graph::Graph): weights
//! are slices of the mapped files, nodes are in their opset-24 form (`graph::op`), model-local functions are inlined, and
//! unknown operators are kept as `Op::Unknown`. [`write()`] and [`write_with_data`] write opset 24 and IR 11.
//! [`exporter`] identifies the exporter of a file.
//!
//! Left to others: dtypes and shapes (`graph::infer`), the rules of a graph (`graph::verify`), patterns (`passes`).

mod attributes;
mod error;
mod expert_functions;
mod exporter;
mod functions;
mod normalize;
pub mod proto;
mod read;
mod tensor;
mod write;

pub use error::{ReadError, ReadErrorKind};
pub use exporter::{Exporter, exporter};
pub use read::{read, read_prompt_branch, read_stripped};
pub use write::{INLINE_LIMIT, Layout, Placement, WriteError, encode, write, write_with_data};

/// The opsets that [`read`] accepts.
pub const OPSETS: std::ops::RangeInclusive<i64> = 11..=25;
