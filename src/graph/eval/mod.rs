//! What every operator means: ONNX semantics on concrete tensors.
//!
//! [`eval_op`] computes one operator, [`Evaluator`] values of a [`Graph`](super::Graph) from bindings. Folding runs it on
//! constants; recognition runs masks, positions and rotary tables through it and compares with what they should be;
//! tests use it as the oracle for every rewrite. It is written to be right and plain: floats of every type compute in f64
//! and are rounded once per operator, so results differ from an fp32 engine by that engine's rounding. Speed belongs to
//! `backend::cpu`. [`support`] and [`depends_on`] tell what a value hangs on before anything is run.
//!
//! Nothing here panics on bad operands: shapes, dtypes and indices come from untrusted files, and each failure is an
//! [`EvalError`] that names the node.

mod array;
mod attention;
mod elementwise;
mod error;
mod evaluator;
mod gather;
mod gqa;
mod heads;
mod linear;
mod movement;
mod norm;
mod reduce;
mod rotary;

pub use error::EvalError;
pub use evaluator::{Evaluator, Support, depends_on, support};
pub(crate) use movement::{reshape_target, slice_range};

use crate::graph::op::Op;
use crate::tensor::Tensor;
use norm::Norm;

/// Computes one operator. Outputs the operator can give are all given, wanted or not. `Split` without sizes needs
/// [`eval_node`], which knows how many outputs there are.
pub fn eval_op(op: &Op, inputs: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, EvalError> {
    if matches!(op, Op::Split { .. }) && inputs.get(1).is_none_or(Option::is_none) {
        return Err(EvalError::MissingInput { input: 1 });
    }
    eval_node(op, inputs, 1)
}

/// [`eval_op`] for a node with `outputs` outputs.
pub fn eval_node(op: &Op, inputs: &[Option<Tensor>], outputs: usize) -> Result<Vec<Option<Tensor>>, EvalError> {
    let maybe = |i: usize| inputs.get(i).and_then(Option::as_ref);
    let need = |i: usize| maybe(i).ok_or(EvalError::MissingInput { input: i });
    let result = match op {
        Op::Unary(op) => elementwise::unary(*op, need(0)?)?,
        Op::Binary(op) => elementwise::binary(*op, need(0)?, need(1)?)?,
        Op::Gelu { tanh } => elementwise::gelu(need(0)?, *tanh)?,
        Op::Swish { alpha } => elementwise::swish(need(0)?, *alpha)?,
        Op::Clip => elementwise::clip(need(0)?, maybe(1), maybe(2))?,
        Op::Identity => need(0)?.clone(),
        Op::Cast { to } => elementwise::cast(need(0)?, *to),
        Op::CastLike => elementwise::cast(need(0)?, need(1)?.dtype()),
        Op::Where => elementwise::select(need(0)?, need(1)?, need(2)?)?,
        Op::MatMul => linear::matmul(need(0)?, need(1)?)?,
        Op::Gemm {
            alpha,
            beta,
            trans_a,
            trans_b,
        } => {
            let how = linear::Scaled {
                alpha: *alpha,
                beta: *beta,
                trans_a: *trans_a,
                trans_b: *trans_b,
            };
            let (a, b) = (need(0)?, need(1)?);
            if a.shape().len() != 2 || b.shape().len() != 2 {
                return Err(error::shape_error(format!("operands {a:?} and {b:?} are not matrices")));
            }
            linear::gemm(&how, a, b, maybe(2))?
        }
        Op::FusedMatMul {
            alpha,
            trans_a,
            trans_b,
        } => {
            let how = linear::Scaled {
                alpha: *alpha,
                beta: 0.0,
                trans_a: *trans_a,
                trans_b: *trans_b,
            };
            linear::gemm(&how, need(0)?, need(1)?, None)?
        }
        Op::Softmax { axis } => reduce::softmax(need(0)?, *axis, false)?,
        Op::LogSoftmax { axis } => reduce::softmax(need(0)?, *axis, true)?,
        Op::Reduce {
            reduction,
            keepdims,
            noop_with_empty_axes,
        } => reduce::reduce(*reduction, *keepdims, *noop_with_empty_axes, need(0)?, maybe(1))?,
        Op::CumSum { exclusive, reverse } => reduce::cumsum(need(0)?, need(1)?, *exclusive, *reverse)?,
        Op::Shape { start, end } => movement::shape_of(need(0)?, *start, *end),
        Op::Size => movement::size_of(need(0)?),
        Op::Reshape { allowzero } => movement::reshape_to(need(0)?, need(1)?, *allowzero)?,
        Op::Transpose { perm } => movement::permute(need(0)?, perm.as_deref())?,
        Op::Squeeze => movement::squeeze(need(0)?, maybe(1))?,
        Op::Unsqueeze => movement::unsqueeze(need(0)?, need(1)?)?,
        Op::Flatten { axis } => movement::flatten(need(0)?, *axis)?,
        Op::Expand => movement::expand_to(need(0)?, need(1)?)?,
        Op::Tile => movement::tile(need(0)?, need(1)?)?,
        Op::Concat { axis } => {
            let parts = (0..inputs.len()).map(need).collect::<Result<Vec<_>, _>>()?;
            movement::concat(&parts, *axis)?
        }
        Op::Split { axis } => {
            let parts = movement::split(need(0)?, *axis, maybe(1), outputs)?;
            return Ok(parts.into_iter().map(Some).collect());
        }
        Op::Slice => movement::slice(need(0)?, need(1)?, need(2)?, maybe(3), maybe(4))?,
        Op::Gather { axis } => gather::gather(need(0)?, need(1)?, *axis)?,
        Op::GatherElements { axis } => gather::gather_elements(need(0)?, need(1)?, *axis)?,
        Op::GatherNd { batch_dims } => gather::gather_nd(need(0)?, need(1)?, *batch_dims)?,
        Op::Range => movement::range(need(0)?, need(1)?, need(2)?)?,
        Op::ConstantOfShape { value } => movement::constant_of_shape(need(0)?, value)?,
        Op::Trilu { upper } => movement::trilu(need(0)?, maybe(1), *upper)?,
        Op::ScatterNd { mode } => gather::scatter_nd(need(0)?, need(1)?, need(2)?, *mode)?,
        Op::ScatterElements { axis, mode } => gather::scatter_elements(need(0)?, need(1)?, need(2)?, *axis, *mode)?,
        Op::TensorScatter { axis, circular } => gather::tensor_scatter(need(0)?, need(1)?, maybe(2), *axis, *circular)?,
        Op::LayerNormalization { axis, epsilon } => {
            let how = norm_of(*axis, *epsilon, true, need(1)?, maybe(2));
            return Ok(norm::normalize(need(0)?, &how)?.map(Some).into());
        }
        Op::RmsNormalization { axis, epsilon } => {
            let how = norm_of(*axis, *epsilon, false, need(1)?, None);
            let [y, ..] = norm::normalize(need(0)?, &how)?;
            y
        }
        Op::SkipRmsNormalization { epsilon } => {
            let how = norm_of(-1, *epsilon, false, need(2)?, None);
            return Ok(norm::skip(need(0)?, need(1)?, maybe(3), &how)?.map(Some).into());
        }
        Op::SkipLayerNormalization { epsilon } => {
            let how = norm_of(-1, *epsilon, true, need(2)?, maybe(3));
            return Ok(norm::skip(need(0)?, need(1)?, maybe(4), &how)?.map(Some).into());
        }
        Op::RotaryEmbedding {
            interleaved,
            num_heads,
            rotary_dim,
        }
        | Op::ContribRotaryEmbedding {
            interleaved,
            num_heads,
            rotary_dim,
        } => {
            let how = rotary::Rotary {
                interleaved: *interleaved,
                num_heads: *num_heads,
                rotary_dim: *rotary_dim,
            };
            // The same operator twice, with the inputs in another order and other shapes of tables.
            match op {
                Op::RotaryEmbedding { .. } => rotary::rotary_embedding(&how, need(0)?, need(1)?, need(2)?, maybe(3))?,
                _ => rotary::contrib_rotary_embedding(&how, need(0)?, need(1)?, need(2)?, need(3)?)?,
            }
        }
        Op::Attention(how) => return Ok(attention::attention(how, |i| maybe(i).cloned())?.map(Some).into()),
        Op::GroupQueryAttention(how) => {
            return Ok(gqa::group_query_attention(how, |i| maybe(i).cloned())?.map(Some).into());
        }
        Op::Unknown { domain, op_type } => return Err(EvalError::Unknown(format!("{domain}::{op_type}"))),
    };
    Ok(vec![Some(result)])
}

fn norm_of<'a>(axis: i64, epsilon: f32, center: bool, scale: &'a Tensor, bias: Option<&'a Tensor>) -> Norm<'a> {
    Norm {
        axis,
        epsilon,
        center,
        scale,
        bias,
    }
}

#[cfg(test)]
mod tests;
