//! Which room lowers which operator, and what is said of those that none does.

use super::context::{Lowered, Lowering};
use super::error::Reason;
use crate::graph::{Node, NodeId, Op};

impl Lowering<'_> {
    /// Lowers one node; its outputs are known afterwards.
    pub fn node(&mut self, id: NodeId) -> Lowered<()> {
        self.in_rows = self.rows.contains(&id);
        let node = self.graph.node(id);
        let name = self.base_name(node);
        if let Op::Split { axis } = node.op {
            return self.split(node, &name, axis);
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
        match &node.op {
            Op::Unary(op) => self.unary(node, name, *op),
            Op::Binary(op) => self.binary(node, name, *op),
            Op::Gelu { tanh } => self.gelu(node, name, *tanh),
            Op::Swish { alpha } => self.swish(node, name, *alpha),
            Op::Clip => self.clip(node, name),
            Op::Cast { to } => self.cast(node, name, *to),
            Op::CastLike => self.cast_like(node, name),
            Op::Where => self.select(node, name),
            Op::Softmax { axis } => self.softmax(node, name, *axis, false),
            Op::LogSoftmax { axis } => self.softmax(node, name, *axis, true),
            Op::Reduce {
                reduction,
                keepdims,
                noop_with_empty_axes,
            } => self.reduce(node, name, *reduction, *keepdims, *noop_with_empty_axes),
            Op::MatMul => self.matmul(node, name),
            Op::Gemm {
                alpha,
                beta,
                trans_a,
                trans_b,
            } => self.gemm(node, name, [*alpha, *beta], [*trans_a, *trans_b]),
            Op::FusedMatMul {
                alpha,
                trans_a,
                trans_b,
            } => self.fused_matmul(node, name, *alpha, [*trans_a, *trans_b]),
            Op::LayerNormalization { axis, epsilon } => self.layer_norm(node, name, *axis, *epsilon),
            Op::RmsNormalization { axis, epsilon } => self.rms_norm(node, name, *axis, *epsilon),
            Op::RotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            } => self.rotary(node, name, *interleaved, *num_heads, *rotary_dim),
            Op::Attention(attributes) => self.attention(node, name, attributes),
            Op::TensorScatter { axis, circular } => self.cache_update(node, name, *axis, *circular),
            Op::Identity => self.data(node, 0),
            Op::Reshape { allowzero } => self.reshape_node(node, name, *allowzero),
            Op::Flatten { axis } => self.flatten(node, name, *axis),
            Op::Squeeze => self.squeeze(node, name),
            Op::Unsqueeze => self.unsqueeze(node, name),
            Op::Transpose { perm } => self.transpose_node(node, name, perm.as_deref()),
            Op::Expand => self.expand_node(node, name),
            Op::Tile => self.tile(node, name),
            Op::Concat { axis } => self.concat(node, name, *axis),
            Op::Slice => self.slice(node, name),
            Op::Gather { axis } => self.gather(node, name, *axis),
            Op::Range => self.range(node, name),
            Op::ConstantOfShape { value } => self.constant_of_shape(node, name, value),
            Op::Shape { .. } | Op::Size => self.known_contents(node, name),
            Op::Split { .. } => unreachable!("split has several outputs and is lowered above"),
            Op::GroupQueryAttention(_)
            | Op::ContribRotaryEmbedding { .. }
            | Op::SkipRmsNormalization { .. }
            | Op::SkipLayerNormalization { .. } => {
                Reason::unsupported("the passes rewrite this contrib operator, so the graph is not canonical")
            }
            Op::CumSum { .. }
            | Op::GatherElements { .. }
            | Op::GatherNd { .. }
            | Op::Trilu { .. }
            | Op::ScatterNd { .. }
            | Op::ScatterElements { .. } => Reason::unsupported(
                "this operator is lowered only as part of a mask, a rotary table or a cache that the passes recognise",
            ),
            Op::Unknown { .. } => Reason::unsupported("Lapidary does not know this operator"),
        }
    }
}
