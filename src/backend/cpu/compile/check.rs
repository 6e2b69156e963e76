//! The rules of each layer on static shapes.
//!
//! The kernels trust these with raw pointers, so the compiler checks every layer itself, whether or not the network was
//! verified before.

use crate::network::{Elementwise, Layer, LayerKind, MatrixOp, Network, UnaryOp};
use crate::tensor::DType;

/// A dtype and a static shape.
pub type Type = (DType, Vec<usize>);

/// A name for messages.
pub fn kind_name(kind: &LayerKind) -> &'static str {
    match kind {
        LayerKind::Weight(_) => "weight",
        LayerKind::Constant(_) => "constant",
        LayerKind::MatrixMultiply { .. } => "matrix multiply",
        LayerKind::Elementwise(_) => "elementwise",
        LayerKind::Unary(_) => "unary",
        LayerKind::Activation(_) => "activation",
        LayerKind::Reduce { .. } => "reduce",
        LayerKind::Softmax { .. } => "softmax",
        LayerKind::Shuffle { .. } => "shuffle",
        LayerKind::Slice { .. } => "slice",
        LayerKind::Concatenation { .. } => "concatenation",
        LayerKind::Gather { .. } => "gather",
        LayerKind::Select => "select",
        LayerKind::Cast { .. } => "cast",
        LayerKind::Fill { .. } => "fill",
        LayerKind::Normalization { .. } => "normalization",
        LayerKind::RotaryEmbedding { .. } => "rotary embedding",
        LayerKind::Attention => "attention",
        LayerKind::KvCacheUpdate => "KV-cache update",
    }
}

macro_rules! ensure {
    ($condition:expr, $($message:tt)*) => {
        if !$condition {
            return Err(format!($($message)*));
        }
    };
}

fn arity(kind: &LayerKind) -> std::ops::RangeInclusive<usize> {
    match kind {
        LayerKind::Weight(_) | LayerKind::Constant(_) | LayerKind::Fill { .. } => 0..=0,
        LayerKind::MatrixMultiply { .. } | LayerKind::Elementwise(_) | LayerKind::Gather { .. } => 2..=2,
        LayerKind::Unary(_)
        | LayerKind::Activation(_)
        | LayerKind::Reduce { .. }
        | LayerKind::Softmax { .. }
        | LayerKind::Shuffle { .. }
        | LayerKind::Slice { .. }
        | LayerKind::Cast { .. } => 1..=1,
        LayerKind::Concatenation { .. } => 1..=usize::MAX,
        LayerKind::Select | LayerKind::Normalization { .. } | LayerKind::KvCacheUpdate => 3..=3,
        LayerKind::RotaryEmbedding { .. } => 4..=4,
        LayerKind::Attention => 3..=4,
    }
}

/// The common shape of operands that broadcast where 1.
fn broadcast(shapes: &[&[usize]]) -> Result<Vec<usize>, String> {
    let mut out = shapes[0].to_vec();
    for shape in &shapes[1..] {
        ensure!(shape.len() == out.len(), "operands of unequal rank {out:?} and {shape:?}");
        for (o, d) in out.iter_mut().zip(*shape) {
            ensure!(*o == *d || *o == 1 || *d == 1, "shapes {:?} and {shape:?} do not broadcast", shapes[0]);
            *o = if *o == 1 { *d } else { *o };
        }
    }
    Ok(out)
}

fn check_permutation(perm: &[usize], rank: usize) -> Result<(), String> {
    let mut seen = vec![false; rank];
    ensure!(perm.len() == rank, "permutation {perm:?} of rank {rank}");
    for p in perm {
        ensure!(*p < rank && !std::mem::replace(&mut seen[*p], true), "{perm:?} is no permutation");
    }
    Ok(())
}

fn check_axes(axes: &[usize], rank: usize) -> Result<(), String> {
    let mut seen = vec![false; rank];
    for axis in axes {
        ensure!(*axis < rank, "axis {axis} of rank {rank}");
        ensure!(!std::mem::replace(&mut seen[*axis], true), "axis {axis} twice");
    }
    Ok(())
}

fn constant_shape(shape: &crate::network::Shape) -> Result<Vec<usize>, String> {
    shape
        .iter()
        .map(|d| {
            let value = d.as_const().ok_or_else(|| format!("the dim {d} is not a number"))?;
            usize::try_from(value).map_err(|_| format!("the dim {d} is negative"))
        })
        .collect()
}

/// The dtypes and shapes of the outputs, or what is wrong with the layer.
pub fn outputs(network: &Network, layer: &Layer, inputs: &[Type]) -> Result<Vec<Type>, String> {
    let kind = &layer.kind;
    ensure!(arity(kind).contains(&inputs.len()), "{} inputs", inputs.len());
    ensure!(layer.outputs.len() == 1, "{} outputs", layer.outputs.len());
    let shape = |i: usize| inputs[i].1.as_slice();
    let dtype = |i: usize| inputs[i].0;
    for (dtype, shape) in inputs {
        ensure!(*dtype != DType::F64, "f64 is not executed");
        ensure!(shape.len() <= 8, "rank {}", shape.len());
    }
    let float = |i: usize| -> Result<(), String> {
        ensure!(dtype(i).is_float(), "input {i} is {}, not a float", dtype(i));
        Ok(())
    };
    let index = |i: usize| -> Result<(), String> {
        ensure!(matches!(dtype(i), DType::I32 | DType::I64), "input {i} is {}, not i32 or i64", dtype(i));
        Ok(())
    };
    let rank = |i: usize, rank: usize| -> Result<(), String> {
        ensure!(shape(i).len() == rank, "input {i} has shape {:?}, not rank {rank}", shape(i));
        Ok(())
    };
    let same = |i: usize, j: usize| -> Result<(), String> {
        ensure!(dtype(i) == dtype(j), "inputs of {} and {}", dtype(i), dtype(j));
        Ok(())
    };
    let one: Type = match kind {
        LayerKind::Weight(id) => {
            let weight = network.weights.get(id.0 as usize).ok_or("no such weight")?;
            (weight.constant.dtype(), weight.constant.shape().to_vec())
        }
        LayerKind::Constant(tensor) => (tensor.dtype(), tensor.shape().to_vec()),
        LayerKind::MatrixMultiply { op_a, op_b } => {
            let (a, b) = (shape(0), shape(1));
            float(0)?;
            float(1)?;
            ensure!(a.len() == b.len() && a.len() >= 2, "shapes {a:?} and {b:?}");
            let split = a.len() - 2;
            let matrix = |s: &[usize], op: &MatrixOp| match op {
                MatrixOp::None => (s[split], s[split + 1]),
                MatrixOp::Transpose => (s[split + 1], s[split]),
            };
            let ((m, k), (k2, n)) = (matrix(a, op_a), matrix(b, op_b));
            ensure!(k == k2, "sums over {k} and {k2} elements: {a:?} by {b:?} with {op_a:?}, {op_b:?}");
            let mut out = broadcast(&[&a[..split], &b[..split]])?;
            out.extend([m, n]);
            (dtype(0), out)
        }
        LayerKind::Elementwise(op) => {
            same(0, 1)?;
            let out = broadcast(&[shape(0), shape(1)])?;
            let logic = matches!(op, Elementwise::And | Elementwise::Or | Elementwise::Xor);
            let comparison = matches!(op, Elementwise::Equal | Elementwise::Greater | Elementwise::Less);
            let bools = dtype(0) == DType::Bool;
            ensure!(!logic || bools, "{op:?} of {}", dtype(0));
            ensure!(!bools || logic || *op == Elementwise::Equal, "{op:?} of bools");
            (if logic || comparison { DType::Bool } else { dtype(0) }, out)
        }
        LayerKind::Unary(op) => {
            let fits = match op {
                UnaryOp::Not => dtype(0) == DType::Bool,
                UnaryOp::Abs | UnaryOp::Neg | UnaryOp::Sign => dtype(0) != DType::Bool,
                _ => dtype(0).is_float(),
            };
            ensure!(fits, "{op:?} of {}", dtype(0));
            let out = if *op == UnaryOp::IsNan { DType::Bool } else { dtype(0) };
            (out, shape(0).to_vec())
        }
        LayerKind::Activation(_) => {
            float(0)?;
            inputs[0].clone()
        }
        LayerKind::Reduce { axes, keep_dims, .. } => {
            check_axes(axes, shape(0).len())?;
            ensure!(dtype(0) != DType::Bool, "a reduction of bools");
            let kept = shape(0).iter().enumerate().filter_map(|(i, d)| match axes.contains(&i) {
                false => Some(*d),
                true => keep_dims.then_some(1),
            });
            (dtype(0), kept.collect())
        }
        LayerKind::Softmax { axis } => {
            float(0)?;
            check_axes(&[*axis], shape(0).len())?;
            inputs[0].clone()
        }
        LayerKind::Shuffle { first, reshape, second } => {
            let mut out = shape(0).to_vec();
            if let Some(perm) = first {
                check_permutation(perm, out.len())?;
                out = perm.iter().map(|p| out[*p]).collect();
            }
            if let Some(target) = reshape {
                let target = constant_shape(target)?;
                let volume = |s: &[usize]| s.iter().product::<usize>();
                ensure!(volume(&target) == volume(&out), "reshape of {out:?} to {target:?}");
                out = target;
            }
            if let Some(perm) = second {
                check_permutation(perm, out.len())?;
                out = perm.iter().map(|p| out[*p]).collect();
            }
            (dtype(0), out)
        }
        LayerKind::Slice { start, size, stride } => {
            let size = constant_shape(size)?;
            let dims = shape(0);
            ensure!(
                start.len() == dims.len() && size.len() == dims.len() && stride.len() == dims.len(),
                "start {start:?}, size {size:?}, stride {stride:?} of {dims:?}"
            );
            for (axis, dim) in dims.iter().enumerate() {
                let last = (size[axis] as i64 - 1)
                    .checked_mul(stride[axis])
                    .and_then(|n| n.checked_add(start[axis]));
                let inside = |i: i64| (0..*dim as i64).contains(&i);
                ensure!(
                    size[axis] == 0 || (inside(start[axis]) && last.is_some_and(inside)),
                    "start {start:?}, size {size:?}, stride {stride:?} reach outside {dims:?}"
                );
            }
            (dtype(0), size)
        }
        LayerKind::Concatenation { axis } => {
            let mut out = shape(0).to_vec();
            check_axes(&[*axis], out.len())?;
            for i in 1..inputs.len() {
                same(0, i)?;
                let other = shape(i);
                let fits = other.len() == out.len() && (0..out.len()).all(|d| d == *axis || other[d] == out[d]);
                ensure!(fits, "parts {:?} and {other:?} on axis {axis}", shape(0));
                out[*axis] += other[*axis];
            }
            (dtype(0), out)
        }
        LayerKind::Gather { axis } => {
            index(1)?;
            check_axes(&[*axis], shape(0).len())?;
            let (before, after) = (&shape(0)[..*axis], &shape(0)[*axis + 1..]);
            (dtype(0), [before, shape(1), after].concat())
        }
        LayerKind::Select => {
            ensure!(dtype(0) == DType::Bool, "the condition is {}", dtype(0));
            same(1, 2)?;
            (dtype(1), broadcast(&[shape(0), shape(1), shape(2)])?)
        }
        LayerKind::Cast { to } => {
            ensure!(*to != DType::F64, "f64 is not executed");
            (*to, shape(0).to_vec())
        }
        LayerKind::Fill { length, .. } => {
            let dtype = network.tensor(layer.outputs[0]).dtype;
            ensure!(matches!(dtype, DType::I32 | DType::I64 | DType::F32), "a fill of {dtype}");
            (dtype, constant_shape(&vec![length.clone()])?)
        }
        LayerKind::Normalization { axes, .. } => {
            (0..3).try_for_each(float)?;
            check_axes(axes, shape(0).len())?;
            ensure!(!axes.is_empty(), "no axes");
            let wanted: Vec<usize> = shape(0)
                .iter()
                .enumerate()
                .map(|(i, d)| if axes.contains(&i) { *d } else { 1 })
                .collect();
            for i in 1..3 {
                ensure!(shape(i) == wanted, "input {i} has shape {:?}, not {wanted:?}", shape(i));
            }
            inputs[0].clone()
        }
        LayerKind::RotaryEmbedding { rotary_dim, .. } => {
            (0..3).try_for_each(float)?;
            index(3)?;
            rank(0, 4)?;
            same(1, 2)?;
            let x = shape(0);
            let half = rotary_dim / 2;
            ensure!(rotary_dim % 2 == 0 && *rotary_dim <= x[3], "rotary dim {rotary_dim} of {x:?}");
            ensure!(
                shape(1).len() == 2 && shape(1)[1] == half && shape(2) == shape(1),
                "tables {:?} and {:?}, not [max_position, {half}]",
                shape(1),
                shape(2)
            );
            ensure!(shape(3) == [x[0], x[2]], "positions {:?} for {x:?}", shape(3));
            inputs[0].clone()
        }
        LayerKind::Attention => {
            for i in 0..3 {
                float(i)?;
                rank(i, 4)?;
            }
            let (q, k) = (shape(0), shape(1));
            ensure!(shape(2) == k && q[0] == k[0] && q[3] == k[3], "q {q:?}, k {k:?}, v {:?}", shape(2));
            ensure!(k[1] > 0 && q[1] % k[1] == 0, "{} query heads over {} KV heads", q[1], k[1]);
            if inputs.len() == 4 {
                rank(3, 4)?;
                ensure!(dtype(3) == DType::Bool || dtype(3).is_float(), "a mask of {}", dtype(3));
                let full = [q[0], q[1], q[2], k[2]];
                let fits = shape(3).iter().zip(full).all(|(d, f)| *d == 1 || *d == f);
                ensure!(fits, "mask {:?} for {full:?}", shape(3));
            }
            inputs[0].clone()
        }
        LayerKind::KvCacheUpdate => {
            float(0)?;
            float(1)?;
            index(2)?;
            rank(0, 4)?;
            rank(1, 4)?;
            let (cache, update) = (shape(0), shape(1));
            let fits = (0..4).all(|i| i == 2 || cache[i] == update[i]) && update[2] <= cache[2];
            ensure!(fits, "update {update:?} of the cache {cache:?}");
            ensure!(shape(2) == [cache[0]], "write indices {:?} for a batch of {}", shape(2), cache[0]);
            ensure!(network.inputs.contains(&layer.inputs[0]), "the cache is not a network input");
            inputs[0].clone()
        }
    };
    Ok(vec![one])
}
