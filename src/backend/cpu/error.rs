//! Errors of a network, of a caller's bindings, and of the indices in them.

use std::fmt;

use super::simd::Isa;
use crate::graph::ConstantError;
use crate::help::{Fault, Help, REPORT_BUG};
use crate::network::VerifyError;

/// Why a network cannot be compiled for the CPU or run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CpuError {
    /// The network breaks a rule of its level: an error of what made it.
    #[error(transparent)]
    Network(#[from] VerifyError),
    /// The network keeps the rules, but asks for what the executor does not do.
    #[error("layer {layer:?} ({kind}): {reason}")]
    Layer {
        /// The layer.
        layer: String,
        /// Its kind, as dumps call it.
        kind: &'static str,
        /// What is wrong, in words.
        reason: String,
    },
    /// A shape still holds a symbol. The executor runs static shapes; see [`bind_tokens`](super::bind_tokens).
    #[error("tensor {tensor:?} has the dynamic shape {shape}: bind its tokens to a number first")]
    Dynamic {
        /// The tensor's name.
        tensor: String,
        /// Its shape, as dumps write it.
        shape: String,
    },
    /// Tokens that the profile does not allow.
    #[error("{tokens} tokens are outside the profile's {min} to {max}")]
    Tokens {
        /// Tokens asked for.
        tokens: usize,
        /// The fewest tokens.
        min: usize,
        /// The most tokens.
        max: usize,
    },
    /// The network's activations would need more bytes than an address can number.
    #[error("the activations of the network are larger than memory can be")]
    TooLarge,
    /// A program was asked for that this machine cannot run.
    #[error("this machine does not have the instruction set {isa}; it has {}", available())]
    Isa {
        /// What was asked for.
        isa: Isa,
    },
    /// A weight has no bytes.
    #[error(transparent)]
    Weight(#[from] ConstantError),
    /// The program has this input, output or cache, and the caller bound nothing to it.
    #[error("{name:?}: the {what} is not bound")]
    MissingBinding {
        /// Input, output or cache.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The caller bound an input, output or cache that the program does not have.
    #[error("{name:?}: the program has no such {what}; it has {}", known.join(", "))]
    UnknownBinding {
        /// Input, output or cache.
        what: &'static str,
        /// Its name.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// By role and by name, or by the same one twice.
    #[error("{name:?}: the {what} is bound twice")]
    BoundTwice {
        /// Input, output or cache.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// What the caller bound does not fit the network.
    #[error("{name:?}: {reason}")]
    Binding {
        /// Its name.
        name: String,
        /// What is wrong, in words.
        reason: String,
    },
    /// An index computed from the caller's inputs lies outside what it indexes.
    #[error("layer {layer:?}: {what} {index} is outside 0..{bound}")]
    Index {
        /// The layer.
        layer: String,
        /// What the index stands for.
        what: Indexed,
        /// The index.
        index: i64,
        /// The first index that is too large.
        bound: usize,
    },
}

/// The instruction sets of this machine, in words.
fn available() -> String {
    let names: Vec<String> = Isa::available().iter().map(Isa::to_string).collect();
    names.join(", ")
}

impl Help for CpuError {
    fn fault(&self) -> Fault {
        match self {
            CpuError::Network(_) => Fault::Bug,
            CpuError::Weight(error) => error.fault(),
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            CpuError::Weight(error) => error.help(),
            CpuError::Network(_) => Some(REPORT_BUG.to_string()),
            _ => None,
        }
    }
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
