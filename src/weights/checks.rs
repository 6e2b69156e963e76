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
    // An exponent of all ones is what both have, and nothing else.
    let data = tensor.data();
    match tensor.dtype() {
        DType::F16 => count(data, |b| u16::from_le_bytes(b) & 0x7c00, 0x7c00),
        DType::Bf16 => count(data, |b| u16::from_le_bytes(b) & 0x7f80, 0x7f80),
        DType::F32 => count(data, |b| u32::from_le_bytes(b) & 0x7f80_0000, 0x7f80_0000),
        DType::F64 => count(data, |b| u64::from_le_bytes(b) & (0x7ff << 52), 0x7ff << 52),
        _ => 0,
    }
}

/// Elements whose exponent is `worst`. Every weight passes here on its way to the disk, so what is good must go fast: a
/// block is counted only if the largest exponent in it is that.
fn count<const N: usize, T: Copy + Ord + Default>(bytes: &[u8], exponent: impl Fn([u8; N]) -> T, worst: T) -> usize {
    let elements = bytes.as_chunks::<N>().0;
    let blocks = elements.chunks(4096);
    let largest = |block: &[[u8; N]]| block.iter().fold(T::default(), |most, b| most.max(exponent(*b)));
    let bad = blocks.filter(|block| largest(block) == worst);
    bad.map(|block| block.iter().filter(|b| exponent(**b) == worst).count())
        .sum()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_is_counted_in_every_dtype() {
        for dtype in [DType::F16, DType::Bf16, DType::F32, DType::F64] {
            let mut values = vec![1.0; 10_000];
            assert_eq!(
                nonfinite(&Tensor::from_f64_as(dtype, vec![10_000], &values)),
                0,
                "{dtype}"
            );
            (values[0], values[4095], values[9999]) = (f64::NAN, f64::INFINITY, f64::NEG_INFINITY);
            assert_eq!(
                nonfinite(&Tensor::from_f64_as(dtype, vec![10_000], &values)),
                3,
                "{dtype}"
            );
        }
        // The largest finite number of each is none of them.
        let largest = Tensor::from_f64_as(DType::F16, vec![2], &[65504.0, -65504.0]);
        assert_eq!(nonfinite(&largest), 0);
    }
}
