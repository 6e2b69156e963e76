//! The rules of each layer: which inputs it takes, and the dtype and shape of what it gives.
//!
//! One place for what TensorRT documents (`NvInfer.h` of TensorRT-RTX 1.6 and the operator pages): equal ranks, only
//! dims of size 1 broadcast, no implicit conversion. `builder` asks for every layer it adds, `verify` again for a whole
//! network, so that neither back end meets a layer that means nothing. Where the documentation leaves a dtype open
//! (booleans in comparisons, integers in unary layers) the rule here is the narrow one; lowering works around it.

use crate::dim::{Dim, Sym};
use crate::tensor::DType;

use super::{Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, Tensor, UnaryOp, Weight};

/// TensorRT has at most eight dims.
pub const MAX_RANK: usize = 8;

/// What is wrong with one layer. [`LayerError`](super::LayerError) adds the layer and its inputs.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Fault {
    #[error("takes {expected} inputs, not {found}")]
    Arity { expected: &'static str, found: usize },
    #[error("input {input} is {found}, but must be {wanted}")]
    DType {
        input: usize,
        found: DType,
        wanted: &'static str,
    },
    #[error("inputs {left} and {right} differ in dtype; TensorRT converts nothing by itself, so one needs a Cast")]
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
    #[error("the slice of axis {axis} from {start} with stride {stride} to {size} elements leaves its {dim}")]
    Slice {
        axis: usize,
        start: i64,
        stride: i64,
        size: Dim,
        dim: Dim,
    },
    #[error("the result would have {0} axes; TensorRT has 8 at most")]
    TooManyAxes(usize),
    #[error("{0}")]
    Parameter(String),
}

/// Dtype and shape of one output.
pub type Typed = (DType, Shape);

impl LayerKind {
    /// The layer's name in TensorRT's terms, as errors and dumps say it.
    pub fn name(&self) -> &'static str {
        match self {
            LayerKind::Weight(_) => "Weight",
            LayerKind::Constant(_) => "Constant",
            LayerKind::MatrixMultiply { .. } => "MatrixMultiply",
            LayerKind::Elementwise(_) => "Elementwise",
            LayerKind::Unary(_) => "Unary",
            LayerKind::Activation(_) => "Activation",
            LayerKind::Reduce { .. } => "Reduce",
            LayerKind::Softmax { .. } => "Softmax",
            LayerKind::Shuffle { .. } => "Shuffle",
            LayerKind::Slice { .. } => "Slice",
            LayerKind::Concatenation { .. } => "Concatenation",
            LayerKind::Gather { .. } => "Gather",
            LayerKind::Select => "Select",
            LayerKind::Cast { .. } => "Cast",
            LayerKind::Fill { .. } => "Fill",
            LayerKind::Normalization { .. } => "Normalization",
            LayerKind::RotaryEmbedding { .. } => "RotaryEmbedding",
            LayerKind::Attention => "Attention",
            LayerKind::KvCacheUpdate => "KvCacheUpdate",
        }
    }
}

/// The only output of a layer over these inputs. `fill` is the dtype wanted of a [`LayerKind::Fill`], which has no input
/// to take it from.
pub(super) fn infer(
    kind: &LayerKind,
    inputs: &[&Tensor],
    weights: &[Weight],
    fill: Option<DType>,
) -> Result<Typed, Fault> {
    let typed = match kind {
        LayerKind::Weight(id) => {
            arity(inputs, &[0], "no")?;
            let weight = weights
                .get(id.0 as usize)
                .ok_or_else(|| Fault::Parameter(format!("there is no weight number {}", id.0)))?;
            check_dtype(0, weight.constant.dtype(), |d| d != DType::F64, "of at most 32 bits")?;
            let shape = weight.constant.shape().iter().map(|d| Dim::from(*d)).collect();
            (weight.constant.dtype(), shape)
        }
        LayerKind::Constant(tensor) => {
            arity(inputs, &[0], "no")?;
            if tensor.is_empty() {
                return Err(Fault::Parameter(format!("the constant {tensor:?} is empty")));
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
                    return Err(Fault::Volume {
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
                return Err(Fault::Arity {
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
            check_dtype(0, inputs[0].dtype, |d| d != DType::F64, "of at most 32 bits")?;
            if *to == DType::F64 {
                return Err(Fault::Parameter("TensorRT has no f64".to_string()));
            }
            (*to, inputs[0].shape.clone())
        }
        LayerKind::Fill { length, .. } => {
            arity(inputs, &[0], "no")?;
            let dtype = fill.ok_or_else(|| Fault::Parameter("a Fill needs the dtype of its output".to_string()))?;
            if !matches!(dtype, DType::I32 | DType::F32) {
                return Err(Fault::Parameter(format!("a Fill gives i32 or f32, not {dtype}")));
            }
            (dtype, vec![length.clone()])
        }
        LayerKind::Normalization { axes, .. } => normalization(axes, inputs)?,
        LayerKind::RotaryEmbedding { rotary_dim, .. } => rotary(*rotary_dim, inputs)?,
        LayerKind::Attention => attention(inputs)?,
        LayerKind::KvCacheUpdate => kv_cache_update(inputs)?,
    };
    if typed.1.len() > MAX_RANK {
        return Err(Fault::TooManyAxes(typed.1.len()));
    }
    Ok(typed)
}

fn matrix_multiply(op_a: MatrixOp, op_b: MatrixOp, inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[2], "2")?;
    check_dtype(0, inputs[0].dtype, DType::is_float, "a float")?;
    like(inputs, 0, 1)?;
    let rank = inputs[0].shape.len();
    if rank < 2 {
        return Err(Fault::Rank {
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
        return Err(Fault::Contraction { left: k, right: k_b });
    }
    let mut shape = broadcast_shapes(&inputs[0].shape[..rank - 2], &inputs[1].shape[..rank - 2])?;
    shape.extend([m, n]);
    Ok((inputs[0].dtype, shape))
}

fn elementwise(op: Elementwise, inputs: &[&Tensor]) -> Result<Typed, Fault> {
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

fn unary(op: UnaryOp, inputs: &[&Tensor]) -> Result<Typed, Fault> {
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

fn slice(start: &[i64], size: &Shape, stride: &[i64], inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[1], "1")?;
    let x = inputs[0];
    let rank = x.shape.len();
    if [start.len(), size.len(), stride.len()] != [rank; 3] {
        return Err(Fault::Parameter(format!(
            "start {start:?}, size {size:?} and stride {stride:?} must have one entry for each of {rank} axes"
        )));
    }
    for (axis, dim) in x.shape.iter().enumerate() {
        let outside = || Fault::Slice {
            axis,
            start: start[axis],
            stride: stride[axis],
            size: size[axis].clone(),
            dim: dim.clone(),
        };
        // The first and the last element read. With `tokens` in them they are linear, so that the two ends of any range
        // of tokens decide; 1 and a large number stand for them.
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

fn normalization(axes: &[usize], inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[3], "3")?;
    let x = inputs[0];
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    check_axes(axes, x.shape.len())?;
    for i in [1, 2] {
        like(inputs, 0, i)?;
        for (a, dim) in x.shape.iter().enumerate() {
            let wanted = if axes.contains(&a) {
                dim.clone()
            } else {
                Dim::from(1usize)
            };
            check_extent(|| format!("axis {a} of input {i}"), &wanted, &inputs[i].shape[a])?;
        }
    }
    Ok(same(x))
}

fn rotary(rotary_dim: usize, inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[4], "4")?;
    let [x, cos, sin, positions] = inputs[..] else {
        unreachable!("four inputs")
    };
    check_dtype(0, x.dtype, DType::is_float, "a float")?;
    check_dtype(3, positions.dtype, |d| d == DType::I32, "i32")?;
    for (i, wanted, text) in [(0, 4, "4"), (1, 2, "2"), (2, 2, "2"), (3, 2, "2")] {
        check_rank(inputs, i, wanted, text)?;
    }
    for i in [1, 2] {
        if inputs[i].dtype != x.dtype {
            return Err(Fault::UnlikeDTypes { left: 0, right: i });
        }
        let half = Dim::from(rotary_dim / 2);
        check_extent(|| format!("the last axis of input {i}"), &half, &inputs[i].shape[1])?;
    }
    check_extent(
        || "the rows of the sine table".to_string(),
        &cos.shape[0],
        &sin.shape[0],
    )?;
    check_extent(
        || "the batch of the positions".to_string(),
        &x.shape[0],
        &positions.shape[0],
    )?;
    check_extent(
        || "the tokens of the positions".to_string(),
        &x.shape[2],
        &positions.shape[1],
    )?;
    let head_dim = x.shape[3].as_const();
    if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) || head_dim.is_none_or(|d| rotary_dim as i64 > d) {
        return Err(Fault::Parameter(format!(
            "rotary_dim {rotary_dim} must be even, above 0 and within the head's {}",
            x.shape[3]
        )));
    }
    Ok(same(x))
}

fn attention(inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[3, 4], "3 or 4")?;
    let q = inputs[0];
    check_dtype(0, q.dtype, DType::is_float, "a float")?;
    for i in 0..inputs.len() {
        check_rank(inputs, i, 4, "4")?;
    }
    for i in [1, 2] {
        like(inputs, 0, i)?;
        check_extent(|| format!("the batch of input {i}"), &q.shape[0], &inputs[i].shape[0])?;
        check_extent(
            || format!("the head size of input {i}"),
            &q.shape[3],
            &inputs[i].shape[3],
        )?;
    }
    let (k, v) = (inputs[1], inputs[2]);
    check_extent(|| "the KV heads of the values".to_string(), &k.shape[1], &v.shape[1])?;
    check_extent(|| "the slots of the values".to_string(), &k.shape[2], &v.shape[2])?;
    let heads = (q.shape[1].as_const(), k.shape[1].as_const());
    if !matches!(heads, (Some(q), Some(kv)) if kv > 0 && q % kv == 0) {
        return Err(Fault::Parameter(format!(
            "{} query heads are not a multiple of {} KV heads",
            q.shape[1], k.shape[1]
        )));
    }
    if let Some(mask) = inputs.get(3) {
        if mask.dtype != DType::Bool && mask.dtype != q.dtype {
            return Err(Fault::DType {
                input: 3,
                found: mask.dtype,
                wanted: "bool or the dtype of the query",
            });
        }
        // NvInfer.h: "with batchSize and numHeadsQuery broadcastable"; tokens and slots are not.
        for (axis, wanted) in [&q.shape[0], &q.shape[1], &q.shape[2], &k.shape[2]]
            .into_iter()
            .enumerate()
        {
            if !(mask.shape[axis] == *wanted || axis < 2 && mask.shape[axis].is_one()) {
                return Err(Fault::Extent {
                    what: format!("axis {axis} of the mask"),
                    wanted: wanted.clone(),
                    found: mask.shape[axis].clone(),
                });
            }
        }
    }
    Ok(same(q))
}

fn kv_cache_update(inputs: &[&Tensor]) -> Result<Typed, Fault> {
    arity(inputs, &[3], "3")?;
    let [cache, update, indices] = inputs[..] else {
        unreachable!("three inputs")
    };
    check_dtype(0, cache.dtype, DType::is_float, "a float")?;
    check_rank(inputs, 0, 4, "4")?;
    like(inputs, 0, 1)?;
    check_dtype(2, indices.dtype, |d| d == DType::I32, "i32")?;
    check_rank(inputs, 2, 1, "1")?;
    for axis in [0, 1, 3] {
        check_extent(
            || format!("axis {axis} of the update"),
            &cache.shape[axis],
            &update.shape[axis],
        )?;
    }
    check_extent(|| "the write indices".to_string(), &cache.shape[0], &indices.shape[0])?;
    if let Some(dim) = cache.shape.iter().find(|d| d.as_const().is_none()) {
        return Err(Fault::Parameter(format!(
            "the cache must have a static shape, but has {dim}"
        )));
    }
    if let (Some(tokens), Some(slots)) = (update.shape[2].as_const(), cache.shape[2].as_const())
        && tokens > slots
    {
        return Err(Fault::Parameter(format!(
            "{tokens} tokens do not fit a cache of {slots} slots"
        )));
    }
    Ok(same(cache))
}

// Checks

fn same(x: &Tensor) -> Typed {
    (x.dtype, x.shape.clone())
}

fn is_number(dtype: DType) -> bool {
    dtype.is_float() || is_index(dtype)
}

fn is_index(dtype: DType) -> bool {
    matches!(dtype, DType::I32 | DType::I64)
}

fn arity(inputs: &[&Tensor], allowed: &[usize], expected: &'static str) -> Result<(), Fault> {
    let found = inputs.len();
    match allowed.contains(&found) {
        true => Ok(()),
        false => Err(Fault::Arity { expected, found }),
    }
}

fn check_dtype(input: usize, found: DType, ok: impl Fn(DType) -> bool, wanted: &'static str) -> Result<(), Fault> {
    match ok(found) && found != DType::F64 {
        true => Ok(()),
        false => Err(Fault::DType { input, found, wanted }),
    }
}

fn check_rank(inputs: &[&Tensor], input: usize, rank: usize, wanted: &'static str) -> Result<(), Fault> {
    let found = inputs[input].shape.len();
    match found == rank {
        true => Ok(()),
        false => Err(Fault::Rank { input, found, wanted }),
    }
}

fn check_extent(what: impl FnOnce() -> String, wanted: &Dim, found: &Dim) -> Result<(), Fault> {
    match wanted == found {
        true => Ok(()),
        false => Err(Fault::Extent {
            what: what(),
            wanted: wanted.clone(),
            found: found.clone(),
        }),
    }
}

fn check_axes(axes: &[usize], rank: usize) -> Result<(), Fault> {
    if axes.is_empty() {
        return Err(Fault::Parameter("no axis is given".to_string()));
    }
    match axes.iter().find(|a| **a >= rank) {
        None => Ok(()),
        Some(axis) => Err(Fault::Axis { axis: *axis, rank }),
    }
}

fn equal_ranks(inputs: &[&Tensor], left: usize, right: usize) -> Result<(), Fault> {
    match inputs[left].shape.len() == inputs[right].shape.len() {
        true => Ok(()),
        false => Err(Fault::UnlikeRanks { left, right }),
    }
}

/// Equal dtypes and ranks.
fn like(inputs: &[&Tensor], left: usize, right: usize) -> Result<(), Fault> {
    if inputs[left].dtype != inputs[right].dtype {
        return Err(Fault::UnlikeDTypes { left, right });
    }
    equal_ranks(inputs, left, right)
}

fn broadcast(inputs: &[&Tensor], left: usize, right: usize) -> Result<Shape, Fault> {
    broadcast_shapes(&inputs[left].shape, &inputs[right].shape)
}

fn broadcast_shapes(left: &[Dim], right: &[Dim]) -> Result<Shape, Fault> {
    let pairs = left.iter().zip(right).enumerate();
    let dims = pairs.map(|(axis, (l, r))| match (l, r) {
        (l, r) if l == r || r.is_one() => Ok(l.clone()),
        (l, r) if l.is_one() => Ok(r.clone()),
        (l, r) => Err(Fault::Broadcast {
            axis,
            left: l.clone(),
            right: r.clone(),
        }),
    });
    dims.collect()
}

fn permuted(shape: &[Dim], order: &[usize]) -> Result<Shape, Fault> {
    let rank = shape.len();
    let mut seen = vec![false; rank];
    let mut valid = order.len() == rank;
    for axis in order {
        valid &= *axis < rank && !std::mem::replace(&mut seen[*axis], true);
    }
    match valid {
        true => Ok(order.iter().map(|a| shape[*a].clone()).collect()),
        false => Err(Fault::Permutation {
            order: order.to_vec(),
            rank,
        }),
    }
}

/// Number of elements.
pub(crate) fn volume(shape: &[Dim]) -> Dim {
    let numbers: i64 = shape.iter().filter_map(Dim::as_const).product();
    let symbols = shape.iter().filter(|d| d.as_const().is_none());
    symbols.fold(Dim::constant(numbers), |product, dim| &product * dim)
}
