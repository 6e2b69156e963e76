//! The result of `scripts/quantized_side_by_side.py`: quantized forms of one model in several systems on the CPU,
//! alternating in one run.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::check::{ResultError, TOLERANCE};
use super::summary::Summary;

/// The value of `schema`.
pub const SCHEMA: &str = "lapidary-side-by-side/1";

/// One run of the script.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SideBySide {
    pub schema: String,
    pub model: String,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens generated.
    pub new: usize,
    pub threads: usize,
    /// Number of rounds over all systems.
    pub rounds: usize,
    /// Runs of a system in each round.
    pub runs: usize,
    pub cpu: String,
    pub date: String,
    /// By form of the weights (`int4`), then by system.
    pub forms: BTreeMap<String, BTreeMap<String, Row>>,
}

/// A system with one form; medians over all runs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub tpot_ms: f64,
    pub ttft_ms: f64,
    /// Peak resident set.
    pub peak_memory_mb: f64,
    /// Tokens before the first that differs from Lapidary's.
    pub tokens_equal_to_lapidary: usize,
    pub samples: Samples,
}

/// Times of each run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Samples {
    pub tpot_ms: Vec<f64>,
    pub ttft_ms: Vec<f64>,
}

/// Reads a result and checks that its medians follow from its samples; `path` is for messages.
pub fn parse(path: &Path, text: &str) -> Result<SideBySide, ResultError> {
    let found: SideBySide = super::check::document(path, text)?;
    let rows = found
        .forms
        .iter()
        .flat_map(|(form, systems)| systems.iter().map(move |(system, row)| (form, system, row)));
    for (form, system, row) in rows {
        for (name, stated, samples) in [
            ("tpot_ms", row.tpot_ms, &row.samples.tpot_ms),
            ("ttft_ms", row.ttft_ms, &row.samples.ttft_ms),
        ] {
            let median = Summary::of(samples).map_or(f64::NAN, |s| s.median);
            if median.is_nan() || (stated - median).abs() > TOLERANCE * median {
                return Err(ResultError::Edited {
                    path: path.to_path_buf(),
                    field: format!("forms.{form}.{system}.{name}"),
                    found: stated.to_string(),
                    expected: median.to_string(),
                });
            }
        }
    }
    Ok(found)
}
