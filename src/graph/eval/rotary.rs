//! Rotary position embedding: ONNX `RotaryEmbedding` and the contrib operator.

use super::array::Result;
use super::error::shape_error;
use super::gather::gather;
use super::heads::Heads;
use crate::tensor::Tensor;

/// cos and sin per row and token: `[batch or 1, tokens, rotary_dim/2]`, looked up by position or given directly.
pub(super) struct Tables {
    cos: Vec<f64>,
    sin: Vec<f64>,
    half: usize,
}

impl Tables {
    /// Rows of `[max_position, rotary_dim/2]` caches, `positions[b * tokens + t]` for each token.
    pub fn looked_up(cos: &Tensor, sin: &Tensor, positions: &[i64]) -> Result<Tables> {
        let (&[_, half], true) = (cos.shape(), cos.shape() == sin.shape()) else {
            return Err(bad_tables(cos, sin));
        };
        // Gathered before they are widened: a table of 131072 positions is 64 MB in f64, for every node that reads it.
        let positions = Tensor::from_i64(vec![positions.len()], positions);
        Ok(Tables {
            cos: gather(cos, &positions, 0)?.to_f64(),
            sin: gather(sin, &positions, 0)?.to_f64(),
            half,
        })
    }

    /// Tables that already hold one row per token, `[batch, tokens, rotary_dim/2]`, the batch perhaps 1.
    fn per_token(cos: &Tensor, sin: &Tensor, batch: usize, tokens: usize) -> Result<Tables> {
        let (&[rows, length, half], true) = (cos.shape(), cos.shape() == sin.shape()) else {
            return Err(bad_tables(cos, sin));
        };
        if (rows != batch && rows != 1) || length != tokens {
            return Err(bad_tables(cos, sin));
        }
        let repeat = |t: &Tensor| t.to_f64().repeat(batch / rows.max(1));
        Ok(Tables {
            cos: repeat(cos),
            sin: repeat(sin),
            half,
        })
    }
}

fn bad_tables(cos: &Tensor, sin: &Tensor) -> super::EvalError {
    shape_error(format!(
        "cos of shape {:?} and sin of shape {:?} do not fit the input",
        cos.shape(),
        sin.shape()
    ))
}

/// Rotates the first `2 * half` elements of every head: pairs `(x[i], x[i + half])`, or `(x[2i], x[2i + 1])` when
/// interleaved. The rest of the head passes through.
pub(super) fn rotate(x: &mut Heads, tables: &Tables, interleaved: bool) -> Result<()> {
    let half = tables.half;
    if 2 * half > x.dim || tables.cos.len() != x.batch * x.tokens * half {
        return Err(shape_error(format!(
            "tables of width {half} for heads of {} in {} rows",
            x.dim,
            x.batch * x.tokens
        )));
    }
    for b in 0..x.batch {
        for h in 0..x.heads {
            for t in 0..x.tokens {
                let at = (b * x.tokens + t) * half;
                let (cos, sin) = (&tables.cos[at..][..half], &tables.sin[at..][..half]);
                let row = x.row_mut(b, h, t);
                for i in 0..half {
                    let (first, second) = if interleaved { (2 * i, 2 * i + 1) } else { (i, i + half) };
                    let (x1, x2) = (row[first], row[second]);
                    row[first] = cos[i] * x1 - sin[i] * x2;
                    row[second] = sin[i] * x1 + cos[i] * x2;
                }
            }
        }
    }
    Ok(())
}

fn finish(x: &Tensor, heads: Heads) -> Tensor {
    if x.shape().len() == 3 {
        heads.tensor_3d(x.dtype())
    } else {
        heads.tensor_4d(x.dtype())
    }
}

pub(super) struct Rotary {
    pub interleaved: bool,
    pub num_heads: Option<usize>,
    pub rotary_dim: usize,
}

pub(super) fn rotary_embedding(
    how: &Rotary,
    x: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
    positions: Option<&Tensor>,
) -> Result<Tensor> {
    let mut heads = Heads::of(x, how.num_heads)?;
    let tables = match positions {
        Some(positions) => {
            let picks = broadcast_positions(positions, heads.batch, heads.tokens)?;
            Tables::looked_up(cos, sin, &picks)?
        }
        None => Tables::per_token(cos, sin, heads.batch, heads.tokens)?,
    };
    let width = if how.rotary_dim == 0 { heads.dim } else { how.rotary_dim };
    if tables.half * 2 != width {
        return Err(bad_tables(cos, sin));
    }
    rotate(&mut heads, &tables, how.interleaved)?;
    Ok(finish(x, heads))
}

/// Positions `[batch, tokens]`, or one row for all.
fn broadcast_positions(positions: &Tensor, batch: usize, tokens: usize) -> Result<Vec<i64>> {
    match *positions.shape() {
        [rows, length] if length == tokens && (rows == batch || rows == 1) => {
            Ok(positions.to_i64().repeat(batch / rows.max(1)))
        }
        _ => Err(shape_error(format!(
            "position_ids of shape {:?} for batch {batch} and {tokens} tokens",
            positions.shape()
        ))),
    }
}

/// The contrib operator: tables are always looked up, and one single position is the offset of the first token.
pub(super) fn contrib_rotary_embedding(
    how: &Rotary,
    x: &Tensor,
    positions: &Tensor,
    cos: &Tensor,
    sin: &Tensor,
) -> Result<Tensor> {
    // Without a head count, the tables' width determines the size of a head.
    let width = cos.shape().last().copied().unwrap_or(0) * 2;
    let from_width = (width > 0).then(|| x.shape().last().copied().unwrap_or(0) / width);
    let mut heads = Heads::of(x, how.num_heads.or(from_width))?;
    let picks = match positions.len() {
        1 => {
            let first = positions.to_i64()[0];
            let row: Vec<i64> = (0..heads.tokens as i64).map(|t| first + t).collect();
            row.repeat(heads.batch)
        }
        _ => broadcast_positions(positions, heads.batch, heads.tokens)?,
    };
    let tables = Tables::looked_up(cos, sin, &picks)?;
    rotate(&mut heads, &tables, how.interleaved)?;
    Ok(finish(x, heads))
}
