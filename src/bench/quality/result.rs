//! The documents of `lapidary perplexity` and `lapidary evaluate` with `--json`: one per run.
//!
//! `report` builds its quality table from [`Perplexity`] documents. Units are in the names; shares are 0 to 1.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::perplexity::{Mean, Measured};
use super::task::{Metric, Scores};
use crate::bench::check::ResultError;
use crate::bench::model::{dtype, weights_hash};
use crate::help::Help;
use crate::package::manifest::WeightEntry;
use crate::package::{Package, PackageError};

/// The `schema` of a [`Perplexity`].
pub const PERPLEXITY: &str = "lapidary-perplexity/1";
/// The `schema` of a [`Task`].
pub const TASK: &str = "lapidary-task/1";

/// A measured model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The package's folder.
    pub name: String,
    /// `fp32`, `fp16` or `bf16`: the type of the arithmetic and of weights that are not quantized.
    pub dtype: String,
    /// The formats of its weights, most bytes first: `u4 in blocks of 32 on axis 1; f32`.
    pub format: String,
    pub weight_bytes: u64,
    /// As in a bench result.
    pub weights_hash: String,
}

impl Model {
    /// Reads every weight once, for the hash.
    pub fn of(package: &Package) -> Result<Model, PackageError> {
        let weights = &package.manifest.weights;
        Ok(Model {
            name: package.name(),
            dtype: dtype(package.manifest.dtype).to_string(),
            format: format(&weights.tensors),
            weight_bytes: weights.bytes,
            weights_hash: weights_hash(package)?,
        })
    }
}

fn format(weights: &[WeightEntry]) -> String {
    let mut bytes: BTreeMap<String, u64> = BTreeMap::new();
    for weight in weights.iter().filter(|w| w.same_as.is_none()) {
        let form = match &weight.quantized {
            Some(quantized) => quantized.to_string(),
            None => weight.dtype.to_string(),
        };
        *bytes.entry(form).or_default() += weight.bytes;
    }
    let mut forms: Vec<(String, u64)> = bytes.into_iter().collect();
    forms.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    forms.into_iter().map(|(form, _)| form).collect::<Vec<_>>().join("; ")
}

/// An input file, identified by its contents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Without the folder.
    pub file: String,
    pub bytes: u64,
    pub blake3: String,
}

impl File {
    pub fn of(path: &Path, contents: &[u8]) -> File {
        let name = path.file_name().unwrap_or(path.as_os_str());
        File {
            file: name.to_string_lossy().into_owned(),
            bytes: contents.len() as u64,
            blake3: blake3::hash(contents).to_hex().to_string(),
        }
    }
}

/// Common fields of both documents.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// RFC 3339, when it was run.
    pub date: String,
    pub command: String,
    pub commit: String,
    pub lapidary: String,
    /// The device.
    pub device: String,
}

/// A mean over tokens or lines, with its standard error.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub mean: f64,
    pub error: f64,
}

impl From<Mean> for Estimate {
    fn from(mean: Mean) -> Self {
        Estimate {
            mean: mean.mean,
            error: mean.error(),
        }
    }
}

/// Perplexity and its components.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Surprise {
    pub perplexity: f64,
    pub perplexity_error: f64,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: Estimate,
}

impl From<Mean> for Surprise {
    fn from(nll: Mean) -> Self {
        let perplexity = nll.mean.exp();
        Surprise {
            perplexity,
            perplexity_error: perplexity * nll.error(),
            nll: nll.into(),
        }
    }
}

/// The result of one package for one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    pub schema: String,
    #[serde(flatten)]
    pub run: Run,
    pub model: Model,
    pub text: File,
    /// Tokens of the text, without the prefix.
    pub tokens: usize,
    /// Scored tokens among them.
    pub scored: usize,
    /// Tokens that begin every window and are not part of the text.
    pub prefix: Vec<u32>,
    pub window: usize,
    pub stride: usize,
    #[serde(flatten)]
    pub surprise: Surprise,
    /// Wall-clock time per scored token, including the context of overlapping windows; for both models if there are
    /// two.
    pub ms_per_token: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// The other model, and the divergence from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Against {
    pub model: Model,
    #[serde(flatten)]
    pub surprise: Surprise,
    /// KL divergence of the other's distribution from this one's, in nats per token.
    pub kl: Estimate,
    /// Largest KL divergence of one token.
    pub kl_largest: f64,
    /// Share of tokens at which both have the same most probable one.
    pub same_best: f64,
}

impl Against {
    pub fn of(model: Model, measured: &Measured) -> Option<Against> {
        let found = measured.against.as_ref()?;
        Some(Against {
            model,
            surprise: found.nll.into(),
            kl: found.kl.into(),
            kl_largest: found.kl.largest,
            same_best: found.same_best as f64 / found.kl.count.max(1) as f64,
        })
    }
}

/// The result of one package for the lines of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    pub schema: String,
    #[serde(flatten)]
    pub run: Run,
    pub model: Model,
    pub task: File,
    /// Relevant sampler settings, and limits.
    pub settings: Map<String, Value>,
    /// Over all lines.
    pub scores: Scores,
    /// Standard errors of the lines' F1 and exact matches.
    pub errors: BTreeMap<Metric, f64>,
    pub thresholds: Vec<Threshold>,
    /// Whether every threshold was met.
    pub passed: bool,
    pub lines: Vec<Line>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Threshold {
    pub metric: Metric,
    pub at_least: f64,
    pub found: f64,
    pub passed: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Line in the file, from 1.
    pub line: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Value>,
    pub prompt_tokens: usize,
    pub tokens: usize,
    pub finish_reason: String,
    pub text: String,
    pub reference: String,
    pub scores: Scores,
}

/// A document of `lapidary perplexity`; `path` is for messages. Inconsistent numbers are refused.
pub fn parse(path: &Path, value: &Value) -> Result<Perplexity, PerplexityResultError> {
    let field = |field: String, message: String| {
        PerplexityResultError(ResultError::Field {
            path: path.to_path_buf(),
            field,
            message,
        })
    };
    let document: Perplexity =
        serde_path_to_error::deserialize(value).map_err(|e| field(e.path().to_string(), e.inner().to_string()))?;
    let d = &document;
    let surprises = [("", &d.surprise)].into_iter();
    let surprises = surprises.chain(d.against.iter().map(|against| ("against.", &against.surprise)));
    for (of, surprise) in surprises {
        let expected = surprise.nll.mean.exp();
        // A NaN agrees with nothing.
        let agrees = (surprise.perplexity - expected).abs() <= 1e-6 * expected;
        if !agrees {
            let message = format!(
                "is {}, and e^nll is {expected}: the file was changed",
                surprise.perplexity
            );
            return Err(field(format!("{of}perplexity"), message));
        }
    }
    let shares = d.against.iter().map(|against| against.same_best);
    if let Some(share) = shares.into_iter().find(|share| !(0.0..=1.0).contains(share)) {
        return Err(field("against.same_best".into(), format!("{share} is no share")));
    }
    if d.against
        .iter()
        .any(|against| against.kl.mean.is_nan() || against.kl.mean < 0.0)
    {
        return Err(field("against.kl".into(), "a divergence is never negative".into()));
    }
    Ok(document)
}

/// An inconsistent file of `lapidary perplexity`.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct PerplexityResultError(#[from] ResultError);

impl Help for PerplexityResultError {
    fn help(&self) -> Option<String> {
        Some("measure again with `lapidary perplexity --json`; docs/guides/quantization.md has every field".to_string())
    }
}
