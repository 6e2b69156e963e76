//! Differences of opsets 11 to 13 from opset 14: the softmax over several axes at once, and `Dropout` with its ratio as an
//! attribute. Lists that became inputs (axes of `Squeeze`, `Unsqueeze` and reductions, sizes of `Split`) are read here for
//! all opsets.
//!
//! Other operators changed between 11 and 14 only in the types that they accept, or have new attributes whose defaults
//! keep the old behavior. An operator of a later opset is read by its own definition: ONNX Runtime's optimizer writes
//! `LayerNormalization` into models of any opset.

use super::{Failure, Replacement, SourceNode};
use crate::graph::op::{AttributeSource, Op, Reduction};

/// The opset in which `Softmax` and `LogSoftmax` became one over a single axis; the same for axes of `Squeeze`, `Unsqueeze`
/// and `ReduceSum`, and sizes of `Split`, as inputs.
const INPUTS: i64 = 13;

impl SourceNode<'_> {
    /// The node's replacement if its opset defines it differently from later ones.
    pub(super) fn older_meaning(&self) -> Result<Option<Replacement>, Failure> {
        match self.op_type {
            "Softmax" | "LogSoftmax" if self.opset < INPUTS => self.flattened_softmax().map(Some),
            "Dropout" if self.opset < 12 => {
                self.attributes.ignore(&["ratio"]);
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// Before opset 13 the axes from `axis` on (default 1) count as one.
    fn flattened_softmax(&self) -> Result<Replacement, Failure> {
        let axis = self.attributes.int_or("axis", 1)?;
        let op = match self.op_type {
            "Softmax" => Op::Softmax { axis: -1 },
            _ => Op::LogSoftmax { axis: -1 },
        };
        Ok(match axis {
            -1 => Replacement::Op(op),
            _ => Replacement::Flattened(op, axis),
        })
    }

    /// A list that is an attribute in this opset and an input in later ones, with its name. `None` if it is omitted or
    /// an input.
    pub(super) fn listed(&self, op: &Op) -> Result<Option<(&'static str, Vec<i64>)>, Failure> {
        let (name, since) = match op {
            Op::Reduce { reduction, .. } if *reduction != Reduction::Sum => ("axes", 18),
            Op::Reduce { .. } | Op::Squeeze | Op::Unsqueeze => ("axes", INPUTS),
            Op::Split { .. } => ("split", INPUTS),
            _ => return Ok(None),
        };
        if self.opset >= since {
            return Ok(None);
        }
        let list = AttributeSource::ints(self, name)?;
        match (list, self.inputs.get(1).copied().flatten()) {
            (Some(_), Some(_)) => Err(format!("its {name} are an attribute and an input").into()),
            (None, None) if *op == Op::Unsqueeze => Err("its attribute \"axes\" is missing".into()),
            (list, _) => Ok(list.map(|list| (name, list))),
        }
    }
}
