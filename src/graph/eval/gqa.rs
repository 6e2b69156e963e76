//! `com.microsoft::GroupQueryAttention` as ONNX Runtime's CPU kernel computes it.

use super::array::{Result, broadcast, broadcast_offsets};
use super::error::{EvalError, invalid, shape_error};
use super::heads::{Heads, attend};
use super::rotary::{Tables, rotate};
use crate::graph::op::GroupQueryAttention;
use crate::tensor::Tensor;

/// Outputs `[y, present_key, present_value]`: y `[batch, tokens, heads*head_dim]`, the others
/// `[batch, kv_heads, slots, head_dim]` with as many slots as the past has, or the total length if that is more.
///
/// `seqlens_k[b] + 1` is the live length of row `b`, this call included; its first new key goes to that length minus
/// the number of tokens (0 in the first call, where shorter rows are padded on the right).
pub(super) fn group_query_attention(
    how: &GroupQueryAttention,
    input: impl Fn(usize) -> Option<Tensor>,
) -> Result<[Tensor; 3]> {
    let needed = |i: usize| input(i).ok_or(EvalError::MissingInput { input: i });
    let query = needed(0)?;
    let dtype = query.dtype();
    let (mut q, mut new_k, new_v) = split_heads(how, &query, input(1), input(2))?;
    let (batch, tokens) = (q.batch, q.tokens);
    let lengths: Vec<i64> = needed(5)?.to_i64().into_iter().map(|n| n + 1).collect();
    if lengths.len() != batch {
        return Err(shape_error(format!(
            "seqlens_k of {} rows for batch {batch}",
            lengths.len()
        )));
    }
    let total = needed(6)?
        .scalar()
        .ok_or_else(|| invalid("total_sequence_length is not a scalar"))? as i64;
    let starts: Vec<usize> = lengths
        .iter()
        .map(|length| match total == tokens as i64 {
            true => Ok(0),
            false => usize::try_from(length - tokens as i64)
                .map_err(|_| invalid(format!("a live length of {length} is less than {tokens} tokens"))),
        })
        .collect::<Result<_>>()?;

    match (input(14), input(15)) {
        (Some(of_queries), Some(of_keys)) => {
            normalize(&mut q, &of_queries, how.qk_norm_epsilon)?;
            normalize(&mut new_k, &of_keys, how.qk_norm_epsilon)?;
        }
        (None, None) => {}
        _ => return Err(invalid("norm weights of queries and keys must come together")),
    }
    if how.do_rotary {
        let positions: Vec<i64> = match input(9) {
            Some(given) => given.to_i64(),
            None => starts
                .iter()
                .flat_map(|s| (0..tokens).map(move |t| (s + t) as i64))
                .collect(),
        };
        let tables = Tables::looked_up(&needed(7)?, &needed(8)?, &positions)?;
        rotate(&mut q, &tables, how.rotary_interleaved)?;
        rotate(&mut new_k, &tables, how.rotary_interleaved)?;
    }

    let present = |past: Option<Tensor>, new: &Heads| -> Result<Heads> {
        let past = past.map(|p| Heads::of(&p, None)).transpose()?;
        let slots = past.as_ref().map_or(0, |p| p.tokens).max(total.max(0) as usize);
        let mut cache = Heads::zeros(batch, new.heads, slots, new.dim);
        for (b, start) in starts.iter().enumerate() {
            for h in 0..new.heads {
                if let Some(past) = &past {
                    for t in 0..past.tokens {
                        cache.row_mut(b, h, t).copy_from_slice(past.row(b, h, t));
                    }
                }
                for t in 0..tokens {
                    if start + t >= slots {
                        return Err(invalid(format!("slot {} of a cache with {slots}", start + t)));
                    }
                    cache.row_mut(b, h, start + t).copy_from_slice(new.row(b, h, t));
                }
            }
        }
        Ok(cache)
    };
    let (k, v) = (present(input(3), &new_k)?, present(input(4), &new_v)?);

    let extra = input(10)
        .map(|bias| Bias::new(&bias, [batch, q.heads, tokens, total.max(0) as usize]))
        .transpose()?;
    let smooth = (how.smooth_softmax == 1).then(|| vec![0.0; q.heads]);
    let sink = input(11).map(|s| s.to_f64()).or(smooth);
    let bias = |b: usize, h: usize, i: usize, j: usize| -> f64 {
        let position = (starts[b] + i) as i64;
        let back = position - j as i64;
        let out_of_window = how.local_window_size > 0 && back >= how.local_window_size;
        if back < 0 || out_of_window {
            f64::NEG_INFINITY
        } else {
            extra.as_ref().map_or(0.0, |e| e.at(b, h, i, j))
        }
    };
    // ONNX Runtime treats a scale of 0 as "not given".
    let scale = match how.scale {
        Some(scale) if scale != 0.0 => f64::from(scale),
        _ => 1.0 / (q.dim as f64).sqrt(),
    };
    let (y, _) = attend(
        [&q, &k, &v],
        scale,
        f64::from(how.softcap),
        bias,
        sink.as_deref(),
        [None; 3],
    )?;
    Ok([y.tensor_3d(dtype), k.tensor_4d(dtype), v.tensor_4d(dtype)])
}

/// RMS normalization of each head, with a weight for each of its elements.
fn normalize(heads: &mut Heads, weight: &Tensor, epsilon: f32) -> Result<()> {
    let weight = weight.to_f64();
    if weight.len() != heads.dim {
        return Err(shape_error(format!(
            "a norm weight of {} elements for heads of {}",
            weight.len(),
            heads.dim
        )));
    }
    for row in heads.values.chunks_mut(heads.dim.max(1)) {
        let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
        let factor = 1.0 / (mean + f64::from(epsilon)).sqrt();
        for (value, weight) in row.iter_mut().zip(&weight) {
            *value *= factor * weight;
        }
    }
    Ok(())
}

/// q, k and v from three tensors, or from one packed `[batch, tokens, (heads + 2*kv_heads)*head_dim]`.
fn split_heads(
    how: &GroupQueryAttention,
    query: &Tensor,
    key: Option<Tensor>,
    value: Option<Tensor>,
) -> Result<(Heads, Heads, Heads)> {
    let (heads, kv) = (how.num_heads, how.kv_num_heads);
    match (key, value) {
        (Some(key), Some(value)) => Ok((
            Heads::of(query, Some(heads))?,
            Heads::of(&key, Some(kv))?,
            Heads::of(&value, Some(kv))?,
        )),
        (None, None) => {
            let packed = Heads::of(query, Some(heads + 2 * kv))?;
            let part = |from: usize, count: usize| {
                let mut part = Heads::zeros(packed.batch, count, packed.tokens, packed.dim);
                for b in 0..packed.batch {
                    for h in 0..count {
                        for t in 0..packed.tokens {
                            part.row_mut(b, h, t).copy_from_slice(packed.row(b, from + h, t));
                        }
                    }
                }
                part
            };
            Ok((part(0, heads), part(heads, kv), part(heads + kv, kv)))
        }
        _ => Err(invalid("key and value must come together")),
    }
}

/// `attention_bias`, broadcast to `[batch, heads, tokens, total]`.
struct Bias {
    values: Vec<f64>,
    offsets: Vec<usize>,
    shape: [usize; 4],
}

impl Bias {
    fn new(bias: &Tensor, shape: [usize; 4]) -> Result<Bias> {
        if broadcast(&[bias.shape(), &shape])? != shape {
            return Err(shape_error(format!(
                "an attention bias of shape {:?} for scores of {shape:?}",
                bias.shape()
            )));
        }
        Ok(Bias {
            values: bias.to_f64(),
            offsets: broadcast_offsets(bias.shape(), &shape),
            shape,
        })
    }

    fn at(&self, b: usize, h: usize, i: usize, j: usize) -> f64 {
        let [_, heads, tokens, total] = self.shape;
        if j >= total {
            return 0.0;
        }
        self.values[self.offsets[((b * heads + h) * tokens + i) * total + j]]
    }
}
