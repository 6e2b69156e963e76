//! Routing and mixtures of experts.
//!
//! Routing becomes the same layers for all back ends. Experts are one layer for an executor that reads only the chosen
//! ones. TensorRT's layer for them (`IMoELayer`) needs newer GPUs than these engines support, and no other layer has a
//! number of rows that depends on data. So engines compute one of two forms ([`ExpertsForm`]): every token through
//! every expert, times weights that are 0 for those not chosen; or products with matrices that are gathered for each
//! token.

use super::ExpertsForm;
use super::context::{Lowered, Lowering, one};
use super::dispatch::no_lowering;
use super::linear::volume;
use crate::dim::Dim;
use crate::graph::op::{ChosenWeights, ExpertActivation, Experts, Gating, Op, RouterScores, Routing};
use crate::graph::{Node, ValueId};
use crate::network::{Activation, Elementwise, Greatest, LayerKind, MatrixOp, ReduceOp, Shape, TensorId, UnaryOp};
use crate::tensor::{DType, Tensor};

/// The operands of an `Experts` node.
struct Operands {
    x: TensorId,
    /// f32.
    weights: TensorId,
    experts: TensorId,
    gate: TensorId,
    up: Option<TensorId>,
    down: TensorId,
    /// Biases of gate, up and down.
    biases: [Option<TensorId>; 3],
}

impl Lowering<'_> {
    /// The operators of [`Family::Experts`](crate::graph::op::Family::Experts).
    pub(super) fn experts_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Experts(how) => self.experts(node, name, how),
            _ => no_lowering(node),
        }
    }

    /// Weights and experts of every token.
    pub(super) fn routing(&mut self, node: &Node, name: &str, how: &Routing) -> Lowered<()> {
        let part = |part: &str| format!("{name}/{part}");
        let logits = self.data(node, 0)?;
        let dtype = self.b.dtype(logits);
        let rank = self.b.rank(logits);
        let last = rank - 1;
        let wide = self.b.cast(&part("wide"), DType::F32, logits)?;
        let scores = match how.scores {
            RouterScores::Logits => wide,
            RouterScores::Sigmoid => self.b.activation(&part("scores"), Activation::Sigmoid, wide)?,
            RouterScores::Softmax => self
                .b
                .add(&part("scores"), LayerKind::Softmax { axis: last }, &[wide])?,
        };
        let mut choice = scores;
        if node.input(1).is_some() {
            let correction = self.operand(node, 1, rank)?;
            let correction = self.b.cast(&part("correction"), DType::F32, correction)?;
            choice = self
                .b
                .elementwise(&part("corrected"), Elementwise::Sum, choice, correction)?;
        }
        if how.groups > 0 {
            choice = self.best_groups(name, choice, how)?;
        }
        let greatest = |part| LayerKind::TopK { k: how.top_k, part };
        let chosen = self.b.add(&part("experts"), greatest(Greatest::Indices), &[choice])?;
        let mut weights = match choice == scores {
            true => self.b.add(&part("chosen"), greatest(Greatest::Values), &[choice])?,
            false => {
                let all = self.b.shape(scores).clone();
                let hot = self.one_hot(&part("hot"), chosen, all[last].clone())?;
                let mut to = all;
                to.insert(last, one());
                let scores = self.reshape(&part("of_all"), scores, to)?;
                let none = self.number(DType::F32, rank + 1, 0.0)?;
                let picked = self.b.add(&part("picked"), LayerKind::Select, &[hot, scores, none])?;
                self.summed(&part("chosen"), picked, rank, false)?
            }
        };
        match how.weights {
            ChosenWeights::Scores => {}
            ChosenWeights::Normalized => {
                let total = self.summed(&part("total"), weights, last, true)?;
                weights = self
                    .b
                    .elementwise(&part("normalized"), Elementwise::Div, weights, total)?;
            }
            ChosenWeights::Softmax => {
                weights = self
                    .b
                    .add(&part("normalized"), LayerKind::Softmax { axis: last }, &[weights])?;
            }
            ChosenWeights::Sigmoid => {
                weights = self.b.activation(&part("shares"), Activation::Sigmoid, weights)?;
            }
            ChosenWeights::SparseMixer => weights = self.sparse_mixer(name, (scores, weights, chosen), how)?,
        }
        let weights = self.scaled(&part("scaled"), weights, how.scale)?;
        let weights = self.b.cast(&part("weights"), dtype, weights)?;
        for (output, tensor) in [(0, weights), (1, chosen)] {
            if let Some(output) = node.output(output) {
                self.define(output, tensor);
            }
        }
        Ok(())
    }

    /// The scores for the choice, 0 outside the best groups.
    fn best_groups(&mut self, name: &str, choice: TensorId, how: &Routing) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let shape = self.b.shape(choice).clone();
        let (all, leading) = shape.split_last().expect("logits of some experts");
        let size = all.as_const().map_or(0, |n| n as usize) / how.groups;
        let rank = leading.len() + 2;
        let grouped = [leading, &[Dim::from(how.groups), Dim::from(size)]].concat();
        let choice = self.reshape(&part("groups"), choice, grouped)?;
        let best = LayerKind::TopK {
            k: how.group_best,
            part: Greatest::Values,
        };
        let best = self.b.add(&part("best"), best, &[choice])?;
        let goodness = self.summed(&part("goodness"), best, rank - 1, false)?;
        let top = LayerKind::TopK {
            k: how.top_groups,
            part: Greatest::Indices,
        };
        let top = self.b.add(&part("best_groups"), top, &[goodness])?;
        let hot = self.one_hot(&part("groups_hot"), top, Dim::from(how.groups))?;
        let hot = self.b.cast(&part("groups_picked"), DType::F32, hot)?;
        let any = self.summed(&part("groups_in"), hot, rank - 2, false)?;
        let factors = [leading, &[Dim::from(how.groups), one()]].concat();
        let factors = self.reshape(&part("group_factors"), any, factors)?;
        let inside = self
            .b
            .elementwise(&part("inside"), Elementwise::Prod, choice, factors)?;
        self.reshape(&part("in_groups"), inside, shape)
    }

    /// Weights of experts that are chosen one after the other, from the scores of all, and the scores and numbers of those chosen.
    fn sparse_mixer(&mut self, name: &str, of: (TensorId, TensorId, TensorId), how: &Routing) -> Lowered {
        let (scores, own, chosen) = of;
        let part = |part: &str| format!("{name}/{part}");
        let all = self.b.shape(scores).clone();
        let last = all.len() - 1;
        let rank = all.len() + 1;
        // `[.., chosen, all]`.
        let mut rows = self.b.shape(own).clone();
        rows.push(one());
        let own = self.reshape(&part("own"), own, rows)?;
        let mut others = all.clone();
        others.insert(last, one());
        let others = self.reshape(&part("others"), scores, others)?;
        let gap = self.b.elementwise(&part("gap"), Elementwise::Sub, own, others)?;
        let magnitude = self
            .b
            .add(&part("magnitude"), LayerKind::Unary(UnaryOp::Abs), &[others])?;
        let size = self.b.elementwise(&part("size"), Elementwise::Max, magnitude, own)?;
        let bound = self.scaled(&part("bound"), size, how.margin)?;
        let far = self.b.elementwise(&part("far"), Elementwise::Greater, gap, bound)?;
        // How often each was chosen before.
        let hot = self.one_hot(&part("turns"), chosen, all[last].clone())?;
        let hot = self.b.cast(&part("turn"), DType::F32, hot)?;
        let (k, mut shape) = (how.top_k, vec![1; rank]);
        (shape[rank - 2], shape[rank - 1]) = (k, k);
        let below: Vec<f32> = (0..k * k).map(|i| if i % k < i / k { 1.0 } else { 0.0 }).collect();
        let below = self.b.constant(&part("earlier"), Tensor::from_f32(shape, &below))?;
        let product = LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b: MatrixOp::None,
        };
        let before = self.b.add(&part("before"), product, &[below, hot])?;
        let half = self.number(DType::F32, rank, 0.5)?;
        let gone = self.b.elementwise(&part("gone"), Elementwise::Greater, before, half)?;
        let out = self.b.elementwise(&part("out"), Elementwise::Or, far, gone)?;
        let falling = self.b.elementwise(&part("falling"), Elementwise::Sub, others, own)?;
        let share = self.b.add(&part("share"), LayerKind::Unary(UnaryOp::Exp), &[falling])?;
        let none = self.number(DType::F32, rank, 0.0)?;
        let competing = self.b.add(&part("competing"), LayerKind::Select, &[out, none, share])?;
        let total = self.summed(&part("competition"), competing, rank - 1, false)?;
        let kind = LayerKind::Unary(UnaryOp::Recip);
        Ok(self.b.add(&part("mixed"), kind, &[total])?)
    }

    /// `[.., k]` of indices as `[.., k, depth]` of bools.
    fn one_hot(&mut self, name: &str, indices: TensorId, depth: Dim) -> Lowered {
        let mut to = self.b.shape(indices).clone();
        to.push(one());
        let rank = to.len();
        let column = self.reshape(&format!("{name}/column"), indices, to)?;
        let iota = self.b.fill(&format!("{name}/iota"), DType::I32, depth, 0.0, 1.0)?;
        let iota = self.raise(iota, rank)?;
        Ok(self.b.elementwise(name, Elementwise::Equal, column, iota)?)
    }

    fn summed(&mut self, name: &str, x: TensorId, axis: usize, keep_dims: bool) -> Lowered {
        let kind = LayerKind::Reduce {
            op: ReduceOp::Sum,
            axes: vec![axis],
            keep_dims,
        };
        Ok(self.b.add(name, kind, &[x])?)
    }

    fn experts(&mut self, node: &Node, name: &str, how: &Experts) -> Lowered {
        let weights = self.data(node, 1)?;
        let weights = self.b.cast(&format!("{name}/weights"), DType::F32, weights)?;
        let operands = Operands {
            x: self.data(node, 0)?,
            weights,
            experts: self.data(node, 2)?,
            gate: self.data(node, 3)?,
            up: node.input(4).map(|v| self.value(v)).transpose()?,
            down: self.data(node, 5)?,
            biases: self.biases(node)?,
        };
        let rows = volume(&self.b.shape(operands.x)[..self.b.rank(operands.x) - 1]);
        match self.options.experts_form(&rows) {
            ExpertsForm::Layer => self.experts_layer(name, how, &operands),
            ExpertsForm::All => self.all_experts(name, how, &operands, rows),
            ExpertsForm::Chosen => self.chosen_experts(name, how, &operands, rows),
        }
    }

    /// The biases; a missing one is zeros if others exist.
    fn biases(&mut self, node: &Node) -> Lowered<[Option<TensorId>; 3]> {
        let mut biases = [None; 3];
        if (6..9).all(|i| node.input(i).is_none()) {
            return Ok(biases);
        }
        for (bias, (i, matrix)) in biases.iter_mut().zip([(6, 3), (7, 4), (8, 5)]) {
            *bias = match (node.input(i), node.input(matrix)) {
                (Some(value), _) => Some(self.value(value)?),
                (None, Some(matrix)) => Some(self.zeros_of_rows(matrix)?),
                (None, None) => None,
            };
        }
        Ok(biases)
    }

    fn zeros_of_rows(&mut self, matrix: ValueId) -> Lowered {
        let value = self.graph.value(matrix);
        let rows = self.graph.constant(matrix).map_or(0, |c| c.shape()[0]);
        let zeros = Tensor::from_f64_as(value.dtype.unwrap_or(DType::F32), vec![rows], &vec![0.0; rows]);
        Ok(self.b.constant(&format!("{}/no_bias", value.name), zeros)?)
    }

    fn experts_layer(&mut self, name: &str, how: &Experts, of: &Operands) -> Lowered {
        let mut inputs = vec![of.x, of.weights, of.experts, of.gate];
        inputs.extend(of.up);
        inputs.push(of.down);
        inputs.extend(of.biases.iter().flatten());
        let kind = LayerKind::Experts {
            experts: how.experts,
            gating: how.gating(),
        };
        Ok(self.b.add(name, kind, &inputs)?)
    }

    /// All tokens through all experts: `[experts, rows, ..]` in between.
    fn all_experts(&mut self, name: &str, how: &Experts, of: &Operands, rows: Dim) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let count = Dim::from(how.experts);
        let shape = self.b.shape(of.x).clone();
        let width = shape.last().cloned().unwrap_or_default();
        let x = self.reshape(&part("rows"), of.x, vec![one(), rows.clone(), width])?;
        let matrices = |lowering: &mut Self, what: &str, matrix: TensorId, bias: Option<TensorId>| {
            lowering.stacked(&part(what), &count, matrix, bias)
        };
        let gate = matrices(self, "gate", of.gate, of.biases[0])?;
        let up = match of.up {
            Some(up) => Some(matrices(self, "up", up, of.biases[1])?),
            None => None,
        };
        let down = matrices(self, "down", of.down, of.biases[2])?;
        let results = self.feed_forward(name, &how.gating(), x, gate, up, down)?;
        // A number for each expert and token.
        let top_k = self.b.shape(of.experts).last().cloned().unwrap_or_default();
        let chosen = vec![rows.clone(), top_k.clone()];
        let experts = self.reshape(&part("experts"), of.experts, chosen)?;
        let hot = self.one_hot(&part("hot"), experts, count.clone())?;
        let weights = self.reshape(&part("of_chosen"), of.weights, vec![rows.clone(), top_k, one()])?;
        let none = self.number(DType::F32, 3, 0.0)?;
        let spread = self.b.add(&part("spread"), LayerKind::Select, &[hot, weights, none])?;
        let weights = self.summed(&part("of_all"), spread, 1, false)?;
        let weights = self.b.transpose(&part("by_expert"), weights, &[1, 0])?;
        let weights = self.reshape(&part("factors"), weights, vec![count.clone(), rows, one()])?;
        self.weighted(name, results, weights, (0, shape))
    }

    /// Each token through its experts, whose matrices are gathered: `[rows, top_k, 1, ..]` in between.
    fn chosen_experts(&mut self, name: &str, how: &Experts, of: &Operands, rows: Dim) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let count = Dim::from(how.experts);
        let shape = self.b.shape(of.x).clone();
        let width = shape.last().cloned().unwrap_or_default();
        let top_k = self.b.shape(of.experts).last().cloned().unwrap_or_default();
        let x = self.reshape(&part("rows"), of.x, vec![rows.clone(), one(), one(), width])?;
        let chosen = vec![rows.clone(), top_k.clone()];
        let experts = self.reshape(&part("experts"), of.experts, chosen)?;
        let matrices = |lowering: &mut Self, what: &str, matrix: TensorId, bias: Option<TensorId>| {
            let (matrix, bias) = lowering.stacked(&part(what), &count, matrix, bias)?;
            let gather = LayerKind::Gather { axis: 0 };
            let matrix = lowering
                .b
                .add(&part(&format!("chosen_{what}")), gather.clone(), &[matrix, experts])?;
            let bias = bias.map(|bias| {
                let name = part(&format!("chosen_{what}_bias"));
                lowering.b.add(&name, gather, &[bias, experts])
            });
            Ok::<_, super::error::Reason>((matrix, bias.transpose()?))
        };
        let gate = matrices(self, "gate", of.gate, of.biases[0])?;
        let up = match of.up {
            Some(up) => Some(matrices(self, "up", up, of.biases[1])?),
            None => None,
        };
        let down = matrices(self, "down", of.down, of.biases[2])?;
        let results = self.feed_forward(name, &how.gating(), x, gate, up, down)?;
        let weights = self.reshape(&part("factors"), of.weights, vec![rows, top_k, one(), one()])?;
        self.weighted(name, results, weights, (1, shape))
    }

    /// The concatenated matrices of all experts as `[experts, out, in]`, and their biases as `[experts, 1, out]`.
    fn stacked(
        &mut self,
        name: &str,
        experts: &Dim,
        matrix: TensorId,
        bias: Option<TensorId>,
    ) -> Lowered<(TensorId, Option<TensorId>)> {
        let shape = self.b.shape(matrix).clone();
        let each = shape[0].div_exact(experts).unwrap_or_default();
        let matrix = self.reshape(name, matrix, vec![experts.clone(), each.clone(), shape[1].clone()])?;
        let to = vec![experts.clone(), one(), each];
        let bias = bias.map(|bias| self.reshape(&format!("{name}_bias"), bias, to));
        Ok((matrix, bias.transpose()?))
    }

    /// `down · h + bias` of several matrices `[.., out, in]` at once, with biases `[.., 1, out]`.
    fn feed_forward(
        &mut self,
        name: &str,
        gating: &Gating,
        x: TensorId,
        gate: (TensorId, Option<TensorId>),
        up: Option<(TensorId, Option<TensorId>)>,
        down: (TensorId, Option<TensorId>),
    ) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let product = |lowering: &mut Self, what: &str, x: TensorId, (matrix, bias): (TensorId, Option<TensorId>)| {
            let kind = LayerKind::MatrixMultiply {
                op_a: MatrixOp::None,
                op_b: MatrixOp::Transpose,
            };
            let product = lowering.b.add(&part(&format!("{what}_product")), kind, &[x, matrix])?;
            match bias {
                Some(bias) => {
                    let name = part(&format!("{what}_sum"));
                    Ok(lowering.b.elementwise(&name, Elementwise::Sum, product, bias)?)
                }
                None => Ok::<_, super::error::Reason>(product),
            }
        };
        let first = product(self, "gate", x, gate)?;
        let second = match up {
            Some(up) => Some(product(self, "up", x, up)?),
            None => None,
        };
        let hidden = self.gated(name, gating, first, second)?;
        product(self, "down", hidden, down)
    }

    /// The weighted sum over an axis, in fp32, as `(axis, shape)` of the result.
    fn weighted(&mut self, name: &str, results: TensorId, weights: TensorId, (axis, shape): (usize, Shape)) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let dtype = self.b.dtype(results);
        let wide = self.b.cast(&part("wide"), DType::F32, results)?;
        let terms = self.b.elementwise(&part("terms"), Elementwise::Prod, wide, weights)?;
        let sum = self.summed(&part("sum"), terms, axis, false)?;
        let sum = self.b.cast(&part("narrow"), dtype, sum)?;
        let width = self.b.shape(results).last().cloned().unwrap_or_default();
        let mut to = shape;
        *to.last_mut().expect("x has a last axis") = width;
        self.reshape(name, sum, to)
    }

    /// The input of the second matrix.
    fn gated(&mut self, name: &str, how: &Gating, gate: TensorId, up: Option<TensorId>) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let (dtype, rank) = (self.b.dtype(gate), self.b.rank(gate));
        let limit = match how.limit > 0.0 {
            true => {
                let limit = f64::from(how.limit);
                Some([self.number(dtype, rank, limit)?, self.number(dtype, rank, -limit)?])
            }
            false => None,
        };
        let x = match limit {
            Some([most, _]) => self.b.elementwise(&part("bounded"), Elementwise::Min, gate, most)?,
            None => gate,
        };
        let active = match how.activation {
            ExpertActivation::Swish => {
                let scaled = self.scaled(&part("alpha"), x, how.alpha)?;
                let share = self.b.activation(&part("share"), Activation::Sigmoid, scaled)?;
                self.b.elementwise(&part("active"), Elementwise::Prod, x, share)?
            }
            ExpertActivation::Gelu => self.b.activation(&part("active"), Activation::GeluErf, x)?,
            ExpertActivation::GeluTanh => self.b.activation(&part("active"), Activation::GeluTanh, x)?,
            ExpertActivation::Relu => self.b.activation(&part("active"), Activation::Relu, x)?,
            ExpertActivation::ReluSquared => {
                let x = self.b.activation(&part("positive"), Activation::Relu, x)?;
                self.b.elementwise(&part("active"), Elementwise::Prod, x, x)?
            }
        };
        let Some(mut up) = up else {
            return Ok(active);
        };
        if let Some([most, least]) = limit {
            up = self.b.elementwise(&part("up_most"), Elementwise::Min, up, most)?;
            up = self.b.elementwise(&part("up_bounded"), Elementwise::Max, up, least)?;
        }
        if how.beta != 0.0 {
            let beta = self.number(dtype, rank, f64::from(how.beta))?;
            up = self.b.elementwise(&part("up_shifted"), Elementwise::Sum, up, beta)?;
        }
        Ok(self.b.elementwise(&part("hidden"), Elementwise::Prod, active, up)?)
    }
}
