//! Errors of reading and writing packages.

use std::io;
use std::path::{Path, PathBuf};

use super::manifest::FORMAT_VERSION;
use crate::help::Help;
use crate::{onnx, weights};

/// A package that cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// A folder without a manifest.
    #[error("{}: not a package: there is no manifest.json in it", path.display())]
    NotAPackage {
        /// Path of the folder.
        path: PathBuf,
    },
    /// Written by a later Lapidary, in an unsupported format.
    #[error("{}: the package has format version {found}, this Lapidary reads up to {FORMAT_VERSION}", path.display())]
    Newer {
        /// Path of the package.
        path: PathBuf,
        /// Its format version.
        found: u64,
    },
    /// A manifest, or a file that it names, is invalid.
    #[error("{}: not a valid manifest: {message}", path.display())]
    Manifest {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A file in the manifest is missing.
    #[error("{}: named in the manifest but missing from the package", path.display())]
    Missing {
        /// Path of the file.
        path: PathBuf,
    },
    /// A file's size differs from the manifest.
    #[error("{}: has {found} bytes, the manifest says {expected}", path.display())]
    Size {
        /// Path of the file.
        path: PathBuf,
        /// Bytes in the manifest.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// Contents that differ from those that were written.
    #[error("{}: the contents of {what} do not have the hash in the manifest", path.display())]
    Hash {
        /// Path of the file.
        path: PathBuf,
        /// The file, or a weight in it.
        what: String,
    },
    /// The target exists.
    #[error("{}: exists already", path.display())]
    Exists {
        /// Path of the target.
        path: PathBuf,
    },
    /// The target is not a package, so it is never replaced.
    #[error("{}: exists and is not a package, so it will not be replaced", path.display())]
    NotReplaced {
        /// Path of the target.
        path: PathBuf,
    },
    /// A path such as `.` or `..`: a package is written beside its name and then takes it.
    #[error("{}: has no name that a package could be put under", path.display())]
    NoName {
        /// Path of the target.
        path: PathBuf,
    },
    /// The system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Weights were needed.
    #[error("{}: a stripped package: its weights were left out", path.display())]
    Stripped {
        /// Path of the package.
        path: PathBuf,
    },
    /// The graph cannot be read.
    #[error(transparent)]
    Read(#[from] onnx::ReadError),
    /// The weights cannot be written.
    #[error(transparent)]
    Weights(weights::WriteError),
    /// The graph cannot be written.
    #[error("{}: {source}", path.display())]
    Graph {
        /// Path of the graph's file.
        path: PathBuf,
        /// Why.
        source: onnx::WriteError,
    },
    /// The tokenizer cannot be read.
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

    /// The system's error, if there is one.
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
            PackageError::NoName { .. } => "give the package's name, from the folder that it lies in".into(),
            PackageError::Read(error) => return error.help(),
            PackageError::Weights(error) => return error.help(),
            PackageError::Graph { source, .. } => return source.help(),
            PackageError::Tokenizer(error) => return error.help(),
            PackageError::Io { .. } => return None,
        })
    }
}
