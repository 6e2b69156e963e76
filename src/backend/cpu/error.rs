//! Errors of a network, of a caller's bindings, and of the indices in them.

use std::fmt;

use super::simd::Isa;
use crate::graph::ConstantError;
use crate::help::{Fault, Help, REPORT_BUG};
use crate::network::VerifyError;

/// Why a network cannot be compiled for the CPU or run.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CpuError {
    /// The network violates a rule of its level: an error of the code that built it.
    #[error(transparent)]
    Network(#[from] VerifyError),
    /// The network is valid, but needs something that the executor does not support.
    #[error("layer {layer:?} ({kind}): {reason}")]
    Layer {
        /// The layer.
        layer: String,
        /// Its kind, as in dumps.
        kind: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A shape still contains a symbol. The executor runs static shapes; see [`bind_tokens`](super::bind_tokens).
    #[error("tensor {tensor:?} has the dynamic shape {shape}: bind its tokens to a number first")]
    Dynamic {
        /// The tensor's name.
        tensor: String,
        /// Its shape, as in dumps.
        shape: String,
    },
    /// A number of tokens that the profile does not allow.
    #[error("{tokens} tokens are outside the profile's {min} to {max}")]
    Tokens {
        /// Requested tokens.
        tokens: usize,
        /// Minimum tokens.
        min: usize,
        /// Maximum tokens.
        max: usize,
    },
    /// The network's activations would need more bytes than an address can number.
    #[error("the activations of the network are larger than memory can be")]
    TooLarge,
    /// A requested program cannot run on this machine.
    #[error("this machine does not have the instruction set {isa}; it has {}", available())]
    Isa {
        /// The requested instruction set.
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
        /// The existing names.
        known: Vec<String>,
    },
    /// Bound by role and by name, or twice by the same one.
    #[error("{name:?}: the {what} is bound twice")]
    BoundTwice {
        /// Input, output or cache.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// A binding does not match the network.
    #[error("{name:?}: {reason}")]
    Binding {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// An index computed from the caller's inputs is out of range.
    #[error("layer {layer:?}: {what} {index} is outside 0..{bound}")]
    Index {
        /// The layer.
        layer: String,
        /// What the index means.
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

/// The meaning of an index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Indexed {
    /// An index of a gather: a token id, if the table is the embedding.
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
