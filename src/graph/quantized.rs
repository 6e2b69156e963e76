//! Quantized weights as constants: codes, scales and zero points that move together.
//!
//! [`Quantized`] is a view of the parts of a [`Constant`] that is quantized ([`Constant::as_quantized`]). Its movements
//! move the codes, so that the result has the moved values: nothing is computed, and
//! nothing is widened. A movement that would split blocks is a [`QuantizedError`]. The same movements on the [`Constant`]
//! itself fall back to moving the values, which is exact but needs the memory of floats.
//!
//! [`crate::tensor::quantized`] defines the values. Scales can be quantized themselves (NVFP4 has blocks whose
//! scales are fp8 with one scale for all).

use std::fmt;

use super::constant::{Constant, ConstantError};
use crate::tensor::quantize::Format;
use crate::tensor::quantized::{Granularity, QuantizedError, check_types, check_values};
use crate::tensor::{DType, Tensor};

/// The parts of a quantized constant.
#[derive(Clone, Copy)]
pub struct Quantized<'a> {
    /// In the shape of the values.
    pub codes: &'a Constant,
    /// In the shape that the granularity defines.
    pub scales: &'a Constant,
    /// In the scales' shape and the codes' dtype; 0 if there are none.
    pub zero_points: Option<&'a Constant>,
    /// Which codes share a scale.
    pub granularity: Granularity,
}

impl<'a> Quantized<'a> {
    /// The names of the parts, appended to the weight's name after a dot.
    pub const PARTS: [&'static str; 3] = ["codes", "scales", "zero_points"];

    /// The existing parts, with their names: see [`Quantized::PARTS`].
    pub fn each(self) -> impl Iterator<Item = (&'static str, &'a Constant)> {
        let parts = [Some(self.codes), Some(self.scales), self.zero_points];
        Self::PARTS
            .into_iter()
            .zip(parts)
            .filter_map(|(name, part)| Some((name, part?)))
    }

    /// The format, for quantizing other values in the same way; `None` if the scales are quantized themselves.
    pub fn format(self) -> Option<Format> {
        self.scales.as_quantized().is_none().then(|| Format {
            codes: self.codes.dtype(),
            granularity: self.granularity,
            zero_points: self.zero_points.is_some(),
        })
    }

    /// Checks that dtypes and shapes fit together.
    pub fn check_types(self) -> Result<(), QuantizedError> {
        fn of(part: &Constant) -> (crate::tensor::DType, &[usize]) {
            (part.dtype(), part.shape())
        }
        check_types(
            of(self.codes),
            of(self.scales),
            self.zero_points.map(of),
            self.granularity,
        )
    }

    /// Refuses values that no model can use; reads all parts. The outer result is that of reading them.
    pub fn check_values(self) -> Result<Result<(), QuantizedError>, ConstantError> {
        if let Some(scales) = self.scales.as_quantized()
            && let Err(error) = scales.check_values()?
        {
            return Ok(Err(error));
        }
        let (codes, scales) = (self.codes.materialize()?, self.scales.materialize()?);
        let zero_points = self.zero_points.map(Constant::materialize).transpose()?;
        Ok(check_values(&codes, &scales, zero_points.as_ref(), self.granularity))
    }

    fn rebuilt(
        self,
        codes: Constant,
        granularity: Granularity,
        part: impl Fn(&Constant) -> Constant,
    ) -> Result<Constant, QuantizedError> {
        Constant::quantized(codes, part(self.scales), self.zero_points.map(&part), granularity)
    }

    fn refused(self, what: String) -> QuantizedError {
        QuantizedError::Blocks {
            what,
            granularity: self.granularity,
        }
    }

    /// The same codes with other scales, of the same shape.
    pub(super) fn with_scales(self, scales: Constant) -> Result<Constant, QuantizedError> {
        Constant::quantized(self.codes.clone(), scales, self.zero_points.cloned(), self.granularity)
    }

    /// Axes permuted as in ONNX `Transpose`; always possible. Panics unless `perm` is a permutation of the axes.
    pub fn transposed(self, perm: &[usize]) -> Result<Constant, QuantizedError> {
        let to = |axis: usize| perm.iter().position(|p| *p == axis).expect("a permutation of the axes");
        let codes = self.codes.transposed(perm);
        match self.granularity {
            Granularity::Tensor => self.rebuilt(codes, Granularity::Tensor, Constant::clone),
            Granularity::Channel { axis } => {
                self.rebuilt(codes, Granularity::Channel { axis: to(axis) }, Constant::clone)
            }
            Granularity::Block { axis, size } => {
                let granularity = Granularity::Block { axis: to(axis), size };
                self.rebuilt(codes, granularity, |part| part.transposed(perm))
            }
        }
    }

    /// Another shape of the same volume, if it preserves every channel or block: it has an axis with the same number of
    /// elements after it and the same channels, or a whole number of blocks.
    pub fn reshaped(self, shape: &[usize]) -> Result<Constant, QuantizedError> {
        let old = self.codes.shape();
        let inner = |shape: &[usize], axis: usize| shape[axis + 1..].iter().product::<usize>();
        let codes = self.codes.reshaped(shape.to_vec());
        let refused = || self.refused(format!("a reshape of {old:?} to {shape:?}"));
        match self.granularity {
            Granularity::Tensor => self.rebuilt(codes, Granularity::Tensor, Constant::clone),
            Granularity::Channel { axis } => {
                let same = |k: &usize| shape[*k] == old[axis] && inner(shape, *k) == inner(old, axis);
                let axis = (0..shape.len()).find(same).ok_or_else(refused)?;
                self.rebuilt(codes, Granularity::Channel { axis }, Constant::clone)
            }
            Granularity::Block { axis, size } => {
                let whole = |k: &usize| inner(shape, *k) == inner(old, axis) && shape[*k].is_multiple_of(size);
                let axis = (0..shape.len()).find(whole).ok_or_else(refused)?;
                let mut blocks = shape.to_vec();
                blocks[axis] /= size;
                self.rebuilt(codes, Granularity::Block { axis, size }, |part| {
                    part.reshaped(blocks.clone())
                })
            }
        }
    }

    /// `start..end` of an axis, if it begins and ends between blocks. Panics if the range is outside the axis.
    pub fn sliced(self, on: usize, start: usize, end: usize) -> Result<Constant, QuantizedError> {
        let codes = self.codes.sliced(on, start, end);
        match self.granularity {
            Granularity::Channel { axis } if axis == on => {
                self.rebuilt(codes, self.granularity, |part| part.sliced(0, start, end))
            }
            Granularity::Tensor | Granularity::Channel { .. } => self.rebuilt(codes, self.granularity, Constant::clone),
            Granularity::Block { axis, size } if axis == on => {
                if !start.is_multiple_of(size) || !end.is_multiple_of(size) {
                    return Err(self.refused(format!("a slice of {start} to {end}")));
                }
                self.rebuilt(codes, self.granularity, |part| {
                    part.sliced(on, start / size, end / size)
                })
            }
            Granularity::Block { .. } => self.rebuilt(codes, self.granularity, |part| part.sliced(on, start, end)),
        }
    }

    /// Concatenated on an axis, if all are quantized in the same way; scales shared across the axis must be equal.
    /// Panics on an empty list, or on parts whose other axes differ.
    pub fn concat(parts: &[Quantized<'_>], on: usize) -> Result<Constant, QuantizedError> {
        let first = parts[0];
        let alike = |part: &Quantized<'_>| {
            part.granularity == first.granularity
                && part.codes.dtype() == first.codes.dtype()
                && part.scales.dtype() == first.scales.dtype()
                && part.zero_points.is_some() == first.zero_points.is_some()
        };
        let unlike = |part: &Quantized<'_>| QuantizedError::Unlike {
            left: first.to_string(),
            right: part.to_string(),
        };
        if let Some(part) = parts.iter().find(|part| !alike(part)) {
            return Err(unlike(part));
        }
        let all = |of: fn(&Quantized<'_>) -> Option<Constant>| parts.iter().map(of).collect::<Option<Vec<Constant>>>();
        let codes = all(|part| Some(part.codes.clone())).expect("all have codes");
        let scales = all(|part| Some(part.scales.clone())).expect("all have scales");
        let zero_points = all(|part| part.zero_points.cloned());
        let codes = Constant::concat(&codes, on);
        let scale_axis = match first.granularity {
            Granularity::Channel { axis } if axis == on => Some(0),
            Granularity::Block { .. } => Some(on),
            _ => None,
        };
        if let Some(axis) = scale_axis {
            let joined = |parts: &[Constant]| Constant::concat(parts, axis);
            let zero_points = zero_points.as_deref().map(joined);
            return Constant::quantized(codes, joined(&scales), zero_points, first.granularity);
        }
        // Small tensors, available unless the package is stripped; if they cannot be compared, they do not count as
        // equal.
        let equal = |left: &Constant, right: &Constant| match (left.materialize(), right.materialize()) {
            (Ok(left), Ok(right)) => left.data() == right.data(),
            _ => false,
        };
        let zeros_equal = |part: &Quantized<'_>| match (part.zero_points, first.zero_points) {
            (Some(left), Some(right)) => equal(left, right),
            _ => true,
        };
        match parts
            .iter()
            .find(|part| !equal(part.scales, first.scales) || !zeros_equal(part))
        {
            Some(part) => Err(unlike(part)),
            None => Constant::quantized(
                codes,
                first.scales.clone(),
                first.zero_points.cloned(),
                first.granularity,
            ),
        }
    }
}

impl Constant {
    /// Powers of two, f8e8m0, as block scales in an arithmetic dtype (the microscaling formats MXFP8 and MXFP4,
    /// <https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf>): codes with a single scale of 1, so that a file keeps their bytes.
    pub fn microscales(&self, dtype: DType) -> Result<Constant, QuantizedError> {
        let one = Tensor::from_f64_as(dtype, Vec::new(), &[1.0]);
        Constant::quantized(self.clone(), Constant::tensor(one), None, Granularity::Tensor)
    }

    /// The scales as powers of two, if [`Constant::microscales`] created them.
    pub fn as_microscales(&self) -> Option<&Constant> {
        let parts = self.as_quantized()?;
        (parts.codes.dtype() == DType::F8E8M0).then_some(parts.codes)
    }

    /// The tensors that a file stores for a constant `name`, with their names: itself, or for a quantized weight its
    /// codes, scales and zero points, `name.codes` and so on.
    pub fn stored_parts(&self, name: &str) -> Vec<(String, &Constant)> {
        match self.as_quantized() {
            Some(parts) => parts
                .each()
                .flat_map(|(part, constant)| constant.stored_parts(&format!("{name}.{part}")))
                .collect(),
            None => vec![(name.to_string(), self)],
        }
    }
}

impl fmt::Display for Quantized<'_> {
    /// `u4 in blocks of 32 on axis 1 with zero points`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.codes.dtype(), self.granularity)?;
        if let Some(scales) = self.scales.as_quantized() {
            write!(f, " with scales of {scales}")?;
        }
        match self.zero_points {
            Some(_) => write!(f, " with zero points"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ints(dtype: DType, shape: &[usize], values: impl IntoIterator<Item = i64>) -> Constant {
        let values: Vec<i64> = values.into_iter().take(shape.iter().product()).collect();
        Constant::tensor(Tensor::from_i64_as(dtype, shape.to_vec(), &values))
    }

    fn scales(shape: &[usize]) -> Constant {
        let n: usize = shape.iter().product();
        let values: Vec<f32> = (0..n).map(|i| 0.25 + i as f32).collect();
        Constant::tensor(Tensor::from_f32(shape.to_vec(), &values))
    }

    /// Codes of `shape` with a scale and a zero point for every block or channel.
    fn weight(shape: &[usize], granularity: Granularity) -> Constant {
        let of = granularity.scale_shape(shape).unwrap();
        let codes = ints(DType::U4, shape, (0..).map(|i| i * 7 % 16));
        let zeros = ints(DType::U4, &of, (0..).map(|i| i * 3 % 16));
        Constant::quantized(codes.with_origin("w"), scales(&of), Some(zeros), granularity).unwrap()
    }

    fn values(constant: &Constant) -> Vec<f32> {
        constant.materialize().unwrap().to_f32()
    }

    /// The values as plain floats; their movements are the expected result for the quantized constant.
    fn plain(constant: &Constant) -> Constant {
        Constant::tensor(constant.materialize().unwrap())
    }

    const ALL: [Granularity; 5] = [
        Granularity::Tensor,
        Granularity::Channel { axis: 0 },
        Granularity::Channel { axis: 1 },
        Granularity::Block { axis: 0, size: 2 },
        Granularity::Block { axis: 1, size: 4 },
    ];

    #[test]
    fn movements_keep_codes_and_meaning() {
        for granularity in ALL {
            let w = weight(&[6, 8], granularity);
            let wide = plain(&w);
            let movements: [&dyn Fn(&Constant) -> Constant; 7] = [
                &|c| c.transposed(&[1, 0]),
                &|c| c.transposed(&[1, 0]).transposed(&[1, 0]),
                &|c| c.reshaped(vec![1, 6, 8, 1]),
                &|c| c.sliced(0, 2, 4),
                &|c| c.sliced(1, 4, 8),
                &|c| c.transposed(&[1, 0]).sliced(0, 4, 8),
                &|c| c.sliced(0, 0, 4).reshaped(vec![4, 8]),
            ];
            for (i, movement) in movements.iter().enumerate() {
                let (found, expected) = (movement(&w), movement(&wide));
                assert!(found.as_quantized().is_some(), "{granularity}: movement {i} widens");
                assert_eq!(found.shape(), expected.shape(), "{granularity}: movement {i}");
                assert_eq!(values(&found), values(&expected), "{granularity}: movement {i}");
                assert_eq!(found.origin(), Some("w"));
            }
        }
    }

    #[test]
    fn blocks_may_become_an_axis_and_one_again() {
        let w = weight(&[3, 8], Granularity::Block { axis: 1, size: 4 });
        let apart = w.reshaped(vec![3, 2, 4]);
        assert_eq!(
            apart.as_quantized().unwrap().granularity,
            Granularity::Block { axis: 2, size: 4 }
        );
        assert_eq!(apart.as_quantized().unwrap().scales.shape(), [3, 2, 1]);
        assert_eq!(values(&apart), values(&w));
        let flat = apart.reshaped(vec![24]);
        assert_eq!(flat.as_quantized().unwrap().scales.shape(), [6]);
        assert_eq!(values(&flat), values(&w));
    }

    #[test]
    fn what_takes_blocks_apart_is_refused_and_the_fallback_is_exact() {
        let w = weight(&[6, 8], Granularity::Block { axis: 1, size: 4 });
        let parts = w.as_quantized().unwrap();
        assert_eq!(
            parts.sliced(1, 2, 6).err().unwrap().to_string(),
            "a slice of 2 to 6 splits what is quantized in blocks of 4 on axis 1"
        );
        assert!(matches!(parts.reshaped(&[8, 6]), Err(QuantizedError::Blocks { .. })));
        let cut = w.sliced(1, 2, 6);
        assert!(cut.as_quantized().is_none());
        assert_eq!(values(&cut), values(&plain(&w).sliced(1, 2, 6)));
        let channels = weight(&[6, 8], Granularity::Channel { axis: 0 });
        assert!(channels.as_quantized().unwrap().reshaped(&[48]).is_err());
        assert_eq!(values(&channels.reshaped(vec![48])), values(&channels));
    }

    #[test]
    fn joining() {
        for granularity in ALL {
            let (a, b) = (weight(&[6, 8], granularity), weight(&[6, 8], granularity));
            for axis in [0, 1] {
                let joined = Constant::concat(&[a.clone(), b.clone()], axis);
                assert!(joined.as_quantized().is_some(), "{granularity} on {axis}");
                assert_eq!(
                    values(&joined),
                    values(&Constant::concat(&[plain(&a), plain(&b)], axis))
                );
            }
        }
        let a = weight(&[4, 4], Granularity::Tensor);
        let codes = ints(DType::U4, &[4, 4], 0..);
        let other = Constant::quantized(
            codes,
            Constant::tensor(Tensor::from_f32(vec![], &[9.0])),
            a.as_quantized().unwrap().zero_points.cloned(),
            Granularity::Tensor,
        )
        .unwrap();
        let parts = [a.as_quantized().unwrap(), other.as_quantized().unwrap()];
        assert!(matches!(
            Quantized::concat(&parts, 0),
            Err(QuantizedError::Unlike { .. })
        ));
        let joined = Constant::concat(&[a.clone(), other.clone()], 0);
        assert_eq!(values(&joined), [values(&a), values(&other)].concat());
        let block = weight(&[4, 4], Granularity::Block { axis: 1, size: 4 });
        let parts = [a.as_quantized().unwrap(), block.as_quantized().unwrap()];
        assert_eq!(
            Quantized::concat(&parts, 0).unwrap_err().to_string(),
            "tensors to be joined are quantized differently: u4 per tensor with zero points and u4 in blocks of 4 on \
             axis 1 with zero points"
        );
    }

    /// NVFP4: f4 codes in blocks of 16, whose scales are fp8 with one scale for all.
    #[test]
    fn scales_of_scales() {
        let codes = Tensor::from_f64_as(DType::F4E2M1, vec![1, 32], &[1.5; 32]);
        let inner = Tensor::from_f64_as(DType::F8E4M3Fn, vec![1, 2], &[2.0, 448.0]);
        let outer = Constant::tensor(Tensor::from_f32(vec![], &[0.5]));
        let scales = Constant::quantized(inner.into(), outer, None, Granularity::Tensor).unwrap();
        let blocks = Granularity::Block { axis: 1, size: 16 };
        let w = Constant::quantized(codes.into(), scales, None, blocks).unwrap();
        assert_eq!(values(&w)[15..17], [1.5, 336.0]);
        assert_eq!(w.stored_byte_len(), 16 + 2 + 4);
        assert_eq!(
            format!("{w:?}"),
            "f32[1, 32] of f4e2m1 in blocks of 16 on axis 1 with scales of f8e4m3fn per tensor"
        );
        assert_eq!(w.as_quantized().unwrap().check_values().unwrap(), Ok(()));
        let transposed = w.transposed(&[1, 0]);
        assert_eq!(transposed.as_quantized().unwrap().scales.shape(), [2, 1]);
        assert_eq!(values(&transposed), values(&w));
    }
}
