//! The kinds of layers: meaning and name. `text` has their text form.
//!
//! A kind's rule is in `infer`; the back ends implement it in their files named `layers`.
//! docs/contributing/adding-an-operator.md shows how to add one.

mod text;

use super::kernel_layers::{DecodeAttention, RowProduct};
use super::{Shape, WeightId};
use crate::dim::Dim;
use crate::graph::op::Gating;
use crate::tensor::quantized::Granularity;
use crate::tensor::{self, DType};

/// An enum without fields, with the list of its variants and their names in dumps.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $( $(#[$doc:meta])* $variant:ident, )* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[allow(missing_docs, reason = "the variants are TensorRT's operations of the same name")]
        pub enum $name {
            $( $(#[$doc])* $variant, )*
        }

        impl $name {
            fn named(word: &str) -> Option<Self> {
                match word { $( stringify!($variant) => Some($name::$variant), )* _ => None }
            }
        }
    };
}

/// What a matrix product first applies to an operand.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatrixOp {
    /// Nothing.
    None,
    /// The last two axes swapped.
    Transpose,
}

words! {
    /// `IElementWiseLayer` operations. Comparisons and logic return bool.
    Elementwise {
        Sum,
        Sub,
        Prod,
        Div,
        Pow,
        Max,
        Min,
        /// Rounds toward negative infinity.
        FloorDiv,
        And,
        Or,
        Xor,
        Equal,
        Greater,
        Less,
    }
}

words! {
    /// `IUnaryLayer` operations, and rounding to the nearest 8-bit float, saturated, which TensorRT does by quantizing
    /// and dequantizing.
    UnaryOp {
        Abs,
        Ceil,
        Cos,
        Erf,
        Exp,
        Floor,
        IsNan,
        Log,
        Neg,
        Not,
        Recip,
        Round,
        RoundE4M3,
        RoundE5M2,
        Sign,
        Sin,
        Sqrt,
    }
}

words! {
    /// `IActivationLayer` functions.
    Activation {
        Relu,
        Sigmoid,
        Tanh,
        GeluErf,
        GeluTanh,
        Softplus,
    }
}

words! {
    /// `IReduceLayer` operations.
    ReduceOp {
        Sum,
        Prod,
        Max,
        Min,
        Avg,
    }
}

words! {
    /// The output of a TopK layer.
    Greatest {
        /// The elements.
        Values,
        /// Their indices along the axis, i32.
        Indices,
    }
}

/// One layer. Inputs and outputs are in the order given; axes count from 0.
#[derive(Clone, Debug)]
pub enum LayerKind {
    /// No input; returns the weight. A constant layer, or a network input when the weight is bound.
    Weight(WeightId),
    /// No input; a small constant that is part of the lowering (an epsilon, a table), always in the plan.
    Constant(tensor::Tensor),
    /// Inputs a `[.., m, k]`, b `[.., k, n]` after their ops; leading dims broadcast where 1; equal ranks.
    MatrixMultiply {
        /// Applied to a.
        op_a: MatrixOp,
        /// Applied to b.
        op_b: MatrixOp,
    },
    /// Two inputs of equal rank and dtype.
    Elementwise(Elementwise),
    /// One input.
    Unary(UnaryOp),
    /// One input, a float.
    Activation(Activation),
    /// Axes are kept with size 1 if `keep_dims`.
    Reduce {
        /// How elements combine.
        op: ReduceOp,
        /// Which axes.
        axes: Vec<usize>,
        /// Whether they are kept, with size 1.
        keep_dims: bool,
    },
    /// Over one axis.
    Softmax {
        /// Counted from 0.
        axis: usize,
    },
    /// Transpose, then reshape to the given dims (of equal volume), then transpose: each optional.
    Shuffle {
        /// The transpose before the reshape.
        first: Option<Vec<usize>>,
        /// The dims to reshape to.
        reshape: Option<Shape>,
        /// The transpose after the reshape.
        second: Option<Vec<usize>>,
    },
    /// `start` and `stride` are numbers; `size` is the output's shape and may hold `tokens`. A stride of 0 repeats the
    /// element at `start`, which is how a dim of 1 is expanded.
    Slice {
        /// The first element, for each axis.
        start: Vec<i64>,
        /// The output's shape.
        size: Shape,
        /// The step between elements, for each axis.
        stride: Vec<i64>,
    },
    /// All inputs, of one dtype, concatenated along one axis.
    Concatenation {
        /// Which axis.
        axis: usize,
    },
    /// Inputs data, indices (i32 or i64); the output's shape is `data[..axis] + indices + data[axis+1..]`. Every index
    /// must be in `0..data[axis]`; any other is the caller's error. The CPU executor refuses and names it; TensorRT
    /// does not check and guarantees nothing about the result, so sessions check token ids before they run.
    Gather {
        /// Which axis of the data.
        axis: usize,
    },
    /// Inputs condition (bool), then, else; equal ranks.
    Select,
    /// One input, converted element by element.
    Cast {
        /// The output's dtype.
        to: DType,
    },
    /// `start + step * i` along one new axis: `[length]`, i32 or f32 by the dtype of the output.
    Fill {
        /// Number of elements.
        length: Dim,
        /// The first element.
        start: f64,
        /// The step from one to the next.
        step: f64,
    },
    /// LayerNorm over `axes`: inputs x, scale, bias; scale and bias have x's rank, with 1 outside `axes`.
    Normalization {
        /// The trailing axes that are normalized.
        axes: Vec<usize>,
        /// Added to the variance.
        epsilon: f32,
    },
    /// Inputs x `[batch, heads, tokens, head_dim]`, cos and sin `[max_position, rotary_dim/2]`, position_ids
    /// `[batch, tokens]` i32. Dims of a head beyond `rotary_dim` pass through. Not interleaved: pairs are
    /// (i, i + rotary_dim/2); interleaved: (2i, 2i + 1).
    RotaryEmbedding {
        /// How elements pair.
        interleaved: bool,
        /// Elements of a head that rotate.
        rotary_dim: usize,
    },
    /// `softmax(q kᵀ + mask) v`; inputs q `[batch, heads, tokens, d]`, k and v `[batch, kv_heads, slots, d]`, and an
    /// optional mask `[batch or 1, heads or 1, tokens, slots]` (bool, true = attend, or the dtype of q, added; TensorRT
    /// broadcasts it over batch and heads only). **Does not scale**: the lowering scales q. heads is a multiple of
    /// kv_heads; query head h reads KV head `h / (heads / kv_heads)`.
    Attention,
    /// Inputs codes (i8, i4 or f8e4m3fn) and scales of the shape that [`Granularity::scale_shape`] gives: `code *
    /// scale` in the scales' dtype. TensorRT accepts channels and blocks only for constants.
    Dequantize(Granularity),
    /// The `k` greatest elements of the last axis of one float input, in descending order.
    TopK {
        /// How many.
        k: usize,
        /// The output of TensorRT's layer.
        part: Greatest,
    },
    /// What [`Op::Experts`](crate::graph::op::Op::Experts) computes, for an executor that computes only the chosen
    /// experts; TensorRT gets other layers. Inputs x, weights (f32), experts (i32), gate, up?, down, then gate_bias,
    /// up_bias? and down_bias together or not at all; there is an up_bias if there is an up, so the number of inputs
    /// identifies them ([`ExpertInputs`]).
    Experts {
        /// Number of experts.
        experts: usize,
        /// The function before `down`.
        gating: Gating,
    },
    /// Inputs cache `[batch, heads, capacity, d]` (a network input), update `[batch, heads, tokens, d]`, write_indices
    /// `[batch]` i32. Writes in place; the output is a network output in the cache's memory.
    KvCacheUpdate,
    /// See [`RowProduct`]; one of Lapidary's kernels.
    RowProduct(RowProduct),
    /// See [`DecodeAttention`]; one of Lapidary's kernels, and the only kind with several outputs.
    DecodeAttention(DecodeAttention),
}

/// The inputs of a [`LayerKind::Experts`] by name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ExpertInputs<T> {
    /// `[.., in]`.
    pub x: T,
    /// `[.., top_k]`.
    pub weights: T,
    /// `[.., top_k]`.
    pub experts: T,
    /// `[experts * hidden, in]`.
    pub gate: T,
    /// As gate.
    pub up: Option<T>,
    /// `[experts * out, hidden]`.
    pub down: T,
    /// Biases of gate, `up` and down, each with one element per row.
    pub biases: Option<(T, Option<T>, T)>,
}

impl<T: Copy> ExpertInputs<T> {
    /// From a layer's inputs; `None` if there are too many or too few.
    pub fn of(inputs: &[T]) -> Option<Self> {
        let (first, up, down, biases) = match *inputs {
            [x, w, e, gate, down] => ([x, w, e, gate], None, down, None),
            [x, w, e, gate, up, down] => ([x, w, e, gate], Some(up), down, None),
            [x, w, e, gate, down, a, c] => ([x, w, e, gate], None, down, Some((a, None, c))),
            [x, w, e, gate, up, down, a, b, c] => ([x, w, e, gate], Some(up), down, Some((a, Some(b), c))),
            _ => return None,
        };
        let [x, weights, experts, gate] = first;
        Some(ExpertInputs {
            x,
            weights,
            experts,
            gate,
            up,
            down,
            biases,
        })
    }
}

/// Which axis a layer works along, if it computes rows independently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum RowLayer {
    /// Each element independently.
    Elements,
    /// Along this axis of input 0, which keeps its position.
    Along(usize),
    /// It does not compute rows independently.
    No,
}

impl LayerKind {
    /// The layer's name in TensorRT's terms, for errors and dumps.
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
            LayerKind::Dequantize(_) => "Dequantize",
            LayerKind::TopK { .. } => "TopK",
            LayerKind::Experts { .. } => "Experts",
            LayerKind::KvCacheUpdate => "KvCacheUpdate",
            LayerKind::RowProduct(_) => "RowProduct",
            LayerKind::DecodeAttention(_) => "DecodeAttention",
        }
    }

    /// Whether it is one of Lapidary's own, which TensorRT does not have: see [`kernel_layers`](super::kernel_layers).
    pub fn is_kernel_layer(&self) -> bool {
        matches!(self, LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_))
    }

    /// Number of outputs.
    pub(super) fn output_count(&self) -> usize {
        match self {
            LayerKind::DecodeAttention(_) => 3,
            _ => 1,
        }
    }

    /// Whether it computes rows independently, so that a back end can run it with its neighbors row by row.
    pub(crate) fn row_layer(&self) -> RowLayer {
        match self {
            LayerKind::Elementwise(_)
            | LayerKind::Unary(_)
            | LayerKind::Activation(_)
            | LayerKind::Select
            | LayerKind::Cast { .. }
            | LayerKind::Fill { .. } => RowLayer::Elements,
            LayerKind::Reduce {
                axes, keep_dims: true, ..
            }
            | LayerKind::Normalization { axes, .. }
                if axes.len() == 1 =>
            {
                RowLayer::Along(axes[0])
            }
            LayerKind::Softmax { axis } => RowLayer::Along(*axis),
            _ => RowLayer::No,
        }
    }
}
