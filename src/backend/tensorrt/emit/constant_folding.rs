//! Prevents TensorRT from folding certain constants while it builds. `docs/explanation/tensorrt-notes.md`, "What
//! TensorRT folds", explains both workarounds of this kind. The other is in `lower::constant_folding`, because it
//! consists of network layers.

use trtx::ElementWiseOperation;

use super::{Emitted, Emitter, Handle};
use crate::network::Layer;
use crate::tensor::{DType, Tensor};

impl<'b> Emitter<'b, '_> {
    /// The attention layer's mask; if fp16 layers cannot share it (bool, with a dynamic token dim), `mask and true` for
    /// this layer alone.
    pub(super) fn mask_of_its_own(&mut self, layer: &Layer, mask: Handle<'b>) -> Emitted<'b> {
        let declared = self.declared(layer.inputs[3])?;
        let dynamic = declared.shape.iter().any(|dim| dim.as_const().is_none());
        if declared.dtype != DType::Bool || !dynamic {
            return Ok(mask);
        }
        let attend = Tensor::from_bool(vec![1; declared.shape.len()], &[true]);
        let attend = self.small(&attend)?;
        let own = self
            .definition
            .add_elementwise(&mask, &attend, ElementWiseOperation::kAND)?;
        self.named(own, &format!("{}/mask", layer.name))
    }
}
