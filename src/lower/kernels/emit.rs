//! Writes the layer of a group.

use super::attention::AttentionGroup;
use super::products::{Matrix, ProductGroup};
use super::{Group, codes};
use crate::graph::{Constant, NodeId, ValueId};
use crate::lower::context::{Lowered, Lowering};
use crate::lower::error::Reason;
use crate::network::{AttentionInputs, DecodeAttention, LayerKind, PartInputs, ProductInputs, RowProduct, TensorId};
use crate::tensor::DType;

impl Lowering<'_> {
    /// Writes the layer of the group whose last node this is.
    pub(in crate::lower) fn kernel_layer(&mut self, node: NodeId) -> Lowered<()> {
        self.in_rows = false;
        let at = self.kernels.at[&node];
        let name = self.base_name(self.graph.node(node));
        match self.kernels.groups[at].clone() {
            Group::Product(product) => self.row_product(&name, at, &product),
            Group::Attention(attention) => self.decode_attention(&name, &attention),
        }
    }

    fn row_product(&mut self, name: &str, at: usize, group: &ProductGroup) -> Lowered<()> {
        let layer = RowProduct {
            parts: group.matrices.iter().map(|matrix| matrix.part).collect(),
            norm: group.norm.map(|(_, epsilon)| epsilon),
            activation: group.activation,
            gated: group.gated,
            residual: group.residual.is_some(),
            to_f32: group.to_f32,
        };
        let x = self.value(group.x)?;
        let norm = group.norm.map(|(weight, _)| self.kernel_weight(weight)).transpose()?;
        let residual = group.residual.map(|value| self.value(value)).transpose()?;
        let parts = group.matrices.iter().map(|matrix| self.matrix(matrix));
        let inputs = ProductInputs {
            x,
            norm,
            residual,
            parts: parts.collect::<Lowered<Vec<_>>>()?,
        };
        let product = self.b.add(name, LayerKind::RowProduct(layer), &inputs.listed())?;
        match group.output {
            Some(output) => self.define(output, product),
            None => {
                self.packed.insert(at, product);
            }
        }
        Ok(())
    }

    /// A matrix and its bias as weights.
    fn matrix(&mut self, matrix: &Matrix) -> Lowered<PartInputs<TensorId>> {
        let (name, constant) = self.weight_of(matrix.weight);
        let mode = self.options.weight_mode;
        let mut inputs = match matrix.part.codes {
            None => PartInputs {
                weights: self.b.weight(&name, constant, mode)?,
                scales: None,
                zero_points: None,
                bias: None,
            },
            Some(layout) => {
                let Some(parts) = codes::codes(&constant, layout) else {
                    return Reason::unsupported("its codes have another layout than the plan of kernels says");
                };
                let scales = self.b.weight(&format!("{name}.kernel_scales"), parts.scales, mode)?;
                let points = parts.zero_points;
                // A gather reads the codes of a table as bytes, under the name that other codes have.
                let is_table = self
                    .table
                    .by_value
                    .get(&matrix.weight)
                    .is_some_and(|i| self.table.list[*i].is_table);
                let part = if is_table { "kernel_codes" } else { "codes" };
                PartInputs {
                    weights: self.b.weight(&format!("{name}.{part}"), parts.codes, mode)?,
                    scales: Some(scales),
                    zero_points: points
                        .map(|points| self.b.weight(&format!("{name}.kernel_zero_points"), points, mode))
                        .transpose()?,
                    bias: None,
                }
            }
        };
        inputs.bias = matrix.bias.map(|bias| self.kernel_weight(bias)).transpose()?;
        Ok(inputs)
    }

    fn decode_attention(&mut self, name: &str, group: &AttentionGroup) -> Lowered<()> {
        let packed = group.packed.map(|product| self.packed[&product]);
        let layer = DecodeAttention {
            packed: packed.is_some(),
            ..group.layer
        };
        let qkv = match packed {
            Some(packed) => [packed; 3],
            None => {
                let mut rows = [TensorId(0); 3];
                for (row, value) in rows.iter_mut().zip(group.qkv) {
                    *row = self.row_of_heads(name, value)?;
                }
                rows
            }
        };
        let rotation = match group.rotation {
            Some([positions, cosines, sines]) => Some([
                self.value(positions)?,
                self.f32_weight(cosines)?,
                self.f32_weight(sines)?,
            ]),
            None => None,
        };
        let inputs = AttentionInputs {
            qkv,
            caches: [self.value(group.caches[0])?, self.value(group.caches[1])?],
            write_indices: self.value(group.write_indices)?,
            rotation,
            query_norm: group.query_norm.map(|weight| self.kernel_weight(weight)).transpose()?,
            key_norm: group.key_norm.map(|weight| self.kernel_weight(weight)).transpose()?,
            sinks: group.sinks.map(|sinks| self.f32_weight(sinks)).transpose()?,
        };
        let kind = LayerKind::DecodeAttention(layer);
        let outputs = self.b.add_with_outputs(name, kind, &inputs.listed(layer.packed))?;
        for (value, tensor) in group.outputs.into_iter().zip(outputs) {
            self.define(value, tensor);
        }
        Ok(())
    }

    /// `[batch, heads, 1, head_dim]` as `[batch, 1, heads * head_dim]`.
    fn row_of_heads(&mut self, name: &str, value: ValueId) -> Lowered {
        let x = self.value(value)?;
        let shape = self.b.shape(x).clone();
        let [batch, heads, tokens, width] = &shape[..] else {
            return Ok(x);
        };
        let to = vec![batch.clone(), tokens.clone(), heads * width];
        let base = self.b.network().tensor(x).name.clone();
        self.reshape(&format!("{name}/{base}/row"), x, to)
    }

    /// A constant as a weight, which a kernel can read, even if it is so small that it would otherwise be part of the
    /// plan.
    fn kernel_weight(&mut self, value: ValueId) -> Lowered {
        let (name, constant) = self.named_constant(value);
        Ok(self.b.weight(&name, constant, self.options.weight_mode)?)
    }

    /// The same in fp32.
    fn f32_weight(&mut self, value: ValueId) -> Lowered {
        let (name, constant) = self.named_constant(value);
        if constant.dtype() == DType::F32 {
            return self.kernel_weight(value);
        }
        let wide = constant.cast(DType::F32);
        Ok(self.b.weight(&format!("{name}.f32"), wide, self.options.weight_mode)?)
    }

    fn named_constant(&self, value: ValueId) -> (String, Constant) {
        match self.table.by_value.contains_key(&value) {
            true => self.weight_of(value),
            false => {
                let constant = self.graph.constant(value).expect("the plan saw a constant");
                (self.graph.value(value).name.clone(), constant.clone())
            }
        }
    }
}
