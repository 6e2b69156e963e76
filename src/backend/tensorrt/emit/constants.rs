//! Weights as inputs or constants, and small tables of a lowering.

use trtx::DataType;

use super::layers::axis_number;
use super::{EmitError, Emitted, Emitter, Handle, data_type};
use crate::network::{Layer, UnaryOp, WeightId, WeightMode};
use crate::tensor::quantized::Granularity;
use crate::tensor::{DType, Tensor};

impl<'b> Emitter<'b, '_> {
    /// The weight as the network input of its name, or as a constant, by its mode.
    pub(super) fn weight(&mut self, layer: &str, id: WeightId) -> Emitted<'b> {
        let network = self.network;
        let weight = network.weights.get(id.0 as usize).ok_or_else(|| {
            EmitError::Malformed(format!("there is no weight {} among {}", id.0, network.weights.len()))
        })?;
        match weight.mode {
            WeightMode::Bind => {
                if let Some(handle) = self.bound.get(&id) {
                    return Ok(*handle);
                }
                let dims: Vec<i64> = weight.constant.shape().iter().map(|d| *d as i64).collect();
                let handle = self
                    .definition
                    .add_input(&weight.name, data_type(weight.constant.dtype())?, &dims)?;
                self.bound.insert(id, handle);
                Ok(handle)
            }
            WeightMode::Embed | WeightMode::Strip => {
                let tensor = self.weights[id.0 as usize]
                    .as_ref()
                    .ok_or_else(|| EmitError::Malformed("its weight has no bytes".to_string()))?;
                let refittable = self.refits.mark || self.refits.identical;
                let handle = self.constant(layer, tensor, refittable.then_some(&weight.name))?;
                if self.refits.mark {
                    self.definition.mark_weights_refittable(&weight.name)?;
                }
                Ok(handle)
            }
        }
    }

    /// A constant layer over the tensor's own bytes, which are not copied. `refit_name` registers it for refitting.
    pub(super) fn constant(&mut self, layer: &str, tensor: &'b Tensor, refit_name: Option<&String>) -> Emitted<'b> {
        if tensor.is_empty() {
            return Err(EmitError::Malformed(format!("{tensor:?} is an empty constant")));
        }
        let dims: Vec<i64> = tensor.shape().iter().map(|d| *d as i64).collect();
        let (dtype, data) = (data_type(tensor.dtype())?, tensor.data());
        let name = refit_name.map(String::as_str);
        // Bytes of a mapped file may be unaligned; TensorRT reads elements, so those get an aligned copy.
        let constant = if (data.as_ptr() as usize).is_multiple_of(tensor.dtype().bits().div_ceil(8)) {
            self.definition.add_constant(&dims, data, dtype, name)?
        } else {
            self.definition.add_constant_owned(&dims, data.to_vec(), dtype, name)?
        };
        self.named(constant, layer)
    }

    /// An unnamed constant for shape arithmetic.
    pub(super) fn small_i64(&mut self, dims: &[i64], values: &[i64]) -> Emitted<'b> {
        let tensor = Tensor::from_i64(dims.iter().map(|d| *d as usize).collect(), values);
        self.small(&tensor)
    }

    /// One float in the given rank (all dims 1), for a layer that computes in `dtype`.
    pub(super) fn small_float(&mut self, rank: usize, dtype: DType, value: f64) -> Emitted<'b> {
        self.small(&Tensor::from_f64_as(dtype, vec![1; rank], &[value]))
    }

    /// An unnamed constant, copied.
    pub(super) fn small(&mut self, tensor: &Tensor) -> Emitted<'b> {
        let dims: Vec<i64> = tensor.shape().iter().map(|d| *d as i64).collect();
        let constant =
            self.definition
                .add_small_constant_copied(&dims, tensor.data(), data_type(tensor.dtype())?, None)?;
        Ok(constant.output(self.definition, 0)?)
    }

    /// Dequantizes codes. A block is given by its extent on every axis.
    pub(super) fn dequantize(&mut self, layer: &Layer, granularity: Granularity) -> Emitted<'b> {
        let [codes, scales] = self.inputs(layer)?;
        let (declared, scale) = (self.declared(layer.inputs[0])?, self.declared(layer.inputs[1])?);
        let mut added = self
            .definition
            .add_dequantize(&codes, &scales, data_type(scale.dtype)?)?;
        match granularity {
            Granularity::Tensor => {}
            Granularity::Channel { axis } => added.set_axis(self.definition, axis_number(axis)?),
            // For i4, TensorRT infers the block from the scales' shape, and refuses an explicit one.
            Granularity::Block { .. } if declared.dtype == DType::I4 => {}
            Granularity::Block { axis, size } => {
                let mut block = vec![1; declared.shape.len()];
                block[axis] = size as i64;
                added.set_block_shape(self.definition, &block)?;
            }
        }
        self.named(added, &layer.name)
    }

    /// Quantizes with the scale 1 and dequantizes. TensorRT has only one 8-bit float.
    pub(super) fn rounded_to_float8(&mut self, layer: &Layer, op: UnaryOp, x: Handle<'b>) -> Emitted<'b> {
        if op != UnaryOp::RoundE4M3 {
            return Err(EmitError::Malformed(
                "TensorRT has no float of 8 bits but f8e4m3fn".to_string(),
            ));
        }
        let dtype = data_type(self.declared(layer.outputs[0])?.dtype)?;
        let one = self.small(&Tensor::from_f32(Vec::new(), &[1.0]))?;
        let codes = self.definition.add_quantize(&x, &one, DataType::kFP8)?;
        let codes = self.named(codes, &format!("{}/codes", layer.name))?;
        let added = self.definition.add_dequantize(&codes, &one, dtype)?;
        self.named(added, &layer.name)
    }
}
