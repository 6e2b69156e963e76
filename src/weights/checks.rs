//! Conditions on a weight's values before they are stored in a package: no NaN, no infinity, nothing that overflowed
//! when it was converted.

use super::WriteError;
use crate::graph::ConstantSource;
use crate::graph::{Constant, ConstantError};
use crate::tensor::{DType, Tensor};

/// What the user allowed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// NaN and infinity in the source.
    pub nonfinite: bool,
    /// Numbers too large for the package's dtype; they become infinite.
    pub overflow: bool,
}

/// Numbers that a model cannot use. `tensor`: their tensor in the source, if it has a name.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum BadNumbers {
    /// NaN or infinity in the source.
    #[error("{count} of {len} values are NaN or infinite in the source{}", within(tensor))]
    NonFinite {
        /// How many.
        count: usize,
        /// Elements of the tensor.
        len: usize,
        /// In the source.
        tensor: Option<String>,
    },
    #[error(
        "{count} of {len} values are too large for {dtype}: the largest is {largest:e}{}",
        within(tensor)
    )]
    /// Finite numbers of the source that became infinite in the dtype of the package.
    Overflow {
        /// How many.
        count: usize,
        /// Elements of the weight.
        len: usize,
        /// Element type of the package.
        dtype: DType,
        /// The largest magnitude in the source.
        largest: f64,
        /// In the source; the one with the largest.
        tensor: Option<String>,
    },
}

fn within(tensor: &Option<String>) -> String {
    tensor.as_ref().map_or(String::new(), |name| format!(", in {name:?}"))
}

/// Elements that are NaN or infinite.
pub fn nonfinite(tensor: &Tensor) -> usize {
    // In IEEE's formats, exactly NaN and infinity have an exponent of all ones.
    let data = tensor.data();
    match tensor.dtype() {
        DType::F16 => count(data, |b| u16::from_le_bytes(b) & 0x7c00, 0x7c00),
        DType::Bf16 => count(data, |b| u16::from_le_bytes(b) & 0x7f80, 0x7f80),
        DType::F32 => count(data, |b| u32::from_le_bytes(b) & 0x7f80_0000, 0x7f80_0000),
        DType::F64 => count(data, |b| u64::from_le_bytes(b) & (0x7ff << 52), 0x7ff << 52),
        dtype if dtype.is_float_format() => tensor.to_f32().iter().filter(|v| !v.is_finite()).count(),
        _ => 0,
    }
}

/// Elements whose exponent is `worst`. Every weight is checked here before it is written, so valid blocks must be fast:
/// a block is counted only if its largest exponent is `worst`.
fn count<const N: usize, T: Copy + Ord + Default>(bytes: &[u8], exponent: impl Fn([u8; N]) -> T, worst: T) -> usize {
    let elements = bytes.as_chunks::<N>().0;
    let blocks = elements.chunks(4096);
    let largest = |block: &[[u8; N]]| block.iter().fold(T::default(), |most, b| most.max(exponent(*b)));
    let bad = blocks.filter(|block| largest(block) == worst);
    bad.map(|block| block.iter().filter(|b| exponent(**b) == worst).count())
        .sum()
}

/// Checks a computed weight. `constant` is its derivation, which is examined only on failure.
pub fn check(constant: &Constant, tensor: &Tensor, allowed: Allowed) -> Result<Option<BadNumbers>, ConstantError> {
    if allowed.nonfinite && allowed.overflow {
        return Ok(None);
    }
    let count = nonfinite(tensor);
    if count == 0 {
        return Ok(None);
    }
    let (len, dtype) = (tensor.len(), tensor.dtype());
    let mut sources = Vec::new();
    leaves(constant, &mut sources);
    let (mut came_so, mut largest, mut holder) = (0, 0f64, None);
    for leaf in sources {
        let source = leaf.materialize()?;
        let name = || leaf.origin().map(str::to_string);
        let bad = nonfinite(&source);
        if bad > 0 && !allowed.nonfinite {
            let (count, len, tensor) = (bad, source.len(), name());
            return Ok(Some(BadNumbers::NonFinite { count, len, tensor }));
        }
        came_so += bad;
        let finite = source.to_f64().into_iter().filter(|v| v.is_finite());
        let most = finite.fold(0f64, |most, v| most.max(v.abs()));
        if most > largest {
            (largest, holder) = (most, name());
        }
    }
    // Values from the source are allowed; the others are from the conversion.
    let count = count.saturating_sub(came_so);
    Ok((count > 0 && !allowed.overflow).then_some(BadNumbers::Overflow {
        count,
        len,
        dtype,
        largest,
        tensor: holder,
    }))
}

/// For [`write`](super::write): refuses weights that do not pass [`check`].
pub fn inspector(allowed: Allowed) -> impl FnMut(&str, &Constant, &Tensor) -> Result<(), WriteError> + Send {
    move |name, constant, tensor| {
        let name = name.to_string();
        match check(constant, tensor, allowed) {
            Ok(None) => Ok(()),
            Ok(Some(source)) => Err(WriteError::Numbers { name, source }),
            Err(source) => Err(WriteError::Constant { name, source }),
        }
    }
}

fn leaves<'a>(constant: &'a Constant, into: &mut Vec<&'a Constant>) {
    match constant.source() {
        ConstantSource::Derived(derived) => derived.inputs.iter().for_each(|input| leaves(input, into)),
        ConstantSource::Tensor(_) | ConstantSource::Absent => into.push(constant),
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
        // The largest finite number of each type does not count.
        let largest = Tensor::from_f64_as(DType::F16, vec![2], &[65504.0, -65504.0]);
        assert_eq!(nonfinite(&largest), 0);
    }

    #[test]
    fn what_the_source_had_is_told_from_what_converting_made() {
        let values = [1.0, f64::NAN, 1e6, -7e4];
        let source = Constant::tensor(Tensor::from_f64_as(DType::F32, vec![4], &values)).with_origin("w");
        let half = source.transposed(&[0]).cast(DType::F16);
        let made = half.materialize().unwrap();
        let found = |nonfinite, overflow| check(&half, &made, Allowed { nonfinite, overflow }).unwrap();
        let message = found(false, false).unwrap().to_string();
        assert_eq!(message, "1 of 4 values are NaN or infinite in the source, in \"w\"");
        assert_eq!(found(false, true).unwrap().to_string(), message);
        assert_eq!(
            found(true, false).unwrap().to_string(),
            "2 of 4 values are too large for f16: the largest is 1e6, in \"w\""
        );
        assert_eq!(found(true, true), None);
    }
}
