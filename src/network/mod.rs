//! The network level: TensorRT layers as plain data, lowered for one [`Profile`].
//!
//! A [`Network`] is a list of [`Layer`]s in order of execution over an arena of [`Tensor`]s. Layers mean exactly what
//! TensorRT documents for the layer of that name (strongly typed: no implicit conversion of dtypes; elementwise layers
//! broadcast only dims of size 1 and only between equal ranks). Shapes are vectors of [`Dim`]; with a static profile
//! every dim is a number, with a dynamic one the only symbol is `tokens`.
//!
//! Two back ends read this: `backend::tensorrt` builds engines, `backend::cpu` executes. Both match exhaustively on
//! [`LayerKind`]. `infer` holds the rules of each layer, [`builder`] makes networks by them and [`verify()`] checks whole
//! ones, `dump` has the text form (`Display`). `lower` makes the networks of models; nothing here knows of graphs, except
//! that a weight's bytes come from a graph [`Constant`].
//!
//! A *sequence* is one entry of the batch. A *row* is a vector along the last axis: of an activation
//! `[batch, tokens, n]` the values of one token, of a weight `[out, in]` those of one output.
//!
//! # Interface of a lowered network
//!
//! | inputs | dtype | shape |
//! |---|---|---|
//! | `input_ids`, `position_ids` | i32 | `[batch, tokens]` |
//! | `write_indices` | i32 | `[batch]` |
//! | `logit_rows` (only with [`Logits::Rows`]) | i32 | `[batch]`: which row (token) of each sequence gets logits |
//! | `key_cache.i`, `value_cache.i` | the cache dtype | `[batch, kv_heads, capacity, head_dim]` |
//!
//! | outputs | dtype | shape |
//! |---|---|---|
//! | `logits` | f32 | `[batch, tokens, vocabulary]`, or `[batch, 1, vocabulary]` with [`Logits::Rows`] |
//! | `updated_key_cache.i`, `updated_value_cache.i` | the cache dtype | as the cache, **in the same memory** as its input |

pub mod builder;
#[cfg(test)]
mod builder_tests;
mod dump;
mod infer;
mod prune;
pub mod verify;

use std::fmt;

pub use builder::{BuildError, LayerError, NetworkBuilder};
pub use infer::Fault;
pub use verify::{VerifyError, verify, verify_interface};

use crate::dim::Dim;
use crate::graph::Constant;
use crate::tensor::{self, DType};

/// A shape of symbolic dims.
pub type Shape = Vec<Dim>;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TensorId(pub u32);

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WeightId(pub u32);

/// A value of the network. Names are unique; inputs and outputs have the names of the table above.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Shape,
}

#[derive(Clone, Debug)]
pub struct Layer {
    /// The graph node it was lowered from, with a suffix where a node became several layers. Unique.
    pub name: String,
    pub kind: LayerKind,
    pub inputs: Vec<TensorId>,
    pub outputs: Vec<TensorId>,
}

/// How a weight enters an engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightMode {
    /// A network input whose device address is bound at load: engines are small and share one copy.
    #[default]
    Bind,
    /// A constant stored in the plan.
    Embed,
    /// A refittable constant left out of the plan.
    Strip,
}

/// A weight of the model. Its bytes may be absent (bound engines of a stripped package build without them).
#[derive(Clone, Debug)]
pub struct Weight {
    /// Unique; the name of the bound input, of the refittable weight and of the entry in the package's manifest.
    pub name: String,
    pub constant: Constant,
    pub mode: WeightMode,
}

/// Token counts of one call.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tokens {
    Static(usize),
    /// An optimization profile over the symbol `tokens`.
    Dynamic {
        min: usize,
        opt: usize,
        max: usize,
    },
}

/// Which tokens get logits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Logits {
    /// Every token, as the export computes them.
    All,
    /// One row (token) of each sequence, chosen by the input `logit_rows`: a prefill chunk needs only its last.
    #[default]
    Rows,
}

/// The shapes a network is lowered for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
pub struct Profile {
    pub batch: usize,
    pub tokens: Tokens,
    /// Slots of the cache.
    pub capacity: usize,
    pub logits: Logits,
}

impl Profile {
    pub fn decode(capacity: usize) -> Self {
        Profile::prefill(1, capacity)
    }
    pub fn prefill(tokens: usize, capacity: usize) -> Self {
        Profile {
            batch: 1,
            tokens: Tokens::Static(tokens),
            capacity,
            logits: Logits::Rows,
        }
    }
}

impl fmt::Display for Profile {
    /// `b1-t128-c1024`, `b1-t1_128_512-c1024-all`: also the stem of an engine's file name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}-", self.batch)?;
        match self.tokens {
            Tokens::Static(n) => write!(f, "t{n}")?,
            Tokens::Dynamic { min, opt, max } => write!(f, "t{min}_{opt}_{max}")?,
        }
        write!(f, "-c{}", self.capacity)?;
        match self.logits {
            Logits::All => f.write_str("-all"),
            Logits::Rows => Ok(()),
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum MatrixOp {
    None,
    /// The last two axes swapped.
    Transpose,
}

/// `IElementWiseLayer` operations. Comparisons and logic give bool.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Elementwise {
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

/// `IUnaryLayer` operations.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum UnaryOp {
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
    Sign,
    Sin,
    Sqrt,
}

/// `IActivationLayer` functions.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Activation {
    Relu,
    Sigmoid,
    Tanh,
    GeluErf,
    GeluTanh,
    Softplus,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ReduceOp {
    Sum,
    Prod,
    Max,
    Min,
    Avg,
}

/// One layer. Inputs and outputs in the order given; axes count from 0.
#[derive(Clone, Debug)]
pub enum LayerKind {
    /// No input; gives the weight. A constant layer, or a network input when the weight is bound.
    Weight(WeightId),
    /// No input; a small constant that is part of the lowering (an epsilon, a table), always in the plan.
    Constant(tensor::Tensor),
    /// Inputs a `[.., m, k]`, b `[.., k, n]` after their ops; leading dims broadcast where 1; equal ranks.
    MatrixMultiply {
        op_a: MatrixOp,
        op_b: MatrixOp,
    },
    /// Two inputs of equal rank and dtype.
    Elementwise(Elementwise),
    Unary(UnaryOp),
    Activation(Activation),
    /// Axes are kept with size 1 if `keep_dims`.
    Reduce {
        op: ReduceOp,
        axes: Vec<usize>,
        keep_dims: bool,
    },
    /// Over one axis.
    Softmax {
        axis: usize,
    },
    /// Transpose, then reshape to the given dims (of equal volume), then transpose: each optional.
    Shuffle {
        first: Option<Vec<usize>>,
        reshape: Option<Shape>,
        second: Option<Vec<usize>>,
    },
    /// `start` and `stride` are numbers; `size` is the output's shape and may hold `tokens`. A stride of 0 repeats the
    /// element at `start`, which is how a dim of 1 is expanded.
    Slice {
        start: Vec<i64>,
        size: Shape,
        stride: Vec<i64>,
    },
    Concatenation {
        axis: usize,
    },
    /// Inputs data, indices (i32 or i64); the output's shape is `data[..axis] + indices + data[axis+1..]`. Every index
    /// lies in `0..data[axis]`: another one is an error of the caller. The CPU executor refuses it and names it;
    /// TensorRT does not check and promises nothing about the result, so sessions check token ids before they run.
    Gather {
        axis: usize,
    },
    /// Inputs condition (bool), then, else; equal ranks.
    Select,
    Cast {
        to: DType,
    },
    /// `start + step * i` along one new axis: `[length]`, i32 or f32 by the dtype of the output.
    Fill {
        length: Dim,
        start: f64,
        step: f64,
    },
    /// LayerNorm over `axes`: inputs x, scale, bias; scale and bias have x's rank, with 1 outside `axes`.
    Normalization {
        axes: Vec<usize>,
        epsilon: f32,
    },
    /// Inputs x `[batch, heads, tokens, head_dim]`, cos and sin `[max_position, rotary_dim/2]`, position_ids
    /// `[batch, tokens]` i32. Dims of a head beyond `rotary_dim` pass through. Not interleaved: pairs are
    /// (i, i + rotary_dim/2); interleaved: (2i, 2i + 1).
    RotaryEmbedding {
        interleaved: bool,
        rotary_dim: usize,
    },
    /// `softmax(q kᵀ + mask) v`; inputs q `[batch, heads, tokens, d]`, k and v `[batch, kv_heads, slots, d]`, and an
    /// optional mask `[batch or 1, heads or 1, tokens, slots]` (bool, true = attend, or the dtype of q, added; TensorRT
    /// broadcasts it over batch and heads only). **Does not scale**: the lowering scales q. heads is a multiple of
    /// kv_heads; query head h reads KV head `h / (heads / kv_heads)`.
    Attention,
    /// Inputs cache `[batch, heads, capacity, d]` (a network input), update `[batch, heads, tokens, d]`, write_indices
    /// `[batch]` i32. Writes in place; the output is a network output in the cache's memory.
    KvCacheUpdate,
}

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Network {
    pub name: String,
    pub profile: Profile,
    pub tensors: Vec<Tensor>,
    pub layers: Vec<Layer>,
    pub inputs: Vec<TensorId>,
    pub outputs: Vec<TensorId>,
    pub weights: Vec<Weight>,
}

impl Network {
    pub fn new(name: impl Into<String>, profile: Profile) -> Self {
        Network {
            name: name.into(),
            profile,
            tensors: Vec::new(),
            layers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            weights: Vec::new(),
        }
    }

    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0 as usize]
    }
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }
    /// The network input or output of that name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        let ids = self.inputs.iter().chain(&self.outputs);
        ids.copied().find(|id| self.tensor(*id).name == name)
    }

    /// (cache input, updated output) of every KV-cache update: each pair must be bound to one address.
    pub fn aliases(&self) -> impl Iterator<Item = (TensorId, TensorId)> + '_ {
        let updates = self
            .layers
            .iter()
            .filter(|l| matches!(l.kind, LayerKind::KvCacheUpdate));
        updates.map(|l| (l.inputs[0], l.outputs[0]))
    }
}
