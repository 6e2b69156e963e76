//! Reads results and refuses inconsistent ones: unknown schemas, missing fields, summaries that do not follow
//! from their samples.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::layers::GROUPS;
use super::model;
use super::result::{Decode, Document, EndToEnd, LayerTimes, LogitRow, Prefill, SCHEMA};
use super::summary::{STABLE_WITHIN, Summary, stable};
use crate::help::Help;

/// Relative tolerance between a number and its samples: rounding in text and by another order of additions.
pub(super) const TOLERANCE: f64 = 1e-6;

/// Fields that every measured document has, even if readers do not need them.
const NEEDED: [&str; 5] = ["prefill", "decode", "end_to_end", "memory", "versions"];

#[derive(Debug, thiserror::Error)]
pub enum ResultError {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: is not JSON: {message}", path.display())]
    Json { path: PathBuf, message: String },
    /// JSON in another format, such as a script's own.
    #[error("{}: is not a bench result: it has no `schema`", path.display())]
    NoSchema { path: PathBuf },
    #[error("{}: the schema is {found:?}, and this version reads {SCHEMA:?}", path.display())]
    Schema { path: PathBuf, found: String },
    #[error("{}: {field}: {message}", path.display())]
    Field {
        path: PathBuf,
        field: String,
        message: String,
    },
    #[error(
        "{}: {field} is {found}, and its samples give {expected}: the file was changed after it was measured",
        path.display()
    )]
    Edited {
        path: PathBuf,
        field: String,
        found: String,
        expected: String,
    },
    #[error(
        "{}: {field} is present beside `error`: a system that could not run has measured nothing",
        path.display()
    )]
    MeasuredBesideError { path: PathBuf, field: &'static str },
    #[error(
        "{}: {field} is {found} ms of the GPU, and tokens took {wall} ms of wall-clock time: {why}",
        path.display()
    )]
    DeviceTime {
        path: PathBuf,
        field: String,
        found: f64,
        wall: f64,
        why: &'static str,
    },
    #[error("{}: {field}: {group:?} is not a group of layers; those are {}", path.display(), GROUPS.join(", "))]
    LayerGroup {
        path: PathBuf,
        field: String,
        group: String,
    },
}

impl Help for ResultError {
    fn help(&self) -> Option<String> {
        let help = match self {
            ResultError::Io { .. } | ResultError::Json { .. } => return None,
            ResultError::NoSchema { .. } => "give files that `lapidary bench` or scripts/baselines wrote",
            ResultError::Schema { .. } => "use the version of Lapidary that knows it, or measure again",
            ResultError::MeasuredBesideError { .. } => "take the `error` out if it did run, or measure again",
            ResultError::Field { .. }
            | ResultError::Edited { .. }
            | ResultError::DeviceTime { .. }
            | ResultError::LayerGroup { .. } => {
                "measure again; docs/reference/benchmarks.md describes every field and how it follows from samples"
            }
        };
        Some(help.to_string())
    }
}

/// A checked result file.
pub fn read(path: &Path) -> Result<Document, ResultError> {
    let text = std::fs::read_to_string(path).map_err(|source| ResultError::Io {
        path: path.to_path_buf(),
        source,
    })?;
    parse(path, &text)
}

/// The same for a text; `path` is for messages.
pub fn parse(path: &Path, text: &str) -> Result<Document, ResultError> {
    let file = || path.to_path_buf();
    let value: Value = serde_json::from_str(text).map_err(|e| ResultError::Json {
        path: file(),
        message: e.to_string(),
    })?;
    match value.get("schema") {
        None => return Err(ResultError::NoSchema { path: file() }),
        Some(Value::String(schema)) if schema == SCHEMA => {}
        Some(other) => {
            let found = other.as_str().map_or_else(|| other.to_string(), str::to_string);
            return Err(ResultError::Schema { path: file(), found });
        }
    }
    let measured = value.get("error").is_none_or(Value::is_null);
    let missing = NEEDED
        .iter()
        .find(|key| measured && value.get(key).is_none_or(Value::is_null));
    if let Some(field) = missing {
        return Err(ResultError::Field {
            path: file(),
            field: field.to_string(),
            message: "is missing".into(),
        });
    }
    let document: Document = serde_path_to_error::deserialize(&value).map_err(|e| ResultError::Field {
        path: file(),
        field: e.path().to_string(),
        message: e.inner().to_string(),
    })?;
    Checker {
        path,
        document: &document,
    }
    .all()?;
    Ok(document)
}

/// A JSON document with a known schema; errors name the field.
pub(super) fn document<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, ResultError> {
    let mut source = serde_json::Deserializer::from_str(text);
    serde_path_to_error::deserialize(&mut source).map_err(|e| ResultError::Field {
        path: path.to_path_buf(),
        field: e.path().to_string(),
        message: e.inner().to_string(),
    })
}

struct Checker<'a> {
    path: &'a Path,
    document: &'a Document,
}

type Checked = Result<(), ResultError>;

impl Checker<'_> {
    fn all(&self) -> Checked {
        let d = self.document;
        for (i, prefill) in d.prefill.iter().enumerate() {
            self.prefill(&format!("prefill[{i}]"), prefill)?;
        }
        for (i, decode) in d.decode.iter().enumerate() {
            self.decode(&format!("decode[{i}]"), decode)?;
        }
        for (i, run) in d.end_to_end.iter().enumerate() {
            self.end_to_end(&format!("end_to_end[{i}]"), run)?;
        }
        self.outputs()?;
        for (name, times) in d.profile.iter().flatten() {
            self.profile(&format!("profile.{name}"), times)?;
        }
        self.error()
    }

    fn error(&self) -> Checked {
        let d = self.document;
        let measured = [
            ("prefill", !d.prefill.is_empty()),
            ("decode", !d.decode.is_empty()),
            ("end_to_end", !d.end_to_end.is_empty()),
            ("outputs", d.outputs.is_some()),
            ("profile", d.profile.is_some()),
        ];
        match measured.into_iter().find(|(_, there)| d.error.is_some() && *there) {
            Some((field, _)) => Err(ResultError::MeasuredBesideError {
                path: self.path.to_path_buf(),
                field,
            }),
            None => Ok(()),
        }
    }

    /// Older files assign layers to groups by another rule; their groups also cover all layers.
    fn profile(&self, at: &str, times: &LayerTimes) -> Checked {
        if let Some((layer, _)) = times.layers.iter().find(|(_, ms)| !ms.is_finite() || *ms < 0.0) {
            return Err(self.field(format!("{at}.layers"), format!("{layer} took a time that is none")));
        }
        let layers: f64 = times.layers.iter().map(|(_, ms)| ms).sum();
        self.number(&format!("{at}.total_ms"), times.total_ms, layers)?;
        for (group, ms) in &times.groups {
            let at = format!("{at}.groups");
            if !GROUPS.contains(&group.as_str()) {
                return Err(ResultError::LayerGroup {
                    path: self.path.to_path_buf(),
                    field: at,
                    group: group.clone(),
                });
            }
            if !ms.is_finite() || *ms < 0.0 {
                return Err(self.field(at, format!("{group} took a time that is none")));
            }
        }
        self.number(&format!("{at}.groups"), times.groups.values().sum(), layers)
    }

    fn prefill(&self, at: &str, p: &Prefill) -> Checked {
        self.summary(&format!("{at}.ms"), &p.ms, &p.samples_ms)?;
        let seconds = p.ms.median / 1e3;
        let rate = (p.tokens * self.batch()) as f64 / seconds;
        self.number(&format!("{at}.prefill_tokens_per_s"), p.prefill_tokens_per_s, rate)?;
        if let Some(mfu) = p.mfu {
            let at = format!("{at}.mfu");
            let peak = self.document.machine.peak_flops.as_ref();
            let peak = peak.ok_or_else(|| self.without(&at, "machine.peak_flops"))?;
            let flop = model::prefill_flop(&self.document.model, p.tokens);
            let flop = flop.ok_or_else(|| self.without(&at, "model.matrix_parameters"))?;
            self.number(&at, mfu, flop * self.batch() as f64 / seconds / peak.flops)?;
        }
        self.stable(at, p.stable, &p.samples_ms)
    }

    fn decode(&self, at: &str, d: &Decode) -> Checked {
        self.summary(&format!("{at}.ms"), &d.ms, &d.samples_ms)?;
        let seconds = d.ms.median / 1e3;
        let rate = self.batch() as f64 / seconds;
        self.number(&format!("{at}.output_tokens_per_s"), d.output_tokens_per_s, rate)?;
        if let Some(mbu) = d.mbu {
            let at = format!("{at}.mbu");
            let bandwidth = self.document.machine.copy_bandwidth_bytes_per_s;
            let bandwidth = bandwidth.ok_or_else(|| self.without(&at, "machine.copy_bandwidth_bytes_per_s"))?;
            let bytes = model::decode_bytes(&self.document.model, d.live * self.batch());
            self.number(&at, mbu, bytes / seconds / bandwidth)?;
        }
        self.device_time(at, d)?;
        self.stable(at, d.stable, &d.samples_ms)
    }

    /// The GPU time of a step is part of a token's time. It is measured after the samples, so the two may differ like
    /// stable samples.
    fn device_time(&self, at: &str, d: &Decode) -> Checked {
        let why = match d.gpu_ms {
            Some(ms) if !ms.is_finite() || ms <= 0.0 => "a step takes some time",
            Some(ms) if ms > d.ms.median * STABLE_WITHIN => "a part of it cannot take longer",
            _ => return Ok(()),
        };
        Err(ResultError::DeviceTime {
            path: self.path.to_path_buf(),
            field: format!("{at}.gpu_ms"),
            found: d.gpu_ms.unwrap_or_default(),
            wall: d.ms.median,
            why,
        })
    }

    fn end_to_end(&self, at: &str, e: &EndToEnd) -> Checked {
        if e.runs.is_empty() {
            return Err(self.field(format!("{at}.runs"), "is empty"));
        }
        for (i, run) in e.runs.iter().enumerate() {
            let between = run.itl_samples_ms.len();
            if between != run.tokens.saturating_sub(1) {
                let message = format!("has {between} times between {} tokens", run.tokens);
                return Err(self.field(format!("{at}.runs[{i}].itl_samples_ms"), message));
            }
            let numbers = run.itl_samples_ms.iter().chain([&run.ttft_ms, &run.latency_ms]);
            let mut numbers = numbers.copied();
            if numbers.any(|n| !n.is_finite() || n < 0.0) {
                return Err(self.field(format!("{at}.runs[{i}]"), "holds a time that is none"));
            }
        }
        let expected = EndToEnd::of(e.prompt, e.new_tokens, e.runs.clone());
        for (name, found, expected) in [
            ("ttft_ms", &e.ttft_ms, &expected.ttft_ms),
            ("tpot_ms", &e.tpot_ms, &expected.tpot_ms),
            ("itl_ms", &e.itl_ms, &expected.itl_ms),
            ("latency_ms", &e.latency_ms, &expected.latency_ms),
        ] {
            self.summaries(&format!("{at}.{name}"), found, expected)?;
        }
        let rate = expected.output_tokens_per_s * self.batch() as f64;
        self.number(&format!("{at}.output_tokens_per_s"), e.output_tokens_per_s, rate)?;
        let latencies: Vec<f64> = e.runs.iter().map(|run| run.latency_ms).collect();
        self.stable(at, e.stable, &latencies)
    }

    fn outputs(&self) -> Checked {
        let Some(outputs) = &self.document.outputs else {
            return Ok(());
        };
        let (prompts, answers) = (outputs.prompts.len(), outputs.greedy_tokens.len());
        if prompts != answers {
            let message = format!("has {answers} answers to {prompts} prompts");
            return Err(self.field("outputs.greedy_tokens", message));
        }
        if let Some(i) = outputs
            .logits
            .iter()
            .position(|row| row.prompt >= prompts || row.top.is_empty())
        {
            let message = "belongs to no prompt, or is empty";
            return Err(self.field(format!("outputs.logits[{i}]"), message));
        }
        for (i, row) in outputs.logits.iter().enumerate() {
            self.logits(&format!("outputs.logits[{i}]"), row)?;
        }
        Ok(())
    }

    fn logits(&self, at: &str, row: &LogitRow) -> Checked {
        if let Some(i) = row.top.windows(2).position(|pair| pair[0].1 < pair[1].1) {
            let message = format!("rises from {} to {}", row.top[i].1, row.top[i + 1].1);
            return Err(self.field(format!("{at}.top"), message));
        }
        let (Some(margin), [first, second, ..]) = (row.margin, &row.top[..]) else {
            return Ok(());
        };
        let expected = first.1 - second.1;
        // A small difference of large numbers has lost precision.
        if (margin - expected).abs() <= TOLERANCE * first.1.abs().max(second.1.abs()) {
            return Ok(());
        }
        self.number(&format!("{at}.margin"), margin, expected)
    }

    fn summary(&self, at: &str, found: &Summary, samples: &[f64]) -> Checked {
        match Summary::of(samples) {
            Some(expected) => self.summaries(at, found, &expected),
            None => Err(self.field(at, "has no samples, or one that is not a number")),
        }
    }

    fn summaries(&self, at: &str, found: &Summary, expected: &Summary) -> Checked {
        self.number(&format!("{at}.count"), found.count as f64, expected.count as f64)?;
        // A spread that is only rounding has no significant digits.
        let slack = expected.mean.abs() * 1e-12;
        for ((name, found), (_, expected)) in found.numbers().into_iter().zip(expected.numbers()) {
            if (found - expected).abs() > slack {
                self.number(&format!("{at}.{name}"), found, expected)?;
            }
        }
        Ok(())
    }

    fn number(&self, field: &str, found: f64, expected: f64) -> Checked {
        // NaN is never equal.
        if (found - expected).abs() <= TOLERANCE * expected.abs() {
            return Ok(());
        }
        Err(ResultError::Edited {
            path: self.path.to_path_buf(),
            field: field.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
        })
    }

    fn stable(&self, at: &str, found: bool, samples: &[f64]) -> Checked {
        match stable(samples) {
            expected if expected == found => Ok(()),
            expected => Err(ResultError::Edited {
                path: self.path.to_path_buf(),
                field: format!("{at}.stable"),
                found: found.to_string(),
                expected: expected.to_string(),
            }),
        }
    }

    fn batch(&self) -> usize {
        self.document.workload.batch.max(1)
    }

    fn without(&self, field: &str, needed: &str) -> ResultError {
        self.field(
            field,
            format!("is given, but {needed}, which it is a share of, is missing"),
        )
    }

    fn field(&self, field: impl Into<String>, message: impl Into<String>) -> ResultError {
        ResultError::Field {
            path: self.path.to_path_buf(),
            field: field.into(),
            message: message.into(),
        }
    }
}
