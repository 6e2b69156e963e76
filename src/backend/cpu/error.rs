use std::fmt;

use super::simd::Isa;
use crate::graph::ConstantError;
use crate::network::VerifyError;

/// Why a network cannot be compiled for the CPU or run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CpuError {
    /// The network breaks a rule of its level: a fault of whoever made it.
    #[error(transparent)]
    Network(#[from] VerifyError),
    /// The network keeps the rules, but asks for what the executor does not do.
    #[error("layer {layer:?} ({kind}): {reason}")]
    Layer {
        layer: String,
        kind: &'static str,
        reason: String,
    },
    /// A shape still holds a symbol. The executor runs static shapes; see [`bind_tokens`](super::bind_tokens).
    #[error("tensor {tensor:?} has the dynamic shape {shape}: bind its tokens to a number first")]
    Dynamic { tensor: String, shape: String },
    #[error("{tokens} tokens are outside the profile's {min} to {max}")]
    Tokens { tokens: usize, min: usize, max: usize },
    /// The network's activations would need more bytes than an address can number.
    #[error("the activations of the network are larger than memory can be")]
    TooLarge,
    /// A program was asked for that this machine cannot run.
    #[error("this machine does not have the instruction set {isa}; it has {}", available())]
    Isa { isa: Isa },
    #[error(transparent)]
    Weight(#[from] ConstantError),
    /// The program has this input, output or cache, and the caller bound nothing to it.
    #[error("{name:?}: the {what} is not bound")]
    MissingBinding { what: &'static str, name: String },
    /// The caller bound an input, output or cache that the program does not have.
    #[error("{name:?}: the program has no such {what}; it has {}", known.join(", "))]
    UnknownBinding {
        what: &'static str,
        name: String,
        known: Vec<String>,
    },
    /// By role and by name, or by the same one twice.
    #[error("{name:?}: the {what} is bound twice")]
    BoundTwice { what: &'static str, name: String },
    /// What the caller bound does not fit the network.
    #[error("{name:?}: {reason}")]
    Binding { name: String, reason: String },
    /// An index computed from the caller's inputs lies outside what it indexes.
    #[error("layer {layer:?}: {what} {index} is outside 0..{bound}")]
    Index {
        layer: String,
        what: Indexed,
        index: i64,
        bound: usize,
    },
}

/// The instruction sets of this machine, in words.
fn available() -> String {
    let names: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    names.join(", ")
}

/// What an index stood for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Indexed {
    /// Of a gather: a token id, when the table is the embedding.
    Index,
    /// A position in the rotary tables.
    Position,
    /// The first slot of a cache write; the bound leaves room for all its tokens.
    Slot,
}

impl fmt::Display for Indexed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Indexed::Index => "index",
            Indexed::Position => "position",
            Indexed::Slot => "cache slot",
        })
    }
}
