//! Why a value cannot be computed.

use crate::graph::ConstantError;
use crate::tensor::DType;

#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum EvalError {
    #[error("input {input} is missing")]
    MissingInput { input: usize },
    #[error("{0}")]
    Shape(String),
    #[error("{what} cannot be {dtype}")]
    DType { what: &'static str, dtype: DType },
    #[error("{0}")]
    Invalid(String),
    #[error("operator {0} is not known to Lapidary")]
    Unknown(String),
    #[error("the graph input {value:?} is not bound to a tensor")]
    Unbound { value: String },
    #[error("the value {value:?} has no definition")]
    Undefined { value: String },
    #[error("the value {value:?} depends on itself")]
    Cycle { value: String },
    #[error(transparent)]
    Constant(#[from] ConstantError),
    /// An operator failed inside a graph.
    #[error("node {node:?} ({op}, inputs {inputs}): {source}")]
    Node {
        node: String,
        op: String,
        inputs: String,
        #[source]
        source: Box<EvalError>,
    },
}

pub(super) fn shape_error(text: String) -> EvalError {
    EvalError::Shape(text)
}

pub(super) fn invalid(text: impl Into<String>) -> EvalError {
    EvalError::Invalid(text.into())
}
