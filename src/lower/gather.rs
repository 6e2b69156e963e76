//! Operators that index: `Gather` reads rows of an embedding or one element of an axis; the cache's `TensorScatter` is
//! in `attention`.

use super::context::{Lowered, Lowering};
use super::dispatch::no_lowering;
use crate::graph::{Node, Op};
use crate::network::LayerKind;
use crate::tensor::{DType, Tensor};

impl Lowering<'_> {
    /// The operators of [`Family::Indexing`](crate::graph::op::Family::Indexing).
    pub(super) fn indexing_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Gather { axis } => self.gather(node, name, *axis),
            Op::TensorScatter { axis, circular } => self.cache_update(node, name, *axis, *circular),
            _ => no_lowering(node),
        }
    }

    pub(super) fn gather(&mut self, node: &Node, name: &str, axis: i64) -> Lowered {
        let data = self.data(node, 0)?;
        let shape = self.b.shape(data).clone();
        let axis = self.axis(axis, shape.len())?;
        let indices = self.input_id(node, 1)?;
        let constant = self
            .graph
            .constant(indices)
            .filter(|c| c.byte_len() <= super::LITERAL_BYTES);
        let indices = match (constant, shape[axis].as_const()) {
            // TensorRT leaves negative indices undefined on a dynamic axis; on others they are converted.
            (Some(constant), Some(length)) => {
                let tensor = constant.materialize()?;
                let plain = |i: i64| (if i < 0 { i + length } else { i }) as i32;
                let values: Vec<i32> = tensor.to_i64().into_iter().map(plain).collect();
                let tensor = Tensor::from_i32(tensor.shape().to_vec(), &values);
                self.b.constant(&format!("{name}/indices"), tensor)?
            }
            _ => {
                let indices = self.value(indices)?;
                self.b.cast(&format!("{name}/indices"), DType::I32, indices)?
            }
        };
        if axis == 0
            && let Some(rows) = self.quantized_rows(name, data, indices)?
        {
            return Ok(rows);
        }
        Ok(self.b.add(name, LayerKind::Gather { axis }, &[data, indices])?)
    }
}
