//! Why a graph cannot be lowered.

use std::fmt::Write;

use crate::graph::infer::InferError;
use crate::graph::{ConstantError, CycleError};
use crate::help::{Fault, Help};
use crate::network::{BuildError, VerifyError};

/// One node without a lowering.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// Its name, with the folder of its layer.
    pub node: String,
    /// Its operator.
    pub op: String,
    /// The reason.
    pub reason: String,
}

/// Why a graph cannot be lowered.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum LowerError {
    /// All such nodes, in order of execution. Nodes that only depend on one of them are not listed.
    #[error("{}", list(.0))]
    Unsupported(Vec<Obstacle>),
    /// Types or shapes contradict each other.
    #[error("the graph cannot be typed before it is lowered: {0}")]
    Infer(#[from] Box<InferError>),
    /// The graph has a cycle.
    #[error(transparent)]
    Cycle(#[from] CycleError),
    /// An input of the graph has no counterpart in a network.
    #[error("input {name:?} cannot be lowered: {reason}")]
    Input { name: String, reason: String },
    /// An output of the graph has no counterpart in a network.
    #[error("output {name:?} cannot be lowered: {reason}")]
    Output { name: String, reason: String },
    /// The graph is not canonical, or (for rules of layers) the lowering has a bug.
    #[error("the lowered network breaks a rule: {0}")]
    Network(#[from] Box<VerifyError>),
}

/// Every graph that the passes call canonical can be lowered; otherwise one of the two has a bug.
impl Help for LowerError {
    fn fault(&self) -> Fault {
        Fault::Bug
    }
}

fn list(obstacles: &[Obstacle]) -> String {
    let mut text = match obstacles.len() {
        1 => "one node has no lowering to TensorRT layers:".to_string(),
        n => format!("{n} nodes have no lowering to TensorRT layers:"),
    };
    for Obstacle { node, op, reason } in obstacles {
        write!(text, "\n  {node:?} ({op}): {reason}").expect("writing to a string");
    }
    text
}

/// Why one node cannot be lowered.
#[derive(Debug, thiserror::Error)]
pub(super) enum Reason {
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Constant(#[from] ConstantError),
    #[error("{0}")]
    Unsupported(String),
    /// A previous node failed and is already listed.
    #[error("depends on a node that has no lowering")]
    Upstream,
}

impl Reason {
    pub(super) fn unsupported<T>(text: impl Into<String>) -> Result<T, Reason> {
        Err(Reason::Unsupported(text.into()))
    }
}
