//! Identifies the expert of each feed-forward network, and checks the sum of a mixture of experts.

use super::body::{Instance, Rows};
use super::trial::Trial;
use crate::graph::ValueId;
use crate::tensor::Tensor;

/// The expert of each instance with a single expert: the one chosen by exactly its rows, otherwise in the graph's
/// order.
pub(super) fn order(rows_of: &[Rows], chosen: &[i64], top_k: usize, experts: usize) -> Vec<usize> {
    let choosers = |expert: usize| -> Vec<usize> {
        let rows = chosen.chunks_exact(top_k).enumerate();
        let mut of: Vec<usize> = rows
            .filter(|(_, row)| row.contains(&(expert as i64)))
            .map(|(token, _)| token)
            .collect();
        of.sort_unstable();
        of
    };
    let by_rows: Vec<Vec<usize>> = (0..experts).map(choosers).collect();
    let find = |(at, rows): (usize, &Rows)| {
        let mut tokens: Vec<usize> = rows.iter().map(|(token, _)| *token).collect();
        tokens.sort_unstable();
        let mut alike = (0..experts).filter(|expert| by_rows[*expert] == tokens);
        match (alike.next(), alike.next()) {
            (Some(expert), None) => expert,
            _ => at,
        }
    };
    rows_of.iter().enumerate().map(find).collect()
}

/// The share of each instance's result in each token's result, with the other results set to 0. Empty if that cannot be
/// computed.
pub(super) fn shares(bound: &Trial<'_>, instances: &[Instance], y: ValueId, sums: &Sums<'_>) -> Vec<Vec<f64>> {
    let run = |kept: Option<usize>| -> Option<Vec<f64>> {
        let mut trial = bound.clone();
        for (i, instance) in instances.iter().enumerate() {
            let result = trial.value(instance.down.result)?;
            if kept != Some(i) {
                let zeros = vec![0.0; result.len()];
                let zeros = Tensor::from_f64_as(result.dtype(), result.shape().to_vec(), &zeros);
                trial.bind(instance.down.result, zeros);
            }
        }
        Some(trial.value(y)?.to_f64())
    };
    let mut bound = bound.clone();
    let share = |i: usize, none: &[f64], bound: &mut Trial<'_>| -> Option<Vec<f64>> {
        let (with, own) = (run(Some(i))?, bound.value(instances[i].down.result)?.to_f64());
        let mut share = vec![0.0; sums.tokens];
        for (row, (token, _)) in sums.rows_of[i].iter().enumerate() {
            let own = &own[row * sums.columns..][..sums.columns];
            let range = token * sums.columns..(token + 1) * sums.columns;
            let pairs = with[range.clone()].iter().zip(&none[range]).zip(own);
            let (dot, square) = pairs.fold((0.0, 0.0), |(d, s), ((a, b), r)| (d + (a - b) * r, s + r * r));
            share[*token] += dot / square;
        }
        Some(share)
    };
    let all = run(None).and_then(|none| (0..instances.len()).map(|i| share(i, &none, &mut bound)).collect());
    all.unwrap_or_default()
}

/// The expert of each instance, whose weights equal the shares up to a factor; `None` if the assignment is not unique.
pub(super) fn by_shares(
    shares: &[Vec<f64>],
    [weights, chosen]: &[Tensor; 2],
    top_k: usize,
    experts: usize,
) -> Option<Vec<usize>> {
    let (weights, chosen) = (weights.to_f64(), chosen.to_i64());
    let tokens = chosen.len() / top_k;
    let mut of_all = vec![vec![0.0; tokens]; experts];
    for (at, expert) in chosen.iter().enumerate() {
        of_all[usize::try_from(*expert).ok()?][at / top_k] = weights[at];
    }
    let alike = |a: &[f64], b: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    let mut free = vec![true; experts];
    let find = |share: &Vec<f64>| {
        let best = (0..experts).max_by(|a, b| alike(share, &of_all[*a]).total_cmp(&alike(share, &of_all[*b])))?;
        std::mem::take(&mut free[best]).then_some(best)
    };
    shares
        .iter()
        .map(find)
        .collect::<Option<Vec<_>>>()
        .filter(|order| order.len() == experts)
}

/// Results of experts, with their owners.
pub(super) struct Sums<'a> {
    pub rows_of: &'a [Rows],
    pub stands: &'a [Vec<f64>],
    pub top_k: usize,
    pub columns: usize,
    pub tokens: usize,
}

impl Sums<'_> {
    /// `sum of weight(token, expert) * row` for each token; `None` if an expert of a token has no row, or several.
    pub(super) fn weighted(&self, expert_of: &[usize], [weights, chosen]: &[Tensor; 2]) -> Option<Vec<f64>> {
        let Sums { top_k, columns, .. } = *self;
        let (weights, chosen) = (weights.to_f64(), chosen.to_i64());
        let mut seen = vec![0usize; weights.len()];
        let mut sum = vec![0.0; self.tokens * columns];
        for (instance, rows) in self.rows_of.iter().enumerate() {
            for (row, (token, expert)) in rows.iter().enumerate() {
                let expert = expert.unwrap_or(*expert_of.get(instance)?) as i64;
                let place = (0..top_k).map(|i| token * top_k + i).find(|at| chosen[*at] == expert);
                let Some(place) = place else { continue };
                seen[place] += 1;
                let from = &self.stands[instance][row * columns..][..columns];
                let to = &mut sum[token * columns..][..columns];
                for (to, from) in to.iter_mut().zip(from) {
                    *to += weights[place] * from;
                }
            }
        }
        seen.iter().all(|n| *n == 1).then_some(sum)
    }
}
