//! Steps of layers that are not elementwise, and views of layers that only rearrange elements.

use super::super::error::CpuError;
use super::super::kernels::attention;
use super::super::program::{AttentionStep, Work};
use super::super::strided_view::View;
use super::products::MULTIPLY;
use super::{Compiler, inverse, per_item};
use crate::network::{LayerKind, TensorId};
use crate::tensor::DType;

/// Nanoseconds per element moved, on one thread.
pub(super) const MOVE: f64 = 0.3;

impl Compiler<'_> {
    /// Emits one layer now: computes its inputs, and gives its output a view.
    pub(super) fn emit(&mut self, index: usize) -> Result<(), CpuError> {
        let network = self.network;
        let layer = &network.layers[index];
        let (name, output) = (layer.name.as_str(), layer.outputs[0]);
        match &layer.kind {
            LayerKind::Weight(id) => {
                let constant = &network.weight(*id).constant;
                let declared = (network.tensor(output).dtype, &self.shapes[output.0 as usize][..]);
                if (constant.dtype(), constant.shape()) != declared {
                    // Every pointer into it is computed from the declared shape.
                    return Err(CpuError::Layer {
                        layer: name.to_string(),
                        kind: layer.kind.name(),
                        reason: format!("its weight is {constant:?}, declared {} {:?}", declared.0, declared.1),
                    });
                }
                if self.stays_quantized(output, constant) {
                    return Ok(());
                }
                let view = self.constant(constant.materialize()?);
                self.set(output, view);
            }
            LayerKind::Constant(tensor) => {
                let view = self.constant(tensor.clone());
                self.set(output, view);
            }
            LayerKind::MatrixMultiply { op_a, op_b } => {
                let a = self.demand(layer.inputs[0])?;
                if !self.quantized_multiply(name, &a, *op_a, layer.inputs[1], *op_b, output)? {
                    let b = self.demand(layer.inputs[1])?;
                    self.matrix_multiply(name, a, *op_a, b, *op_b, output);
                }
            }
            LayerKind::Shuffle { .. } | LayerKind::Slice { .. } if self.moves_codes(index)? => {}
            LayerKind::Shuffle { first, reshape, second } => {
                let mut view = self.demand(layer.inputs[0])?;
                if let Some(perm) = first {
                    view = view.permuted(perm);
                }
                if reshape.is_some() {
                    // The shape before the second transpose; the output's declared shape is after it.
                    let after = self.shapes[output.0 as usize].clone();
                    let target = match second {
                        Some(perm) => inverse(perm).iter().map(|p| after[*p]).collect(),
                        None => after,
                    };
                    view = match view.reshaped(&target) {
                        Some(view) => view,
                        None => {
                            let dense = self.densify(&view, false, name);
                            dense.reshaped(&target).expect("a dense view takes any shape")
                        }
                    };
                }
                if let Some(perm) = second {
                    view = view.permuted(perm);
                }
                self.set(output, view);
            }
            LayerKind::Slice { start, stride, .. } => {
                let view = self.demand(layer.inputs[0])?;
                let size = self.shapes[output.0 as usize].clone();
                self.set(output, view.sliced(start, &size, stride));
            }
            LayerKind::Concatenation { axis } => {
                let parts = layer
                    .inputs
                    .iter()
                    .map(|i| self.demand(*i))
                    .collect::<Result<Vec<_>, _>>()?;
                let whole = self.allocate(output);
                let (mut start, stride) = (vec![0; whole.shape.len()], vec![1; whole.shape.len()]);
                for part in parts {
                    let place = whole.sliced(&start, &part.shape, &stride);
                    self.copy(&part, &place, name);
                    start[*axis] += part.shape[*axis] as i64;
                }
            }
            LayerKind::Gather { axis } if self.quantized_gather(index, *axis)? => {}
            LayerKind::Gather { axis } => {
                let data = self.demand(layer.inputs[0])?;
                let indices = self.demand(layer.inputs[1])?;
                let data = self.densify(&data, false, name);
                let indices = self.densify(&indices, false, name);
                let out = self.allocate(output);
                let volume = |dims: &[usize]| dims.iter().product::<usize>();
                let dims = [
                    volume(&data.shape[..*axis]),
                    data.shape[*axis],
                    volume(&data.shape[axis + 1..]),
                ];
                let total = dims[0] * indices.len();
                let one = 20.0 + dims[2] as f64 * MOVE;
                let per_item = per_item(total, one);
                let (reads, writes) = (vec![data.buffer, indices.buffer], vec![out.buffer]);
                let work = Work::Gather {
                    data,
                    dims,
                    indices,
                    out: out.buffer,
                    per_item,
                };
                let items = if out.is_empty() { 0 } else { total.div_ceil(per_item) };
                self.push(name, work, items, one * total as f64, reads, writes);
            }
            LayerKind::RotaryEmbedding {
                interleaved,
                rotary_dim,
            } => {
                let x = self.demand(layer.inputs[0])?;
                let x = self.contiguous_rows(x, true, name);
                let tables = [self.demand(layer.inputs[1])?, self.demand(layer.inputs[2])?];
                let [mut cos, mut sin] = tables.map(|t| self.densify(&t, false, name));
                if cos.storage != sin.storage {
                    cos = self.densify(&cos, true, name);
                    sin = self.densify(&sin, true, name);
                }
                let positions = self.demand(layer.inputs[3])?;
                let out = self.allocate_for_reader(output);
                let total = x.shape[..3].iter().product::<usize>();
                let one = 10.0 + x.shape[3] as f64 * MOVE;
                let per_item = per_item(total, one);
                let reads = vec![x.buffer, cos.buffer, sin.buffer, positions.buffer];
                let writes = vec![out.buffer];
                let work = Work::Rotate {
                    x,
                    cos,
                    sin,
                    positions,
                    out,
                    rotary_dim: *rotary_dim,
                    interleaved: *interleaved,
                    per_item,
                };
                self.push(name, work, total.div_ceil(per_item), one * total as f64, reads, writes);
            }
            LayerKind::Attention => self.attention(index)?,
            LayerKind::Dequantize(granularity) => self.dequantize(index, *granularity)?,
            LayerKind::TopK { k, part } => self.top_k(index, *k, *part)?,
            LayerKind::Experts { experts, gating } => self.experts(index, *experts, *gating)?,
            LayerKind::KvCacheUpdate => self.cache_update(index)?,
            LayerKind::RowProduct(_) | LayerKind::DecodeAttention(_) => {
                unreachable!("`Program::compile` writes layer {name:?} out")
            }
            LayerKind::Reduce { .. } | LayerKind::Softmax { .. } | LayerKind::Normalization { .. }
                if !self.is_row_layer(index) =>
            {
                self.across_axes(index)?;
            }
            LayerKind::Elementwise(_)
            | LayerKind::Unary(_)
            | LayerKind::Activation(_)
            | LayerKind::Reduce { .. }
            | LayerKind::Softmax { .. }
            | LayerKind::Select
            | LayerKind::Cast { .. }
            | LayerKind::Fill { .. }
            | LayerKind::Normalization { .. } => self.emit_group(index)?,
        }
        Ok(())
    }

    pub(super) fn set(&mut self, id: TensorId, view: View) {
        self.views[id.0 as usize] = Some(view);
    }

    /// A view whose last axis is contiguous, and f32 if `widen`.
    fn contiguous_rows(&mut self, view: View, widen: bool, layer: &str) -> View {
        let (dim, stride) = (view.shape.last(), view.strides.last());
        let contiguous = dim.is_none_or(|d| *d <= 1) || stride == Some(&1);
        if contiguous && !(widen && view.storage != DType::F32) {
            return view;
        }
        self.densify(&view, widen, layer)
    }

    fn attention(&mut self, index: usize) -> Result<(), CpuError> {
        let network = self.network;
        let layer = &network.layers[index];
        let name = layer.name.as_str();
        let views = layer.inputs[..3]
            .iter()
            .map(|i| self.demand(*i))
            .collect::<Result<Vec<_>, _>>()?;
        let [q, k, v] = <[View; 3]>::try_from(views).expect("three");
        let q = self.contiguous_rows(q, true, name);
        let [mut k, mut v] = [k, v].map(|x| self.contiguous_rows(x, false, name));
        if k.storage != v.storage {
            k = self.densify(&k, true, name);
            v = self.densify(&v, true, name);
        }
        // The kernels step through slots with unsigned strides.
        if v.strides[2] < 0 {
            v = self.arena_copy(&v, name);
        }
        let (batch, heads, tokens, dim) = (q.shape[0], q.shape[1], q.shape[2], q.shape[3]);
        let (kv_heads, slots) = (k.shape[1], k.shape[2]);
        let mask = match layer.inputs.get(3) {
            None => None,
            Some(id) => {
                let mask = self.demand(*id)?;
                let mask = match mask.storage {
                    DType::Bool | DType::F32 => mask,
                    _ => self.densify(&mask, true, name),
                };
                let live = self.scan(&mask, slots, name);
                let full = [batch, heads, tokens];
                let live = live.broadcast(&[&full[..], &[slots.div_ceil(attention::BLOCK)]].concat());
                Some((mask.broadcast(&[&full[..], &[slots]].concat()), live))
            }
        };
        let out = self.allocate_for_reader(layer.outputs[0]);
        if out.is_empty() {
            return Ok(());
        }
        let rows = heads / kv_heads * tokens;
        let mut reads = vec![q.buffer, k.buffer, v.buffer];
        reads.extend(mask.iter().flat_map(|(mask, live)| [mask.buffer, live.buffer]));
        let mut step = AttentionStep {
            q,
            k,
            v,
            mask,
            out: out.clone(),
            partial: None,
        };
        let time = (2 * batch * kv_heads * rows * slots * dim) as f64 * MULTIPLY * 2.0 + 500.0;
        if rows <= attention::MAX_DECODE_ROWS {
            let items = batch * kv_heads * attention::decode_chunks(slots);
            let partial = self
                .arena(DType::F32, vec![items, attention::decode_rows(rows), 2 + dim])
                .buffer;
            step.partial = Some(partial);
            self.push(name, Work::DecodeChunk(step.clone()), items, time, reads, vec![partial]);
            let merged = (batch * heads * tokens * dim * attention::decode_chunks(slots)) as f64 * MOVE;
            self.push(
                name,
                Work::MergeChunks(step),
                1,
                merged,
                vec![partial],
                vec![out.buffer],
            );
        } else {
            let items = batch * kv_heads * attention::prefill_panels(self.isa, rows);
            self.push(name, Work::PrefillPanel(step), items, time, reads, vec![out.buffer]);
        }
        Ok(())
    }

    fn arena_copy(&mut self, view: &View, layer: &str) -> View {
        let to = self.arena(view.storage, view.shape.clone());
        self.copy(view, &to, layer);
        to
    }

    /// The table of live blocks of a mask, `[mask's dims, blocks]`.
    fn scan(&mut self, mask: &View, slots: usize, name: &str) -> View {
        let blocks = slots.div_ceil(attention::BLOCK);
        let shape = vec![mask.shape[0], mask.shape[1], mask.shape[2], blocks];
        let known = self.scanned.iter().find(|(view, n, _)| view == mask && *n == slots);
        if let Some((_, _, live)) = known {
            return View::dense(*live, DType::U8, shape);
        }
        let live = self.arena(DType::U8, shape);
        let total = mask.shape[..3].iter().product::<usize>();
        let one = slots as f64;
        let per_item = per_item(total, one);
        let work = Work::MaskScan {
            mask: mask.clone(),
            slots,
            live: live.buffer,
            per_item,
        };
        self.push(
            name,
            work,
            total.div_ceil(per_item),
            one * total as f64,
            vec![mask.buffer],
            vec![live.buffer],
        );
        self.scanned.push((mask.clone(), slots, live.buffer));
        live
    }

    /// Copies views of the cache that are still to be read: they must see the old cache, which the update overwrites.
    /// Also copies the new rows if they are such a view, since source and destination must not overlap.
    fn copy_views_of(&mut self, cache: TensorId, update: usize) {
        let Some(buffer) = self.views[cache.0 as usize].as_ref().map(|view| view.buffer) else {
            return;
        };
        for at in 0..self.views.len() {
            let Some(view) = self.views[at].as_ref().filter(|view| view.buffer == buffer) else {
                continue;
            };
            let id = TensorId(at as u32);
            let waits = |reader: &usize| {
                let output = self.network.layers[*reader].outputs[0];
                *reader >= update || self.views[output.0 as usize].is_none()
            };
            // The cache itself is read only by this update, which writes it in place, and by no later layer.
            let read = id != cache && self.consumers[at].iter().any(waits);
            if read || self.output_of.contains_key(&id) {
                let (view, network) = (view.clone(), self.network);
                let copy = self.arena_copy(&view, &network.layers[update].name);
                self.set(id, copy);
            }
        }
    }

    fn cache_update(&mut self, index: usize) -> Result<(), CpuError> {
        let network = self.network;
        let layer = &network.layers[index];
        let name = layer.name.as_str();
        // Pending layers that read the old cache must run before it changes; none may read it afterwards.
        for reader in self.consumers[layer.inputs[0].0 as usize].clone() {
            if reader < index {
                self.demand(network.layers[reader].outputs[0])?;
            } else if reader > index {
                return Err(CpuError::Layer {
                    layer: network.layers[reader].name.clone(),
                    kind: network.layers[reader].kind.name(),
                    reason: format!("reads the cache that {name:?} has updated in place; read the update's output"),
                });
            }
        }
        let cache = self.demand(layer.inputs[0])?;
        self.copy_views_of(layer.inputs[0], index);
        let update = self.demand(layer.inputs[1])?;
        let widen = update.storage != cache.storage;
        let update = self.contiguous_rows(update, widen, name);
        let indices = self.demand(layer.inputs[2])?;
        let total = update.shape[..3].iter().product::<usize>();
        let one = 10.0 + update.shape[3] as f64 * MOVE;
        let per_item = per_item(total, one);
        let reads = vec![update.buffer, indices.buffer];
        let writes = vec![cache.buffer];
        let work = Work::CacheUpdate {
            cache: cache.clone(),
            update,
            indices,
            per_item,
        };
        self.push(name, work, total.div_ceil(per_item), one * total as f64, reads, writes);
        self.set(layer.outputs[0], cache);
        Ok(())
    }
}
