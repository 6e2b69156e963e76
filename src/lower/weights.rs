//! Decides which constants are weights, names them, and finds equal ones. The rule is in the head of [`lower`](super).

use std::collections::{HashMap, HashSet};

use super::demand::{Demand, demand};
use crate::graph::{Constant, ConstantSource, Graph, Op, ValueId};
use crate::interface::Role;
use crate::tensor::DType;

/// Constants up to this size can be part of a plan; larger ones are always weights.
pub const LITERAL_BYTES: usize = 64 << 10;

/// A weight of the graph, for the package's manifest.
#[derive(Clone, Debug)]
pub struct NamedWeight {
    /// The name in every network lowered from the graph: the initializer's name if there is one.
    pub name: String,
    /// Its values or their recipe.
    pub constant: Constant,
    /// Whether its rows are gathered, as in an embedding.
    pub is_table: bool,
}

/// The weights of networks that are lowered from a file of this graph, in order of first use: what such a file stores
/// outside the graph. Every constant of a file is an initializer, so each has its own name here and its own dtype. Only
/// single numbers are not weights, and index vectors that runtimes need in place to infer shapes.
pub fn stored_weights(graph: &Graph) -> Vec<(ValueId, NamedWeight)> {
    let mut seen = HashSet::new();
    let read = graph
        .node_ids()
        .flat_map(|node| graph.node(node).inputs.iter().flatten());
    // No network reads the embedding table, but a package stores it.
    let read = read.chain(&graph.embedding);
    let constants = read.filter_map(|id| graph.constant(*id).map(|constant| (*id, constant)));
    let weights = constants.filter(|(id, constant)| is_weight(constant, true) && seen.insert(*id));
    let tables = tables(graph);
    let named = weights.map(|(id, constant)| {
        let weight = NamedWeight {
            name: graph.value(id).name.clone(),
            constant: constant.clone(),
            is_table: tables.contains(&id),
        };
        (id, weight)
    });
    named.collect()
}

/// Constant values of the graph that are weights, and the weights in order of first use.
pub(super) struct Table {
    pub by_value: HashMap<ValueId, usize>,
    pub list: Vec<NamedWeight>,
}

/// Every weight in networks of this graph, for any profile, in order of first use.
pub fn weights(graph: &Graph) -> Vec<NamedWeight> {
    table(graph, &demand(graph)).list
}

pub(super) fn table(graph: &Graph, demand: &Demand) -> Table {
    let interface = graph.inputs.iter().chain(&graph.outputs);
    let mut taken: HashSet<String> = interface.map(|v| graph.value(*v).name.clone()).collect();
    taken.insert(Role::LogitRows.name());
    let mut known: HashMap<String, usize> = HashMap::new();
    let tables = tables(graph);
    let mut by_value = HashMap::new();
    let mut list: Vec<NamedWeight> = Vec::new();
    for id in &demand.constants {
        let Some(constant) = graph.constant(*id).filter(|c| is_weight(c, c.origin().is_some())) else {
            continue;
        };
        let index = *known.entry(constant.identity()).or_insert_with(|| {
            let base = constant.origin().unwrap_or(&graph.value(*id).name);
            let numbered = (1..).map(|n| format!("{base}.{n}"));
            let mut candidates = std::iter::once(base.to_string()).chain(numbered);
            let name = candidates
                .find(|name| !taken.contains(name))
                .expect("some number is free");
            taken.insert(name.clone());
            list.push(NamedWeight {
                name,
                // TensorRT's indices are i32.
                constant: match constant.dtype() {
                    DType::I64 => constant.cast(DType::I32),
                    _ => constant.clone(),
                },
                is_table: false,
            });
            list.len() - 1
        });
        list[index].is_table |= tables.contains(id);
        by_value.insert(*id, index);
    }
    Table { by_value, list }
}

/// Values whose rows nodes gather.
fn tables(graph: &Graph) -> HashSet<ValueId> {
    let nodes = graph.node_ids().map(|id| graph.node(id));
    let gathers = nodes.filter(|node| matches!(node.op, Op::Gather { .. }));
    gathers
        .filter_map(|node| node.input(0))
        .chain(graph.embedding)
        .collect()
}

/// The rule in the head of [`lower`](super). `initializer`: whether the constant came, or will come, from a file by its name.
fn is_weight(constant: &Constant, initializer: bool) -> bool {
    matches!(constant.source(), ConstantSource::Absent)
        || constant.byte_len() > LITERAL_BYTES
        || (constant.dtype().is_float() || constant.dtype().is_storage_only()) && constant.len() >= 2 && initializer
}
