//! The meaning of every operator: ONNX semantics on concrete tensors.
//!
//! [`eval_op`] computes one operator, [`Evaluator`] values of a [`Graph`](super::Graph) from bindings. Folding runs it on
//! constants. Recognition executes masks, positions and rotary tables with it and compares the results with the definition.
//! Tests use it as the oracle for every rewrite. It favors correctness and simplicity over speed: floats of every type compute in f64
//! and are rounded once per operator, so results differ from an fp32 engine by that engine's rounding. `backend::cpu` is the
//! fast executor.
//!
//! Nothing here panics on bad operands: shapes, dtypes and indices come from untrusted files, and each failure is an
//! [`EvalError`] that names the node.

mod array;
mod attention;
mod elementwise;
mod error;
mod evaluator;
mod experts;
mod gather;
mod gqa;
mod heads;
mod linear;
mod movement;
mod norm;
mod quantization;
mod reduce;
mod rotary;
mod selection;

pub use error::EvalError;
pub use evaluator::Evaluator;
pub(crate) use experts::gated;
pub(crate) use movement::{reshape_target, slice_range};

use crate::graph::op::{Family, Op};
use crate::tensor::Tensor;

/// Computes one operator, with all of its outputs, whether read or not. `Split` without sizes needs [`eval_node`],
/// which has the number of outputs.
pub fn eval_op(op: &Op, inputs: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>, EvalError> {
    if matches!(op, Op::Split { .. }) && inputs.get(1).is_none_or(Option::is_none) {
        return Err(EvalError::MissingInput { input: 1 });
    }
    eval_node(op, inputs, 1)
}

/// [`eval_op`] for a node with `outputs` outputs.
pub fn eval_node(op: &Op, inputs: &[Option<Tensor>], outputs: usize) -> Result<Vec<Option<Tensor>>, EvalError> {
    // Storage-only elements can be converted, dequantized or reshaped; nothing else operates on them.
    let keeps_elements = matches!(
        op,
        Op::Cast { .. }
            | Op::CastLike
            | Op::Identity
            | Op::Reshape { .. }
            | Op::Flatten { .. }
            | Op::Squeeze
            | Op::Unsqueeze
            | Op::Shape { .. }
            | Op::Size
            | Op::QuantizeLinear { .. }
            | Op::DequantizeLinear { .. }
    );
    let stored_only = inputs.iter().flatten().map(Tensor::dtype).find(|d| d.is_storage_only());
    if let (Some(dtype), false) = (stored_only, keeps_elements) {
        let what = "an operand";
        return Err(EvalError::DType { what, dtype });
    }
    let operands = Operands { inputs, outputs };
    match op.info().family {
        Family::Elementwise => elementwise::eval(op, &operands),
        Family::Reduction => reduce::eval(op, &operands),
        Family::Product => linear::eval(op, &operands),
        Family::Normalization => norm::eval(op, &operands),
        Family::Movement => movement::eval(op, &operands),
        Family::Indexing => gather::eval(op, &operands),
        Family::Selection => selection::eval(op, &operands),
        Family::Attention => attention::eval(op, &operands),
        Family::Experts => experts::eval(op, &operands),
        Family::Quantization => quantization::eval(op, &operands),
        Family::Unknown => no_evaluator(op),
    }
}

/// For an operator that its family's evaluator does not list.
fn no_evaluator(op: &Op) -> Result<Vec<Option<Tensor>>, EvalError> {
    Err(EvalError::Unknown(op.name()))
}

/// The operands of one node, and its number of outputs.
struct Operands<'a> {
    inputs: &'a [Option<Tensor>],
    outputs: usize,
}

impl<'a> Operands<'a> {
    /// Input `i` if present.
    fn maybe(&self, i: usize) -> Option<&'a Tensor> {
        self.inputs.get(i).and_then(Option::as_ref)
    }

    /// Input `i`, which the operator requires.
    fn need(&self, i: usize) -> Result<&'a Tensor, EvalError> {
        self.maybe(i).ok_or(EvalError::MissingInput { input: i })
    }
}

#[cfg(test)]
mod tests;
