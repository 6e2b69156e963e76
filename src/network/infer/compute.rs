//! Products, elementwise operations and slices.

use super::checks::{arity, broadcast, broadcast_shapes, check_dtype, is_code, is_number, like};
use super::{LayerFault, Typed};
use crate::dim::{Dim, Sym};
use crate::network::{Elementwise, MatrixOp, Shape, Tensor, UnaryOp};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

pub(super) fn matrix_multiply(op_a: MatrixOp, op_b: MatrixOp, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[2], "2")?;
    check_dtype(0, inputs[0].dtype, DType::is_float, "a float")?;
    like(inputs, 0, 1)?;
    let rank = inputs[0].shape.len();
    if rank < 2 {
        return Err(LayerFault::Rank {
            input: 0,
            found: rank,
            wanted: "2 or more",
        });
    }
    let matrix = |x: &Tensor, op| {
        let (rows, columns) = (x.shape[rank - 2].clone(), x.shape[rank - 1].clone());
        match op {
            MatrixOp::None => (rows, columns),
            MatrixOp::Transpose => (columns, rows),
        }
    };
    let (m, k) = matrix(inputs[0], op_a);
    let (k_b, n) = matrix(inputs[1], op_b);
    if k != k_b {
        return Err(LayerFault::Contraction { left: k, right: k_b });
    }
    let mut shape = broadcast_shapes(&inputs[0].shape[..rank - 2], &inputs[1].shape[..rank - 2])?;
    shape.extend([m, n]);
    Ok((inputs[0].dtype, shape))
}

pub(super) fn elementwise(op: Elementwise, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    use Elementwise as E;
    arity(inputs, &[2], "2")?;
    let dtype = inputs[0].dtype;
    match op {
        E::And | E::Or | E::Xor => check_dtype(0, dtype, |d| d == DType::Bool, "bool")?,
        E::Pow => check_dtype(0, dtype, DType::is_float, "a float")?,
        _ => check_dtype(0, dtype, is_number, "a float, i32 or i64")?,
    }
    like(inputs, 0, 1)?;
    let shape = broadcast(inputs, 0, 1)?;
    let out = match op {
        E::Equal | E::Greater | E::Less => DType::Bool,
        _ => dtype,
    };
    Ok((out, shape))
}

pub(super) fn unary(op: UnaryOp, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[1], "1")?;
    let x = inputs[0];
    match op {
        UnaryOp::Not => check_dtype(0, x.dtype, |d| d == DType::Bool, "bool")?,
        UnaryOp::Sign => check_dtype(0, x.dtype, |d| d.is_float() || d == DType::I32, "a float or i32")?,
        _ => check_dtype(0, x.dtype, DType::is_float, "a float")?,
    }
    let dtype = if op == UnaryOp::IsNan { DType::Bool } else { x.dtype };
    Ok((dtype, x.shape.clone()))
}

pub(super) fn slice(start: &[i64], size: &Shape, stride: &[i64], inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[1], "1")?;
    let x = inputs[0];
    let rank = x.shape.len();
    if [start.len(), size.len(), stride.len()] != [rank; 3] {
        return Err(LayerFault::Parameter(format!(
            "start {start:?}, size {size:?} and stride {stride:?} must have one entry for each of {rank} axes"
        )));
    }
    for (axis, dim) in x.shape.iter().enumerate() {
        let outside = || LayerFault::Slice {
            axis,
            start: start[axis],
            stride: stride[axis],
            size: size[axis].clone(),
            dim: dim.clone(),
        };
        // The first and the last element read. If they depend on `tokens` they are linear, so the two ends of any range
        // of tokens decide; 1 and a large number are used.
        let ends = |tokens: i64| {
            let at = |d: &Dim| d.eval(&[(Sym::tokens(), tokens)].into());
            let (dim, size) = (at(dim)?, at(&size[axis])?);
            let last = start[axis] + stride[axis] * (size - 1);
            let inside = |i: i64| (0..dim).contains(&i);
            Some(size >= 1 && inside(start[axis]) && inside(last))
        };
        let symbolic = dim.as_const().is_none() || size[axis].as_const().is_none();
        let ok = match symbolic {
            false => ends(1).unwrap_or(false),
            true => size[axis] == *dim && start[axis] == 0 && stride[axis] == 1 || ends(1 << 20).unwrap_or(false),
        };
        if !ok {
            return Err(outside());
        }
    }
    Ok((x.dtype, size.clone()))
}

pub(super) fn dequantize(granularity: Granularity, inputs: &[&Tensor]) -> Result<Typed, LayerFault> {
    arity(inputs, &[2], "2")?;
    let (codes, scales) = (inputs[0], inputs[1]);
    if !is_code(codes.dtype) {
        return Err(LayerFault::DType {
            input: 0,
            found: codes.dtype,
            wanted: "i8, i4 or f8e4m3fn",
        });
    }
    check_dtype(1, scales.dtype, DType::is_float, "a float")?;
    let fixed = |x: &Tensor| -> Option<Vec<usize>> {
        x.shape
            .iter()
            .map(|dim| usize::try_from(dim.as_const()?).ok())
            .collect()
    };
    let (Some(shape), Some(found)) = (fixed(codes), fixed(scales)) else {
        return Err(LayerFault::Parameter("codes and scales have fixed shapes".to_string()));
    };
    let expected = granularity
        .scale_shape(&shape)
        .map_err(|error| LayerFault::Parameter(error.to_string()))?;
    if found != expected {
        let reason = format!("the scales have the shape {found:?}; codes {granularity} need {expected:?}");
        return Err(LayerFault::Parameter(reason));
    }
    Ok((scales.dtype, codes.shape.clone()))
}
