//! The network level: TensorRT layers as plain data, lowered for one [`Profile`].
//!
//! A [`Network`] is a list of [`Layer`]s in order of execution over an arena of [`Tensor`]s. Layers mean exactly what
//! TensorRT documents for the layer of that name (strongly typed: no implicit conversion of dtypes; elementwise layers
//! broadcast only dims of size 1 and only between equal ranks). Shapes are vectors of [`Dim`]; with a static profile
//! every dim is a number, with a dynamic one the only symbol is `tokens`.
//!
//! Two back ends read this: `backend::tensorrt` builds engines, `backend::cpu` executes. Both match exhaustively on
//! [`LayerKind`]. `kind` defines the layers, `infer` their rules; [`builder`] builds networks by these rules and
//! [`verify()`] checks whole networks. `dump` has the text form (`Display`) and [`parse()`] reads it. `lower` builds
//! the networks of models. This module does not depend on graphs, except that a weight's bytes come from a graph
//! [`Constant`].
//!
//! A *sequence* is one entry of the batch. A *row* is a vector along the last axis: of an activation
//! `[batch, tokens, n]` the values of one token, of a weight `[out, in]` those of one output.
//!
//! # Interface of a lowered network
//!
//! [`Network::interface`] gives the role of each tensor; the names are those of [`Role`](crate::interface::Role).
//!
//! | inputs | dtype | shape |
//! |---|---|---|
//! | `input_ids`, `position_ids` | i32 | `[batch, tokens]` |
//! | `write_indices` | i32 | `[batch]` |
//! | `total_lengths` | i32 | `[batch]`, if the graph has it |
//! | `logit_rows` (only with [`Logits::Rows`]) | i32 | `[batch]`: which row (token) of each sequence gets logits |
//! | `key_cache.i`, `value_cache.i` | the cache dtype | `[batch, kv_heads, capacity, head_dim]` |
//!
//! | outputs | dtype | shape |
//! |---|---|---|
//! | `logits` | f32 | `[batch, tokens, vocabulary]`, or `[batch, 1, vocabulary]` with [`Logits::Rows`] |
//! | `updated_key_cache.i`, `updated_value_cache.i` | the cache dtype | as the cache, **in the same memory** as its input |

mod builder;
#[cfg(test)]
mod builder_tests;
mod dump;
mod infer;
mod interface;
mod kernel_layers;
mod kind;
mod parse;
mod prune;
pub mod segments;
mod verify;

use std::fmt;

pub use builder::{BuildError, LayerError, NetworkBuilder};
pub use infer::LayerFault;
pub use interface::verify_interface;
pub use kernel_layers::{
    AttentionInputs, CodeLayout, DecodeAttention, PartInputs, ProductInputs, ProductPart, Rotation, RowActivation,
    RowProduct,
};
pub(crate) use kind::RowLayer;
pub use kind::{Activation, Elementwise, ExpertInputs, Greatest, LayerKind, MatrixOp, ReduceOp, UnaryOp};
pub use parse::parse;
pub use verify::{VerifyError, verify};

use crate::dim::Dim;
use crate::graph::Constant;
use crate::interface::Interface;
use crate::tensor::DType;

/// A shape of symbolic dims.
pub type Shape = Vec<Dim>;

/// A tensor of one network: its number in [`Network::tensors`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TensorId(pub u32);

/// A weight of one network: its number in [`Network::weights`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct WeightId(pub u32);

/// A value of the network. Names are unique; inputs and outputs have the names of the table above.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    /// Unique in the network.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Numbers; with a dynamic profile also dims with the symbol `tokens`.
    pub shape: Shape,
}

/// One layer with its inputs and outputs.
#[derive(Clone, Debug)]
pub struct Layer {
    /// The graph node it was lowered from, with a suffix if a node became several layers. Unique.
    pub name: String,
    /// What it computes.
    pub kind: LayerKind,
    /// In the kind's documented order.
    pub inputs: Vec<TensorId>,
    /// One tensor; three for a [`LayerKind::DecodeAttention`].
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
    /// A refittable constant that the plan omits.
    Strip,
}

/// A weight of the model. Its bytes may be absent (bound engines of a stripped package build without them).
#[derive(Clone, Debug)]
pub struct Weight {
    /// Unique; the name of the bound input, of the refittable weight and of the entry in the package's manifest.
    pub name: String,
    /// Its bytes or the recipe for them.
    pub constant: Constant,
    /// How it enters an engine.
    pub mode: WeightMode,
}

/// Token counts of one call.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tokens {
    /// Always this many.
    Static(usize),
    /// An optimization profile over the symbol `tokens`.
    Dynamic {
        /// The minimum.
        min: usize,
        /// The number that engines are tuned for.
        opt: usize,
        /// The maximum.
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
    /// Sequences in one call.
    pub batch: usize,
    /// New tokens of each sequence in one call.
    pub tokens: Tokens,
    /// Slots of the cache.
    pub capacity: usize,
    /// Which tokens get logits.
    pub logits: Logits,
}

impl Profile {
    /// One sequence, one token.
    pub fn decode(capacity: usize) -> Self {
        Profile::prefill(1, capacity)
    }
    /// One sequence, a chunk of tokens, logits of one of them.
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

/// See the module's head.
#[derive(Clone, Debug)]
pub struct Network {
    /// The model's name, for messages.
    pub name: String,
    /// The shapes it was lowered for.
    pub profile: Profile,
    /// All tensors; ids are indices.
    pub tensors: Vec<Tensor>,
    /// In order of execution.
    pub layers: Vec<Layer>,
    /// What a session binds for reading.
    pub inputs: Vec<TensorId>,
    /// What a session binds for writing.
    pub outputs: Vec<TensorId>,
    /// The roles of inputs and outputs, in the network of a model; `None` in other networks.
    pub interface: Option<Interface<TensorId>>,
    /// All weights; ids are indices.
    pub weights: Vec<Weight>,
}

impl Network {
    /// A network without layers.
    pub fn new(name: impl Into<String>, profile: Profile) -> Self {
        Network {
            name: name.into(),
            profile,
            tensors: Vec::new(),
            layers: Vec::new(),
            inputs: Vec::new(),
            outputs: Vec::new(),
            interface: None,
            weights: Vec::new(),
        }
    }

    /// The tensor of an id of this network.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id.0 as usize]
    }
    /// The weight of an id of this network.
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }
    /// The network input or output of that name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        let ids = self.inputs.iter().chain(&self.outputs);
        ids.copied().find(|id| self.tensor(*id).name == name)
    }

    /// (cache input, updated output) of every cache that a layer updates: each pair must be bound to one address.
    pub fn aliases(&self) -> impl Iterator<Item = (TensorId, TensorId)> + '_ {
        self.cache_updates().map(|(_, cache, updated)| (cache, updated))
    }

    /// Every update of a cache: the layer, the cache that it reads, the output that it writes.
    pub(crate) fn cache_updates(&self) -> impl Iterator<Item = (&Layer, TensorId, TensorId)> {
        self.layers.iter().flat_map(|layer| {
            let pairs: Vec<(TensorId, TensorId)> = match &layer.kind {
                LayerKind::KvCacheUpdate => vec![(layer.inputs[0], layer.outputs[0])],
                LayerKind::DecodeAttention(attention) => {
                    let caches = AttentionInputs::of(attention, &layer.inputs).map(|inputs| inputs.caches);
                    let caches = caches.into_iter().flatten();
                    caches.zip(layer.outputs.iter().skip(1).copied()).collect()
                }
                _ => Vec::new(),
            };
            pairs.into_iter().map(move |(cache, updated)| (layer, cache, updated))
        })
    }
}
