//! Prevents TensorRT from folding certain constants while it builds. `docs/explanation/tensorrt-notes.md`, "What
//! TensorRT folds", explains both workarounds of this kind. The other, a mask for each attention layer, needs no layer
//! of the network and is added where layers are emitted for TensorRT.

use super::context::{Lowered, Lowering, one};
use crate::network::{Elementwise, LayerKind, TensorId, WeightMode};
use crate::tensor::DType;

impl Lowering<'_> {
    /// A weight before a cast. TensorRT would widen a constant while it builds, and its plan would store and read four
    /// bytes per weight instead of two (measured: decode of 1.1 B took 1.6 ms instead of 1.2); so it is multiplied by a
    /// 1 that is known only at run time. The product is part of the same kernel.
    pub(super) fn kept_narrow(&mut self, name: &str, weight: TensorId) -> Lowered {
        let dtype = self.b.dtype(weight);
        if self.options.weight_mode == WeightMode::Bind || dtype == DType::F32 {
            return Ok(weight);
        }
        self.kept_apart(name, weight)
    }

    /// A matrix before a layer that TensorRT must not fuse with the previous one: multiplied by the same 1.
    pub(super) fn kept_apart(&mut self, name: &str, matrix: TensorId) -> Lowered {
        match self.one_at_run_time(self.b.dtype(matrix))? {
            Some(one) => {
                let one = self.raise(one, self.b.rank(matrix))?;
                let name = format!("{name}/stored");
                Ok(self.b.elementwise(&name, Elementwise::Prod, matrix, one)?)
            }
            None => Ok(matrix),
        }
    }

    /// `[1, 1]`: whether the first number of an integer input is above 0 or below 1. `None` if there is no such input.
    fn one_at_run_time(&mut self, dtype: DType) -> Lowered<Option<TensorId>> {
        if let Some(one) = self.ones.get(&dtype) {
            return Ok(Some(*one));
        }
        let inputs = self.b.network().inputs.clone();
        let Some(input) = inputs.into_iter().find(|x| self.b.dtype(*x) == DType::I32) else {
            return Ok(None);
        };
        let rank = self.b.rank(input);
        let first = LayerKind::Slice {
            start: vec![0; rank],
            size: vec![one(); rank],
            stride: vec![1; rank],
        };
        let first = self.b.add("one/first", first, &[input])?;
        let first = self.reshape("one/of", first, vec![one(), one()])?;
        let (zero, unit) = (self.number(DType::I32, 2, 0.0)?, self.number(DType::I32, 2, 1.0)?);
        let above = self.b.elementwise("one/above", Elementwise::Greater, first, zero)?;
        let below = self.b.elementwise("one/below", Elementwise::Less, first, unit)?;
        let either = self.b.elementwise("one/either", Elementwise::Or, above, below)?;
        let made = self.b.cast(&format!("one/{dtype}"), dtype, either)?;
        self.ones.insert(dtype, made);
        Ok(Some(made))
    }
}
