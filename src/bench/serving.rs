//! The result of `lapidary bench --serve`: throughput and latencies of a scheduler against the number of clients.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::check::{ResultError, TOLERANCE};
use super::summary::Summary;

/// The value of `schema`.
pub const SCHEMA: &str = "lapidary.bench.serve/1";

/// One run; times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Serving {
    pub schema: String,
    /// RFC 3339, when it was run.
    pub date: String,
    pub command: String,
    pub commit: String,
    /// The package's name.
    pub package: String,
    /// The device.
    pub device: String,
    pub engine: String,
    pub cores: usize,
    /// Prompt tokens of each request.
    pub prompt_tokens: usize,
    pub new_tokens: usize,
    pub prefill_chunk: usize,
    pub levels: Vec<Level>,
}

/// Measurements with one number of clients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Level {
    pub clients: usize,
    pub requests: usize,
    pub seconds: f64,
    /// Generated tokens of all clients.
    pub tokens_per_s: f64,
    pub requests_per_s: f64,
    /// Mean number of tokens per step.
    pub tokens_per_step: f64,
    pub ttft_ms: Summary,
    /// From one token of a request to its next.
    pub itl_ms: Option<Summary>,
    pub e2e_ms: Summary,
}

/// Reads a result and checks that its rates follow from requests and seconds; `path` is for messages.
pub fn parse(path: &Path, text: &str) -> Result<Serving, ResultError> {
    let found: Serving = super::check::document(path, text)?;
    let field = |field: &str, message: &str| ResultError::Field {
        path: path.to_path_buf(),
        field: field.to_string(),
        message: message.to_string(),
    };
    if found.levels.is_empty() {
        return Err(field("levels", "there are none"));
    }
    for (i, level) in found.levels.iter().enumerate() {
        if level.clients == 0 {
            return Err(field(&format!("levels[{i}].clients"), "is 0"));
        }
        let expected = (level.requests * found.new_tokens) as f64 / level.seconds;
        if !expected.is_finite() || (level.tokens_per_s - expected).abs() > TOLERANCE * expected {
            return Err(ResultError::Edited {
                path: path.to_path_buf(),
                field: format!("levels[{i}].tokens_per_s"),
                found: level.tokens_per_s.to_string(),
                expected: expected.to_string(),
            });
        }
    }
    Ok(found)
}
