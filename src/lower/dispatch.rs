//! Dispatches each operator to the file of its family, and reports operators without a lowering.

use super::context::{Lowered, Lowering};
use super::error::Reason;
use crate::graph::op::Family;
use crate::graph::{MICROSOFT, Node, NodeId, Op};

impl Lowering<'_> {
    /// Lowers one node; its outputs are known afterwards.
    pub fn node(&mut self, id: NodeId) -> Lowered<()> {
        self.in_rows = self.rows.contains(&id);
        let node = self.graph.node(id);
        let name = self.base_name(node);
        if let Op::Split { axis } = node.op {
            return self.split(node, &name, axis);
        }
        if let Op::Routing(how) = &node.op {
            return self.routing(node, &name, how);
        }
        if self.fused(id)? {
            return Ok(());
        }
        let tensor = self.first_output(node, &name)?;
        if node.outputs.iter().skip(1).any(Option::is_some) && !matches!(node.op, Op::TensorScatter { .. }) {
            return Reason::unsupported("it has more than one output in use");
        }
        if let Some(output) = node.output(0) {
            self.define(output, tensor);
        }
        Ok(())
    }

    fn first_output(&mut self, node: &Node, name: &str) -> Lowered {
        match node.op.info().family {
            Family::Elementwise => self.elementwise_node(node, name),
            Family::Reduction => self.reduction_node(node, name),
            Family::Product => self.product_node(node, name),
            Family::Normalization => self.normalization_node(node, name),
            Family::Movement => self.movement_node(node, name),
            Family::Indexing => self.indexing_node(node, name),
            Family::Attention => self.attention_node(node, name),
            Family::Experts => self.experts_node(node, name),
            Family::Selection => no_lowering(node),
            Family::Quantization => self.quantization_node(node, name),
            Family::Unknown => Reason::unsupported("Lapidary does not know this operator"),
        }
    }
}

/// For an operator that its family's file does not list.
pub(super) fn no_lowering<T>(node: &Node) -> Lowered<T> {
    if node.op.domain() == MICROSOFT {
        return Reason::unsupported("the passes rewrite this contrib operator, so the graph is not canonical");
    }
    Reason::unsupported(
        "this operator is lowered only as part of a mask, a rotary table or a cache that the passes recognize",
    )
}
