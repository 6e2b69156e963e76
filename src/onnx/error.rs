//! Why a file could not be read. Every variant is the input's fault; the file's name is in [`ReadError::path`].

use std::path::PathBuf;

use crate::graph::CycleError;
use crate::help::Help;
use crate::tensor::{DType, SizeMismatch};

/// Reading failed: which file, and what is wrong with it.
#[derive(Debug, thiserror::Error)]
#[error("{}: {kind}", .path.display())]
pub struct ReadError {
    /// The model's file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: ReadErrorKind,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the message says what the fields are")]
pub enum ReadErrorKind {
    #[error("cannot be opened: {0}")]
    Open(#[source] std::io::Error),
    #[error("is a folder")]
    Folder,
    #[error("is empty")]
    Empty,
    #[error("is a Git LFS pointer, not the model itself")]
    LfsPointer,
    #[error("is not an ONNX model: {reason}")]
    NotOnnx { reason: String },
    #[error("is truncated: it has {found} of at least {needed} bytes")]
    Truncated { needed: u64, found: u64 },
    #[error("does not state its opset (no opset_import for the domain \"\")")]
    NoOpset,
    #[error("uses opset {version}{place}; Lapidary reads opsets {} to {}", super::OPSETS.start(), super::OPSETS.end())]
    Opset { version: i64, place: String },
    #[error(
        "tensor {tensor:?} has the element type {dtype}, which Lapidary does not read (it reads {})",
        DType::all().filter(|dtype| dtype.onnx_code().is_some()).map(DType::onnx_name).collect::<Vec<_>>().join(", ")
    )]
    DType { tensor: String, dtype: String },
    #[error("has sparse tensors, which are not read")]
    Sparse,
    #[error("tensor {tensor:?}: {reason}")]
    Tensor { tensor: String, reason: String },
    #[error("tensor {tensor:?}: {source}")]
    TensorSize {
        tensor: String,
        #[source]
        source: SizeMismatch,
    },
    #[error("tensor {tensor:?} refers to external data {location:?}: {reason}")]
    ExternalLocation {
        tensor: String,
        location: String,
        reason: &'static str,
        /// What to do about it.
        help: Option<&'static str>,
    },
    #[error("tensor {tensor:?} is in the external file {}, which cannot be opened: {source}", .file.display())]
    ExternalOpen {
        tensor: String,
        file: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("tensor {tensor:?} needs bytes {start} to {end} of the external file {}, which has {found}", .file.display())]
    ExternalShort {
        tensor: String,
        file: PathBuf,
        start: u64,
        end: u128,
        found: u64,
    },
    #[error("input {name:?} {reason}")]
    Input { name: String, reason: String },
    #[error("the value {value:?} is defined twice, by {first} and by {second}")]
    Duplicate {
        value: String,
        first: String,
        second: String,
    },
    #[error("{reader} reads the value {value:?}, which is not defined")]
    Undefined { value: String, reader: String },
    #[error("node {node:?} ({op}): {reason}")]
    Node { node: String, op: String, reason: String },
    #[error("the model's functions cannot be inlined: {reason}")]
    Functions { reason: String },
    #[error(transparent)]
    Cycle(#[from] CycleError),
}

impl ReadErrorKind {
    /// The same error with the file where it occurred.
    pub(super) fn at(self, path: &std::path::Path) -> ReadError {
        ReadError {
            path: path.to_path_buf(),
            kind: self,
        }
    }
}

impl Help for ReadError {
    fn help(&self) -> Option<String> {
        self.kind.help()
    }
}

impl Help for ReadErrorKind {
    fn help(&self) -> Option<String> {
        let help = match self {
            ReadErrorKind::Folder => "give the .onnx file in it",
            ReadErrorKind::LfsPointer => "fetch it with `git lfs pull`",
            ReadErrorKind::Truncated { .. } => "download or export it again",
            ReadErrorKind::Opset { .. } => "export it again with another opset, 18 for example",
            ReadErrorKind::Sparse => "export the model with dense weights",
            ReadErrorKind::Cycle(error) => return error.help(),
            ReadErrorKind::ExternalLocation { help, .. } => return help.map(str::to_string),
            ReadErrorKind::ExternalOpen { .. } => "keep it beside the model",
            _ => return None,
        };
        Some(help.to_string())
    }
}
