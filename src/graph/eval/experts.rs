//! Routing to experts, and the computation of the experts.

use super::array::{Result, floats};
use super::elementwise::{self, sigmoid};
use super::error::{invalid, shape_error};
use super::selection::falling;
use super::{Operands, no_evaluator};
use crate::graph::op::{ChosenWeights, ExpertActivation, Experts, Gating, Op, RouterScores, Routing};
use crate::tensor::Tensor;

/// The operators of this family.
pub(super) fn eval(op: &Op, operands: &Operands) -> Result<Vec<Option<Tensor>>> {
    let (need, maybe) = (|i| operands.need(i), |i| operands.maybe(i));
    Ok(match op {
        Op::Routing(how) => route(how, need(0)?, maybe(1))?.map(Some).into(),
        Op::Experts(how) => {
            let parts = Parts {
                weights: need(1)?,
                experts: need(2)?,
                gate: need(3)?,
                up: maybe(4),
                down: need(5)?,
                biases: [maybe(6), maybe(7), maybe(8)],
            };
            vec![Some(experts(how, need(0)?, &parts)?)]
        }
        _ => return no_evaluator(op),
    })
}

/// Scores from the logits of all experts.
fn scores(how: RouterScores, logits: &[f64]) -> Vec<f64> {
    match how {
        RouterScores::Logits => logits.to_vec(),
        RouterScores::Sigmoid => logits.iter().copied().map(sigmoid).collect(),
        RouterScores::Softmax => softmax(logits),
    }
}

fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
    x.iter().map(|x| (x - max).exp() / sum).collect()
}

/// Weights and experts of each row of logits.
fn route(how: &Routing, logits: &Tensor, correction: Option<&Tensor>) -> Result<[Tensor; 2]> {
    let Some((count, leading)) = logits.shape().split_last().filter(|(count, _)| **count > 0) else {
        return Err(shape_error("there are no experts".to_string()));
    };
    let correction = correction.map_or_else(|| vec![0.0; *count], Tensor::to_f64);
    let grouped = how.groups > 0;
    let fits = how.top_k <= *count && correction.len() == *count && (!grouped || count.is_multiple_of(how.groups));
    if !fits {
        return Err(invalid(format!(
            "{} of {count} experts in {} groups, with {} corrections",
            how.top_k,
            how.groups,
            correction.len()
        )));
    }
    let (mut weights, mut experts) = (Vec::new(), Vec::new());
    for row in logits.to_f64().chunks_exact(*count) {
        let scores = scores(how.scores, row);
        let mut choice: Vec<f64> = scores.iter().zip(&correction).map(|(s, c)| s + c).collect();
        if grouped {
            let size = count / how.groups;
            let goodness = |group: usize| -> f64 {
                let of = &choice[group * size..][..size];
                falling(size, |i| of[i])
                    .iter()
                    .take(how.group_best)
                    .map(|i| of[*i])
                    .sum()
            };
            let good: Vec<f64> = (0..how.groups).map(goodness).collect();
            let order = falling(how.groups, |group| good[group]);
            for group in &order[how.top_groups.min(how.groups)..] {
                choice[group * size..][..size].fill(0.0);
            }
        }
        let chosen: Vec<usize> = falling(*count, |i| choice[i]).into_iter().take(how.top_k).collect();
        let of_chosen: Vec<f64> = chosen.iter().map(|i| scores[*i]).collect();
        let total: f64 = of_chosen.iter().sum();
        let made = match how.weights {
            ChosenWeights::Scores => of_chosen,
            ChosenWeights::Normalized => of_chosen.iter().map(|s| s / total).collect(),
            ChosenWeights::Softmax => softmax(&of_chosen),
            ChosenWeights::Sigmoid => of_chosen.into_iter().map(sigmoid).collect(),
            ChosenWeights::SparseMixer => sparse_mixer(&scores, &chosen, f64::from(how.margin)),
        };
        weights.extend(made.into_iter().map(|w| w * f64::from(how.scale)));
        experts.extend(chosen.into_iter().map(|i| i as i64));
    }
    let mut shape = leading.to_vec();
    shape.push(how.top_k);
    Ok([
        floats(logits.dtype(), shape.clone(), &weights),
        Tensor::from_i64(shape, &experts),
    ])
}

/// Weights of experts that are chosen in this order, as [`ChosenWeights::SparseMixer`] says them.
fn sparse_mixer(scores: &[f64], chosen: &[usize], margin: f64) -> Vec<f64> {
    let weight = |place: usize| {
        let own = scores[chosen[place]];
        let competes = |expert: &usize| {
            let score = scores[*expert];
            !chosen[..place].contains(expert) && own - score <= margin * score.abs().max(own)
        };
        let competing = (0..scores.len()).filter(competes);
        1.0 / competing.map(|expert| (scores[expert] - own).exp()).sum::<f64>()
    };
    (0..chosen.len()).map(weight).collect()
}

/// `activation(gate) * (up + beta)` within the limit; `activation(gate)` without `up`.
pub(crate) fn gated(how: &Gating, gate: f64, up: Option<f64>) -> f64 {
    let limit = f64::from(how.limit);
    let bounded = limit > 0.0;
    let x = if bounded { gate.min(limit) } else { gate };
    let active = match how.activation {
        ExpertActivation::Swish => x / (1.0 + (-f64::from(how.alpha) * x).exp()),
        ExpertActivation::Gelu => 0.5 * x * (1.0 + elementwise::erf(x / std::f64::consts::SQRT_2)),
        ExpertActivation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        ExpertActivation::Relu => x.max(0.0),
        ExpertActivation::ReluSquared => x.max(0.0) * x.max(0.0),
    };
    match up {
        Some(up) => {
            let up = if bounded { up.clamp(-limit, limit) } else { up };
            active * (up + f64::from(how.beta))
        }
        None => active,
    }
}

/// The operands except `x`.
struct Parts<'a> {
    weights: &'a Tensor,
    experts: &'a Tensor,
    gate: &'a Tensor,
    up: Option<&'a Tensor>,
    down: &'a Tensor,
    biases: [Option<&'a Tensor>; 3],
}

/// The concatenated matrices of all experts.
struct Stacked {
    rows: usize,
    depth: usize,
    numbers: Vec<f64>,
    bias: Option<Vec<f64>>,
}

impl Stacked {
    fn of(count: usize, matrix: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let bad = || shape_error(format!("{matrix:?} with the bias {bias:?} is not of {count} experts"));
        let [all, depth] = *matrix.shape() else {
            return Err(bad());
        };
        if count == 0 || !all.is_multiple_of(count) || bias.is_some_and(|bias| bias.len() != all) {
            return Err(bad());
        }
        Ok(Stacked {
            rows: all / count,
            depth,
            numbers: matrix.to_f64(),
            bias: bias.map(Tensor::to_f64),
        })
    }

    fn times(&self, expert: usize, x: &[f64]) -> Vec<f64> {
        let each = |row: usize| {
            let row = expert * self.rows + row;
            let numbers = &self.numbers[row * self.depth..][..self.depth];
            let bias = self.bias.as_ref().map_or(0.0, |bias| bias[row]);
            numbers.iter().zip(x).map(|(a, b)| a * b).sum::<f64>() + bias
        };
        (0..self.rows).map(each).collect()
    }
}

fn experts(how: &Experts, x: &Tensor, parts: &Parts<'_>) -> Result<Tensor> {
    let gate = Stacked::of(how.experts, parts.gate, parts.biases[0])?;
    let up = match parts.up {
        Some(up) => Some(Stacked::of(how.experts, up, parts.biases[1])?),
        None => None,
    };
    let down = Stacked::of(how.experts, parts.down, parts.biases[2])?;
    let fits = x.shape().last() == Some(&gate.depth)
        && down.depth == gate.rows
        && up
            .as_ref()
            .is_none_or(|up| (up.rows, up.depth) == (gate.rows, gate.depth));
    let tokens = x.len().checked_div(gate.depth).unwrap_or(0);
    let (weights, chosen) = (parts.weights.to_f64(), parts.experts.to_i64());
    let even = weights.len() == chosen.len() && (tokens == 0 || chosen.len().is_multiple_of(tokens));
    if !fits || !even {
        return Err(shape_error(format!(
            "{x:?} with weights {:?} does not go through experts of {:?} and {:?}",
            parts.weights, parts.gate, parts.down
        )));
    }
    let top_k = chosen.len().checked_div(tokens).unwrap_or(0);
    let gating = how.gating();
    let mut out = vec![0.0; tokens * down.rows];
    let numbers = x.to_f64();
    for token in 0..tokens {
        let row = &numbers[token * gate.depth..][..gate.depth];
        for i in 0..top_k {
            let expert = super::array::index(chosen[token * top_k + i], how.experts)?;
            let weight = weights[token * top_k + i];
            let first = gate.times(expert, row);
            let second = up.as_ref().map(|up| up.times(expert, row));
            let hidden: Vec<f64> = (0..first.len())
                .map(|i| gated(&gating, first[i], second.as_ref().map(|up| up[i])))
                .collect();
            let to = &mut out[token * down.rows..][..down.rows];
            for (sum, y) in to.iter_mut().zip(down.times(expert, &hidden)) {
                *sum += weight * y;
            }
        }
    }
    let mut shape = x.shape().to_vec();
    if let Some(last) = shape.last_mut() {
        *last = down.rows;
    }
    Ok(floats(x.dtype(), shape, &out))
}
