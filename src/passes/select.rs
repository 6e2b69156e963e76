//! Logits of one token in each sequence.
//!
//! A prompt's prefill wants the logits of its last token only; the language-model head over all tokens can cost more
//! than the layers. [`select_logits`] gathers the wanted rows in front of the head.

use crate::dim::Dim;
use crate::graph::op::{Binary, Op, Unary};
use crate::graph::{Graph, NodeId, ValueId};
use crate::tensor::DType;

/// The canonical graph has no head that rows could be selected in front of.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("rows of logits cannot be selected: {at} is not computed row by row from a matrix product with a weight")]
pub struct NoHead {
    /// The value at which the walk back from the logits stopped.
    pub at: String,
}

/// Adds the input `logit_rows` (i64, `[batch]`: which token of each sequence) to a canonical graph and makes `logits`
/// `[batch, 1, vocabulary]`. The rows are picked by `GatherND(batch_dims = 1)` with indices `[batch, 1, 1]` from the
/// activation that the language-model head multiplies.
pub fn select_logits(graph: &mut Graph) -> Result<(), NoHead> {
    let logits = graph.outputs[0];
    let mut chain: Vec<NodeId> = Vec::new();
    let mut at = logits;
    let (head, hidden) = loop {
        let stop = |graph: &Graph, at: ValueId| NoHead {
            at: graph.value(at).name.clone(),
        };
        let (id, node) = graph.def(at).ok_or_else(|| stop(graph, at))?;
        let per_row = |v: Option<ValueId>| {
            v.is_some_and(|v| {
                graph
                    .shape(v)
                    .is_some_and(|s| s.len() <= 1 || s[..s.len() - 1].iter().all(Dim::is_one))
            })
        };
        let next = match &node.op {
            Op::MatMul => {
                let hidden = node.input(0).ok_or_else(|| stop(graph, at))?;
                let weight = node.input(1).ok_or_else(|| stop(graph, at))?;
                if graph.shape(hidden).map(Vec::len) != Some(3) || graph.shape(weight).map(Vec::len) != Some(2) {
                    return Err(stop(graph, at));
                }
                break (id, hidden);
            }
            Op::Cast { .. } | Op::Identity | Op::Clip | Op::Unary(Unary::Tanh | Unary::Neg) => node.input(0),
            Op::Binary(Binary::Add | Binary::Sub | Binary::Mul | Binary::Div | Binary::Max | Binary::Min) => {
                if per_row(node.input(1)) {
                    node.input(0)
                } else if per_row(node.input(0)) {
                    node.input(1)
                } else {
                    None
                }
            }
            _ => None,
        };
        chain.push(id);
        at = next.ok_or_else(|| stop(graph, at))?;
    };
    let batch = graph.shape(hidden).expect("checked above")[0].clone();
    let dtype = graph.value(hidden).dtype;
    let width = graph.shape(hidden).expect("checked above")[2].clone();
    let one = Dim::from(1usize);
    let rows = graph.add_input("logit_rows", DType::I64, vec![batch.clone()]);
    let axes = graph.add_i64("logit_rows.axes", &[1, 2]);
    let indices = graph.add_node("logit_rows.indices", Op::Unsqueeze, &[rows, axes]);
    let value = graph.value_mut(indices);
    (value.dtype, value.shape) = (Some(DType::I64), Some(vec![batch.clone(), one.clone(), one.clone()]));
    let picked = graph.add_node("logit_rows.hidden", Op::GatherNd { batch_dims: 1 }, &[hidden, indices]);
    let value = graph.value_mut(picked);
    (value.dtype, value.shape) = (dtype, Some(vec![batch.clone(), one.clone(), width]));
    graph.node_mut(head).inputs[0] = Some(picked);
    for id in chain.into_iter().chain([head]) {
        let outputs: Vec<ValueId> = graph.node(id).outputs.iter().flatten().copied().collect();
        for output in outputs {
            if let Some(shape) = &mut graph.value_mut(output).shape
                && shape.len() == 3
            {
                shape[1] = one.clone();
            }
        }
    }
    graph.sort().expect("the gather comes before the head");
    Ok(())
}
