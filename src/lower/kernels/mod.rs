//! Lapidary's own layers in place of operators, for networks of one token per sequence: the parts that decode kernels
//! compute.
//!
//! Input: the canonical graph, before it is lowered. Output: a [`KernelPlan`], groups of nodes, each of which becomes
//! one [`RowProduct`] or [`DecodeAttention`]. `attention` finds the attentions, with the rotation, norms and cache
//! updates before them and the join of heads after them; `products` the linear layers, with the norm before and the
//! bias, activation, gate and residual after them; `mask` determines the slots that a token attends to; `emit` writes
//! the layers. A node is part of a group only if nothing else reads its intermediate results. The remaining nodes are
//! lowered as usual.
//!
//! [`DecodeAttention`]: crate::network::DecodeAttention

mod attention;
mod codes;
mod emit;
mod mask;
mod products;

use std::collections::{HashMap, HashSet};

use super::LowerOptions;
use super::demand::{Demand, data_inputs};
use super::weights::Table;
use crate::graph::{Graph, Node, NodeId, ValueId};
use crate::interface::{Interface, Role};
use crate::network::{Profile, RowProduct, Tokens, WeightMode};
use crate::tensor::DType;
use attention::AttentionGroup;
use products::ProductGroup;

/// Whether kernels can run networks of this profile and these options.
pub fn apply(profile: &Profile, options: &LowerOptions) -> bool {
    // Kernels read bound weights in place.
    options.kernels
        && options.weight_mode == WeightMode::Bind
        && profile.tokens == Tokens::Static(1)
        && profile.batch <= RowProduct::MOST_ROWS
}

/// Nodes that become one layer.
#[derive(Clone, Debug)]
enum Group {
    Product(ProductGroup),
    Attention(AttentionGroup),
}

impl Group {
    /// The nodes that it replaces.
    fn nodes(&self) -> &[NodeId] {
        match self {
            Group::Product(product) => &product.nodes,
            Group::Attention(attention) => &attention.nodes,
        }
    }

    /// The values that it computes, if they are values of the graph.
    fn outputs(&self) -> Vec<ValueId> {
        match self {
            Group::Product(product) => product.output.into_iter().collect(),
            Group::Attention(attention) => attention.outputs.to_vec(),
        }
    }

    /// The values that it reads.
    fn inputs(&self) -> Vec<ValueId> {
        match self {
            Group::Product(product) => product.inputs(),
            Group::Attention(attention) => attention.inputs(),
        }
    }
}

/// Which nodes are lowered to Lapidary's own layers. Empty if kernels do not apply.
#[derive(Default)]
pub(super) struct KernelPlan {
    groups: Vec<Group>,
    /// The last node of each group in the graph's order, where its layer is written.
    at: HashMap<NodeId, usize>,
}

impl KernelPlan {
    /// Finds all groups, and keeps in `demand` only the nodes that are needed outside of groups.
    pub fn find(graph: &Graph, demand: &mut Demand, table: &Table) -> Self {
        let finder = Finder::new(graph, demand, table);
        let mut groups = Vec::new();
        let attentions = finder.attentions();
        let (products, packed) = finder.products(&attentions);
        groups.extend(products.into_iter().map(Group::Product));
        groups.extend(attentions.into_iter().enumerate().map(|(i, attention)| {
            Group::Attention(AttentionGroup {
                packed: packed.get(&i).copied(),
                ..attention
            })
        }));
        let order: HashMap<NodeId, usize> = graph.node_ids().enumerate().map(|(i, id)| (id, i)).collect();
        let last = |group: &Group| group.nodes().iter().copied().max_by_key(|node| order[node]);
        let at = groups.iter().enumerate();
        let at = at.filter_map(|(i, group)| Some((last(group)?, i))).collect();
        let plan = KernelPlan { groups, at };
        demand.nodes = plan.needed(graph, demand);
        plan
    }

    /// Whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Whether a layer is written at this node.
    pub fn writes_at(&self, node: NodeId) -> bool {
        self.at.contains_key(&node)
    }

    /// The nodes that the outputs depend on, with each group as one node.
    fn needed(&self, graph: &Graph, demand: &Demand) -> HashSet<NodeId> {
        let mut by_output = HashMap::new();
        for (i, group) in self.groups.iter().enumerate() {
            by_output.extend(group.outputs().into_iter().map(|output| (output, i)));
        }
        let mut nodes = HashSet::new();
        let mut seen = HashSet::new();
        let mut open: Vec<ValueId> = graph.outputs.clone();
        while let Some(value) = open.pop() {
            if !seen.insert(value) {
                continue;
            }
            let mut at = by_output.get(&value).copied();
            if at.is_none()
                && let Some((id, node)) = graph.def(value).filter(|(id, _)| demand.nodes.contains(id))
                && nodes.insert(id)
            {
                open.extend(data_inputs(graph, node));
            }
            while let Some(i) = at {
                open.extend(self.groups[i].inputs());
                at = match &self.groups[i] {
                    Group::Attention(attention) => attention.packed,
                    Group::Product(_) => None,
                };
            }
        }
        nodes
    }
}

/// The graph in which groups are searched.
struct Finder<'g> {
    graph: &'g Graph,
    demand: &'g Demand,
    table: &'g Table,
    /// Nodes that read a value as data, once per read.
    readers: HashMap<ValueId, Vec<NodeId>>,
}

impl<'g> Finder<'g> {
    fn new(graph: &'g Graph, demand: &'g Demand, table: &'g Table) -> Self {
        let mut readers: HashMap<ValueId, Vec<NodeId>> = HashMap::new();
        for id in graph.node_ids().filter(|id| demand.nodes.contains(id)) {
            for value in data_inputs(graph, graph.node(id)) {
                readers.entry(value).or_default().push(id);
            }
        }
        Finder {
            graph,
            demand,
            table,
            readers,
        }
    }

    /// The only reader of a value, if it reads the value once and the value is not an output of the graph.
    fn reader(&self, value: ValueId) -> Option<(NodeId, &'g Node)> {
        match self.readers.get(&value).map(Vec::as_slice) {
            Some([only]) if !self.graph.outputs.contains(&value) => Some((*only, self.graph.node(*only))),
            _ => None,
        }
    }

    /// The node that computes a value, if nothing but `reader` reads it.
    fn private(&self, value: ValueId, reader: NodeId) -> Option<(NodeId, &'g Node)> {
        let (only, _) = self.reader(value)?;
        let (id, node) = self.graph.def(value)?;
        (only == reader).then_some((id, node))
    }

    /// fp16 or bf16.
    fn half(&self, value: ValueId) -> Option<DType> {
        let dtype = self.graph.value(value).dtype?;
        matches!(dtype, DType::F16 | DType::Bf16).then_some(dtype)
    }

    /// Whether the value is a constant of this dtype and shape that is not quantized.
    fn is_weight(&self, value: ValueId, dtype: DType, shape: &[usize]) -> bool {
        let constant = self.graph.constant(value);
        constant.is_some_and(|c| c.dtype() == dtype && c.shape() == shape && c.as_quantized().is_none())
    }

    /// Whether the value is the input of this role.
    fn is_input(&self, value: ValueId, role: Role) -> bool {
        let interface = self.graph.interface.as_ref();
        interface.and_then(|interface| interface.input(role)) == Some(value)
    }

    fn logits(&self) -> Option<ValueId> {
        self.graph.interface.as_ref().map(Interface::logits)
    }

    /// `n` of a value `[batch, tokens, n]`.
    fn width(&self, value: ValueId) -> Option<usize> {
        match self.graph.shape(value).map(Vec::as_slice) {
            Some([_, _, width]) => usize::try_from(width.as_const()?).ok(),
            _ => None,
        }
    }
}
