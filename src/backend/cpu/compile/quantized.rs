//! Quantized weights: movements move codes, products and gathers read codes. Other layers get the values as floats
//! ([`Compiler::demand`](super::Compiler::demand)), which is acceptable only for small weights.

use std::sync::Arc;

use super::super::error::CpuError;
use super::super::kernels::gemv;
use super::super::program::Work;
use super::super::quantized::QuantizedMatrix;
use super::super::strided_view::{BufferId, View};
use super::layers::MOVE;
use super::products::{MULTIPLY, READ, matrix_view, offsets, oriented};
use super::{Compiler, inverse, per_item};
use crate::graph::Constant;
use crate::network::{LayerKind, MatrixOp, TensorId};
use crate::tensor::DType;
use crate::tensor::quantized::Granularity;

impl Compiler<'_> {
    /// Keeps a constant as codes if possible: returns true if it was recorded for `id`.
    pub(super) fn stays_quantized(&mut self, id: TensorId, constant: &Constant) -> bool {
        let stays = QuantizedMatrix::takes(constant);
        if stays {
            self.quantized.insert(id, constant.clone());
        }
        stays
    }

    /// Codes and scales from weights or constants, as one quantized weight.
    pub(super) fn dequantize(&mut self, index: usize, granularity: Granularity) -> Result<(), CpuError> {
        let layer = &self.network.layers[index];
        let refused = |reason: String| CpuError::Layer {
            layer: layer.name.clone(),
            kind: layer.kind.name(),
            reason,
        };
        let part = |input: usize| {
            let producer = self.producer[layer.inputs[input].0 as usize];
            match producer.map(|producer| &self.network.layers[producer].kind) {
                Some(LayerKind::Weight(id)) => Ok(self.network.weight(*id).constant.clone()),
                Some(LayerKind::Constant(tensor)) => Ok(Constant::tensor(tensor.clone())),
                _ => Err(refused(format!(
                    "input {input} is computed; codes and scales are weights or constants"
                ))),
            }
        };
        let constant = Constant::quantized(part(0)?, part(1)?, None, granularity);
        let constant = constant.map_err(|error| refused(error.to_string()))?;
        let output = layer.outputs[0];
        if !self.stays_quantized(output, &constant) {
            let view = self.constant(constant.materialize()?);
            self.set(output, view);
        }
        Ok(())
    }

    /// The quantized weight of a tensor.
    pub(super) fn quantized_of(&mut self, id: TensorId) -> Result<Option<Constant>, CpuError> {
        let known = self.quantized.contains_key(&id) || self.views[id.0 as usize].is_some();
        if !known && let Some(layer) = self.producer[id.0 as usize] {
            let kind = &self.network.layers[layer].kind;
            if matches!(
                kind,
                LayerKind::Weight(_) | LayerKind::Dequantize(_) | LayerKind::Shuffle { .. } | LayerKind::Slice { .. }
            ) {
                self.emit(layer)?;
            }
        }
        Ok(self.quantized.get(&id).cloned())
    }

    /// A shuffle or slice of a quantized weight, applied to its codes; false if it is not one, or splits blocks.
    pub(super) fn moves_codes(&mut self, index: usize) -> Result<bool, CpuError> {
        let layer = &self.network.layers[index];
        let Some(from) = self.quantized_of(layer.inputs[0])? else {
            return Ok(false);
        };
        let output = layer.outputs[0];
        let after = self.shapes[output.0 as usize].clone();
        let moved = match &layer.kind {
            LayerKind::Shuffle { first, reshape, second } => {
                let mut moved = from;
                if let Some(perm) = first {
                    moved = moved.transposed(perm);
                }
                if reshape.is_some() {
                    moved = moved.reshaped(match second {
                        Some(perm) => inverse(perm).iter().map(|p| after[*p]).collect(),
                        None => after,
                    });
                }
                match second {
                    Some(perm) => moved.transposed(perm),
                    None => moved,
                }
            }
            LayerKind::Slice { start, stride, .. } if stride.iter().all(|s| *s == 1) => {
                let axes = start.iter().zip(after).enumerate();
                axes.fold(from, |moved, (axis, (start, size))| match size == moved.shape()[axis] {
                    true => moved,
                    false => moved.sliced(axis, *start as usize, *start as usize + size),
                })
            }
            _ => return Ok(false),
        };
        Ok(self.stays_quantized(output, &moved))
    }

    /// A product with a quantized weight on the right: false if it is not one.
    pub(super) fn quantized_multiply(
        &mut self,
        name: &str,
        a: &View,
        op_a: MatrixOp,
        right: TensorId,
        op_b: MatrixOp,
        output: TensorId,
    ) -> Result<bool, CpuError> {
        let Some(b) = self.quantized_of(right)? else {
            return Ok(false);
        };
        let rank = b.shape().len();
        // In the kernels' order: `[out, in]`.
        let b = match op_b {
            MatrixOp::Transpose => b,
            MatrixOp::None => {
                let mut perm: Vec<usize> = (0..rank).collect();
                perm.swap(rank - 2, rank - 1);
                b.transposed(&perm)
            }
        };
        let (columns, depth) = (b.shape()[rank - 2], b.shape()[rank - 1]);
        let leading = b.shape()[..rank - 2].to_vec();
        let own: usize = leading.iter().product();
        let stacked = b.reshaped(vec![own * columns, depth]);
        if !QuantizedMatrix::takes(&stacked) {
            return Ok(false);
        }
        let matrices = (0..own)
            .map(|i| match own {
                1 => Some(stacked.clone()),
                _ => Some(stacked.sliced(0, i * columns, (i + 1) * columns)).filter(QuantizedMatrix::takes),
            })
            .collect::<Option<Vec<_>>>();
        let Some(matrices) = matrices else {
            return Ok(false);
        };
        let matrices = matrices
            .iter()
            .map(|matrix| self.weights.get(matrix))
            .collect::<Result<Vec<_>, _>>()?;
        let a = oriented(a.clone(), op_a);
        let out = self.allocate(output);
        let rows = a.shape[rank - 2];
        if out.is_empty() {
            return Ok(true);
        }
        if own == 1 {
            let rows: usize = a.shape[..rank - 1].iter().product();
            let a = self.flat_rows(&a, rows, depth, name);
            self.quantized_product(name, &a, &matrices[0], out.buffer, 0);
            return Ok(true);
        }
        // One matrix per batch entry; either side may repeat.
        let batch = out.shape[..rank - 2].to_vec();
        let numbers = View::dense(out.buffer, DType::F32, leading);
        let starts = View {
            shape: a.shape[..rank - 2].to_vec(),
            strides: a.strides[..rank - 2].to_vec(),
            ..a.clone()
        };
        let of = offsets(&starts, &batch).into_iter().zip(offsets(&numbers, &batch));
        for (place, (offset, matrix)) in of.enumerate() {
            let left = View {
                offset,
                shape: vec![rows, depth],
                strides: a.strides[rank - 2..].to_vec(),
                ..a.clone()
            };
            self.quantized_product(name, &left, &matrices[matrix as usize], out.buffer, place);
        }
        Ok(true)
    }

    /// `out[place] = a · matrixᵀ` for a matrix `[rows, depth]`.
    fn quantized_product(&mut self, name: &str, a: &View, matrix: &Arc<QuantizedMatrix>, out: BufferId, place: usize) {
        let (rows, depth) = (a.shape[0], a.shape[1]);
        let (columns, bytes) = (matrix.rows(), matrix.row_bytes());
        if rows > gemv::MAX_ROWS {
            let packed = self.packed_left(a, name);
            let panels = columns.div_ceil(self.isa.tile_columns());
            let time = (rows * columns * depth) as f64 * MULTIPLY + (columns * depth) as f64 * MOVE;
            let work = Work::QuantizedGemm {
                packed,
                left: 0,
                right: matrix.clone(),
                out,
                place,
                rows,
            };
            return self.push(name, work, panels, time, vec![packed], vec![out]);
        }
        let plain = a.storage == DType::F32 && (depth <= 1 || a.strides[1] == 1) && a.strides[0] >= 0;
        let a = match plain {
            true => a.clone(),
            false => self.densify(a, true, name),
        };
        let per_item = (32 * 1024 / bytes.max(1)).max(4).next_multiple_of(4).min(columns);
        let one = (bytes as f64 * READ).max((depth * rows) as f64 * 2.0 * MULTIPLY);
        let work = Work::QuantizedGemv {
            left: matrix_view(&a, &[]),
            right: matrix.clone(),
            out,
            place,
            rows,
            per_item,
        };
        let items = columns.div_ceil(per_item);
        self.push(name, work, items, one * columns as f64, vec![a.buffer], vec![out]);
    }

    /// Rows of a quantized weight by index; false if the layer reads something else.
    pub(super) fn quantized_gather(&mut self, index: usize, axis: usize) -> Result<bool, CpuError> {
        let layer = &self.network.layers[index];
        if axis != 0 {
            return Ok(false);
        }
        let Some(data) = self.quantized_of(layer.inputs[0])? else {
            return Ok(false);
        };
        let rows = data.shape()[0];
        let data = data.reshaped(vec![rows, data.shape()[1..].iter().product()]);
        if !QuantizedMatrix::takes(&data) {
            return Ok(false);
        }
        let data = self.weights.get(&data)?;
        let indices = self.demand(layer.inputs[1])?;
        let indices = self.densify(&indices, false, &layer.name);
        let out = self.allocate(layer.outputs[0]);
        let total = indices.len();
        let one = 20.0 + data.depth() as f64 * 2.0 * MOVE;
        let per_item = per_item(total, one);
        let (reads, writes) = (vec![indices.buffer], vec![out.buffer]);
        let items = if out.is_empty() { 0 } else { total.div_ceil(per_item) };
        let work = Work::QuantizedGather {
            data,
            indices,
            out: out.buffer,
            per_item,
        };
        self.push(&layer.name, work, items, one * total as f64, reads, writes);
        Ok(true)
    }
}
