//! How a weight is made from named tensors: the part of a [`Constant`]'s derivation that outlives the export.
//!
//! Exporters transpose, fuse and rename. A [`Recipe`] records this without the bytes: a small tree over named tensors,
//! stored in the manifest, from which the same weight is built again with other values. The names at its leaves depend
//! on its owner: initializers of the export, or modules of the model (see [`super::modules`]).

use serde::{Deserialize, Serialize};

use crate::graph::Constant;
use crate::graph::{ConstantSource, Transform};
use crate::tensor::DType;
use crate::tensor::quantize::Format;
use crate::tensor::quantized::Granularity;

/// A tensor computed from named ones. Shapes are those of results.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recipe {
    /// A named tensor, unchanged.
    Tensor {
        /// Name of an initializer, a module or a tensor of a checkpoint.
        name: String,
        /// Its dtype when the recipe was created.
        dtype: DType,
        /// Its required shape.
        shape: Vec<usize>,
    },
    /// Axes permuted as in ONNX `Transpose`.
    Transpose {
        /// The input's axis for each axis of the result.
        perm: Vec<usize>,
        /// The input.
        of: Box<Recipe>,
    },
    /// The same elements under another shape.
    Reshape {
        /// Shape of the result.
        shape: Vec<usize>,
        /// The input.
        of: Box<Recipe>,
    },
    /// Rounded to nearest even.
    Cast {
        /// Element type of the result.
        dtype: DType,
        /// The input.
        of: Box<Recipe>,
    },
    /// `start..end` of an axis.
    Slice {
        /// Axis of the input.
        axis: usize,
        /// First index.
        start: usize,
        /// After the last index.
        end: usize,
        /// The input.
        of: Box<Recipe>,
    },
    /// Concatenated on an axis.
    Concat {
        /// Axis of all parts.
        axis: usize,
        /// In order.
        of: Vec<Recipe>,
    },
    /// Every element times a number, in fp32.
    Scale {
        /// The number.
        factor: f64,
        /// The input.
        of: Box<Recipe>,
    },
    /// Every element plus a number, in fp32.
    Offset {
        /// The number.
        addend: f64,
        /// The input.
        of: Box<Recipe>,
    },
    /// A quantized weight: ONNX's `DequantizeLinear` of its parts.
    Dequantize {
        /// Which codes share a scale.
        granularity: Granularity,
        /// In the shape of the result.
        codes: Box<Recipe>,
        /// In the dtype of the result.
        scales: Box<Recipe>,
        /// In the dtype of the codes; 0 if there are none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        zero_points: Option<Box<Recipe>>,
    },
    /// The codes of a floating-point tensor: ONNX's `QuantizeLinear`.
    Quantize {
        /// Element type of the codes.
        dtype: DType,
        /// Which codes share a scale.
        granularity: Granularity,
        /// In the shape of the result.
        of: Box<Recipe>,
        /// One per group of codes.
        scales: Box<Recipe>,
        /// In the dtype of the codes; 0 if there are none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        zero_points: Option<Box<Recipe>>,
    },
    /// Unsigned codes of b bits minus 2^(b-1), as signed ones; signed codes plus the same, as unsigned ones.
    HalfRange {
        /// Element type of the result.
        dtype: DType,
        /// Codes.
        of: Box<Recipe>,
    },
    /// 4-bit codes with the halves of every byte swapped.
    SwapHalves {
        /// Codes.
        of: Box<Recipe>,
    },
    /// Slices of an axis in the order of indices.
    Take {
        /// Axis of the tensor.
        axis: usize,
        /// The tensor.
        of: Box<Recipe>,
        /// `[n]`, integers.
        indices: Box<Recipe>,
    },
    /// The indices that sort a vector of integers.
    Order {
        /// `[n]`.
        of: Box<Recipe>,
    },
    /// The nearest quantized weight ([`crate::tensor::quantize`]); one that has the format already stays as it is.
    RoundToNearest {
        /// Format of the codes.
        format: Format,
        /// The input.
        of: Box<Recipe>,
    },
    /// Changed by calibration on a text: scaled by factors of rows or columns, or quantized with column importance. It
    /// applies only to the values that were used in the calibration.
    Calibrated {
        /// The recipe without calibration.
        of: Box<Recipe>,
    },
}

/// A named tensor that a recipe needs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Leaf<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its dtype when the recipe was created.
    pub dtype: DType,
    /// Its required shape.
    pub shape: &'a [usize],
}

impl Recipe {
    /// The recipe of a constant, over the names its sources had in the export; `None` if any of them has no name,
    /// which means that a pass computed it.
    pub fn of(constant: &Constant) -> Option<Recipe> {
        let derived = match constant.source() {
            ConstantSource::Derived(derived) => derived,
            ConstantSource::Tensor(_) | ConstantSource::Absent => {
                return Some(Recipe::Tensor {
                    name: constant.origin()?.to_string(),
                    dtype: constant.dtype(),
                    shape: constant.shape().to_vec(),
                });
            }
        };
        if let Some((values, format, weighted)) = constant.quantized_from() {
            let of = Box::new(Recipe::of(values)?);
            let quantized = Recipe::RoundToNearest { format, of };
            return Some(match weighted {
                true => quantized.calibrated(),
                false => quantized,
            });
        }
        let input = || Recipe::of(&derived.inputs[0]).map(Box::new);
        let zero_points = || match derived.inputs.get(2) {
            Some(part) => Recipe::of(part).map(|recipe| Some(Box::new(recipe))),
            None => Some(None),
        };
        Some(match &derived.transform {
            Transform::Transpose(perm) => Recipe::Transpose {
                perm: perm.clone(),
                of: input()?,
            },
            Transform::Reshape => Recipe::Reshape {
                shape: constant.shape().to_vec(),
                of: input()?,
            },
            Transform::Cast => Recipe::Cast {
                dtype: constant.dtype(),
                of: input()?,
            },
            Transform::Slice { axis, start, end } => Recipe::Slice {
                axis: *axis,
                start: *start,
                end: *end,
                of: input()?,
            },
            Transform::Concat { axis } => Recipe::Concat {
                axis: *axis,
                of: derived.inputs.iter().map(Recipe::of).collect::<Option<_>>()?,
            },
            Transform::Scale(factor) => Recipe::Scale {
                factor: *factor,
                of: input()?,
            },
            Transform::Offset(addend) => Recipe::Offset {
                addend: *addend,
                of: input()?,
            },
            Transform::Dequantize(granularity) => Recipe::Dequantize {
                granularity: *granularity,
                codes: input()?,
                scales: Box::new(Recipe::of(&derived.inputs[1])?),
                zero_points: zero_points()?,
            },
            Transform::Quantize(granularity) => Recipe::Quantize {
                dtype: constant.dtype(),
                granularity: *granularity,
                of: input()?,
                scales: Box::new(Recipe::of(&derived.inputs[1])?),
                zero_points: zero_points()?,
            },
            Transform::HalfRange => Recipe::HalfRange {
                dtype: constant.dtype(),
                of: input()?,
            },
            Transform::SwapHalves => Recipe::SwapHalves { of: input()? },
            Transform::Take { axis } => Recipe::Take {
                axis: *axis,
                of: input()?,
                indices: Box::new(Recipe::of(&derived.inputs[1])?),
            },
            Transform::Order => Recipe::Order { of: input()? },
            Transform::Factors { .. } => Recipe::of(&derived.inputs[0])?.calibrated(),
            // Codes alone, without their scales, are no weight.
            Transform::RoundToNearest(_) => return None,
            // Adapters are merged and checkpoints decoded when a package is written, and bytes of codes are for
            // engines; no pass creates such a constant.
            Transform::PlusProduct { .. } | Transform::RowLengths | Transform::Decode(_) | Transform::Bytes => {
                return None;
            }
        })
    }

    /// The recipe of a calibrated weight; applying it twice is the same as once.
    fn calibrated(self) -> Recipe {
        match self {
            Recipe::Calibrated { .. } => self,
            of => Recipe::Calibrated { of: Box::new(of) },
        }
    }

    /// This recipe of a weight's values with the last steps of `whole`, a recipe of the same weight: quantization or
    /// calibration.
    pub fn stored_as(self, whole: Option<&Recipe>) -> Recipe {
        match whole {
            Some(Recipe::RoundToNearest { format, of }) => Recipe::RoundToNearest {
                format: *format,
                of: Box::new(self.stored_as(Some(of))),
            },
            Some(Recipe::Calibrated { of }) => self.stored_as(Some(of)).calibrated(),
            _ => self,
        }
    }

    /// The format that it quantizes values to; `None` if it keeps them, or reads codes.
    pub fn quantizes_to(&self) -> Option<Format> {
        match self {
            Recipe::RoundToNearest { format, .. } => Some(*format),
            Recipe::Calibrated { of } => of.quantizes_to(),
            _ => None,
        }
    }

    /// Whether it is calibrated.
    pub fn is_calibrated(&self) -> bool {
        match self {
            Recipe::Calibrated { .. } => true,
            Recipe::Dequantize { .. } => false,
            // Codes of an export are not calibrated by Lapidary.
            Recipe::Quantize { .. }
            | Recipe::HalfRange { .. }
            | Recipe::SwapHalves { .. }
            | Recipe::Take { .. }
            | Recipe::Order { .. } => false,
            _ => self.parts().into_iter().any(Recipe::is_calibrated),
        }
    }

    /// The named tensors it reads, in order.
    pub fn leaves(&self) -> Vec<Leaf<'_>> {
        let mut leaves = Vec::new();
        self.visit(&mut leaves);
        leaves
    }

    fn visit<'a>(&'a self, leaves: &mut Vec<Leaf<'a>>) {
        match self {
            Recipe::Tensor { name, dtype, shape } => leaves.push(Leaf {
                name,
                dtype: *dtype,
                shape,
            }),
            _ => self.parts().into_iter().for_each(|part| part.visit(leaves)),
        }
    }

    /// The recipes that this one reads, in order.
    pub(super) fn parts(&self) -> Vec<&Recipe> {
        match self {
            Recipe::Tensor { .. } => Vec::new(),
            Recipe::Concat { of, .. } => of.iter().collect(),
            Recipe::Dequantize {
                codes: of,
                scales,
                zero_points,
                ..
            }
            | Recipe::Quantize {
                of,
                scales,
                zero_points,
                ..
            } => [Some(of), Some(scales), zero_points.as_ref()]
                .into_iter()
                .flatten()
                .map(|part| &**part)
                .collect(),
            Recipe::Take { of, indices, .. } => vec![of, indices],
            Recipe::Transpose { of, .. }
            | Recipe::Reshape { of, .. }
            | Recipe::Cast { of, .. }
            | Recipe::Slice { of, .. }
            | Recipe::Scale { of, .. }
            | Recipe::HalfRange { of, .. }
            | Recipe::SwapHalves { of }
            | Recipe::Order { of }
            | Recipe::Offset { of, .. }
            | Recipe::RoundToNearest { of, .. }
            | Recipe::Calibrated { of } => vec![of],
        }
    }

    /// The weight built from other tensors: `tensor` returns the one for a leaf, whose shape must be the leaf's; its
    /// dtype may differ, so the result has the dtype of the last cast, or that of the tensors. `None` if `tensor` had
    /// none.
    pub fn apply(&self, tensor: &mut dyn FnMut(Leaf<'_>) -> Option<Constant>) -> Option<Constant> {
        Some(match self {
            Recipe::Tensor { name, dtype, shape } => {
                let constant = tensor(Leaf {
                    name,
                    dtype: *dtype,
                    shape,
                })?;
                debug_assert_eq!(constant.shape(), shape, "{name}");
                constant
            }
            Recipe::Transpose { perm, of } => of.apply(tensor)?.transposed(perm),
            Recipe::Reshape { shape, of } => of.apply(tensor)?.reshaped(shape.clone()),
            Recipe::Cast { dtype, of } => of.apply(tensor)?.cast(*dtype),
            Recipe::Slice { axis, start, end, of } => of.apply(tensor)?.sliced(*axis, *start, *end),
            Recipe::Concat { axis, of } => {
                let parts = of.iter().map(|part| part.apply(tensor)).collect::<Option<Vec<_>>>()?;
                Constant::concat(&parts, *axis)
            }
            Recipe::Scale { factor, of } => of.apply(tensor)?.scaled(*factor),
            Recipe::Offset { addend, of } => of.apply(tensor)?.offset(*addend),
            Recipe::Dequantize {
                granularity,
                codes,
                scales,
                zero_points,
            } => {
                // Scales are converted to their original float type, so that the weight has the same type.
                let (codes, scales) = (codes.apply(tensor)?, scales.apply(tensor)?.cast(scales.dtype()));
                let zero_points = made_of(zero_points.as_deref(), tensor)?;
                // The code that finds tensors for leaves checks their shapes and dtypes, so the parts fit.
                Constant::quantized(codes, scales, zero_points, *granularity).ok()?
            }
            Recipe::Quantize {
                dtype,
                granularity,
                of,
                scales,
                zero_points,
            } => {
                let (of, scales) = (of.apply(tensor)?, scales.apply(tensor)?.cast(scales.dtype()));
                let zero_points = made_of(zero_points.as_deref(), tensor)?;
                of.quantize(*dtype, scales, zero_points, *granularity).ok()?
            }
            Recipe::HalfRange { dtype, of } => {
                let codes = of.apply(tensor)?;
                match codes.dtype() == *dtype {
                    // The same format, from a file that stores codes like the package.
                    true => codes,
                    false => codes.half_range_moved(),
                }
            }
            Recipe::SwapHalves { of } => of.apply(tensor)?.halves_swapped(),
            Recipe::Take { axis, of, indices } => of.apply(tensor)?.taken(*axis, &indices.apply(tensor)?),
            Recipe::Order { of } => of.apply(tensor)?.order(),
            Recipe::RoundToNearest { format, of } => {
                let made = of.apply(tensor)?;
                match made.as_quantized() {
                    // In this format, or in one that the caller reports.
                    Some(_) => made,
                    // Values are converted to their original float type, so that the scales have the same type.
                    None => made.cast(of.dtype()).quantized_as(*format, None).ok()?,
                }
            }
            Recipe::Calibrated { .. } => return None,
        })
    }

    /// Of the tensor that it makes.
    pub fn dtype(&self) -> DType {
        match self {
            Recipe::Tensor { dtype, .. }
            | Recipe::Cast { dtype, .. }
            | Recipe::Quantize { dtype, .. }
            | Recipe::HalfRange { dtype, .. } => *dtype,
            Recipe::Order { .. } => DType::I64,
            Recipe::Concat { of, .. } => of.first().map_or(DType::F32, Recipe::dtype),
            Recipe::Dequantize { scales, .. } => scales.dtype(),
            Recipe::Transpose { of, .. }
            | Recipe::Reshape { of, .. }
            | Recipe::Slice { of, .. }
            | Recipe::Take { of, .. }
            | Recipe::SwapHalves { of }
            | Recipe::Scale { of, .. }
            | Recipe::Offset { of, .. }
            | Recipe::RoundToNearest { of, .. }
            | Recipe::Calibrated { of } => of.dtype(),
        }
    }

    /// Whether it reads codes of a quantized weight.
    pub fn has_codes(&self) -> bool {
        match self {
            Recipe::Dequantize { .. } => true,
            // Its floats and its integers are not codes yet.
            Recipe::Quantize { .. } | Recipe::Order { .. } => false,
            _ => self.parts().into_iter().any(Recipe::has_codes),
        }
    }

    /// Whether the result's axes are those of the tensor read, in another order.
    pub fn is_transposed(&self) -> bool {
        match self {
            Recipe::Tensor { .. } | Recipe::Concat { .. } | Recipe::Order { .. } => false,
            Recipe::Dequantize { codes, .. } => codes.is_transposed(),
            Recipe::Transpose { perm, of } => perm.windows(2).any(|pair| pair[0] > pair[1]) != of.is_transposed(),
            Recipe::Reshape { of, .. }
            | Recipe::Cast { of, .. }
            | Recipe::Slice { of, .. }
            | Recipe::Scale { of, .. }
            | Recipe::Quantize { of, .. }
            | Recipe::HalfRange { of, .. }
            | Recipe::Take { of, .. }
            | Recipe::SwapHalves { of }
            | Recipe::Offset { of, .. }
            | Recipe::RoundToNearest { of, .. }
            | Recipe::Calibrated { of } => of.is_transposed(),
        }
    }
}

/// An optional part; the outer `None` as in [`Recipe::apply`].
fn made_of(part: Option<&Recipe>, tensor: &mut dyn FnMut(Leaf<'_>) -> Option<Constant>) -> Option<Option<Constant>> {
    match part {
        Some(part) => part.apply(tensor).map(Some),
        None => Some(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    fn iota(shape: Vec<usize>, first: f32) -> Constant {
        let values: Vec<f32> = (0..shape.iter().product()).map(|i: usize| first + i as f32).collect();
        Constant::tensor(Tensor::from_f32(shape, &values))
    }

    /// Every transform, once.
    fn everything(a: &Constant, b: &Constant) -> Constant {
        let joined = Constant::concat(&[a.transposed(&[1, 0]), b.clone()], 0);
        joined
            .sliced(0, 1, 4)
            .scaled(2.0)
            .offset(1.0)
            .cast(DType::F16)
            .reshaped(vec![6])
    }

    #[test]
    fn a_recipe_makes_the_same_weight_of_other_numbers() {
        let named = |first| {
            (
                iota(vec![2, 3], first).with_origin("a"),
                iota(vec![1, 2], -first).with_origin("b"),
            )
        };
        let (a, b) = named(1.0);
        let recipe = Recipe::of(&everything(&a, &b)).unwrap();
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
        let leaves: Vec<_> = recipe.leaves().iter().map(|l| (l.name, l.shape)).collect();
        assert_eq!(leaves, [("a", &[2, 3][..]), ("b", &[1, 2])]);

        let (a, b) = named(10.0);
        let made = recipe.apply(&mut |leaf| Some(if leaf.name == "a" { a.clone() } else { b.clone() }));
        let (made, expected) = (made.unwrap().materialize(), everything(&a, &b).materialize());
        assert_eq!(made.unwrap().data(), expected.unwrap().data());
        assert!(
            recipe
                .apply(&mut |leaf| (leaf.name == "a").then(|| a.clone()))
                .is_none()
        );
    }

    #[test]
    fn what_a_pass_computed_has_no_recipe() {
        assert_eq!(Recipe::of(&iota(vec![2], 0.0)), None);
        let parts = [iota(vec![2], 0.0).with_origin("a"), iota(vec![2], 0.0)];
        assert_eq!(Recipe::of(&Constant::concat(&parts, 0)), None);
    }

    #[test]
    fn a_quantized_weight_is_made_of_named_parts() {
        let named = |first: i64| {
            let codes: Vec<i64> = (0..8).map(|i| (first + i) % 16).collect();
            let codes = Tensor::from_i64_as(DType::U4, vec![2, 4], &codes);
            let zeros = Tensor::from_i64_as(DType::U4, vec![2, 2], &[first % 16; 4]);
            let [codes, zeros] = [codes, zeros].map(Constant::tensor);
            (
                codes.with_origin("q"),
                iota(vec![2, 2], first as f32).with_origin("s"),
                zeros.with_origin("z"),
            )
        };
        let make = |(codes, scales, zeros): (Constant, Constant, Constant)| {
            let blocks = Granularity::Block { axis: 1, size: 2 };
            Constant::quantized(codes, scales, Some(zeros), blocks)
                .unwrap()
                .transposed(&[1, 0])
        };
        let recipe = Recipe::of(&make(named(1))).unwrap();
        assert!(recipe.has_codes() && recipe.is_transposed());
        assert_eq!(recipe.dtype(), DType::F32);
        let text = serde_json::to_string(&recipe).unwrap();
        assert_eq!(serde_json::from_str::<Recipe>(&text).unwrap(), recipe);
        let leaves: Vec<_> = recipe
            .leaves()
            .iter()
            .map(|l| (l.name, l.dtype, l.shape.to_vec()))
            .collect();
        assert_eq!(
            leaves,
            [
                ("q", DType::U4, vec![2, 4]),
                ("s", DType::F32, vec![2, 2]),
                ("z", DType::U4, vec![2, 2])
            ]
        );
        let (codes, scales, zeros) = named(5);
        let mut find = |leaf: Leaf<'_>| {
            Some(match leaf.name {
                "q" => codes.clone(),
                "s" => scales.clone(),
                _ => zeros.clone(),
            })
        };
        let made = recipe.apply(&mut find).unwrap();
        assert!(made.as_quantized().is_some());
        assert_eq!(
            made.materialize().unwrap().data(),
            make(named(5)).materialize().unwrap().data()
        );
    }

    #[test]
    fn two_turns_are_none() {
        let once = Recipe::of(&iota(vec![2, 3], 0.0).with_origin("a").transposed(&[1, 0])).unwrap();
        assert!(once.is_transposed());
        let twice = Recipe::Transpose {
            perm: vec![1, 0],
            of: Box::new(once),
        };
        assert!(!twice.is_transposed());
    }
}
