//! Layers whose meaning is ours: what a decoder does with one token of a sequence, in kernels of our own.
//!
//! TensorRT has no such layers. Networks of an engine are cut at them ([`segments`](super::segments)): what lies between is
//! built by TensorRT, and the kernels run between its engines. What each means is said by layers of TensorRT's:
//! [`Network::expanded`](super::Network::expanded) writes them out, and the CPU executor runs those.
//!
//! Both compute in fp32 over 16-bit operands and round each output once, so they may differ from layers that round in
//! between by the last bit of the 16-bit type.

mod attention;
mod expand;
mod independent;
mod product;

pub use attention::{AttentionInputs, DecodeAttention, Rotation};
pub use product::{CodeLayout, PartInputs, ProductInputs, ProductPart, RowActivation, RowProduct};

use crate::ir_text::{Cursor, Parsed};

/// `word` of letters, digits and the signs that parameters of these layers have.
fn word<'a>(line: &mut Cursor<'a>) -> &'a str {
    line.take(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.'))
}

/// One of the words of a list, or an error that names them.
fn one_of<T>(line: &mut Cursor, what: &str, named: impl FnOnce(&str) -> Option<T>) -> Parsed<T> {
    let at = line.position();
    let word = word(line);
    named(word).ok_or_else(|| line.error_at(at, what))
}
