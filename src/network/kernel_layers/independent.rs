//! Whether the sequences of a batch are computed independently, bit for bit.

use std::collections::HashSet;

use crate::network::{Layer, LayerKind, Network, TensorId};

impl Network {
    /// A layer because of which a sequence could get different bits in a batch than alone, or whose cache must be one
    /// tensor for all sequences: `None` if there is none.
    ///
    /// Lapidary's kernels compute a row in the same order whatever the other rows are. This holds for TensorRT's layers
    /// that move or compute each element independently. For products, sums, softmax and attention TensorRT chooses the
    /// order by the shape.
    pub fn layer_across_sequences(&self) -> Option<&Layer> {
        let interface = self.interface.as_ref();
        let caches = interface.into_iter().flat_map(|interface| interface.inputs());
        let caches: HashSet<TensorId> = caches
            .filter(|port| port.role.cache().is_some())
            .map(|port| port.id)
            .collect();
        let reads_cache = |layer: &Layer| layer.inputs.iter().any(|id| caches.contains(id));
        self.layers
            .iter()
            .find(|layer| !layer.kind.is_kernel_layer() && (reads_cache(layer) || !computes_elements(&layer.kind)))
    }
}

/// Whether each element of the result is an element of an input, or computed from one element of each.
fn computes_elements(kind: &LayerKind) -> bool {
    match kind {
        LayerKind::Weight(_)
        | LayerKind::Constant(_)
        | LayerKind::Elementwise(_)
        | LayerKind::Unary(_)
        | LayerKind::Activation(_)
        | LayerKind::Shuffle { .. }
        | LayerKind::Slice { .. }
        | LayerKind::Concatenation { .. }
        | LayerKind::Gather { .. }
        | LayerKind::Select
        | LayerKind::Cast { .. }
        | LayerKind::Fill { .. }
        | LayerKind::Dequantize(_)
        | LayerKind::RowProduct(_)
        | LayerKind::DecodeAttention(_) => true,
        LayerKind::MatrixMultiply { .. }
        | LayerKind::Reduce { .. }
        | LayerKind::Softmax { .. }
        | LayerKind::Normalization { .. }
        | LayerKind::RotaryEmbedding { .. }
        | LayerKind::Attention
        | LayerKind::TopK { .. }
        | LayerKind::Experts { .. }
        | LayerKind::KvCacheUpdate => false,
    }
}
