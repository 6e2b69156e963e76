//! `Attention` and the cache it reads.
//!
//! TensorRT's layer does not scale, so the query is scaled before it. In decode the query heads of a KV group become
//! query rows (measured: twice as fast over a long cache); the mask, which TensorRT does not broadcast over rows, is
//! repeated for them once. For a soft cap and for [`AttentionForm::Decomposed`], the products and the softmax are
//! separate layers.

mod reduced_scores;
mod split;

use super::AttentionForm;
use super::context::{Lowered, Lowering};
use super::dispatch::no_lowering;
use super::error::Reason;
use super::linear::volume;
use crate::dim::Dim;
use crate::graph::op::{Attention, BiasedAttention, RoundedAttention, Rounding};
use crate::graph::{Node, Op};
use crate::network::{Activation, Elementwise, LayerKind, MatrixOp, ReduceOp, Shape, TensorId, UnaryOp};
use crate::tensor::{DType, Tensor};

/// Up to this many slots, one piece per KV head reads the cache as fast as several.
pub(in crate::lower) const SHORT: usize = 1024;
/// Pieces for longer caches.
pub(in crate::lower) const PARTS: usize = 16;

/// Maximum query rows of one Attention layer when the heads of a group are folded into the rows of several tokens. Its
/// mask takes 4 bytes per row and slot (2048 rows over 131072 slots took 1.07 GB of scratch memory), and 8 KV heads of
/// 1024 rows occupy all multiprocessors.
const FOLDED_ROWS: usize = 1024;

/// Added to a masked score; finite, so that a fully masked row is not NaN.
const MASKED: f64 = -1e30;

/// What attention in single layers does in addition to scale, soft cap and mask.
#[derive(Default)]
struct Extras {
    /// Roundings of the products, of the scores after the cap, and of the softmax's result.
    scores: Option<Rounding>,
    capped: Option<Rounding>,
    shares: Option<Rounding>,
    /// Added to the scores after the cap: fp32 `[1, heads, 1, slots]`.
    bias: Option<TensorId>,
    /// fp32 `[1, heads, 1, 1]`.
    sinks: Option<TensorId>,
}

impl Lowering<'_> {
    /// The operators of [`Family::Attention`](crate::graph::op::Family::Attention).
    pub(in crate::lower) fn attention_node(&mut self, node: &Node, name: &str) -> Lowered {
        match &node.op {
            Op::Attention(attributes) => self.attention(node, name, attributes),
            Op::RoundedAttention(how) => self.rounded_attention(node, name, how),
            Op::BiasedAttention(how) => self.biased_attention(node, name, how),
            Op::RotaryEmbedding {
                interleaved,
                num_heads,
                rotary_dim,
            } => self.rotary(node, name, *interleaved, *num_heads, *rotary_dim),
            _ => no_lowering(node),
        }
    }

    pub(in crate::lower) fn attention(&mut self, node: &Node, name: &str, attributes: &Attention) -> Lowered {
        if attributes.is_causal {
            return Reason::unsupported("is_causal: the canonical graph has its mask as an input");
        }
        for (i, what) in [(4, "past_key"), (5, "past_value"), (6, "nonpad_kv_seqlen")] {
            if node.input(i).is_some() {
                return Reason::unsupported(format!("{what}: the canonical graph keeps its cache by TensorScatter"));
            }
        }
        let part = |part: &str| format!("{name}/{part}");
        let q = self.data(node, 0)?;
        let flat_heads = self.b.rank(q) == 3;
        let [q, k, v] = if flat_heads {
            let (heads, kv) = (attributes.q_num_heads, attributes.kv_num_heads);
            let (k, v) = (self.data(node, 1)?, self.data(node, 2)?);
            [
                self.split_heads(&part("q"), q, heads)?,
                self.split_heads(&part("k"), k, kv)?,
                self.split_heads(&part("v"), v, kv)?,
            ]
        } else {
            [q, self.data(node, 1)?, self.data(node, 2)?]
        };
        let mask = match node.input(3) {
            Some(_) => Some(self.operand(node, 3, 4)?),
            None => None,
        };
        for x in [q, k, v] {
            if self.b.rank(x) != 4 {
                return Reason::unsupported("query, key and value must have four axes, or three and their heads");
            }
        }
        let head_dim = self.b.shape(q)[3].as_const().unwrap_or(1) as usize;
        let scores = attributes.scores(head_dim);
        let q = self.scaled_query(&part("scaled"), q, scores.scale)?;
        let form = self.options.attention.at(&self.profile);
        let split = match form {
            AttentionForm::Split(parts) if scores.softcap.is_none() => {
                self.split_attention(name, [q, k, v], mask, parts)?
            }
            AttentionForm::ReducedScores if scores.softcap.is_none() => {
                self.reduced_attention(name, [q, k, v], mask)?
            }
            _ => None,
        };
        let attended = if let Some(attended) = split {
            attended
        } else if scores.softcap.is_some()
            || form == AttentionForm::Decomposed
            || self.b.shape(v)[3] != self.b.shape(q)[3]
        {
            // The layer requires values of the same width as the keys.
            self.decomposed(name, [q, k, v], mask, scores.softcap, &Extras::default())?
        } else {
            self.attention_layer(name, [q, k, v], mask)?
        };
        match flat_heads {
            true => self.join_heads(&part("joined"), attended),
            false => Ok(attended),
        }
    }

    /// In single layers: no fused layer rounds its scores.
    fn rounded_attention(&mut self, node: &Node, name: &str, how: &RoundedAttention) -> Lowered {
        let (operands, mask) = self.scaled_operands(node, name, how.scale)?;
        let softcap = how.unrounded().scores(1).softcap;
        let extras = Extras {
            scores: how.scores,
            capped: how.capped,
            shares: how.probabilities,
            ..Extras::default()
        };
        self.decomposed(name, operands, Some(mask), softcap, &extras)
    }

    /// In single layers: no fused layer accepts a bias by head and slot, or a sink.
    fn biased_attention(&mut self, node: &Node, name: &str, how: &BiasedAttention) -> Lowered {
        let (operands, mask) = self.scaled_operands(node, name, how.scale)?;
        let softcap = how.unbiased().scores(1).softcap;
        // A constant that is absent, as in a stripped package, may have an effect.
        let idle = |i: usize, number: f32| {
            let constant = node.input(i).and_then(|v| self.graph.constant(v));
            let numbers = constant.and_then(|c| c.materialize().ok());
            numbers.is_some_and(|numbers| numbers.to_f32().iter().all(|n| *n == number))
        };
        let mut extras = Extras::default();
        if !idle(4, 0.0) {
            let slots = self.b.shape(operands[1])[2].clone();
            extras.bias = Some(self.bias_of_slots(node, name, &slots)?);
        }
        if !idle(5, f32::NEG_INFINITY) {
            extras.sinks = Some(self.column_of_heads(node, 5, &format!("{name}/sinks"))?);
        }
        self.decomposed(name, operands, Some(mask), softcap, &extras)
    }

    /// The scaled query, key and value, and the mask.
    fn scaled_operands(&mut self, node: &Node, name: &str, scale: f32) -> Lowered<([TensorId; 3], TensorId)> {
        let operands = [self.data(node, 0)?, self.data(node, 1)?, self.data(node, 2)?];
        let mask = self.operand(node, 3, 4)?;
        let [q, k, v] = operands;
        if operands.iter().any(|x| self.b.rank(*x) != 4) {
            return Reason::unsupported("query, key and value must have four axes");
        }
        let q = self.scaled_query(&format!("{name}/scaled"), q, scale)?;
        Ok(([q, k, v], mask))
    }

    /// In the query's dtype if it represents the scale exactly, otherwise in fp32: a rounded scale is a wrong
    /// temperature.
    fn scaled_query(&mut self, name: &str, q: TensorId, scale: f32) -> Lowered {
        let dtype = self.b.dtype(q);
        if scale == 1.0 || dtype == DType::F32 || is_exact(dtype, scale) {
            return self.scaled(name, q, scale);
        }
        let wide = self.b.cast(&format!("{name}/wide"), DType::F32, q)?;
        let scaled = self.scaled(name, wide, scale)?;
        Ok(self.b.cast(&format!("{name}/narrow"), dtype, scaled)?)
    }

    fn attention_layer(&mut self, name: &str, [q, k, v]: [TensorId; 3], mask: Option<TensorId>) -> Lowered {
        let shape = self.b.shape(q).clone();
        let groups = self.groups(&shape, k);
        let one_token = shape[2].is_one();
        let wanted = match one_token {
            true => self.options.fold_groups,
            false => {
                let long = self
                    .options
                    .fold_prefill
                    .is_some_and(|from| self.profile.capacity >= from);
                long && shape[2].as_const().is_some()
            }
        };
        let fold = wanted && groups.is_some_and(|(_, group)| group > 1);
        if !fold {
            let mut inputs = vec![q, k, v];
            if let Some(mask) = mask {
                inputs.push(self.mask_of_tokens(name, mask, &shape[2])?);
            }
            return Ok(self.b.add(name, LayerKind::Attention, &inputs)?);
        }
        let (kv_heads, group) = groups.expect("folding needs groups");
        let by_head = mask.is_some_and(|mask| !self.b.shape(mask)[1].is_one());
        let pieces = match shape[2].as_const() {
            Some(tokens) if !by_head => pieces(group, tokens as usize),
            _ => 1,
        };
        let (kv, one) = (Dim::from(kv_heads), group / pieces);
        let mut rows_of = shape.clone();
        (rows_of[1], rows_of[2]) = (kv.clone(), volume(&[one.into(), shape[2].clone()]));
        let rows = rows_of[2].clone();
        let mask = match mask {
            Some(mask) if one_token => Some(self.mask_of_rows(name, mask, kv_heads, one)?),
            Some(mask) => Some(self.mask_of_groups(name, mask, &shape[2], [kv_heads, one], rows)?),
            None => None,
        };
        let inputs = |q| -> Vec<TensorId> { [q, k, v].into_iter().chain(mask).collect() };
        if pieces == 1 {
            let q = self.reshape(&format!("{name}/folded"), q, rows_of)?;
            let attended = self.b.add(name, LayerKind::Attention, &inputs(q))?;
            return self.reshape(&format!("{name}/unfolded"), attended, shape);
        }
        let of_groups = |heads: usize| {
            vec![
                shape[0].clone(),
                kv.clone(),
                heads.into(),
                shape[2].clone(),
                shape[3].clone(),
            ]
        };
        let q = self.reshape(&format!("{name}/groups"), q, of_groups(group))?;
        let mut attended = Vec::new();
        for i in 0..pieces {
            let part = |part: &str| format!("{name}/{part}.{i}");
            let q = self.slice_axis(&part("group"), q, 2, (i * one) as i64, one.into())?;
            let q = self.reshape(&part("folded"), q, rows_of.clone())?;
            let piece = self.b.add(&part("attended"), LayerKind::Attention, &inputs(q))?;
            attended.push(self.reshape(&part("unfolded"), piece, of_groups(one))?);
        }
        let attended = self.b.add(name, LayerKind::Concatenation { axis: 2 }, &attended)?;
        self.reshape(&format!("{name}/joined_groups"), attended, shape)
    }

    /// The mask of several tokens for folded rows: repeated once per head of a group.
    fn mask_of_groups(
        &mut self,
        name: &str,
        mask: TensorId,
        tokens: &Dim,
        [kv_heads, group]: [usize; 2],
        rows: Dim,
    ) -> Lowered {
        let mask = self.mask_of_tokens(name, mask, tokens)?;
        let shape = self.b.shape(mask).clone();
        if !shape[1].is_one() {
            let to = vec![shape[0].clone(), kv_heads.into(), rows, shape[3].clone()];
            return self.reshape(&format!("{name}/mask"), mask, to);
        }
        if let Some(repeated) = self.repeated_masks.get(&(mask, group)) {
            return Ok(*repeated);
        }
        let name = format!("{}/groups{group}", self.b.network().tensor(mask).name);
        let repeated = self
            .b
            .add(&name, LayerKind::Concatenation { axis: 2 }, &vec![mask; group])?;
        self.repeated_masks.insert((mask, group), repeated);
        Ok(repeated)
    }

    /// KV heads, and query heads per KV head, if they are numbers that divide.
    pub(in crate::lower) fn groups(&self, q: &Shape, k: TensorId) -> Option<(usize, usize)> {
        let (heads, kv) = (q[1].as_const()?, self.b.shape(k)[1].as_const()?);
        (kv > 0 && heads % kv == 0).then_some((kv as usize, (heads / kv) as usize))
    }

    /// A mask with one row for all tokens, repeated: TensorRT broadcasts over batch and heads only.
    fn mask_of_tokens(&mut self, name: &str, mask: TensorId, tokens: &Dim) -> Lowered {
        let mut to = self.b.shape(mask).clone();
        if to[2] == *tokens || !to[2].is_one() {
            return Ok(mask);
        }
        to[2].clone_from(tokens);
        self.expanded(&format!("{name}/mask"), mask, &to)
    }

    /// The mask of one token for the `group` rows of its heads. A mask by head is rearranged with its heads.
    fn mask_of_rows(&mut self, name: &str, mask: TensorId, kv_heads: usize, group: usize) -> Lowered {
        let shape = self.b.shape(mask).clone();
        if !shape[1].is_one() {
            let to = vec![shape[0].clone(), kv_heads.into(), group.into(), shape[3].clone()];
            return self.reshape(&format!("{name}/mask"), mask, to);
        }
        if let Some(repeated) = self.repeated_masks.get(&(mask, group)) {
            return Ok(*repeated);
        }
        // By an elementwise layer, which fuses with the comparison that computes the mask.
        let name = format!("{}/rows{group}", self.b.network().tensor(mask).name);
        let (dtype, rows) = (self.b.dtype(mask), vec![1, 1, group, 1]);
        let (op, neutral) = match dtype {
            DType::Bool => (Elementwise::And, Tensor::from_bool(rows, &vec![true; group])),
            _ => (Elementwise::Sum, Tensor::from_f64_as(dtype, rows, &vec![0.0; group])),
        };
        let neutral = self.b.constant(&format!("{name}/neutral"), neutral)?;
        let repeated = self.b.elementwise(&name, op, mask, neutral)?;
        self.repeated_masks.insert((mask, group), repeated);
        Ok(repeated)
    }

    /// `softmax(cap(q kᵀ) + bias + mask) v` in single layers, scores in fp32. The heads of a group are rows of one product
    /// with their KV head: `[batch, kv_heads, group * tokens, d]`.
    fn decomposed(
        &mut self,
        name: &str,
        [q, k, v]: [TensorId; 3],
        mask: Option<TensorId>,
        softcap: Option<f32>,
        extras: &Extras,
    ) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let shape = self.b.shape(q).clone();
        let dtype = self.b.dtype(q);
        let Some((kv_heads, group)) = self.groups(&shape, k) else {
            return Reason::unsupported("the query heads are not a multiple of the KV heads");
        };
        let slots = self.b.shape(k)[2].clone();
        let rows = volume(&[group.into(), shape[2].clone()]);
        let folded: Shape = vec![shape[0].clone(), kv_heads.into(), rows.clone(), shape[3].clone()];
        let q = self.reshape(&part("folded"), q, folded)?;
        let product = |op_b| LayerKind::MatrixMultiply {
            op_a: MatrixOp::None,
            op_b,
        };
        let scores = self.b.add(&part("scores"), product(MatrixOp::Transpose), &[q, k])?;
        let mut scores = self.b.cast(&part("scores/wide"), DType::F32, scores)?;
        if let Some(how) = extras.scores {
            scores = self.rounded(&part("scores/rounded"), scores, how)?;
        }
        if let Some(softcap) = softcap {
            let inner = self.scaled(&part("uncapped"), scores, 1.0 / softcap)?;
            let bent = self.b.activation(&part("bent"), Activation::Tanh, inner)?;
            scores = self.scaled(&part("capped"), bent, softcap)?;
        }
        if let Some(how) = extras.capped {
            scores = self.rounded(&part("capped/rounded"), scores, how)?;
        }
        let by_group = vec![shape[0].clone(), kv_heads.into(), rows, slots.clone()];
        let by_head = vec![shape[0].clone(), shape[1].clone(), shape[2].clone(), slots];
        if mask.is_some() || extras.bias.is_some() || extras.sinks.is_some() {
            scores = self.reshape(&part("by_head"), scores, by_head)?;
        }
        if let Some(bias) = extras.bias {
            scores = self.b.elementwise(&part("biased"), Elementwise::Sum, scores, bias)?;
        }
        if let Some(mask) = mask {
            scores = if self.b.dtype(mask) == DType::Bool {
                let never = self.number(DType::F32, 4, MASKED)?;
                self.b.add(&part("masked"), LayerKind::Select, &[mask, scores, never])?
            } else {
                let mask = self.b.cast(&part("mask"), DType::F32, mask)?;
                self.b.elementwise(&part("masked"), Elementwise::Sum, scores, mask)?
            };
        }
        let mut weights = if let Some(sinks) = extras.sinks {
            let shares = self.softmax_with_sinks(&part("softmax"), scores, sinks)?;
            self.reshape(&part("by_group"), shares, by_group)?
        } else {
            let scores = self.reshape(&part("by_group"), scores, by_group)?;
            self.b
                .add(&part("softmax"), LayerKind::Softmax { axis: 3 }, &[scores])?
        };
        if let Some(how) = extras.shares {
            weights = self.rounded(&part("softmax/rounded"), weights, how)?;
        }
        let weights = self.b.cast(&part("softmax/narrow"), dtype, weights)?;
        let attended = self.b.add(name, product(MatrixOp::None), &[weights, v])?;
        let mut to = shape;
        to[3] = self.b.shape(v)[3].clone();
        self.reshape(&part("unfolded"), attended, to)
    }

    /// Input `i`, one number per head, as `[1, heads, 1, 1]` in fp32.
    fn column_of_heads(&mut self, node: &Node, i: usize, name: &str) -> Lowered {
        let numbers = self.data(node, i)?;
        let numbers = self.b.cast(&format!("{name}/wide"), DType::F32, numbers)?;
        let heads = self.b.shape(numbers)[0].clone();
        self.reshape(name, numbers, vec![1usize.into(), heads, 1usize.into(), 1usize.into()])
    }

    /// `slope * slot` in fp32, `[1, heads, 1, slots]`; shared by all layers with the same slopes.
    fn bias_of_slots(&mut self, node: &Node, name: &str, slots: &Dim) -> Lowered {
        let slopes = self.input_id(node, 4)?;
        if let Some(known) = self.biases.get(&slopes) {
            return Ok(*known);
        }
        let column = self.column_of_heads(node, 4, &format!("{name}/slopes"))?;
        let iota = self
            .b
            .fill(&format!("{name}/slots"), DType::F32, slots.clone(), 0.0, 1.0)?;
        let iota = self.raise(iota, 4)?;
        let bias = self
            .b
            .elementwise(&format!("{name}/bias"), Elementwise::Prod, column, iota)?;
        self.biases.insert(slopes, bias);
        Ok(bias)
    }

    /// The softmax over scores `[batch, heads, tokens, slots]` and one additional score per head, which takes its
    /// share.
    fn softmax_with_sinks(&mut self, name: &str, scores: TensorId, sinks: TensorId) -> Lowered {
        let part = |part: &str| format!("{name}/{part}");
        let reduced = |op| LayerKind::Reduce {
            op,
            axes: vec![3],
            keep_dims: true,
        };
        let largest = self.b.add(&part("largest"), reduced(ReduceOp::Max), &[scores])?;
        let top = self.b.elementwise(&part("top"), Elementwise::Max, largest, sinks)?;
        let below = self.b.elementwise(&part("below"), Elementwise::Sub, scores, top)?;
        let shares = self.b.unary(&part("exp"), UnaryOp::Exp, below)?;
        let sum = self.b.add(&part("sum"), reduced(ReduceOp::Sum), &[shares])?;
        let below = self.b.elementwise(&part("sink/below"), Elementwise::Sub, sinks, top)?;
        let of_sink = self.b.unary(&part("sink/exp"), UnaryOp::Exp, below)?;
        let sum = self.b.elementwise(&part("whole"), Elementwise::Sum, sum, of_sink)?;
        Ok(self.b.elementwise(name, Elementwise::Div, shares, sum)?)
    }

    /// `TensorScatter(cache, update, write_indices)` on the slots of a four-dimensional cache.
    pub(in crate::lower) fn cache_update(&mut self, node: &Node, name: &str, axis: i64, circular: bool) -> Lowered {
        let cache = self.data(node, 0)?;
        if circular || self.axis(axis, self.b.rank(cache))? != 2 || self.b.rank(cache) != 4 {
            return Reason::unsupported("only a linear cache [batch, kv_heads, capacity, head_dim] can be updated");
        }
        let update = self.data(node, 1)?;
        let indices = match node.input(2) {
            Some(_) => self.data(node, 2)?,
            None => {
                let batch = self.profile.batch;
                let zeros = Tensor::from_i32(vec![batch], &vec![0; batch]);
                self.b.constant(&format!("{name}/start"), zeros)?
            }
        };
        Ok(self.b.add(name, LayerKind::KvCacheUpdate, &[cache, update, indices])?)
    }
}

/// The number of layers among which the heads of a group are divided, so that none has more than [`FOLDED_ROWS`] rows
/// if possible.
fn pieces(group: usize, tokens: usize) -> usize {
    let fits = |pieces: &usize| group.is_multiple_of(*pieces) && group / pieces * tokens <= FOLDED_ROWS;
    (1..=group).find(fits).unwrap_or(group)
}

fn is_exact(dtype: DType, value: f32) -> bool {
    Tensor::from_f64_as(dtype, vec![], &[f64::from(value)]).to_f32() == [value]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_dealt_to_layers_of_at_most_so_many_rows() {
        for (group, tokens, expected) in [
            (4, 1, 1),
            (4, 128, 1),
            (4, 512, 2),
            (8, 512, 4),
            (7, 512, 7),
            (6, 341, 2),
            (4, 4096, 4),
        ] {
            assert_eq!(pieces(group, tokens), expected, "{group} heads, {tokens} tokens");
        }
    }

    #[test]
    fn scales_of_common_heads() {
        for (head_dim, exact) in [(16.0f32, true), (64.0, true), (128.0, false), (32.0, false)] {
            assert_eq!(is_exact(DType::F16, 1.0 / head_dim.sqrt()), exact, "{head_dim}");
        }
    }
}
