//! Why weights cannot be quantized.

use std::path::PathBuf;

use crate::graph::ConstantError;
use crate::help::Help;
use crate::tensor::quantized::QuantizedError;

/// Weights that cannot be quantized as requested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantizeError {
    /// The export already has quantized weights.
    #[error("its weights are quantized already: {weight:?} is {form}")]
    Quantized {
        /// One of them, in the export.
        weight: String,
        /// How.
        form: String,
    },
    /// There is nothing to quantize.
    #[error("no weight is left to be quantized{}", kept_note(kept))]
    Nothing {
        /// Weights that stay in floating point.
        kept: Vec<String>,
    },
    /// A name that is not a weight's.
    #[error("keep={pattern}: no weight matches")]
    NoSuchWeight {
        /// The given pattern.
        pattern: String,
        /// Names of weights.
        known: Vec<String>,
    },
    /// An unusable calibration text.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A text without a tokenizer.
    #[error("calibrating on a text needs the model's tokenizer, and there is none in the export's folder")]
    NoTokenizer,
    /// The model cannot be run on the text.
    #[error("the activations cannot be measured: {reason}")]
    Measure {
        /// What went wrong.
        reason: String,
    },
    /// A weight whose values are unavailable.
    #[error("{weight:?}: {source}")]
    Constant {
        /// In the graph.
        weight: String,
        /// Why.
        source: ConstantError,
    },
    /// A weight that cannot have the format.
    #[error("{weight:?} cannot be quantized: {source}")]
    Format {
        /// In the export.
        weight: String,
        /// Why.
        source: QuantizedError,
    },
}

fn kept_note(kept: &[String]) -> String {
    match kept {
        [] => ": the graph has no linear layer with a constant weight".to_string(),
        [first, ..] => format!(
            ": all {} matrices stay in floating point, {first:?} for example",
            kept.len()
        ),
    }
}

/// An unusable calibration text.
#[derive(Debug, thiserror::Error)]
#[error("{}: {message}", path.display())]
pub struct TextError {
    /// Path of the file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub message: String,
}

impl Help for QuantizeError {
    fn help(&self) -> Option<String> {
        match self {
            QuantizeError::Quantized { .. } => {
                Some("convert it without --quantize, or quantize the model's export in floating point".to_string())
            }
            QuantizeError::Nothing { .. } => Some("keep less: see keep= of --quantize".to_string()),
            QuantizeError::NoSuchWeight { known, .. } => {
                let mut some: Vec<&str> = known.iter().take(4).map(String::as_str).collect();
                if known.len() > some.len() {
                    some.push("…");
                }
                Some(format!("weights are called {}; a pattern has *", some.join(", ")))
            }
            QuantizeError::NoTokenizer => Some("give it with --tokenizer, or quantize without --calibrate".to_string()),
            QuantizeError::Text(_) | QuantizeError::Measure { .. } => None,
            QuantizeError::Constant { source, .. } => source.help(),
            QuantizeError::Format { weight, source } => match source {
                QuantizedError::BlockSize { size, axis, codes } => {
                    let extent = codes[*axis];
                    let divisor = (2..*size).rev().find(|n| extent.is_multiple_of(*n));
                    let smaller = divisor.map_or("group=channel".to_string(), |n| format!("group={n} or group=auto"));
                    Some(format!("use {smaller}, or keep it in floating point: keep={weight}"))
                }
                _ => None,
            },
        }
    }
}
