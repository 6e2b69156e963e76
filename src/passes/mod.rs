//! Rewrites of the graph, from what an exporter wrote to the canonical graph (see [`crate::graph`]).
//!
//! One rewrite a file. Each is `run(&mut Graph, ..) -> Result<usize, PassError>`, gives the number of rewrites it made (0:
//! the graph is as it was), leaves the graph sorted and without dead nodes, and can be run alone, in any order and again.
//! A rewrite that is not sure leaves the graph as it is. Types: passes read dtypes and shapes that `graph::infer` left on
//! values and keep those of values they keep; values they add may be untyped, so infer again after a pass.
//!
//! | file | rewrite |
//! |---|---|
//! | `fold` | constants computed; weights moved by recipe; shape arithmetic by symbolic contents |
//! | `cleanup` | operators that change nothing; equal nodes and equal constants merged |
//! | `decompose` | contrib operators into plain ones |
//! | `layer_norm`, `rms_norm` | normalizations from their parts |
//! | `activation` | SiLU and GELU from their parts, proven by execution |
//! | `linear` | every linear layer as `MatMul(x, Transpose(weight))` and `Add` |
//! | `dtype` | another float type for the whole graph |

pub mod activation;
pub mod cleanup;
pub mod layer_norm;
mod pattern;
pub mod rms_norm;

use crate::graph::eval::EvalError;
use crate::graph::infer::InferError;
use crate::graph::{ConstantError, CycleError};

/// Why a pass gave up. The graph may be half rewritten and must not be used any more.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError {
    #[error(transparent)]
    Cycle(#[from] CycleError),
    #[error(transparent)]
    Infer(#[from] InferError),
    #[error(transparent)]
    Constant(#[from] ConstantError),
    #[error("folding constants: {0}")]
    Eval(#[from] EvalError),
}
