//! Errors between a [`Network`](crate::network::Network) and a plan, with help.

use std::path::PathBuf;

use super::flavour::{FLAVOUR, Flavour};
use crate::graph::ConstantError;
use crate::help::{Fault, Help, REPORT_BUG};

/// Errors of the TensorRT back end. [`Help`] has the advice.
#[derive(Debug, thiserror::Error)]
pub enum EngineBuildError {
    /// The machine's setup: no library, or no suitable one.
    #[error(transparent)]
    Library(#[from] LibraryError),

    /// Refittable and stripped engines, and all engines of full TensorRT, need a CUDA driver at build time.
    #[error("{what} needs a CUDA driver and GPU at build time, and {reason}")]
    NeedsGpu {
        /// The kind of engine.
        what: &'static str,
        /// Why there is none.
        reason: String,
    },

    /// A weight that must be embedded in the plan has no bytes.
    #[error("the plan of {network:?} embeds the weight {weight:?}, which this stripped package does not contain")]
    Weight {
        /// The network's name.
        network: String,
        /// The weight's name.
        weight: String,
        /// Why.
        source: ConstantError,
    },

    /// The layer list violates its own rules or names a type that TensorRT does not have. A bug in the lowering.
    #[error("the network {network:?} is not well formed at layer {layer:?}: {reason}")]
    Malformed {
        /// The network's name.
        network: String,
        /// The layer.
        layer: String,
        /// What is wrong, in words.
        reason: String,
    },

    /// TensorRT refused a layer.
    #[error("TensorRT {version} refuses layer {layer}: {message}")]
    Layer {
        /// The library's version.
        version: super::Version,
        /// The layer.
        layer: Box<LayerContext>,
        /// The library's messages, one error per line.
        message: String,
    },

    /// TensorRT accepted the layer, but infers another type or shape for its output than the network. A bug in the
    /// lowering.
    #[error("layer {layer}, tensor {tensor:?}: declared {declared}, TensorRT infers {inferred}")]
    Inference {
        /// The layer.
        layer: Box<LayerContext>,
        /// The tensor's name.
        tensor: String,
        /// TensorRT's type and shape.
        inferred: String,
        /// The network's type and shape.
        declared: String,
    },

    /// TensorRT failed while it optimized the whole network.
    #[error("TensorRT {version} cannot build the network {network:?}: {message}{hint}")]
    Build {
        /// The library's version.
        version: super::Version,
        /// The network's name.
        network: String,
        /// TensorRT's messages, one error per line.
        message: String,
        /// The layer that the message names, if it names one; starts with a separator, or is empty.
        hint: String,
    },

    /// The token counts do not form an optimization profile.
    #[error("token counts {min}:{opt}:{max} do not make an optimization profile for {network:?}")]
    Profile {
        /// The network's name.
        network: String,
        /// The fewest tokens.
        min: usize,
        /// The tokens that it is optimized for.
        opt: usize,
        /// The most tokens.
        max: usize,
    },

    /// The observer asked to stop.
    #[error("the build of {network:?} was cancelled")]
    Cancelled {
        /// The network's name.
        network: String,
    },

    /// TensorRT's C++ objects could not be created.
    #[error("TensorRT could not be started: {message}")]
    Start {
        /// The library's messages, one error per line.
        message: String,
    },
}

impl Help for EngineBuildError {
    fn fault(&self) -> Fault {
        match self {
            EngineBuildError::Library(_)
            | EngineBuildError::NeedsGpu { .. }
            | EngineBuildError::Weight { .. }
            | EngineBuildError::Profile { .. } => Fault::Input,
            EngineBuildError::Malformed { .. } | EngineBuildError::Inference { .. } => Fault::Bug,
            EngineBuildError::Layer { .. }
            | EngineBuildError::Build { .. }
            | EngineBuildError::Cancelled { .. }
            | EngineBuildError::Start { .. } => Fault::Machine,
        }
    }

    fn help(&self) -> Option<String> {
        Some(match self {
            EngineBuildError::Library(error) => return error.help(),
            EngineBuildError::NeedsGpu { .. } => {
                format!("build on a machine with an NVIDIA GPU, or {}", FLAVOUR.without_gpu)
            }
            EngineBuildError::Weight { .. } => "bring the weights back with `lapidary refit`".to_string(),
            EngineBuildError::Malformed { .. } | EngineBuildError::Inference { .. } => REPORT_BUG.to_string(),
            EngineBuildError::Profile { .. } => "give 1 <= min <= opt <= max".to_string(),
            EngineBuildError::Layer { .. }
            | EngineBuildError::Build { .. }
            | EngineBuildError::Cancelled { .. }
            | EngineBuildError::Start { .. } => return None,
        })
    }
}

/// Which library, and why it cannot be used. [`Help`] has the advice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// The feature is off.
    #[error("this lapidary was compiled without TensorRT")]
    NotCompiled,

    /// Engines of the other TensorRT were requested.
    #[error("this lapidary was compiled for {}, not for {}", FLAVOUR.product, asked.product)]
    OtherFlavour {
        /// The requested TensorRT.
        asked: &'static Flavour,
    },

    /// Not found in any searched location.
    #[error(
        "no {} library found (looked for the Python package {} and for {} on the loader's path)",
        FLAVOUR.product,
        FLAVOUR.python_package,
        FLAVOUR.libraries.join(", ")
    )]
    NotFound,

    /// The given path does not exist.
    #[error("the TensorRT library {path:?} given by {by} does not exist")]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// The flag or variable that gave it.
        by: super::LibrarySource,
    },

    /// A folder without the library.
    #[error(
        "the folder {path:?} given by {by} holds no {}, and neither does a folder lib in it",
        FLAVOUR.libraries.join(" or ")
    )]
    NotInFolder {
        /// The file or folder.
        path: PathBuf,
        /// The flag or variable that gave it.
        by: super::LibrarySource,
    },

    /// Not a library for this machine.
    #[error("{path:?} cannot be loaded as a library: {reason}")]
    NotALibrary {
        /// The file or folder.
        path: PathBuf,
        /// The loader's message.
        reason: String,
    },

    /// Another library.
    #[error("{path:?} is a library, but not {}: it does not export {symbol}", FLAVOUR.product)]
    NotTensorRt {
        /// The file or folder.
        path: PathBuf,
        /// The missing function.
        symbol: &'static str,
    },

    /// A version for which this binary was not compiled.
    #[error(
        "{path:?} is TensorRT {version}, and this lapidary needs {} {}.x from {} on",
        FLAVOUR.product,
        FLAVOUR.headers.major,
        FLAVOUR.headers
    )]
    Version {
        /// The file or folder.
        path: PathBuf,
        /// The library's version.
        version: super::Version,
    },

    /// A second library in one process.
    #[error("a process can use one TensorRT library: {loaded:?} is loaded, {asked:?} was requested")]
    AnotherLoaded {
        /// The library in use.
        loaded: PathBuf,
        /// The requested library.
        asked: PathBuf,
    },
}

impl Help for LibraryError {
    fn help(&self) -> Option<String> {
        let install = || format!("install {}", FLAVOUR.install);
        let by_path = || format!("with --tensorrt-lib or {}", FLAVOUR.variable);
        let library = FLAVOUR.libraries[0];
        Some(match self {
            LibraryError::NotCompiled => "build it with `cargo build --features tensorrt-rtx`".to_string(),
            LibraryError::OtherFlavour { asked } => format!(
                "take `--target {}`, or build another with `cargo build --no-default-features --features cli,{}`",
                FLAVOUR.feature, asked.feature
            ),
            LibraryError::NotFound => format!("{}, or give its path {}", install(), by_path()),
            LibraryError::Missing { .. } => {
                format!(
                    "give the path of {library} {}, or nothing to have it looked for",
                    by_path()
                )
            }
            LibraryError::NotInFolder { .. } => "give the library itself".to_string(),
            LibraryError::NotALibrary { .. } | LibraryError::NotTensorRt { .. } => {
                format!("give the path of {library} {}, or {}", by_path(), install())
            }
            LibraryError::Version { .. } => install(),
            LibraryError::AnotherLoaded { .. } => "use the other in a separate process".to_string(),
        })
    }
}

/// A layer, as shown in error messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerContext {
    /// As in the network.
    pub name: String,
    /// `MatrixMultiply`, `Slice` …
    pub kind: String,
    /// `name: dtype[shape]` of every input.
    pub inputs: Vec<String>,
    /// The same of its outputs.
    pub outputs: Vec<String>,
}

impl std::fmt::Display for LayerContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} ({}: {} -> {})",
            self.name,
            self.kind,
            self.inputs.join(", "),
            self.outputs.join(", ")
        )
    }
}
