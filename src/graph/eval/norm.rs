//! Normalizations, and the contrib operators that add a residual first.

use super::array::{Result, axis, broadcast, broadcast_offsets, floats};
use super::elementwise::binary;
use super::error::shape_error;
use super::{Operands, no_evaluator};
use crate::graph::op::{Binary, Op};
use crate::tensor::{DType, Tensor};

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    let norm = |axis: &i64, epsilon: &f32, center: bool, scale: usize, bias: Option<usize>| -> Result<Norm> {
        Ok(Norm {
            axis: *axis,
            epsilon: *epsilon,
            center,
            scale: need(scale)?,
            bias: bias.and_then(maybe),
        })
    };
    Ok(match op {
        Op::LayerNormalization { axis, epsilon } => {
            let how = norm(axis, epsilon, true, 1, Some(2))?;
            normalize(need(0)?, &how)?.map(Some).into()
        }
        Op::RmsNormalization { axis, epsilon } => {
            let [y, ..] = normalize(need(0)?, &norm(axis, epsilon, false, 1, None)?)?;
            vec![Some(y)]
        }
        Op::SkipRmsNormalization { epsilon } => {
            let how = norm(&-1, epsilon, false, 2, None)?;
            skip(need(0)?, need(1)?, maybe(3), &how)?.map(Some).into()
        }
        Op::SkipLayerNormalization { epsilon } => {
            let how = norm(&-1, epsilon, true, 2, Some(3))?;
            skip(need(0)?, need(1)?, maybe(4), &how)?.map(Some).into()
        }
        _ => return no_evaluator(op),
    })
}

/// The settings of a normalization.
pub(super) struct Norm<'a> {
    pub axis: i64,
    pub epsilon: f32,
    /// Subtract the mean: LayerNormalization does, RMSNormalization does not.
    pub center: bool,
    pub scale: &'a Tensor,
    pub bias: Option<&'a Tensor>,
}

/// The normalized tensor, and per normalized vector the mean and the inverse standard deviation, in fp32.
pub(super) fn normalize(x: &Tensor, how: &Norm) -> Result<[Tensor; 3]> {
    let shape = x.shape();
    let at = axis(how.axis, shape.len())?;
    let length: usize = shape[at..].iter().product();
    let mut values = x.to_f64();
    let (mut means, mut inverses) = (Vec::new(), Vec::new());
    if length > 0 {
        for vector in values.chunks_exact_mut(length) {
            let n = length as f64;
            let mean = if how.center {
                vector.iter().sum::<f64>() / n
            } else {
                0.0
            };
            let variance = vector.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + f64::from(how.epsilon)).sqrt();
            vector.iter_mut().for_each(|v| *v = (*v - mean) * inverse);
            means.push(mean);
            inverses.push(inverse);
        }
    }
    scale_and_shift(&mut values, shape, how)?;
    let mut reduced = shape.to_vec();
    reduced[at..].fill(1);
    let count: usize = reduced.iter().product();
    means.resize(count, f64::NAN);
    inverses.resize(count, f64::NAN);
    Ok([
        floats(x.dtype(), shape.to_vec(), &values),
        floats(DType::F32, reduced.clone(), &means),
        floats(DType::F32, reduced, &inverses),
    ])
}

fn scale_and_shift(values: &mut [f64], shape: &[usize], how: &Norm) -> Result<()> {
    let fits = |t: &Tensor| match broadcast(&[t.shape(), shape]) {
        Ok(both) if both == shape => Ok((t.to_f64(), broadcast_offsets(t.shape(), shape))),
        _ => Err(shape_error(format!(
            "a scale or bias of shape {:?} for a tensor of shape {shape:?}",
            t.shape()
        ))),
    };
    let (scale, offsets) = fits(how.scale)?;
    values.iter_mut().zip(offsets).for_each(|(v, o)| *v *= scale[o]);
    if let Some(bias) = how.bias {
        let (bias, offsets) = fits(bias)?;
        values.iter_mut().zip(offsets).for_each(|(v, o)| *v += bias[o]);
    }
    Ok(())
}

/// The contrib Skip… operators: outputs `[normalized, mean, inverse, x + skip + bias]`.
pub(super) fn skip(x: &Tensor, skip: &Tensor, bias: Option<&Tensor>, how: &Norm) -> Result<[Tensor; 4]> {
    let mut sum = binary(Binary::Add, x, skip)?;
    if sum.shape() != x.shape() {
        return Err(shape_error(format!(
            "a skip of shape {:?} for an input of shape {:?}",
            skip.shape(),
            x.shape()
        )));
    }
    if let Some(bias) = bias {
        sum = binary(Binary::Add, &sum, bias)?;
    }
    let [y, mean, inverse] = normalize(&sum, how)?;
    Ok([y, mean, inverse, sum])
}
