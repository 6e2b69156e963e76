//! The rules of each layer: its inputs, and the dtype and shape of its outputs.
//!
//! The one place for TensorRT's documented rules (`NvInfer.h` of TensorRT-RTX 1.6 and the operator pages): equal ranks,
//! only dims of size 1 broadcast, no implicit conversion. `builder` applies them to every layer it adds, `verify` again
//! to a whole network, so that no back end gets an invalid layer. Where the documentation leaves a dtype open (booleans
//! in comparisons, integers in unary layers) the rule here is the strict one; lowering works around it.

mod checks;
mod compute;
mod experts;
mod kernel_layers;
mod transformer;

use super::{LayerKind, ReduceOp, Shape, Tensor, Weight};
use crate::dim::Dim;
use crate::tensor::DType;
pub(crate) use checks::volume;
use checks::{
    arity, broadcast, broadcast_shapes, check_axes, check_dtype, check_extent, equal_ranks, is_code, is_computed,
    is_index, is_number, like, permuted, same,
};
use compute::{dequantize, elementwise, matrix_multiply, slice, unary};
use experts::{expert_layer, top_k};
use transformer::{attention, kv_cache_update, normalization, rotary};

/// TensorRT supports at most eight dims.
pub const MAX_RANK: usize = 8;

/// What is wrong with one layer. [`LayerError`](super::LayerError) adds the layer and its inputs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum LayerFault {
    #[error("takes {expected} inputs, not {found}")]
    Arity { expected: &'static str, found: usize },
    #[error("input {input} is {found}, but must be {wanted}")]
    DType {
        input: usize,
        found: DType,
        wanted: &'static str,
    },
    #[error("inputs {left} and {right} differ in dtype; TensorRT has no implicit conversion, so one needs a Cast")]
    UnlikeDTypes { left: usize, right: usize },
    #[error("inputs {left} and {right} differ in rank; the smaller needs a Shuffle that adds leading 1s")]
    UnlikeRanks { left: usize, right: usize },
    #[error("input {input} has rank {found}, but must have {wanted}")]
    Rank {
        input: usize,
        found: usize,
        wanted: &'static str,
    },
    #[error("dims {left} and {right} of axis {axis} do not broadcast: only a 1 does")]
    Broadcast { axis: usize, left: Dim, right: Dim },
    #[error("the inner dims {left} and {right} of the product differ")]
    Contraction { left: Dim, right: Dim },
    #[error("{what} must be {wanted}, not {found}")]
    Extent { what: String, wanted: Dim, found: Dim },
    #[error("axis {axis} does not exist in rank {rank}")]
    Axis { axis: usize, rank: usize },
    #[error("{order:?} is not a permutation of {rank} axes")]
    Permutation { order: Vec<usize>, rank: usize },
    #[error("the volume of {from:?} is not that of {to:?}")]
    Volume { from: Shape, to: Shape },
    #[error("the slice of axis {axis} from {start} with stride {stride} to {size} elements exceeds its {dim}")]
    Slice {
        axis: usize,
        start: i64,
        stride: i64,
        size: Dim,
        dim: Dim,
    },
    #[error("the result would have {0} axes; TensorRT has at most 8")]
    TooManyAxes(usize),
    #[error("{0}")]
    Parameter(String),
}

/// Dtype and shape of one output.
pub type Typed = (DType, Shape);

/// The outputs of a layer over these inputs. `fill` is the dtype of a [`LayerKind::Fill`], which has no input that
/// determines it.
pub(super) fn infer(
    kind: &LayerKind,
    inputs: &[&Tensor],
    weights: &[Weight],
    fill: Option<DType>,
) -> Result<Vec<Typed>, LayerFault> {
    let typed = match kind {
        LayerKind::Weight(id) => {
            arity(inputs, &[0], "no")?;
            let weight = weights
                .get(id.0 as usize)
                .ok_or_else(|| LayerFault::Parameter(format!("there is no weight number {}", id.0)))?;
            let dtype = weight.constant.dtype();
            if !is_computed(dtype) && !is_code(dtype) {
                return Err(LayerFault::Parameter(format!("no layer reads a weight of {dtype}")));
            }
            let shape = weight.constant.shape().iter().map(|d| Dim::from(*d)).collect();
            (dtype, shape)
        }
        LayerKind::Constant(tensor) => {
            arity(inputs, &[0], "no")?;
            if tensor.is_empty() {
                return Err(LayerFault::Parameter(format!("the constant {tensor:?} is empty")));
            }
            if tensor.dtype().is_storage_only() {
                return Err(LayerFault::Parameter(format!(
                    "no layer computes with the constant {tensor:?}"
                )));
            }
            let shape = tensor.shape().iter().map(|d| Dim::from(*d)).collect();
            (tensor.dtype(), shape)
        }
        LayerKind::MatrixMultiply { op_a, op_b } => matrix_multiply(*op_a, *op_b, inputs)?,
        LayerKind::Elementwise(op) => elementwise(*op, inputs)?,
        LayerKind::Unary(op) => unary(*op, inputs)?,
        LayerKind::Activation(_) => {
            arity(inputs, &[1], "1")?;
            check_dtype(0, inputs[0].dtype, DType::is_float, "a float")?;
            same(inputs[0])
        }
        LayerKind::Reduce { op, axes, keep_dims } => {
            arity(inputs, &[1], "1")?;
            let x = inputs[0];
            match op {
                ReduceOp::Avg => check_dtype(0, x.dtype, DType::is_float, "a float")?,
                _ => check_dtype(0, x.dtype, is_number, "a float, i32 or i64")?,
            }
            check_axes(axes, x.shape.len())?;
            let dims = x.shape.iter().enumerate();
            let shape = dims.filter_map(|(i, dim)| match (axes.contains(&i), keep_dims) {
                (false, _) => Some(dim.clone()),
                (true, true) => Some(Dim::from(1usize)),
                (true, false) => None,
            });
            (x.dtype, shape.collect())
        }
        LayerKind::Softmax { axis } => {
            arity(inputs, &[1], "1")?;
            check_dtype(0, inputs[0].dtype, DType::is_float, "a float")?;
            check_axes(&[*axis], inputs[0].shape.len())?;
            same(inputs[0])
        }
        LayerKind::Shuffle { first, reshape, second } => {
            arity(inputs, &[1], "1")?;
            let mut shape = inputs[0].shape.clone();
            if let Some(order) = first {
                shape = permuted(&shape, order)?;
            }
            if let Some(to) = reshape {
                if volume(&shape) != volume(to) {
                    return Err(LayerFault::Volume {
                        from: shape,
                        to: to.clone(),
                    });
                }
                shape.clone_from(to);
            }
            if let Some(order) = second {
                shape = permuted(&shape, order)?;
            }
            (inputs[0].dtype, shape)
        }
        LayerKind::Slice { start, size, stride } => slice(start, size, stride, inputs)?,
        LayerKind::Concatenation { axis } => {
            let Some(head) = inputs.first() else {
                return Err(LayerFault::Arity {
                    expected: "1 or more",
                    found: 0,
                });
            };
            check_axes(&[*axis], head.shape.len())?;
            let mut shape = head.shape.clone();
            for (i, part) in inputs.iter().enumerate().skip(1) {
                like(inputs, 0, i)?;
                for (a, dim) in part.shape.iter().enumerate() {
                    if a == *axis {
                        shape[a] = &shape[a] + dim;
                    } else {
                        check_extent(|| format!("axis {a} of input {i}"), &shape[a], dim)?;
                    }
                }
            }
            (head.dtype, shape)
        }
        LayerKind::Gather { axis } => {
            arity(inputs, &[2], "2")?;
            let (data, indices) = (inputs[0], inputs[1]);
            check_dtype(1, indices.dtype, is_index, "i32 or i64")?;
            check_axes(&[*axis], data.shape.len())?;
            let (before, after) = (&data.shape[..*axis], &data.shape[*axis + 1..]);
            (data.dtype, [before, &indices.shape, after].concat())
        }
        LayerKind::Select => {
            arity(inputs, &[3], "3")?;
            check_dtype(0, inputs[0].dtype, |d| d == DType::Bool, "bool")?;
            check_dtype(1, inputs[1].dtype, is_number, "a float, i32 or i64")?;
            like(inputs, 1, 2)?;
            let chosen = broadcast(inputs, 1, 2)?;
            equal_ranks(inputs, 0, 1)?;
            let shape = broadcast_shapes(&inputs[0].shape, &chosen)?;
            (inputs[1].dtype, shape)
        }
        LayerKind::Cast { to } => {
            arity(inputs, &[1], "1")?;
            check_dtype(0, inputs[0].dtype, is_computed, "a type that layers compute with")?;
            if !is_computed(*to) {
                return Err(LayerFault::Parameter(format!("no layer computes with {to}")));
            }
            (*to, inputs[0].shape.clone())
        }
        LayerKind::Fill { length, .. } => {
            arity(inputs, &[0], "no")?;
            let dtype =
                fill.ok_or_else(|| LayerFault::Parameter("a Fill needs the dtype of its output".to_string()))?;
            if !matches!(dtype, DType::I32 | DType::F32) {
                return Err(LayerFault::Parameter(format!("a Fill gives i32 or f32, not {dtype}")));
            }
            (dtype, vec![length.clone()])
        }
        LayerKind::Normalization { axes, .. } => normalization(axes, inputs)?,
        LayerKind::RotaryEmbedding { rotary_dim, .. } => rotary(*rotary_dim, inputs)?,
        LayerKind::Attention => attention(inputs)?,
        LayerKind::Dequantize(granularity) => dequantize(*granularity, inputs)?,
        LayerKind::TopK { k, part } => top_k(*k, *part, inputs)?,
        LayerKind::Experts { experts, .. } => expert_layer(*experts, inputs)?,
        LayerKind::KvCacheUpdate => kv_cache_update(inputs)?,
        LayerKind::RowProduct(product) => kernel_layers::row_product(product, inputs)?,
        LayerKind::DecodeAttention(attention) => return kernel_layers::decode_attention(attention, inputs),
    };
    if typed.1.len() > MAX_RANK {
        return Err(LayerFault::TooManyAxes(typed.1.len()));
    }
    Ok(vec![typed])
}
