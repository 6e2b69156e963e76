//! The operators of the graph level: ONNX operators as data, normalised to their opset-24 form.
//!
//! Attributes that became inputs in later opsets (axes of `ReduceMean`, `Squeeze`; sizes of `Split`) are always inputs
//! here, and variadic `Max`, `Min`, `Sum` are chains of two-operand nodes; the reader does this once. Inputs keep ONNX's
//! order; an omitted optional input is `None`. Specification: <https://onnx.ai/onnx/operators/>, for the contrib
//! operators <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md>.

use crate::tensor::{DType, Tensor};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Unary {
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
    Reciprocal,
    Relu,
    Round,
    Sigmoid,
    Sign,
    Sin,
    Softplus,
    Sqrt,
    Tanh,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Pow,
    /// Integer: sign of the divisor. Floats need `fmod` and take the sign of the dividend.
    Mod,
    Max,
    Min,
    And,
    Or,
    Xor,
    Equal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reduction {
    Mean,
    Sum,
    Max,
    Min,
    Prod,
    SumSquare,
}

/// How scatters combine a new element with the old one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ScatterMode {
    Replace,
    Add,
    Mul,
    Max,
    Min,
}

/// Attributes of ONNX `Attention` (opset 23 and 24).
///
/// Inputs: q, k, v, attn_mask?, past_key?, past_value?, nonpad_kv_seqlen?. Outputs: y, present_key?, present_value?,
/// qk_matmul?. q is `[batch, heads, tokens, head_dim]` or `[batch, tokens, heads*head_dim]` (then `q_num_heads` is set).
#[derive(Clone, PartialEq, Debug)]
pub struct Attention {
    pub is_causal: bool,
    /// `None`: 1/√head_dim.
    pub scale: Option<f32>,
    /// 0: none.
    pub softcap: f32,
    /// Set when q, k, v are three-dimensional.
    pub q_num_heads: Option<usize>,
    pub kv_num_heads: Option<usize>,
    /// `None`: the dtype of q.
    pub softmax_precision: Option<DType>,
}

/// Attributes of `com.microsoft::GroupQueryAttention`.
///
/// Inputs: query (or packed qkv), key?, value?, past_key?, past_value?, seqlens_k (i32 `[batch]`, total − 1),
/// total_sequence_length (i32 scalar), cos_cache?, sin_cache?, position_ids?, attention_bias?, head_sink?.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupQueryAttention {
    pub num_heads: usize,
    pub kv_num_heads: usize,
    pub scale: Option<f32>,
    pub softcap: f32,
    /// −1: no window. Otherwise the number of positions a query may look back, itself included.
    pub local_window_size: i64,
    pub do_rotary: bool,
    pub rotary_interleaved: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub enum Op {
    Unary(Unary),
    Binary(Binary),
    Gelu {
        tanh: bool,
    },
    /// `x * sigmoid(alpha * x)`; SiLU at alpha 1.
    Swish {
        alpha: f32,
    },
    /// Inputs: x, min?, max?.
    Clip,
    Identity,
    Cast {
        to: DType,
    },
    /// Inputs: x, a tensor of the dtype wanted.
    CastLike,
    Where,
    MatMul,
    /// `alpha * a' * b' + beta * c`; inputs a, b, c?.
    Gemm {
        alpha: f32,
        beta: f32,
        trans_a: bool,
        trans_b: bool,
    },
    Softmax {
        axis: i64,
    },
    LogSoftmax {
        axis: i64,
    },
    /// Inputs: x, axes? (i64 vector).
    Reduce {
        reduction: Reduction,
        keepdims: bool,
        noop_with_empty_axes: bool,
    },
    CumSum {
        exclusive: bool,
        reverse: bool,
    },
    Shape {
        start: i64,
        end: Option<i64>,
    },
    Size,
    /// Inputs: x, shape.
    Reshape {
        allowzero: bool,
    },
    Transpose {
        perm: Option<Vec<usize>>,
    },
    /// Inputs: x, axes?.
    Squeeze,
    /// Inputs: x, axes.
    Unsqueeze,
    Flatten {
        axis: i64,
    },
    Expand,
    Tile,
    Concat {
        axis: i64,
    },
    /// Inputs: x, sizes?.
    Split {
        axis: i64,
    },
    /// Inputs: x, starts, ends, axes?, steps?.
    Slice,
    Gather {
        axis: i64,
    },
    GatherElements {
        axis: i64,
    },
    GatherNd {
        batch_dims: usize,
    },
    Range,
    ConstantOfShape {
        value: Tensor,
    },
    /// Inputs: x, k?.
    Trilu {
        upper: bool,
    },
    ScatterNd {
        mode: ScatterMode,
    },
    ScatterElements {
        axis: i64,
        mode: ScatterMode,
    },
    /// Inputs: past_cache, update, write_indices?. Writes `update` into the cache from `write_indices[batch]` on.
    TensorScatter {
        axis: i64,
        circular: bool,
    },
    /// Inputs: x, scale, bias?. Statistics in fp32.
    LayerNormalization {
        axis: i64,
        epsilon: f32,
    },
    /// Inputs: x, scale. `x / sqrt(mean(x²) + epsilon) * scale` over the axes from `axis` on, statistics in fp32.
    RmsNormalization {
        axis: i64,
        epsilon: f32,
    },
    /// Inputs: x, cos_cache, sin_cache, position_ids?. x is `[batch, heads, tokens, head_dim]`, or
    /// `[batch, tokens, heads*head_dim]` with `num_heads` set; caches are `[max_position, rotary_dim/2]` with
    /// position_ids, `[batch, tokens, rotary_dim/2]` without.
    RotaryEmbedding {
        interleaved: bool,
        num_heads: Option<usize>,
        /// 0: the whole head.
        rotary_dim: usize,
    },
    Attention(Attention),
    GroupQueryAttention(GroupQueryAttention),
    /// `com.microsoft::RotaryEmbedding`. Inputs: x, position_ids, cos_cache, sin_cache.
    ContribRotaryEmbedding {
        interleaved: bool,
        num_heads: Option<usize>,
        rotary_dim: usize,
    },
    /// `com.microsoft::SkipSimplifiedLayerNormalization`. Inputs: x, skip, scale, bias?. Outputs: y, _, _, sum?.
    SkipRmsNormalization {
        epsilon: f32,
    },
    /// `com.microsoft::SkipLayerNormalization`. Inputs: x, skip, gamma, beta?, bias?. Outputs: y, _, _, sum?.
    SkipLayerNormalization {
        epsilon: f32,
    },
    /// `com.microsoft::FusedMatMul`: `alpha * a' * b'`, transposing the last two axes.
    FusedMatMul {
        alpha: f32,
        trans_a: bool,
        trans_b: bool,
    },
    /// An operator Lapidary does not know. Kept so that `inspect` can show the whole graph and so that every obstacle
    /// is named at once; the verifier refuses graphs that still hold one.
    Unknown {
        domain: String,
        op_type: String,
    },
}
