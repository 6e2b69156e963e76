//! Which values depend on token ids and caches, and which on positions alone.
//!
//! Everything an export computes from its masks, positions, lengths and shapes alone is *positional*: it can be
//! executed for any (batch, past, tokens) without weights or tokens, which is how masks, rotary tables and index
//! arithmetic are recognized. Input: an inferred graph and its [`Roles`]. Output: a [`Dependence`] for each value.

use std::collections::{HashMap, HashSet};

use super::roles::Roles;
use crate::graph::op::Op;
use crate::graph::{Definition, Graph, ValueId};

/// What a value depends on; the larger one wins when values are combined.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Dependence {
    /// Depends on nothing.
    Constant,
    /// Depends on batch size, past length, token count and capacity only.
    Positional,
    /// Depends on token ids or cache contents.
    Data,
}

/// The dependence of every live value. The graph must be sorted.
pub fn classify(graph: &Graph, roles: &Roles) -> HashMap<ValueId, Dependence> {
    let mut dependences = HashMap::new();
    for id in graph.value_ids() {
        match graph.value(id).definition {
            Definition::Constant(_) => dependences.insert(id, Dependence::Constant),
            Definition::Input => {
                let positional = roles.of.get(&id).is_some_and(|role| role.is_positional());
                dependences.insert(
                    id,
                    if positional {
                        Dependence::Positional
                    } else {
                        Dependence::Data
                    },
                )
            }
            _ => None,
        };
    }
    for id in graph.node_ids() {
        let node = graph.node(id);
        let inputs = node.inputs.iter().flatten();
        let dependence = match node.op {
            // A shape follows from the dims, whatever the elements are.
            Op::Shape { .. } | Op::Size => Dependence::Positional,
            Op::Unknown { .. } => Dependence::Data,
            _ => inputs
                .map(|v| dependences.get(v).copied().unwrap_or(Dependence::Data))
                .max()
                .unwrap_or(Dependence::Constant),
        };
        for output in node.outputs.iter().flatten() {
            dependences.insert(*output, dependence);
        }
    }
    dependences
}

/// Values whose elements affect the outputs.
pub fn reaching_outputs(graph: &Graph) -> HashSet<ValueId> {
    let mut stack: Vec<ValueId> = graph.outputs.clone();
    let mut seen: HashSet<ValueId> = stack.iter().copied().collect();
    while let Some(id) = stack.pop() {
        if let Some((_, node)) = graph.def(id)
            && !matches!(node.op, Op::Shape { .. } | Op::Size)
        {
            stack.extend(node.inputs.iter().flatten().filter(|v| seen.insert(**v)));
        }
    }
    seen
}
