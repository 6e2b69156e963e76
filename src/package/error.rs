//! What can be wrong with a package, or with writing one.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::FORMAT_VERSION;
use crate::help::Help;
use crate::{onnx, weights};

#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    #[error("{}: not a package: there is no manifest.json in it", path.display())]
    NotAPackage { path: PathBuf },
    #[error("{}: the package has format version {found}, this Lapidary reads up to {FORMAT_VERSION}", path.display())]
    Newer { path: PathBuf, found: u64 },
    #[error("{}: not a valid manifest: {message}", path.display())]
    Manifest { path: PathBuf, message: String },
    #[error("{}: named in the manifest but missing from the package", path.display())]
    Missing { path: PathBuf },
    #[error("{}: has {found} bytes, the manifest says {expected}", path.display())]
    Size { path: PathBuf, expected: u64, found: u64 },
    #[error("{}: the contents of {what} do not have the hash in the manifest", path.display())]
    Hash { path: PathBuf, what: String },
    #[error("{}: exists already", path.display())]
    Exists { path: PathBuf },
    #[error("{}: exists and is not a package, so it will not be replaced", path.display())]
    NotReplaced { path: PathBuf },
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{}: a stripped package: its weights were left out", path.display())]
    Stripped { path: PathBuf },
    #[error(transparent)]
    Read(#[from] onnx::ReadError),
    #[error(transparent)]
    Weights(weights::WriteError),
    #[error("{}: {source}", path.display())]
    Graph { path: PathBuf, source: onnx::WriteError },
    #[error(transparent)]
    Tokenizer(#[from] crate::text::TokenizerError),
}

impl PackageError {
    pub(super) fn io(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> PackageError {
        move |source| PackageError::Io {
            path: path.as_ref().to_path_buf(),
            source,
        }
    }

    /// What the system said, if it was the system.
    fn kind(&self) -> Option<io::ErrorKind> {
        match self {
            PackageError::Io { source, .. }
            | PackageError::Weights(weights::WriteError::Io { source, .. })
            | PackageError::Graph {
                source: onnx::WriteError::Io { source, .. },
                ..
            } => Some(source.kind()),
            _ => None,
        }
    }

    /// The disk was full (or a quota or limit reached).
    pub fn is_full(&self) -> bool {
        matches!(
            self.kind(),
            Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
        )
    }
}

impl From<weights::WriteError> for PackageError {
    fn from(error: weights::WriteError) -> Self {
        PackageError::Weights(error)
    }
}

impl Help for PackageError {
    fn help(&self) -> Option<String> {
        if self.is_full() {
            return Some("free some space, or write the package to another disk; nothing was left behind".into());
        }
        if self.kind() == Some(io::ErrorKind::ReadOnlyFilesystem) {
            return Some(
                "nothing was changed; write to another place, for instance a copy that `lapidary strip PKG -o COPY` makes \
                 for a refit"
                    .into(),
            );
        }
        Some(match self {
            PackageError::NotAPackage { .. } => "make one with `lapidary convert MODEL.onnx -o PKG`".into(),
            PackageError::Newer { .. } => {
                "use the Lapidary that wrote it or a newer one, or convert the model again".into()
            }
            PackageError::Manifest { .. } => {
                "the package is of another version, damaged or changed by hand; convert the model again".into()
            }
            PackageError::Missing { .. } | PackageError::Size { .. } | PackageError::Hash { .. } => {
                "the package is damaged or was changed by hand; convert the model again".into()
            }
            PackageError::Stripped { path } => {
                format!(
                    "bring them back with `lapidary refit {} --from FILE_OR_DIR`",
                    path.display()
                )
            }
            PackageError::Exists { .. } => "choose another name, or replace it with --force".into(),
            PackageError::NotReplaced { .. } => "choose another name, or remove it yourself".into(),
            PackageError::Read(error) => return error.help(),
            PackageError::Weights(error) => return error.help(),
            PackageError::Graph { source, .. } => return source.help(),
            PackageError::Tokenizer(error) => return error.help(),
            PackageError::Io { .. } => return None,
        })
    }
}
