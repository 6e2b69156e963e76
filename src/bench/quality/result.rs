//! The documents of `lapidary perplexity` and `lapidary evaluate` with `--json`: one per run.
//!
//! `report` makes its table of quality of [`Perplexity`] documents. Units are in the names; shares are 0 to 1.

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

/// What `schema` says of a [`Perplexity`].
pub const PERPLEXITY: &str = "lapidary-perplexity/1";
/// What `schema` says of a [`Task`].
pub const TASK: &str = "lapidary-task/1";

/// A model of which something was found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// The package's folder.
    pub name: String,
    /// `fp32`, `fp16` or `bf16`: of what is not quantized, and of what is computed.
    pub dtype: String,
    /// How its weights are stored, the most bytes first: `u4 in blocks of 32 on axis 1; f32`.
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

/// A file that was read, by its contents.
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

/// What both documents say of their run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// RFC 3339, when it was run.
    pub date: String,
    pub command: String,
    pub commit: String,
    pub lapidary: String,
    /// What computed it.
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

/// Perplexity with what it is made of.
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

/// Of one package over one text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    pub schema: String,
    #[serde(flatten)]
    pub run: Run,
    pub model: Model,
    pub text: File,
    /// Of the text, without the prefix.
    pub tokens: usize,
    /// Of these, how many were scored.
    pub scored: usize,
    /// Tokens that begin every window and are not of the text.
    pub prefix: Vec<u32>,
    pub window: usize,
    pub stride: usize,
    #[serde(flatten)]
    pub surprise: Surprise,
    /// Wall-clock time of a scored token, prompts of overlapping windows included; both models where there are two.
    pub ms_per_token: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub against: Option<Against>,
}

/// The other model, and how far this one is from it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Against {
    pub model: Model,
    #[serde(flatten)]
    pub surprise: Surprise,
    /// KL divergence of the other's distribution from this one's, in nats a token.
    pub kl: Estimate,
    /// Of one token.
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

/// Of one package over the lines of a task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Task {
    pub schema: String,
    #[serde(flatten)]
    pub run: Run,
    pub model: Model,
    pub task: File,
    /// The sampler's settings that matter, and limits.
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
    /// In the file, from 1.
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

/// A document of `lapidary perplexity`; `path` is for messages. Numbers that do not follow from others are refused.
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

/// A file of `lapidary perplexity` that does not hold together.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct PerplexityResultError(#[from] ResultError);

impl Help for PerplexityResultError {
    fn help(&self) -> Option<String> {
        Some("measure again with `lapidary perplexity --json`; docs/guides/quantization.md has every field".to_string())
    }
}
