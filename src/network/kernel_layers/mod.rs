//! Lapidary's own layers: the parts of a decode step that run in its own kernels.
//!
//! TensorRT has no such layers. Networks of an engine are cut at them ([`segments`](super::segments)): TensorRT builds
//! what lies between, and the kernels run between its engines. Their meaning is defined in TensorRT's layers:
//! [`Network::expanded`](super::Network::expanded) expands them, and the CPU executor runs those.
//!
//! Both compute in fp32 over 16-bit operands and round each output once, so they can differ in the last bit of the
//! 16-bit type from layers that round in between.

mod attention;
mod expand;
mod independent;
mod product;

pub use attention::{AttentionInputs, DecodeAttention, Rotation};
pub use product::{CodeLayout, PartInputs, ProductInputs, ProductPart, RowActivation, RowProduct};

use crate::ir_text::{Cursor, Parsed};

/// A `word` of letters, digits and the punctuation in parameters of these layers.
fn word<'a>(line: &mut Cursor<'a>) -> &'a str {
    line.take(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.'))
}

/// One of the words of a list, or an error that names them.
fn one_of<T>(line: &mut Cursor, what: &str, named: impl FnOnce(&str) -> Option<T>) -> Parsed<T> {
    let at = line.position();
    let word = word(line);
    named(word).ok_or_else(|| line.error_at(at, what))
}
