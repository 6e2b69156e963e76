//! What must be true of a weight's numbers before they go into a package: no NaN, no infinity, nothing that overflowed
//! when it was converted.

use crate::graph::constant::Source;
use crate::graph::{Constant, ConstantError};
use crate::tensor::{DType, Tensor};

/// What the user said is all right.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// NaN and infinity in the source.
    pub nonfinite: bool,
    /// Numbers too large for the package's dtype; they become infinite.
    pub overflow: bool,
}

/// Numbers that a model cannot use.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadNumbers {
    #[error("{count} of its {len} numbers are NaN or infinite in the source")]
    NonFinite { count: usize, len: usize },
    #[error("{count} of its {len} numbers are too large for {dtype}: the largest is {largest:e}")]
    Overflow {
        count: usize,
        len: usize,
        dtype: DType,
        largest: f64,
    },
}

/// Elements that are NaN or infinite.
pub fn nonfinite(tensor: &Tensor) -> usize {
    fn count<const N: usize>(bytes: &[u8], is: impl Fn([u8; N]) -> bool) -> usize {
        bytes.as_chunks::<N>().0.iter().map(|b| usize::from(is(*b))).sum()
    }
    // An exponent of all ones is what both have, and nothing else.
    let data = tensor.data();
    match tensor.dtype() {
        DType::F16 => count(data, |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        DType::Bf16 => count(data, |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        DType::F32 => count(data, |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        DType::F64 => count(data, |b| !f64::from_le_bytes(b).is_finite()),
        _ => 0,
    }
}

/// Checks a computed weight. `constant` is how it was computed, and looked into only if something is wrong.
pub fn check(constant: &Constant, tensor: &Tensor, allowed: Allowed) -> Result<Option<BadNumbers>, ConstantError> {
    if allowed.nonfinite && allowed.overflow {
        return Ok(None);
    }
    let count = nonfinite(tensor);
    if count == 0 {
        return Ok(None);
    }
    let len = tensor.len();
    let mut sources = Vec::new();
    leaves(constant, &mut sources);
    let mut largest = 0f64;
    for source in sources {
        let source = source.materialize()?;
        if nonfinite(&source) > 0 {
            return Ok((!allowed.nonfinite).then_some(BadNumbers::NonFinite { count, len }));
        }
        largest = source
            .to_f32()
            .into_iter()
            .fold(largest, |m, v| m.max(f64::from(v.abs())));
    }
    let dtype = tensor.dtype();
    Ok((!allowed.overflow).then_some(BadNumbers::Overflow {
        count,
        len,
        dtype,
        largest,
    }))
}

fn leaves<'a>(constant: &'a Constant, into: &mut Vec<&'a Constant>) {
    match constant.source() {
        Source::Derived(derived) => derived.inputs.iter().for_each(|input| leaves(input, into)),
        Source::Tensor(_) | Source::Absent => into.push(constant),
    }
}
