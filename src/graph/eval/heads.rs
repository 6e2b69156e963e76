//! Tensors split into heads, and the attention that both attention operators share.

use super::array::{Result, floats};
use super::error::shape_error;
use super::quantization::round_to_codes;
use crate::graph::op::Rounding;
use crate::tensor::{DType, Tensor};

/// Elements as `[batch, heads, tokens, dim]`, row-major.
#[derive(Clone)]
pub(super) struct Heads {
    pub values: Vec<f64>,
    pub batch: usize,
    pub heads: usize,
    pub tokens: usize,
    pub dim: usize,
}

impl Heads {
    /// From `[batch, heads, tokens, dim]`, or from `[batch, tokens, heads*dim]` when the number of heads is given.
    pub fn of(x: &Tensor, num_heads: Option<usize>) -> Result<Heads> {
        match (x.shape(), num_heads) {
            (&[batch, heads, tokens, dim], _) => Ok(Heads {
                values: x.to_f64(),
                batch,
                heads,
                tokens,
                dim,
            }),
            (&[batch, tokens, hidden], Some(heads)) if heads > 0 && hidden.is_multiple_of(heads) => {
                let dim = hidden / heads;
                let flat = x.to_f64();
                let mut values = Vec::with_capacity(flat.len());
                for b in 0..batch {
                    for h in 0..heads {
                        for t in 0..tokens {
                            values.extend_from_slice(&flat[((b * tokens + t) * heads + h) * dim..][..dim]);
                        }
                    }
                }
                Ok(Heads {
                    values,
                    batch,
                    heads,
                    tokens,
                    dim,
                })
            }
            (shape, _) => Err(shape_error(format!(
                "a tensor of shape {shape:?} cannot be split into {num_heads:?} heads"
            ))),
        }
    }

    pub fn zeros(batch: usize, heads: usize, tokens: usize, dim: usize) -> Heads {
        Heads {
            values: vec![0.0; batch * heads * tokens * dim],
            batch,
            heads,
            tokens,
            dim,
        }
    }

    fn at(&self, b: usize, h: usize, t: usize) -> usize {
        ((b * self.heads + h) * self.tokens + t) * self.dim
    }
    /// The vector of one head at one position.
    pub fn row(&self, b: usize, h: usize, t: usize) -> &[f64] {
        &self.values[self.at(b, h, t)..][..self.dim]
    }
    pub fn row_mut(&mut self, b: usize, h: usize, t: usize) -> &mut [f64] {
        let at = self.at(b, h, t);
        &mut self.values[at..][..self.dim]
    }

    /// `[batch, heads, tokens, dim]`
    pub fn tensor_4d(&self, dtype: DType) -> Tensor {
        floats(dtype, vec![self.batch, self.heads, self.tokens, self.dim], &self.values)
    }

    /// `[batch, tokens, heads*dim]`
    pub fn tensor_3d(&self, dtype: DType) -> Tensor {
        let mut flat = Vec::with_capacity(self.values.len());
        for b in 0..self.batch {
            for t in 0..self.tokens {
                for h in 0..self.heads {
                    flat.extend_from_slice(self.row(b, h, t));
                }
            }
        }
        floats(dtype, vec![self.batch, self.tokens, self.heads * self.dim], &flat)
    }

    /// Positions of `self`, then those of `next`.
    pub fn followed_by(&self, next: &Heads) -> Result<Heads> {
        if (self.batch, self.heads, self.dim) != (next.batch, next.heads, next.dim) {
            return Err(shape_error(format!(
                "a past of [{}, {}, {}, {}] cannot be continued by [{}, {}, {}, {}]",
                self.batch, self.heads, self.tokens, self.dim, next.batch, next.heads, next.tokens, next.dim
            )));
        }
        let mut joined = Heads::zeros(self.batch, self.heads, self.tokens + next.tokens, self.dim);
        for b in 0..self.batch {
            for h in 0..self.heads {
                for t in 0..joined.tokens {
                    let row = if t < self.tokens {
                        self.row(b, h, t)
                    } else {
                        next.row(b, h, t - self.tokens)
                    };
                    joined.row_mut(b, h, t).copy_from_slice(row);
                }
            }
        }
        Ok(joined)
    }
}

/// Softmax attention. `bias(b, h, i, j)` is added to the score of query `i` and key `j` after the softcap; a query
/// whose keys are all at minus infinity gives zeros. `sink[h]` adds a score that takes weight but has no value. The
/// roundings are those of scores before and after the softcap, and of probabilities. Returns the output `[batch, heads,
/// queries, v_dim]` and the scores (softcapped, without the bias).
pub(super) fn attend(
    [q, k, v]: [&Heads; 3],
    scale: f64,
    softcap: f64,
    bias: impl Fn(usize, usize, usize, usize) -> f64,
    sink: Option<&[f64]>,
    [round_scores, round_capped, round_shares]: [Option<Rounding>; 3],
) -> Result<(Heads, Heads)> {
    let fits = q.batch == k.batch
        && k.batch == v.batch
        && q.dim == k.dim
        && k.heads == v.heads
        && k.tokens == v.tokens
        && k.heads > 0
        && q.heads.is_multiple_of(k.heads);
    if !fits {
        let shape = |h: &Heads| [h.batch, h.heads, h.tokens, h.dim];
        return Err(shape_error(format!(
            "q of {:?}, k of {:?} and v of {:?} do not fit together",
            shape(q),
            shape(k),
            shape(v)
        )));
    }
    let group = q.heads / k.heads;
    let mut out = Heads::zeros(q.batch, q.heads, q.tokens, v.dim);
    let mut scores = Heads::zeros(q.batch, q.heads, q.tokens, k.tokens);
    let mut weights = vec![0.0; k.tokens];
    let mut dots = vec![0.0; k.tokens];
    for b in 0..q.batch {
        for h in 0..q.heads {
            for i in 0..q.tokens {
                let query = q.row(b, h, i);
                let mut max = sink.map_or(f64::NEG_INFINITY, |s| s[h]);
                for (j, dot) in dots.iter_mut().enumerate() {
                    let sum: f64 = query.iter().zip(k.row(b, h / group, j)).map(|(x, y)| x * y).sum();
                    *dot = sum * scale;
                }
                rounded(&mut dots, round_scores);
                if softcap > 0.0 {
                    dots.iter_mut().for_each(|dot| *dot = softcap * (*dot / softcap).tanh());
                }
                rounded(&mut dots, round_capped);
                for (j, weight) in weights.iter_mut().enumerate() {
                    let score = dots[j];
                    scores.row_mut(b, h, i)[j] = score;
                    // A masked key stays masked whatever its score, infinities and NaNs of unused slots included.
                    let bias = bias(b, h, i, j);
                    *weight = if bias == f64::NEG_INFINITY { bias } else { score + bias };
                    max = max.max(*weight);
                }
                if max == f64::NEG_INFINITY {
                    continue;
                }
                let mut sum = sink.map_or(0.0, |s| (s[h] - max).exp());
                for weight in &mut weights {
                    *weight = (*weight - max).exp();
                    sum += *weight;
                }
                weights.iter_mut().for_each(|weight| *weight /= sum);
                rounded(&mut weights, round_shares);
                let row = out.row_mut(b, h, i);
                for (j, share) in weights.iter().enumerate().filter(|(_, w)| **w != 0.0) {
                    for (o, x) in row.iter_mut().zip(v.row(b, h / group, j)) {
                        *o += share * x;
                    }
                }
            }
        }
    }
    Ok((out, scores))
}

/// Rounds numbers to the values of their codes, in place.
fn rounded(values: &mut [f64], rounding: Option<Rounding>) {
    if let Some(how) = rounding {
        let row = floats(DType::F32, vec![values.len()], values);
        values.copy_from_slice(&round_to_codes(&row, how).to_f64());
    }
}
