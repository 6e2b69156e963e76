//! Whether a system's answers equal the reference's, which is checked before any comparison of speed.
//!
//! The reference is transformers in fp32. Logits are compared where both have the same context: after each prompt, and
//! after each token of the reference's own greedy continuation. `scripts/baselines/outputs.py` computes the same.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::result::{Document, LogitRow, Outputs};
use crate::help::Help;

/// A difference of two logits is within the error if it is below this many root mean squares of the error of one: of
/// all rows, or of its own row if that is larger, since errors grow with the context. The two logits in question are
/// excluded from their row's error, so that a single large error does not hide itself.
const CLEAR: f64 = 4.0;

/// The difference between a system's outputs and the reference's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// The reference.
    pub system: String,
    /// The worst row's norm of the difference over the norm of the reference, both over the ids that the reference
    /// ranks highest and the system also lists.
    pub worst_relative_logit_error: f64,
    pub mean_relative_logit_error: f64,
    /// Root mean square error of one logit.
    pub rms_logit_error: f64,
    /// Limit up to which `worst_relative_logit_error` counts as equal: 1e-3 in fp32, 0.03 in fp16, 0.2 in bf16.
    pub limit: f64,
    /// Number of compared rows.
    pub rows: usize,
    /// Rows whose best token is the reference's.
    pub same_best: usize,
    /// Rows with another best token where the reference's margin is below the error.
    pub differing_within_error: usize,
    pub differing_though_clear: usize,
    /// For each prompt, greedy tokens before the first difference.
    pub greedy_equal_up_to: Vec<usize>,
    pub first_difference: Vec<Option<Difference>>,
    /// Within the limit, and different tokens only where the reference's margin is below the error.
    pub equal: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Difference {
    pub step: usize,
    /// The reference's margin, if its logits are known.
    pub margin: Option<f64>,
    pub within_error: bool,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CompareError {
    #[error("{0} recorded no outputs")]
    NoOutputs(String),
    #[error("the reference was made with other prompts")]
    Prompts,
    #[error("no row of logits is in both the result and the reference")]
    NoRows,
}

/// Advice for outputs of other prompts.
pub const OTHER_PROMPTS: &str = "give both runs the same --prompts file";
impl Help for CompareError {
    fn help(&self) -> Option<String> {
        Some(OTHER_PROMPTS.to_string())
    }
}

/// Relative error of the logits that still counts as equal.
pub fn limit(dtype: &str) -> f64 {
    match dtype {
        "fp32" => 1e-3,
        "bf16" => 0.2,
        _ => 0.03,
    }
}

/// Compares the outputs of one result with those of the reference.
pub fn compare(result: &Document, reference: &Document) -> Result<Comparison, CompareError> {
    let outputs = |d: &Document| -> Result<Outputs, CompareError> {
        let name = || d.system.label.clone();
        d.outputs.clone().ok_or_else(|| CompareError::NoOutputs(name()))
    };
    let (mine, theirs) = (outputs(result)?, outputs(reference)?);
    if mine.prompts != theirs.prompts {
        return Err(CompareError::Prompts);
    }
    let known: HashMap<(usize, usize), &LogitRow> = theirs.logits.iter().map(|r| ((r.prompt, r.step), r)).collect();
    let margin = |row: &LogitRow| match (row.margin, &row.top[..]) {
        (Some(margin), _) => margin,
        (None, [first, second, ..]) => first.1 - second.1,
        (None, _) => f64::INFINITY,
    };
    let (mut errors, mut squares, mut count) = (Vec::new(), 0.0, 0usize);
    // Root mean square of the error in each row.
    let mut rows: HashMap<(usize, usize), f64> = HashMap::new();
    let mut differing = Vec::new();
    for row in &mine.logits {
        let Some(expected) = known.get(&(row.prompt, row.step)) else {
            continue;
        };
        let ours: HashMap<u32, f64> = row.top.iter().copied().collect();
        let shared: Vec<(u32, f64, f64)> = expected
            .top
            .iter()
            .filter_map(|(id, e)| Some((*id, *ours.get(id)?, *e)))
            .collect();
        if shared.len() < expected.top.len() / 4 || shared.is_empty() {
            // There are hardly any likely tokens in common: report the maximum error.
            errors.push(1.0);
            continue;
        }
        let difference: f64 = shared.iter().map(|(_, a, b)| (a - b) * (a - b)).sum();
        let norm: f64 = shared.iter().map(|(_, _, b)| b * b).sum();
        errors.push((difference / norm).sqrt());
        squares += difference;
        count += shared.len();
        let (first, other) = (row.top[0].0, expected.top[0].0);
        let others = shared.iter().filter(|(id, ..)| *id != first && *id != other);
        let squares_of: Vec<f64> = others.map(|(_, a, b)| (a - b) * (a - b)).collect();
        let own = squares_of.iter().sum::<f64>() / squares_of.len().max(1) as f64;
        rows.insert((row.prompt, row.step), own.sqrt());
        if first != other {
            differing.push(*expected);
        }
    }
    if errors.is_empty() {
        return Err(CompareError::NoRows);
    }
    let noise = (squares / count.max(1) as f64).sqrt();
    let within = |row: &LogitRow| {
        let own = rows.get(&(row.prompt, row.step)).copied().unwrap_or(0.0);
        margin(row) < CLEAR * noise.max(own)
    };
    let (mut equal_up_to, mut differences) = (Vec::new(), Vec::new());
    for (i, (a, b)) in mine.greedy_tokens.iter().zip(&theirs.greedy_tokens).enumerate() {
        let n = a.len().min(b.len());
        let same = a.iter().zip(b).take_while(|(a, b)| a == b).count();
        equal_up_to.push(same);
        differences.push((same < n).then(|| {
            let row = known.get(&(i, same)).copied();
            Difference {
                step: same,
                margin: row.map(margin),
                within_error: row.is_some_and(within),
            }
        }));
    }
    let limit = limit(&result.model.dtype);
    let clear = differing.iter().filter(|row| !within(row)).count();
    let worst = errors.iter().copied().fold(0.0, f64::max);
    let tokens_agree = differences.iter().flatten().all(|d| d.within_error);
    Ok(Comparison {
        system: reference.system.label.clone(),
        worst_relative_logit_error: worst,
        mean_relative_logit_error: errors.iter().sum::<f64>() / errors.len() as f64,
        rms_logit_error: noise,
        limit,
        rows: errors.len(),
        same_best: errors.len() - differing.len(),
        differing_within_error: differing.len() - clear,
        differing_though_clear: clear,
        greedy_equal_up_to: equal_up_to,
        first_difference: differences,
        equal: worst <= limit && clear == 0 && tokens_agree,
    })
}
