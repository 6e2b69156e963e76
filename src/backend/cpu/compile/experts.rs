//! Steps of a mixture of experts: a plan that assigns tokens to experts, then products of only the active experts.

use super::super::error::CpuError;
use super::super::kernels::{experts as kernels, gemv};
use super::super::program::{ExpertMatrix, ExpertShape, ExpertWork, TopKWork, Work};
use super::super::quantized::QuantizedMatrix;
use super::super::strided_view::{BufferId, View};
use super::layers::MOVE;
use super::products::{MULTIPLY, READ};
use super::{Compiler, per_item};
use crate::graph::op::Gating;
use crate::network::{ExpertInputs, Greatest, LayerKind, TensorId};
use crate::tensor::DType;

/// Nanoseconds of an activation.
const ACTIVATE: f64 = 0.5;

impl Compiler<'_> {
    /// The greatest elements of the last axis.
    pub(super) fn top_k(&mut self, index: usize, k: usize, part: Greatest) -> Result<(), CpuError> {
        let layer = &self.network.layers[index];
        let (name, output) = (layer.name.as_str(), layer.outputs[0]);
        let x = self.demand(layer.inputs[0])?;
        let x = self.densify(&x, true, name);
        let n = x.shape.last().copied().unwrap_or(1);
        let rows = x.len().checked_div(n).unwrap_or(0);
        let out = self.allocate(output);
        let one = (n * k) as f64;
        let per_item = per_item(rows, one);
        let (reads, writes) = (vec![x.buffer], vec![out.buffer]);
        let work = TopKWork {
            x,
            n,
            k,
            values: (part == Greatest::Values).then_some(out.buffer),
            indices: (part == Greatest::Indices).then_some(out.buffer),
            per_item,
        };
        let items = rows.div_ceil(per_item);
        self.push(name, Work::TopK(work), items, one * rows as f64, reads, writes);
        Ok(())
    }

    /// A whole mixture of experts.
    pub(super) fn experts(&mut self, index: usize, experts: usize, gating: Gating) -> Result<(), CpuError> {
        let layer = &self.network.layers[index];
        let (name, output) = (layer.name.as_str(), layer.outputs[0]);
        let of = ExpertInputs::of(&layer.inputs).expect("verified");
        let rows_of = |compiler: &Self, matrix: TensorId| compiler.shapes[matrix.0 as usize][0] / experts;
        let width = self.shapes[of.x.0 as usize].last().copied().unwrap_or(0);
        let (hidden, columns) = (rows_of(self, of.gate), rows_of(self, of.down));
        let top_k = self.shapes[of.experts.0 as usize].last().copied().unwrap_or(0);
        let tokens = self.shapes[of.x.0 as usize].iter().product::<usize>() / width.max(1);
        let pairs = tokens * top_k;
        if pairs * width * hidden * columns == 0 {
            let out = self.allocate(output);
            let none = self.constant(crate::tensor::Tensor::from_f32(vec![], &[0.0]));
            let zeros = View {
                shape: out.shape.clone(),
                strides: vec![0; out.shape.len()],
                ..none
            };
            self.copy(&zeros, &out, name);
            return Ok(());
        }
        let x = self.demand(of.x)?;
        let x = self.densify(&x, true, name);
        let weights = self.demand(of.weights)?;
        let weights = self.densify(&weights, true, name);
        let indices = self.demand(of.experts)?;
        let indices = self.densify(&indices, false, name);
        let plan = self.arena(DType::I32, vec![kernels::plan_len(pairs, experts)]).buffer;
        let shape = ExpertShape {
            plan,
            tokens,
            top_k,
            experts,
        };
        let step = |compiler: &mut Self, work: ExpertWork, items, time, mut reads: Vec<BufferId>, writes| {
            if !matches!(work, ExpertWork::Plan { .. }) {
                reads.push(plan);
            }
            compiler.push(name, Work::Experts(shape, work), items, time, reads, writes);
        };
        let work = ExpertWork::Plan {
            indices: indices.clone(),
        };
        let active = kernels::most_active(pairs, experts);
        let time = (pairs * active) as f64 * 0.5 + 50.0;
        step(self, work, 1, time, vec![indices.buffer], vec![plan]);

        let rows = self.arena(DType::F32, vec![pairs, width]).buffer;
        let one = 10.0 + width as f64 * MOVE;
        let each = per_item(pairs, one);
        let (reads, to) = (vec![x.buffer], rows);
        let work = ExpertWork::Rows {
            x,
            width,
            to,
            per_item: each,
        };
        step(self, work, pairs.div_ceil(each), one * pairs as f64, reads, vec![rows]);

        let packed = self.packed_experts(name, &shape, rows, width);
        let gate = self.expert_product(name, &shape, (rows, packed), of.gate, (width, hidden))?;
        let up = match of.up {
            Some(up) => Some(self.expert_product(name, &shape, (rows, packed), up, (width, hidden))?),
            None => None,
        };
        let [mut biases, mut bias] = [[None, None], [None, None]];
        if let Some((of_gate, of_up, of_down)) = of.biases {
            biases[0] = Some(self.bias(of_gate, name)?);
            biases[1] = of_up.map(|up| self.bias(up, name)).transpose()?;
            bias[0] = Some(self.bias(of_down, name)?);
        }
        let one = hidden as f64 * ACTIVATE;
        let each = per_item(pairs, one);
        let mut reads = vec![gate];
        reads.extend(up);
        reads.extend(biases.iter().flatten().map(|view| view.buffer));
        let work = ExpertWork::Gate {
            gate,
            up,
            biases,
            gating,
            columns: hidden,
            per_item: each,
        };
        step(self, work, pairs.div_ceil(each), one * pairs as f64, reads, vec![gate]);

        let packed = self.packed_experts(name, &shape, gate, hidden);
        let results = self.expert_product(name, &shape, (gate, packed), of.down, (hidden, columns))?;
        let out = self.allocate(output);
        let [bias, _] = bias;
        let one = (top_k * columns) as f64 * MOVE;
        let each = per_item(tokens, one);
        let mut reads = vec![results, weights.buffer, indices.buffer];
        reads.extend(bias.iter().map(|view| view.buffer));
        let work = ExpertWork::Sum {
            results,
            weights,
            bias,
            indices,
            columns,
            out: out.buffer,
            per_item: each,
        };
        step(
            self,
            work,
            tokens.div_ceil(each),
            one * tokens as f64,
            reads,
            vec![out.buffer],
        );
        Ok(())
    }

    /// Rows as the left side of products of many rows, if an expert can have so many.
    fn packed_experts(&mut self, name: &str, shape: &ExpertShape, from: BufferId, depth: usize) -> Option<BufferId> {
        let pairs = shape.pairs();
        if pairs <= gemv::MAX_ROWS {
            return None;
        }
        let to = self.arena(DType::F32, vec![pairs, depth]).buffer;
        let items = kernels::most_active(pairs, shape.experts);
        let time = (pairs * depth) as f64 * MOVE;
        let work = Work::Experts(*shape, ExpertWork::Pack { from, depth, to });
        self.push(name, work, items, time, vec![from, shape.plan], vec![to]);
        Some(to)
    }

    /// The products of the active experts, `[pairs, columns]`.
    fn expert_product(
        &mut self,
        name: &str,
        shape: &ExpertShape,
        (rows, packed): (BufferId, Option<BufferId>),
        matrix: TensorId,
        (depth, columns): (usize, usize),
    ) -> Result<BufferId, CpuError> {
        let pairs = shape.pairs();
        let mut reads = vec![rows, shape.plan];
        reads.extend(packed);
        let codes = self.quantized_of(matrix)?;
        let codes = codes.filter(QuantizedMatrix::takes);
        let codes = codes.map(|constant| self.weights.get(&constant)).transpose()?;
        let (matrix, bytes) = match codes.filter(|codes| codes.starts_at_multiples_of(columns)) {
            Some(codes) => {
                let bytes = codes.row_bytes();
                (ExpertMatrix::Codes(codes), bytes)
            }
            None => {
                let view = self.demand(matrix)?;
                let view = self.densify(&view, false, name);
                reads.push(view.buffer);
                let bytes = view.storage.byte_len(depth);
                (ExpertMatrix::Floats(view), bytes)
            }
        };
        let out = self.arena(DType::F32, vec![pairs, columns]).buffer;
        let active = kernels::most_active(pairs, shape.experts);
        let panel = self.isa.tile_columns();
        let wide = (48 * 1024 / bytes.max(1)).max(panel).next_multiple_of(panel);
        let time = ((active * columns * bytes) as f64 * READ).max((pairs * columns * depth) as f64 * MULTIPLY);
        let work = ExpertWork::Product {
            rows,
            packed,
            matrix,
            depth,
            columns,
            out,
            per_item: wide,
        };
        let items = active * columns.div_ceil(wide);
        self.push(name, Work::Experts(*shape, work), items, time, reads, vec![out]);
        Ok(out)
    }

    /// Biases as f32; those from weights are converted once.
    fn bias(&mut self, id: TensorId, name: &str) -> Result<View, CpuError> {
        let producer = self.producer[id.0 as usize].map(|layer| &self.network.layers[layer].kind);
        if let Some(LayerKind::Weight(weight)) = producer {
            let constant = self.network.weight(*weight).constant.cast(DType::F32);
            return Ok(self.constant(constant.materialize()?));
        }
        let view = self.demand(id)?;
        Ok(self.densify(&view, true, name))
    }
}
