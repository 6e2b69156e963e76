//! Why an export cannot become a package.

use std::path::PathBuf;

use super::files::FilesError;
#[cfg(feature = "engines")]
use crate::backend::tensorrt::run::RunError;
use crate::backend::tensorrt::{self, LibraryError};
use crate::help::{Fault, Help};
use crate::lower::LowerError;
use crate::onnx;
use crate::package::PackageError;
use crate::passes::PassError;
use crate::quantize::QuantizeError;
use crate::text::TokenizerError;
#[cfg(feature = "engines")]
use crate::tune::measure::TuneError;
use crate::weights::embeddings::EmbeddingError;

/// Why a conversion failed. `path` is the export.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The export cannot be read.
    #[error(transparent)]
    Read(#[from] onnx::ReadError),
    /// The package cannot be written.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The tokenizer's files cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A folder in which no export can be chosen.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The table of token embeddings cannot be used.
    #[error(transparent)]
    Embeddings(#[from] EmbeddingError),
    /// There is no TensorRT library for building engines.
    #[error(transparent)]
    Library(#[from] LibraryError),
    /// Unknown operators, or operands of the wrong number or type.
    #[error("{}: {}", path.display(), list(faults))]
    Invalid {
        /// The export.
        path: PathBuf,
        /// Every fault, with its node.
        faults: Vec<String>,
    },
    /// The export cannot be made canonical.
    #[error("{}: {source}", path.display())]
    Pass {
        /// The export.
        path: PathBuf,
        /// Why.
        source: PassError,
    },
    /// The canonical graph cannot run.
    #[error("{}: {reason}", path.display())]
    Unrunnable {
        /// The export.
        path: PathBuf,
        /// The problem, with the size.
        reason: String,
    },
    /// A merged decoder whose two branches are different models.
    #[error("{}: {}", path.display(), branches(switch, reason))]
    Branches {
        /// The export.
        path: PathBuf,
        /// The input that chooses the branch.
        switch: String,
        /// The difference.
        reason: String,
    },
    /// TensorRT is known to compute this graph incorrectly.
    #[error(
        "{}: {} {} rows whose rotation by position is written out in single layers: engines of such a model are wrong on a GPU", path.display(), nodes.join(", "), if nodes.len() == 1 { "normalizes" } else { "normalize" })]
    WrongEngines {
        /// The export.
        path: PathBuf,
        /// Norms after such a rotation.
        nodes: Vec<String>,
    },
    /// A step of several sequences would not run only in kernels.
    #[error(
        "{}: --batch cannot be built: the layer {layer:?} ({kind}) has no kernel, so the tokens of a sequence could depend \
         on the other sequences of its step", path.display()
    )]
    Batch {
        /// The export.
        path: PathBuf,
        /// The first such layer.
        layer: String,
        /// Its kind.
        kind: &'static str,
    },
    /// The same for a model that takes embeddings.
    #[error("{}: --batch cannot be built for a model that takes embeddings", path.display())]
    BatchOfEmbeddings {
        /// The export.
        path: PathBuf,
    },
    /// Weights have invalid values.
    #[error("{}: {source}", path.display())]
    Numbers {
        /// The export.
        path: PathBuf,
        /// Which.
        source: PackageError,
    },
    /// A requested capacity exceeds the export's tables of positions.
    #[error("{}: capacity {capacity} is larger than the {limit} positions that the export has tables for", path.display())]
    Capacity {
        /// The export.
        path: PathBuf,
        /// The requested capacity.
        capacity: usize,
        /// The limit.
        limit: usize,
    },
    /// Its weights cannot be quantized as requested.
    #[error("{}: {source}", path.display())]
    Quantize {
        /// The export.
        path: PathBuf,
        /// Why.
        source: QuantizeError,
    },
    /// The canonical graph cannot be written as ONNX.
    #[error("{}: {source}", path.display())]
    Emit {
        /// The file to write.
        path: PathBuf,
        /// Why.
        source: onnx::WriteError,
    },
    /// A canonical graph that cannot be lowered: a bug.
    #[error("{}: {source}", path.display())]
    Lower {
        /// The export.
        path: PathBuf,
        /// Why.
        source: LowerError,
    },
    /// An engine cannot be built.
    #[error("{}: {source}", path.display())]
    Engine {
        /// The export.
        path: PathBuf,
        /// Why.
        source: tensorrt::EngineBuildError,
    },
    /// Tuning without engines.
    #[error("--tune needs a target with engines")]
    NothingToTune,
    /// There is no GPU for tuning.
    #[cfg(feature = "engines")]
    #[error("--tune measures on the GPU of this machine: {0}")]
    TuneGpu(RunError),
    /// Tuning failed.
    #[cfg(feature = "engines")]
    #[error(transparent)]
    Tune(TuneError),
    /// [`Progress::stop_signal`](super::Progress::stop_signal) asked to stop.
    #[error("stopped; nothing was written")]
    Stopped,
}

/// Why a merged decoder cannot be converted.
pub(super) fn branches(switch: &str, reason: &str) -> String {
    format!("the branches that {switch} chooses between are not one model: for the same prompt, {reason}")
}

fn list(faults: &[String]) -> String {
    match faults {
        [one] => one.clone(),
        several => format!(
            "the model cannot be converted, for {} reasons:\n  {}",
            several.len(),
            several.join("\n  ")
        ),
    }
}

impl Help for ConvertError {
    fn fault(&self) -> Fault {
        match self {
            ConvertError::Package(error) => error.fault(),
            ConvertError::Pass { source, .. } => source.fault(),
            ConvertError::Lower { source, .. } => source.fault(),
            ConvertError::Engine { source, .. } => source.fault(),
            #[cfg(feature = "engines")]
            ConvertError::Tune(error) => error.fault(),
            ConvertError::Stopped => Fault::Stopped,
            _ => Fault::Input,
        }
    }

    fn help(&self) -> Option<String> {
        match self {
            ConvertError::Read(error) => error.help(),
            ConvertError::Package(error) => error.help(),
            ConvertError::Tokenizer(error) => error.help(),
            ConvertError::Files(error) => error.help(),
            ConvertError::Embeddings(error) => error.help(),
            ConvertError::Library(error) => error.help(),
            ConvertError::Invalid { path, .. } => {
                Some(format!("`lapidary inspect {}` shows the whole model", path.display()))
            }
            ConvertError::Pass { path, source } => source
                .help()
                .or_else(|| Some(format!("`lapidary inspect {}` shows what was understood", path.display()))),
            ConvertError::Unrunnable { .. } => Some(
                "a size of the example that it was exported with is probably fixed in the graph: export with dynamic axes for \
                 the batch (or a batch of 1), the new tokens, the past and the mask's length; if they are dynamic, please \
                 report it with the export"
                    .to_string(),
            ),
            ConvertError::WrongEngines { .. } => Some(
                "convert it for the CPU alone (--target cpu), and please report the export: its rotation is one that is not recognized"
                    .to_string(),
            ),
            ConvertError::Batch { .. } => Some(
                "leave --batch out; sequences then take turns; docs/explanation/decode-kernels.md lists what has \
                 kernels (in fp32 nothing has: see --dtype fp16)"
                    .to_string(),
            ),
            ConvertError::BatchOfEmbeddings { .. } => Some("leave --batch out; sequences then take turns".to_string()),
            ConvertError::Branches { .. } => Some(
                "convert decoder_with_past_model.onnx, which is one model (`optimum-cli export onnx --no-post-process` writes it)"
                    .to_string(),
            ),
            ConvertError::Numbers { source, .. } => source.help(),
            ConvertError::Capacity { limit, .. } => Some(format!("use a --capacity of at most {limit}")),
            ConvertError::Emit { source, .. } => source.help(),
            ConvertError::Quantize { source, .. } => source.help(),
            ConvertError::Lower { source, .. } => source.help(),
            ConvertError::Engine { source, .. } => source.help(),
            ConvertError::NothingToTune => Some("use it with --target tensorrt-rtx".to_string()),
            // The error's own advice is for running, not for tuning.
            #[cfg(feature = "engines")]
            ConvertError::TuneGpu(_) => Some(
                "leave --tune out for the choices that were best elsewhere, or take them from a machine with such a GPU: \
                 `convert --tune --save-spec FILE` there, `convert --spec FILE` here"
                    .to_string(),
            ),
            #[cfg(feature = "engines")]
            ConvertError::Tune(error) => error.help(),
            ConvertError::Stopped => None,
        }
    }
}
