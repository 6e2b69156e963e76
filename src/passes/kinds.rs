//! Which values depend on token ids and caches, and which on positions alone.
//!
//! Everything an export computes from its masks, positions, lengths and shapes alone is *positional*: it can be executed
//! for any (batch, past, tokens) without weights or tokens, which is how masks, rotary tables and index arithmetic are
//! recognised. Taken: an inferred graph and its [`Roles`]. Given: a [`Kind`] for each value.

use std::collections::HashMap;

use super::roles::Roles;
use crate::graph::op::Op;
use crate::graph::{Definition, Graph, ValueId};

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Depends on nothing.
    Constant,
    /// Depends on batch size, past length, token count and capacity only.
    Positional,
    /// Depends on token ids or cache contents.
    Data,
}

/// The kind of every live value. The graph must be sorted.
pub fn classify(graph: &Graph, roles: &Roles) -> HashMap<ValueId, Kind> {
    let mut kinds = HashMap::new();
    for id in graph.value_ids() {
        match graph.value(id).definition {
            Definition::Constant(_) => kinds.insert(id, Kind::Constant),
            Definition::Input => {
                let positional = roles.of.get(&id).is_some_and(|role| role.is_positional());
                kinds.insert(id, if positional { Kind::Positional } else { Kind::Data })
            }
            _ => None,
        };
    }
    for id in graph.node_ids() {
        let node = graph.node(id);
        let inputs = node.inputs.iter().flatten();
        let kind = match node.op {
            // A shape is known from the dims, whatever the elements are.
            Op::Shape { .. } | Op::Size => Kind::Positional,
            Op::Unknown { .. } => Kind::Data,
            _ => inputs
                .map(|v| kinds.get(v).copied().unwrap_or(Kind::Data))
                .max()
                .unwrap_or(Kind::Constant),
        };
        for output in node.outputs.iter().flatten() {
            kinds.insert(*output, kind);
        }
    }
    kinds
}
