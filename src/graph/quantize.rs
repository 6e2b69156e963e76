//! Constants that are quantized when their bytes are needed: [`Constant::quantized_as`].
//!
//! Codes, scales and zero points are three constants over one of floats; they are computed when a package is written.
//! The search for scales runs once for all three, and its result is stored; codes are computed again each time.
//! Codes that depend on more than the values, such as those of a calibration, are stored: [`Constant::with_codes`].

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::constant::{Constant, ConstantError, ConstantSource, Transform};
use crate::tensor::quantize::{self, Format, Scales};
use crate::tensor::quantized::{Granularity, QuantizedError};
use crate::tensor::{DType, Tensor};

/// A part of a quantized constant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// In the values' shape.
    Codes,
    /// In the values' dtype.
    Scales,
    /// In the codes' dtype.
    ZeroPoints,
}

/// How [`Transform::RoundToNearest`] quantizes, and which part it returns. Inputs are the values, with contiguous runs,
/// and optionally the importance of each column (see [`quantize::scales`]).
#[derive(Clone)]
pub struct RoundToNearest {
    /// Format of the codes.
    pub format: Format,
    /// Which part.
    pub part: Part,
    /// The scales, once found.
    scales: Arc<OnceLock<Scales>>,
    /// Stored codes, if they are not the nearest.
    codes: Option<Tensor>,
}

impl RoundToNearest {
    /// Address of the stored codes; null if codes are the nearest.
    fn stored_codes(&self) -> *const u8 {
        self.codes
            .as_ref()
            .map_or(std::ptr::null(), |codes| codes.data().as_ptr())
    }
}

impl PartialEq for RoundToNearest {
    fn eq(&self, other: &Self) -> bool {
        (self.format, self.part, self.stored_codes()) == (other.format, other.part, other.stored_codes())
    }
}

impl fmt::Debug for RoundToNearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RoundToNearest({}, {:?}", self.format, self.part)?;
        match &self.codes {
            Some(_) => write!(f, ", codes at {:p})", self.stored_codes()),
            None => write!(f, ")"),
        }
    }
}

impl Constant {
    /// The quantized weight nearest to these values: see [`crate::tensor::quantize`]. Its dtype and shape are those of the
    /// values. `importance`: `[columns]`, of the last axis.
    pub fn quantized_as(&self, format: Format, importance: Option<&Constant>) -> Result<Constant, QuantizedError> {
        if !matches!(self.dtype(), DType::F32 | DType::F16 | DType::Bf16) {
            return Err(QuantizedError::Scales { dtype: self.dtype() });
        }
        format.check(self.shape())?;
        if !format.has_contiguous_runs(self.shape()) {
            return self.quantized_across(format, importance);
        }
        let inputs: Vec<Constant> = [self].into_iter().chain(importance).cloned().collect();
        self.of_parts(inputs, format, OnceLock::new(), None)
    }

    /// These values, quantized to codes and scales that were computed from them and from more, as a calibration does. An error unless
    /// [`Format::check`] accepts the shape. Panics if codes or scales have another dtype or shape, or runs are not contiguous.
    pub fn with_codes(&self, format: Format, codes: Tensor, scales: Scales) -> Result<Constant, QuantizedError> {
        format.check(self.shape())?;
        assert_eq!(
            (codes.dtype(), codes.shape(), scales.scales.dtype()),
            (format.codes, self.shape(), self.dtype()),
            "codes of another format"
        );
        self.of_parts(vec![self.clone()], format, OnceLock::from(scales), Some(codes))
    }

    /// Codes, scales and zero points over the same inputs.
    fn of_parts(
        &self,
        inputs: Vec<Constant>,
        format: Format,
        scales: OnceLock<Scales>,
        codes: Option<Tensor>,
    ) -> Result<Constant, QuantizedError> {
        let scales = Arc::new(scales);
        let part = |part, dtype, shape| {
            let quantize = RoundToNearest {
                format,
                part,
                scales: scales.clone(),
                codes: codes.clone(),
            };
            Constant::derive(inputs.clone(), Transform::RoundToNearest(quantize), dtype, shape)
        };
        let shape = format.granularity.scale_shape(self.shape())?;
        let codes = part(Part::Codes, format.codes, self.shape().to_vec());
        let zero_points = format
            .zero_points
            .then(|| part(Part::ZeroPoints, format.codes, shape.clone()));
        Constant::quantized(
            codes,
            part(Part::Scales, self.dtype(), shape),
            zero_points,
            format.granularity,
        )
    }

    /// The same if runs are not contiguous: swaps axes to make them so.
    fn quantized_across(&self, format: Format, importance: Option<&Constant>) -> Result<Constant, QuantizedError> {
        let rank = self.shape().len();
        let mut perm: Vec<usize> = (0..rank).collect();
        let granularity = match format.granularity {
            Granularity::Channel { axis } => {
                perm.swap(0, axis);
                Granularity::Channel { axis: 0 }
            }
            Granularity::Block { axis, size } => {
                perm.swap(rank - 1, axis);
                Granularity::Block { axis: rank - 1, size }
            }
            Granularity::Tensor => unreachable!("its run is all of it"),
        };
        // Swapped axes change the columns.
        debug_assert!(importance.is_none(), "importance is of the last axis");
        let turned = self
            .transposed(&perm)
            .quantized_as(Format { granularity, ..format }, None)?;
        // A swap is its own inverse.
        Ok(turned.transposed(&perm))
    }

    /// The floats and the format of this quantized constant, and whether its codes depend on more than these; `None` if the codes
    /// are those of an export.
    pub fn quantized_from(&self) -> Option<(&Constant, Format, bool)> {
        let ConstantSource::Derived(derived) = self.as_quantized()?.codes.source() else {
            return None;
        };
        match &derived.transform {
            Transform::RoundToNearest(quantize) => {
                let more = derived.inputs.len() > 1 || quantize.codes.is_some();
                Some((&derived.inputs[0], quantize.format, more))
            }
            _ => None,
        }
    }

    /// Every element times the factor of its index on an axis, in fp32. Panics unless there is a factor for each.
    pub fn with_factors(&self, axis: usize, factors: &Constant) -> Constant {
        assert!(factors.shape() == [self.shape()[axis]], "factors of another axis");
        let inputs = vec![self.clone(), factors.clone()];
        Constant::derive(inputs, Transform::Factors { axis }, self.dtype(), self.shape().to_vec())
    }
}

/// The part that a constant is.
pub(super) fn apply(quantize: &RoundToNearest, inputs: &[Constant]) -> Result<Tensor, ConstantError> {
    if let (Some(codes), Some(scales)) = (&quantize.codes, quantize.scales.get()) {
        return Ok(match quantize.part {
            Part::Codes => codes.clone(),
            Part::Scales => scales.scales.clone(),
            Part::ZeroPoints => scales.zero_points.clone().expect("the format has them"),
        });
    }
    let values = inputs[0].materialize()?;
    let format = quantize.format;
    let scales = match quantize.scales.get() {
        Some(scales) => scales,
        None => {
            let importance = inputs
                .get(1)
                .map(Constant::materialize)
                .transpose()?
                .map(|h| h.to_f32());
            let found =
                quantize::scales(&values, importance.as_deref(), format).map_err(|bad| ConstantError::NotFinite {
                    name: inputs[0].origin().unwrap_or("unnamed").to_string(),
                    count: bad.count,
                    len: values.len(),
                })?;
            quantize.scales.get_or_init(|| found)
        }
    };
    Ok(match quantize.part {
        Part::Codes => quantize::codes(&values, scales, format),
        Part::Scales => scales.scales.clone(),
        Part::ZeroPoints => scales.zero_points.clone().expect("the format has them"),
    })
}

/// Elements times the factor of their index on an axis.
pub(super) fn with_factors(values: &Tensor, factors: &Tensor, axis: usize) -> Tensor {
    let (shape, factors) = (values.shape().to_vec(), factors.to_f32());
    let inner: usize = shape[axis + 1..].iter().product::<usize>().max(1);
    let mut numbers = values.to_f32();
    for (at, run) in numbers.chunks_mut(inner).enumerate() {
        let factor = factors[at % shape[axis]];
        run.iter_mut().for_each(|v| *v *= factor);
    }
    match values.dtype() {
        DType::F32 => Tensor::from_f32(shape, &numbers),
        other => {
            let numbers: Vec<f64> = numbers.into_iter().map(f64::from).collect();
            Tensor::from_f64_as(other, shape, &numbers)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::quantized::Granularity::{Block, Channel};

    fn weight() -> Constant {
        let values: Vec<f32> = (0..8 * 64).map(|i| ((i * 37 % 101) as f32 - 50.0) / 40.0).collect();
        Constant::tensor(Tensor::from_f32(vec![8, 64], &values)).with_origin("w")
    }

    fn int4(granularity: Granularity) -> Format {
        Format {
            codes: DType::I4,
            granularity,
            zero_points: false,
        }
    }

    #[test]
    fn a_constant_is_quantized_when_it_is_needed() {
        let format = int4(Block { axis: 1, size: 32 });
        let made = weight().quantized_as(format, None).unwrap();
        let parts = made.as_quantized().unwrap();
        assert_eq!(parts.to_string(), format.to_string());
        assert_eq!(
            (made.dtype(), made.shape(), made.origin()),
            (DType::F32, &[8, 64][..], Some("w"))
        );
        assert_eq!(made.stored_byte_len(), 8 * 32 + 8 * 2 * 4);
        assert_eq!(parts.check_values().unwrap(), Ok(()));
        let (from, of, weighted) = made.quantized_from().unwrap();
        assert_eq!((from.origin(), of, weighted), (Some("w"), format, false));
        let (values, given) = (
            made.materialize().unwrap().to_f32(),
            weight().materialize().unwrap().to_f32(),
        );
        // The largest ones may be clipped; on average the error is that of sixteen codes.
        let error: f32 = values.iter().zip(&given).map(|(a, b)| (a - b).powi(2)).sum();
        assert!(error / 512.0 < 0.06f32.powi(2), "{error}");
        // For absent weights only the resulting types and shapes are known.
        let absent = Constant::absent(DType::F16, vec![8, 64]).with_origin("w");
        let made = absent.quantized_as(format, None).unwrap();
        assert!(!made.is_present());
        assert_eq!(made.stored_byte_len(), 8 * 32 + 8 * 2 * 2);
        assert!(made.materialize().is_err());
    }

    #[test]
    fn other_axes_are_quantized_by_way_of_the_last() {
        for (across, along) in [
            (Channel { axis: 1 }, Channel { axis: 0 }),
            (Block { axis: 0, size: 4 }, Block { axis: 1, size: 4 }),
        ] {
            let made = weight().quantized_as(int4(across), None).unwrap();
            assert_eq!(made.as_quantized().unwrap().granularity, across);
            let turned = weight().transposed(&[1, 0]).quantized_as(int4(along), None).unwrap();
            let turned = Constant::tensor(turned.materialize().unwrap());
            assert_eq!(
                made.materialize().unwrap(),
                turned.transposed(&[1, 0]).materialize().unwrap()
            );
        }
    }

    #[test]
    fn factors_of_rows_and_columns() {
        let made = Constant::tensor(Tensor::from_f32(vec![2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]));
        let factors = |f: &[f32]| Constant::tensor(Tensor::from_f32(vec![f.len()], f));
        let rows = made.with_factors(0, &factors(&[2.0, 0.5])).materialize().unwrap();
        assert_eq!(rows.to_f32(), [2.0, 4.0, 6.0, 2.0, 2.5, 3.0]);
        let columns = made.with_factors(1, &factors(&[1.0, 0.0, -1.0])).materialize().unwrap();
        assert_eq!(columns.to_f32(), [1.0, 0.0, -3.0, 4.0, 0.0, -6.0]);
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let values = Constant::tensor(Tensor::from_f32(vec![1, 2], &[f32::NAN, 1.0])).with_origin("layer.weight");
        let made = values.quantized_as(int4(Channel { axis: 0 }), None).unwrap();
        assert_eq!(
            made.materialize().unwrap_err().to_string(),
            "\"layer.weight\" cannot be quantized: 1 of 2 values are NaN or infinite"
        );
    }
}
