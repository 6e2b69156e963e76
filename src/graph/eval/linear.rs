//! Matrix products.

use std::ops::{Add, Mul};

use super::array::{Data, Result, broadcast, broadcast_offsets, floats, store, transpose, volume};
use super::error::{invalid, shape_error};
use super::{Operands, no_evaluator};
use crate::graph::Op;
use crate::tensor::Tensor;

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let result = match op {
        Op::MatMul => matmul(need(0)?, need(1)?)?,
        Op::Gemm {
            alpha,
            beta,
            trans_a,
            trans_b,
        } => {
            let how = Scaled {
                alpha: *alpha,
                beta: *beta,
                trans_a: *trans_a,
                trans_b: *trans_b,
            };
            let (a, b) = (need(0)?, need(1)?);
            if a.shape().len() != 2 || b.shape().len() != 2 {
                return Err(shape_error(format!("operands {a:?} and {b:?} are not matrices")));
            }
            gemm(&how, a, b, maybe(2))?
        }
        Op::FusedMatMul {
            alpha,
            trans_a,
            trans_b,
        } => {
            let how = Scaled {
                alpha: *alpha,
                beta: 0.0,
                trans_a: *trans_a,
                trans_b: *trans_b,
            };
            gemm(&how, need(0)?, need(1)?, None)?
        }
        _ => return no_evaluator(op),
    };
    Ok(vec![Some(result)])
}

/// Elements of a right operand that are widened at a time: a large weight is never in memory in f64.
const PANEL: usize = 1 << 20;

/// NumPy's `matmul`: the last two axes are matrices, those before broadcast; a vector operand is a row on the left, a
/// column on the right, and its axis is dropped from the result.
pub(super) fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (shape, data) = product(a, b)?;
    Ok(store(a.dtype(), shape, data))
}

/// [`matmul`], before it is rounded to the dtype of the operands.
fn product(a: &Tensor, b: &Tensor) -> Result<(Vec<usize>, Data)> {
    if a.dtype() != b.dtype() {
        return Err(invalid(format!(
            "operands of two dtypes, {} and {}",
            a.dtype(),
            b.dtype()
        )));
    }
    let bad = || {
        shape_error(format!(
            "lhs of shape {:?} cannot be multiplied by rhs of shape {:?}",
            a.shape(),
            b.shape()
        ))
    };
    let (mut left, mut right) = (a.shape().to_vec(), b.shape().to_vec());
    let (row, column) = (left.len() == 1, right.len() == 1);
    if row {
        left.insert(0, 1);
    }
    if column {
        right.push(1);
    }
    let ([left_batch @ .., m, k], [right_batch @ .., k2, n]) = (&left[..], &right[..]) else {
        return Err(bad());
    };
    let (m, k, n) = (*m, *k, *n);
    if k != *k2 {
        return Err(bad());
    }
    let batch = broadcast(&[left_batch, right_batch]).map_err(|_| bad())?;
    let mut shape = batch.clone();
    shape.extend([m, n]);
    let total = volume(&shape)?;
    let left_at = broadcast_offsets(left_batch, &batch);
    let right_at = broadcast_offsets(right_batch, &batch);
    let plan = Plan {
        pairs: left_at.iter().zip(&right_at).map(|(i, j)| (*i, *j)).collect(),
        m,
        k,
        n,
    };
    // One matrix for all rows, like a weight; several are small.
    let rows = match right_batch.is_empty() && n > 0 {
        true => (PANEL / n).clamp(1, k.max(1)),
        false => k,
    };
    let panel = |from: usize| match rows < k {
        true => rows_of(b, from, rows.min(k - from), n),
        false => b.clone(),
    };
    let panels = (0..k).step_by(rows.max(1)).map(|from| (from, panel(from)));
    let data = match Data::of(a) {
        Data::Float(x) => {
            let mut out = vec![0.0; total];
            for (from, panel) in panels {
                plan.add(&x, from, &panel.to_f64(), &mut out);
            }
            Data::Float(out)
        }
        Data::Int(x) => {
            let mut out = vec![0; total];
            for (from, panel) in panels {
                plan.add(&x, from, &panel.to_i64(), &mut out);
            }
            Data::Int(out)
        }
    };
    if column {
        shape.pop();
    }
    if row {
        shape.remove(batch.len());
    }
    Ok((shape, data))
}

/// Rows of a matrix with `n` columns; its bytes are not copied.
fn rows_of(x: &Tensor, from: usize, rows: usize, n: usize) -> Tensor {
    let run = n * x.dtype().element_bytes();
    let bytes = x.data().slice(from * run..(from + rows) * run);
    Tensor::new(x.dtype(), vec![rows, n], bytes).expect("whole rows")
}

/// Which matrices to multiply, by number on each side: `[m, k]` by `[k, n]`.
struct Plan {
    pairs: Vec<(usize, usize)>,
    m: usize,
    k: usize,
    n: usize,
}

impl Plan {
    /// Adds the products with the rows of `b` from row `from` on, or with all of several matrices. Rows of `b` are the inner
    /// loop, so that both matrices are read in order.
    fn add<T: Copy + Add<Output = T> + Mul<Output = T>>(&self, a: &[T], from: usize, b: &[T], out: &mut [T]) {
        let Plan { m, k, n, .. } = *self;
        if n == 0 || k == 0 || m == 0 {
            return;
        }
        let rows = match self.pairs.iter().all(|(_, j)| *j == 0) {
            true => (b.len() / n).min(k),
            false => k,
        };
        for (c, (i, j)) in out.chunks_exact_mut(m * n).zip(&self.pairs) {
            let (a, b) = (&a[i * m * k..][..m * k], &b[j * rows * n..][..rows * n]);
            for (c_row, a_row) in c.chunks_exact_mut(n).zip(a.chunks_exact(k)) {
                for (x, b_row) in a_row[from..].iter().zip(b.chunks_exact(n)) {
                    for (c, y) in c_row.iter_mut().zip(b_row) {
                        *c = *c + *x * *y;
                    }
                }
            }
        }
    }
}

/// The last two axes exchanged.
fn swap_last(x: &Tensor) -> Result<Tensor> {
    let rank = x.shape().len();
    if rank < 2 {
        return Err(shape_error(format!(
            "a tensor of shape {:?} is not a matrix",
            x.shape()
        )));
    }
    let mut perm: Vec<usize> = (0..rank).collect();
    perm.swap(rank - 2, rank - 1);
    Ok(transpose(x, &perm))
}

pub(super) struct Scaled {
    pub alpha: f32,
    pub beta: f32,
    pub trans_a: bool,
    pub trans_b: bool,
}

/// `alpha * a' * b' + beta * c`, the sum in one rounding.
pub(super) fn gemm(how: &Scaled, a: &Tensor, b: &Tensor, c: Option<&Tensor>) -> Result<Tensor> {
    let a = if how.trans_a { swap_last(a)? } else { a.clone() };
    let b = if how.trans_b { swap_last(b)? } else { b.clone() };
    let dtype = a.dtype();
    if !dtype.is_float() {
        let product = matmul(&a, &b)?;
        if how.alpha != 1.0 || how.beta != 1.0 {
            return Err(invalid("a scaled product of integers"));
        }
        return match c {
            Some(c) => super::elementwise::binary(crate::graph::op::Binary::Add, &product, c),
            None => Ok(product),
        };
    }
    // Kept in f64 until the bias is added.
    let (shape, Data::Float(mut values)) = product(&a, &b)? else {
        return Err(invalid(format!("a scaled product of {dtype}")));
    };
    values.iter_mut().for_each(|v| *v *= f64::from(how.alpha));
    if let Some(c) = c {
        if broadcast(&[c.shape(), &shape])? != shape {
            return Err(shape_error(format!(
                "c of shape {:?} does not broadcast to {shape:?}",
                c.shape()
            )));
        }
        let bias = c.to_f64();
        for (value, at) in values.iter_mut().zip(broadcast_offsets(c.shape(), &shape)) {
            *value += f64::from(how.beta) * bias[at];
        }
    }
    Ok(floats(dtype, shape, &values))
}
