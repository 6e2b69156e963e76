//! The part of a graph that is a mixture of experts: from the choice of experts forward to the value in which everything is
//! combined, and back to the value from which everything is computed.
//!
//! Only data counts: reading the shape of a value is not a dependency.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::graph::{Graph, NodeId, Op, ValueId};

/// Order and readers of a sorted graph.
pub struct Flow<'g> {
    pub graph: &'g Graph,
    place: HashMap<NodeId, usize>,
    /// By value, as data.
    pub readers: HashMap<ValueId, Vec<NodeId>>,
    /// Values that depend on an input of the graph.
    pub carries: HashSet<ValueId>,
}

impl<'g> Flow<'g> {
    pub fn new(graph: &'g Graph) -> Self {
        let mut flow = Flow {
            graph,
            place: HashMap::new(),
            readers: HashMap::new(),
            carries: graph.inputs.iter().copied().collect(),
        };
        for (place, id) in graph.node_ids().enumerate() {
            flow.place.insert(id, place);
            let node = graph.node(id);
            let data = data_inputs(graph, id);
            if data.iter().any(|v| flow.carries.contains(v)) {
                flow.carries.extend(node.outputs.iter().flatten());
            }
            for value in data {
                let readers = flow.readers.entry(value).or_default();
                if readers.last() != Some(&id) {
                    readers.push(id);
                }
            }
        }
        flow
    }

    /// The one reader of a value, if there is one.
    pub fn only_reader(&self, value: ValueId) -> Option<NodeId> {
        match self.readers.get(&value).map(Vec::as_slice) {
            Some([reader]) if !self.graph.outputs.contains(&value) => Some(*reader),
            _ => None,
        }
    }

    /// The dominators of `value`: values through which all of its inputs pass, nearest first, found lazily.
    pub fn dominators(&self, value: ValueId) -> impl Iterator<Item = ValueId> + use<'_, 'g> {
        let graph = self.graph;
        let at = move |v: ValueId| graph.producer_of(v).map_or(0, |(node, _)| self.place[&node] + 1);
        let mut open = BTreeSet::from([(at(value), value)]);
        std::iter::from_fn(move || {
            while let Some((_, next)) = open.pop_last() {
                let alone = open.is_empty() && next != value;
                if let Some((node, _)) = graph.producer_of(next) {
                    let inputs = data_inputs(graph, node).into_iter();
                    open.extend(inputs.filter(|v| self.carries.contains(v)).map(|v| (at(v), v)));
                }
                if alone {
                    return Some(next);
                }
            }
            None
        })
    }

    /// The first `count` post-dominators of a node's outputs, nearest first.
    pub fn postdominators(&self, node: NodeId, count: usize) -> Vec<ValueId> {
        let graph = self.graph;
        let mut waiting: HashMap<ValueId, usize> = HashMap::new();
        let begin = |outputs: &[Option<ValueId>], waiting: &mut HashMap<ValueId, usize>| {
            for output in outputs.iter().flatten() {
                let readers = self.readers.get(output).map_or(0, Vec::len);
                let readers = readers + usize::from(graph.outputs.contains(output));
                if readers > 0 {
                    waiting.insert(*output, readers);
                }
            }
        };
        begin(&graph.node(node).outputs, &mut waiting);
        let mut found = Vec::new();
        for id in graph.node_ids().skip(self.place[&node] + 1) {
            let inputs = data_inputs(graph, id);
            let mut dependent = false;
            for input in inputs.iter().collect::<HashSet<_>>() {
                if let Some(left) = waiting.get_mut(input) {
                    dependent = true;
                    *left -= 1;
                    if *left == 0 {
                        waiting.remove(input);
                    }
                }
            }
            if !dependent {
                continue;
            }
            begin(&graph.node(id).outputs, &mut waiting);
            if let (1, [Some(output)]) = (waiting.len(), &graph.node(id).outputs[..])
                && waiting.contains_key(output)
            {
                found.push(*output);
            }
            if waiting.is_empty() || found.len() == count {
                break;
            }
        }
        found
    }

    /// Everything that is computed from the outputs of a node.
    pub fn descendants(&self, node: NodeId) -> HashSet<ValueId> {
        let graph = self.graph;
        let mut found: HashSet<ValueId> = graph.node(node).outputs.iter().flatten().copied().collect();
        for id in graph.node_ids().skip(self.place[&node] + 1) {
            if data_inputs(graph, id).iter().any(|v| found.contains(v)) {
                found.extend(graph.node(id).outputs.iter().flatten());
            }
        }
        found
    }

    /// The nodes that compute `value` from these values, in the graph's order.
    pub fn cone(&self, value: ValueId, ends: &[ValueId]) -> Vec<NodeId> {
        let graph = self.graph;
        let mut seen: HashSet<ValueId> = ends.iter().copied().collect();
        let mut nodes = BTreeSet::new();
        let mut stack = vec![value];
        while let Some(next) = stack.pop() {
            if !seen.insert(next) {
                continue;
            }
            if let Some((node, _)) = graph.producer_of(next) {
                nodes.insert((self.place[&node], node));
                stack.extend(data_inputs(graph, node));
            }
        }
        nodes.into_iter().map(|(_, node)| node).collect()
    }
}

/// The inputs of a node whose elements it reads.
pub fn data_inputs(graph: &Graph, id: NodeId) -> Vec<ValueId> {
    let node = graph.node(id);
    match node.op {
        Op::Shape { .. } | Op::Size => Vec::new(),
        _ => node.inputs.iter().flatten().copied().collect(),
    }
}
