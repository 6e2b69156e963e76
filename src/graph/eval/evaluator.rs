//! Values of a graph, computed on demand.

use std::collections::{HashMap, HashSet};

use super::{EvalError, error::EvalError as E, eval_node};
use crate::graph::{Definition, Graph, NodeId, ValueId};
use crate::tensor::Tensor;

/// Computes values of a graph from bindings, each at most once.
///
/// Any value can be bound, not only graph inputs: a binding hides the value's definition, so a part of a graph can run
/// alone. Only the dependencies of the requested value are computed, so other inputs may stay unbound.
pub struct Evaluator<'g> {
    graph: &'g Graph,
    known: HashMap<ValueId, Tensor>,
}

impl<'g> Evaluator<'g> {
    /// An evaluator with these bindings.
    pub fn new(graph: &'g Graph, bindings: HashMap<ValueId, Tensor>) -> Self {
        Evaluator { graph, known: bindings }
    }

    /// The tensor of one value.
    pub fn value(&mut self, wanted: ValueId) -> Result<Tensor, EvalError> {
        // Depth first without recursion: graphs are thousands of nodes deep.
        let mut open = HashSet::new();
        let mut stack = vec![wanted];
        while let Some(&id) = stack.last() {
            if self.known.contains_key(&id) {
                stack.pop();
                continue;
            }
            let value = self.graph.value(id);
            let node = match &value.definition {
                Definition::Constant(constant) => {
                    let tensor = constant.materialize()?;
                    self.known.insert(id, tensor);
                    continue;
                }
                Definition::Node { node, .. } => *node,
                Definition::Input => {
                    return Err(E::Unbound {
                        value: value.name.clone(),
                    });
                }
                Definition::Dead => {
                    return Err(E::Undefined {
                        value: value.name.clone(),
                    });
                }
            };
            let inputs = self.graph.node(node).inputs.iter().flatten();
            let missing: Vec<ValueId> = inputs.filter(|i| !self.known.contains_key(i)).copied().collect();
            if missing.is_empty() {
                self.run(node)?;
                if !self.known.contains_key(&id) {
                    return Err(E::Undefined {
                        value: value.name.clone(),
                    });
                }
            } else if open.insert(id) {
                stack.extend(missing);
            } else {
                return Err(E::Cycle {
                    value: value.name.clone(),
                });
            }
        }
        Ok(self.known[&wanted].clone())
    }

    /// The tensors of several values, in order.
    pub fn values(&mut self, wanted: &[ValueId]) -> Result<Vec<Tensor>, EvalError> {
        wanted.iter().map(|id| self.value(*id)).collect()
    }

    fn run(&mut self, id: NodeId) -> Result<(), EvalError> {
        let node = self.graph.node(id);
        let inputs: Vec<Option<Tensor>> = node.inputs.iter().map(|i| i.map(|i| self.known[&i].clone())).collect();
        let results = eval_node(&node.op, &inputs, node.outputs.len()).map_err(|source| E::Node {
            node: node.name.clone(),
            op: node.op.name(),
            inputs: describe(&inputs),
            source: Box::new(source),
        })?;
        for (output, result) in node.outputs.iter().zip(results) {
            if let (Some(output), Some(result)) = (output, result) {
                // A bound output keeps its binding.
                self.known.entry(*output).or_insert(result);
            }
        }
        Ok(())
    }
}

fn describe(inputs: &[Option<Tensor>]) -> String {
    let each: Vec<String> = inputs
        .iter()
        .map(|i| i.as_ref().map_or("-".to_string(), |t| format!("{t:?}")))
        .collect();
    each.join(", ")
}
