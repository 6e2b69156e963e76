//! ONNX `Attention`, opset 23 and 24 (<https://onnx.ai/onnx/operators/onnx__Attention.html>), and the dispatch
//! of the other operators of its family.

use super::array::{Result, broadcast, broadcast_offsets};
use super::error::{EvalError, invalid, shape_error};
use super::gqa::group_query_attention;
use super::heads::{Heads, attend};
use super::rotary::{Rotary, contrib_rotary_embedding, rotary_embedding};
use super::{Operands, no_evaluator};
use crate::graph::op::{Attention, BiasedAttention, Op, RoundedAttention, Rounding};
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    Ok(match op {
        Op::Attention(how) => attention(how, |i| maybe(i).cloned())?.map(Some).into(),
        Op::RoundedAttention(how) => {
            let [y, ..] = rounded_attention(how, |i| maybe(i).cloned())?;
            vec![Some(y)]
        }
        Op::BiasedAttention(how) => {
            let [y, ..] = biased_attention(how, |i| maybe(i).cloned())?;
            vec![Some(y)]
        }
        Op::GroupQueryAttention(how) => group_query_attention(how, |i| maybe(i).cloned())?.map(Some).into(),
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
            let how = Rotary {
                interleaved: *interleaved,
                num_heads: *num_heads,
                rotary_dim: *rotary_dim,
            };
            // The same operator in two forms, with different input orders and table shapes.
            let y = match op {
                Op::RotaryEmbedding { .. } => rotary_embedding(&how, need(0)?, need(1)?, need(2)?, maybe(3))?,
                _ => contrib_rotary_embedding(&how, need(0)?, need(1)?, need(2)?, need(3)?)?,
            };
            vec![Some(y)]
        }
        _ => return no_evaluator(op),
    })
}

/// Outputs `[y, present_key, present_value, scores]`.
///
/// Query `i` is at position `i + offset` among the keys, where the offset is the length of the past, or with
/// `nonpad_kv_seqlen` that row's length minus the number of queries, or 0.
pub(super) fn attention(how: &Attention, input: impl Fn(usize) -> Option<Tensor>) -> Result<[Tensor; 4]> {
    attention_with(how, input, None, [None; 3])
}

/// Like [`attention`], with rounded scores and probabilities.
fn rounded_attention(how: &RoundedAttention, input: impl Fn(usize) -> Option<Tensor>) -> Result<[Tensor; 4]> {
    let roundings = [how.scores, how.capped, how.probabilities];
    attention_with(&how.unrounded(), input, None, roundings)
}

/// Like [`attention`], with slopes and sinks per head.
fn biased_attention(how: &BiasedAttention, input: impl Fn(usize) -> Option<Tensor>) -> Result<[Tensor; 4]> {
    let of_heads = |i: usize| match input(i) {
        Some(numbers) => Ok(numbers.to_f64()),
        None => Err(EvalError::MissingInput { input: i }),
    };
    let biases = [of_heads(4)?, of_heads(5)?];
    let plain = |i: usize| if i < 4 { input(i) } else { None };
    attention_with(&how.unbiased(), plain, Some(biases), [None; 3])
}

fn attention_with(
    how: &Attention,
    input: impl Fn(usize) -> Option<Tensor>,
    slopes_and_sinks: Option<[Vec<f64>; 2]>,
    roundings: [Option<Rounding>; 3],
) -> Result<[Tensor; 4]> {
    let needed = |i: usize| input(i).ok_or(EvalError::MissingInput { input: i });
    let (q_in, k_in, v_in) = (needed(0)?, needed(1)?, needed(2)?);
    let q = Heads::of(&q_in, how.q_num_heads)?;
    let new_k = Heads::of(&k_in, how.kv_num_heads)?;
    let new_v = Heads::of(&v_in, how.kv_num_heads)?;
    let (past_length, k, v) = match (input(4), input(5)) {
        (Some(past_k), Some(past_v)) => {
            let (past_k, past_v) = (Heads::of(&past_k, None)?, Heads::of(&past_v, None)?);
            (past_k.tokens, past_k.followed_by(&new_k)?, past_v.followed_by(&new_v)?)
        }
        (None, None) => (0, new_k, new_v),
        _ => return Err(invalid("past_key and past_value must come together")),
    };
    let lengths = match input(6) {
        Some(t) if t.len() == q.batch => Some(t.to_i64()),
        Some(t) => return Err(shape_error(format!("nonpad_kv_seqlen of shape {:?}", t.shape()))),
        None => None,
    };
    let mask = input(3)
        .map(|mask| Mask::new(&mask, [q.batch, q.heads, q.tokens, k.tokens]))
        .transpose()?;
    if let Some(biases) = &slopes_and_sinks
        && biases.iter().any(|of_heads| of_heads.len() != q.heads)
    {
        let lengths = biases.each_ref().map(Vec::len);
        return Err(shape_error(format!(
            "slopes and sinks of {lengths:?} heads for {}",
            q.heads
        )));
    }
    let (slopes, sinks) = match &slopes_and_sinks {
        Some([slopes, sinks]) => (Some(slopes), Some(&sinks[..])),
        None => (None, None),
    };
    let bias = |b: usize, h: usize, i: usize, j: usize| -> f64 {
        let offset = match &lengths {
            Some(lengths) => lengths[b] - q.tokens as i64,
            None => past_length as i64,
        };
        let future = how.is_causal && j as i64 > i as i64 + offset;
        let padding = lengths.as_ref().is_some_and(|l| j as i64 >= l[b]);
        if future || padding {
            f64::NEG_INFINITY
        } else {
            let slope = slopes.map_or(0.0, |slopes| slopes[h] * j as f64);
            slope + mask.as_ref().map_or(0.0, |m| m.bias(b, h, i, j))
        }
    };
    let scale = how.scale.map_or(1.0 / (q.dim as f64).sqrt(), f64::from);
    let (y, scores) = attend([&q, &k, &v], scale, f64::from(how.softcap), bias, sinks, roundings)?;
    let dtype = q_in.dtype();
    let y = if q_in.shape().len() == 3 {
        y.tensor_3d(dtype)
    } else {
        y.tensor_4d(dtype)
    };
    Ok([
        y,
        k.tensor_4d(k_in.dtype()),
        v.tensor_4d(v_in.dtype()),
        scores.tensor_4d(dtype),
    ])
}

/// A mask as numbers to add, broadcast to `[batch, heads, queries, keys]`. A mask shorter than the keys is extended
/// with "masked out".
struct Mask {
    additive: Vec<f64>,
    offsets: Vec<usize>,
    /// The broadcast shape; its last axis may be shorter than the keys.
    shape: [usize; 4],
}

impl Mask {
    fn new(mask: &Tensor, [batch, heads, queries, keys]: [usize; 4]) -> Result<Mask> {
        let own = mask.shape();
        let width = *own.last().unwrap_or(&1);
        let shape = [batch, heads, queries, width.min(keys)];
        let fits = own.len() <= 4
            && (1..=keys.max(1)).contains(&width)
            && broadcast(&[own, &shape]).is_ok_and(|both| both == shape);
        if !fits {
            return Err(shape_error(format!(
                "a mask of shape {own:?} for scores of shape {:?}",
                [batch, heads, queries, keys]
            )));
        }
        let additive = match mask.dtype() {
            DType::Bool => {
                let chosen = mask.to_i64();
                chosen
                    .iter()
                    .map(|c| if *c != 0 { 0.0 } else { f64::NEG_INFINITY })
                    .collect()
            }
            dtype if dtype.is_float() => mask.to_f64(),
            dtype => {
                return Err(EvalError::DType {
                    what: "the mask",
                    dtype,
                });
            }
        };
        Ok(Mask {
            additive,
            offsets: broadcast_offsets(own, &shape),
            shape,
        })
    }

    fn bias(&self, b: usize, h: usize, i: usize, j: usize) -> f64 {
        let [_, heads, queries, width] = self.shape;
        if j >= width {
            return f64::NEG_INFINITY;
        }
        self.additive[self.offsets[((b * heads + h) * queries + i) * width + j]]
    }
}
