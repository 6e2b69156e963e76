//! Inverts recipes: splits a weight into the tensors that its recipe names.
//!
//! Movements and concatenations are undone exactly. A factor or an addend is undone only if applying it again gives the
//! same bytes; a slice does not contain the rest of the tensor, so it is refused.

use super::recipe::Recipe;
use crate::graph::Constant;
use crate::tensor::DType;

/// Why a recipe cannot be inverted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Irreversible {
    /// It holds a part of the tensor.
    #[error("it holds only a slice of the tensor")]
    Slice,
    /// A factor or an addend whose effect was rounded.
    #[error("it holds the tensor times or plus a number, which cannot be undone without rounding")]
    Arithmetic,
    /// Codes in another form than the recipe's.
    #[error("it holds the tensor in another quantized form")]
    Quantized,
    /// Columns in a computed order.
    #[error("it holds the tensor in another order")]
    Order,
    /// Rows or columns that calibration scaled.
    #[error("it holds the tensor as a calibration changed it")]
    Calibrated,
    /// Numbers that cannot be read.
    #[error("its numbers cannot be read")]
    Unreadable,
}

impl Recipe {
    /// The named tensors of a weight built by this recipe, in the order of [`Recipe::leaves`] and in the weight's dtype
    /// (fp32 where only that undoes an addend exactly).
    pub fn take_apart(&self, made: &Constant) -> Result<Vec<(String, Constant)>, Irreversible> {
        let mut parts = Vec::new();
        self.walk_back(made, &mut parts)?;
        Ok(parts)
    }

    fn walk_back(&self, made: &Constant, parts: &mut Vec<(String, Constant)>) -> Result<(), Irreversible> {
        match self {
            Recipe::Tensor { name, .. } => {
                parts.push((name.clone(), made.clone()));
                Ok(())
            }
            Recipe::Transpose { perm, of } => {
                let mut back = vec![0; perm.len()];
                for (to, from) in perm.iter().enumerate() {
                    back[*from] = to;
                }
                of.walk_back(&made.transposed(&back), parts)
            }
            Recipe::Reshape { of, .. } => of.walk_back(&made.reshaped(of.shape()), parts),
            Recipe::Cast { of, .. } | Recipe::RoundToNearest { of, .. } => of.walk_back(made, parts),
            Recipe::Calibrated { .. } => Err(Irreversible::Calibrated),
            Recipe::Slice { .. } => Err(Irreversible::Slice),
            Recipe::Concat { axis, of } => {
                let mut start = 0;
                for part in of {
                    let end = start + part.shape()[*axis];
                    part.walk_back(&made.sliced(*axis, start, end), parts)?;
                    start = end;
                }
                Ok(())
            }
            Recipe::Scale { factor, of } => {
                let before = undone(made, |c| c.scaled(1.0 / factor), |c| c.scaled(*factor))?;
                of.walk_back(&before, parts)
            }
            Recipe::Offset { addend, of } => {
                let before = undone(made, |c| c.offset(-addend), |c| c.offset(*addend))?;
                of.walk_back(&before, parts)
            }
            Recipe::Dequantize {
                granularity,
                codes,
                scales,
                zero_points,
            } => {
                let quantized = made.as_quantized().ok_or(Irreversible::Quantized)?;
                if quantized.granularity != *granularity || quantized.zero_points.is_some() != zero_points.is_some() {
                    return Err(Irreversible::Quantized);
                }
                codes.walk_back(quantized.codes, parts)?;
                scales.walk_back(quantized.scales, parts)?;
                match (zero_points, quantized.zero_points) {
                    (Some(recipe), Some(part)) => recipe.walk_back(part, parts),
                    _ => Ok(()),
                }
            }
            Recipe::HalfRange { dtype, of } if made.dtype() == *dtype => of.walk_back(&made.half_range_moved(), parts),
            Recipe::SwapHalves { of } => of.walk_back(&made.halves_swapped(), parts),
            // Codes do not contain the values before rounding.
            Recipe::HalfRange { .. } | Recipe::Quantize { .. } => Err(Irreversible::Quantized),
            Recipe::Take { .. } | Recipe::Order { .. } => Err(Irreversible::Order),
        }
    }

    /// Shape or dtype of the result.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Recipe::Tensor { shape, .. } | Recipe::Reshape { shape, .. } => shape.clone(),
            Recipe::Transpose { perm, of } => {
                let shape = of.shape();
                perm.iter().map(|axis| shape[*axis]).collect()
            }
            Recipe::Slice { axis, start, end, of } => {
                let mut shape = of.shape();
                shape[*axis] = end - start;
                shape
            }
            Recipe::Concat { axis, of } => {
                let mut shape = of.first().map_or(Vec::new(), Recipe::shape);
                if let Some(dim) = shape.get_mut(*axis) {
                    *dim = of.iter().map(|part| part.shape()[*axis]).sum();
                }
                shape
            }
            Recipe::Take { axis, of, indices } => {
                let mut shape = of.shape();
                if let Some(dim) = shape.get_mut(*axis) {
                    *dim = indices.shape().iter().product();
                }
                shape
            }
            Recipe::Cast { of, .. }
            | Recipe::Scale { of, .. }
            | Recipe::Quantize { of, .. }
            | Recipe::HalfRange { of, .. }
            | Recipe::SwapHalves { of }
            | Recipe::Order { of }
            | Recipe::Offset { of, .. }
            | Recipe::RoundToNearest { of, .. }
            | Recipe::Calibrated { of } => of.shape(),
            Recipe::Dequantize { codes, .. } => codes.shape(),
        }
    }

    /// Whether both build the same weight from the same tensors, whatever their float types.
    pub fn is_like(&self, other: &Recipe) -> bool {
        match (self, other) {
            (Recipe::Cast { of, dtype }, other) | (other, Recipe::Cast { of, dtype }) if dtype.is_float() => {
                of.is_like(other)
            }
            (
                Recipe::Tensor { name, dtype, shape },
                Recipe::Tensor {
                    name: n,
                    dtype: d,
                    shape: s,
                },
            ) => name == n && shape == s && (dtype == d || dtype.is_float() && d.is_float()),
            (Recipe::RoundToNearest { format, of }, Recipe::RoundToNearest { format: f, of: o }) => {
                format == f && of.is_like(o)
            }
            (Recipe::Calibrated { of }, Recipe::Calibrated { of: o }) => of.is_like(o),
            (Recipe::Transpose { perm, of }, Recipe::Transpose { perm: p, of: o }) => perm == p && of.is_like(o),
            (Recipe::Reshape { shape, of }, Recipe::Reshape { shape: s, of: o }) => shape == s && of.is_like(o),
            (Recipe::Cast { dtype, of }, Recipe::Cast { dtype: d, of: o }) => dtype == d && of.is_like(o),
            (
                Recipe::Slice { axis, start, end, of },
                Recipe::Slice {
                    axis: a,
                    start: s,
                    end: e,
                    of: o,
                },
            ) => (axis, start, end) == (a, s, e) && of.is_like(o),
            (Recipe::Concat { axis, of }, Recipe::Concat { axis: a, of: o }) => {
                axis == a && of.len() == o.len() && of.iter().zip(o).all(|(a, b)| a.is_like(b))
            }
            (Recipe::Scale { factor, of }, Recipe::Scale { factor: f, of: o }) => factor == f && of.is_like(o),
            (Recipe::Offset { addend, of }, Recipe::Offset { addend: a, of: o }) => addend == a && of.is_like(o),
            (
                Recipe::Dequantize {
                    granularity,
                    codes,
                    scales,
                    zero_points,
                },
                Recipe::Dequantize {
                    granularity: g,
                    codes: c,
                    scales: s,
                    zero_points: z,
                },
            ) => {
                let zeros = match (zero_points, z) {
                    (Some(a), Some(b)) => a.is_like(b),
                    (None, None) => true,
                    _ => false,
                };
                granularity == g && codes.is_like(c) && scales.is_like(s) && zeros
            }
            (Recipe::Quantize { .. }, Recipe::Quantize { .. }) => self == other,
            (Recipe::HalfRange { dtype, of }, Recipe::HalfRange { dtype: d, of: o }) => dtype == d && of.is_like(o),
            (
                Recipe::Take { axis, of, indices },
                Recipe::Take {
                    axis: a,
                    of: o,
                    indices: i,
                },
            ) => axis == a && of.is_like(o) && indices.is_like(i),
            (Recipe::SwapHalves { of }, Recipe::SwapHalves { of: o })
            | (Recipe::Order { of }, Recipe::Order { of: o }) => of.is_like(o),
            _ => false,
        }
    }

    /// The recipe without factors, addends and casts above its only tensor.
    pub fn is_arithmetic(&self) -> bool {
        match self {
            Recipe::Scale { .. } | Recipe::Offset { .. } => true,
            Recipe::Dequantize { .. } | Recipe::Quantize { .. } | Recipe::Order { .. } => false,
            _ => self.parts().into_iter().any(Recipe::is_arithmetic),
        }
    }
}

/// The input of `forward` with this result, where `back` is its inverse: in the same dtype if that reproduces the
/// bytes, else in fp32 if that does.
pub(super) fn undone(
    made: &Constant,
    back: impl Fn(&Constant) -> Constant,
    forward: impl Fn(&Constant) -> Constant,
) -> Result<Constant, Irreversible> {
    let read = |c: &Constant| c.materialize().map_err(|_| Irreversible::Unreadable);
    let expected = read(made)?;
    let wide = Constant::tensor(read(&back(&made.cast(DType::F32)))?);
    for candidate in [wide.cast(made.dtype()), wide] {
        if read(&forward(&candidate).cast(made.dtype()))?.data() == expected.data() {
            return Ok(candidate);
        }
    }
    Err(Irreversible::Arithmetic)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn named(name: &str, shape: &[usize], first: f32) -> Constant {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| first + i as f32).collect();
        Constant::tensor(Tensor::from_f32(shape.to_vec(), &values)).with_origin(name)
    }

    fn numbers(constant: &Constant) -> (Vec<usize>, Vec<f32>) {
        (constant.shape().to_vec(), constant.materialize().unwrap().to_f32())
    }

    #[test]
    fn movements_are_undone() {
        let (a, b) = (named("a", &[2, 3], 1.0), named("b", &[1, 2], -4.0));
        let made = Constant::concat(&[a.transposed(&[1, 0]), b.clone()], 0)
            .reshaped(vec![8])
            .scaled(4.0);
        let recipe = Recipe::of(&made).unwrap();
        assert_eq!(recipe.shape(), made.shape());
        let parts = recipe.take_apart(&made).unwrap();
        let names: Vec<&str> = parts.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(numbers(&parts[0].1), numbers(&a));
        assert_eq!(numbers(&parts[1].1), numbers(&b));
        assert!(recipe.is_arithmetic());
    }

    #[test]
    fn what_was_rounded_or_cut_is_refused() {
        let vector = |values: &[f32]| Constant::tensor(Tensor::from_f32(vec![values.len()], values)).with_origin("v");
        // 1 + w loses bits of a small w, but the inverse gives the same sum.
        let small = vector(&[1e-5, 0.3, -0.9, 7.25]);
        let made = small.offset(1.0);
        let back = &Recipe::of(&made).unwrap().take_apart(&made).unwrap()[0].1;
        assert_eq!(numbers(&back.offset(1.0)), numbers(&made));
        // A number below one half has no w in half precision, but one in fp32.
        let half = vector(&[0.3]).offset(0.0).cast(DType::F16);
        let recipe = Recipe::Offset {
            addend: 1.0,
            of: Box::new(Recipe::of(&vector(&[0.3])).unwrap()),
        };
        let back = &recipe.take_apart(&half).unwrap()[0].1;
        assert_eq!(back.dtype(), DType::F32);
        let odd = Constant::tensor(Tensor::from_f32(vec![1], &[f32::from_bits(0x3f80_0001)]));
        let factor = Recipe::Scale {
            factor: 0.0,
            of: Box::new(Recipe::of(&vector(&[0.0])).unwrap()),
        };
        assert_eq!(factor.take_apart(&odd).err(), Some(Irreversible::Arithmetic));
        let slice = Recipe::of(&named("a", &[4, 2], 0.0).sliced(0, 1, 3)).unwrap();
        assert_eq!(
            slice.take_apart(&named("x", &[2, 2], 0.0)).err(),
            Some(Irreversible::Slice)
        );
    }

    #[test]
    fn recipes_are_alike_whatever_floats_they_read() {
        let recipe = |constant: &Constant| Recipe::of(constant).unwrap();
        let a = named("a", &[2, 3], 1.0);
        let wide = recipe(&a.transposed(&[1, 0]).offset(1.0));
        let half = recipe(&a.cast(DType::F16).transposed(&[1, 0]).cast(DType::F32).offset(1.0));
        assert!(wide.is_like(&half) && half.is_like(&wide));
        assert!(!wide.is_like(&recipe(&a.transposed(&[1, 0]))));
        assert!(!wide.is_like(&recipe(&a.transposed(&[1, 0]).offset(2.0))));
        assert!(!recipe(&a).is_like(&recipe(&named("b", &[2, 3], 1.0))));
    }
}
