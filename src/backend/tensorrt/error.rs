//! Errors between a [`Network`](crate::network::Network) and a plan, and their remedies.

use std::path::PathBuf;

use super::flavour::{FLAVOUR, Flavour};
use crate::graph::ConstantError;
use crate::help::{Fault, Help, REPORT_BUG};

/// Errors of the TensorRT back end. [`Help`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum EngineBuildError {
    /// The machine's set-up: no library, or none that fits.
    #[error(transparent)]
    Library(#[from] LibraryError),

    /// Refittable and stripped engines need a CUDA driver at build time, and all those of full TensorRT.
    #[error("{what} needs a CUDA driver and GPU at build time, and {reason}")]
    NeedsGpu {
        /// The kind of engine.
        what: &'static str,
        /// Why there is none.
        reason: String,
    },

    /// A weight that must lie in the plan has no bytes.
    #[error("the plan of {network:?} embeds the weight {weight:?}, which this stripped package does not contain")]
    Weight {
        /// The network's name.
        network: String,
        /// The weight's name.
        weight: String,
        /// Why.
        source: ConstantError,
    },

    /// The layer list breaks its own rule or names a type that TensorRT does not have. A bug of the lowering.
    #[error("the network {network:?} is not well formed at layer {layer:?}: {reason}")]
    Malformed {
        /// The network's name.
        network: String,
        /// The layer.
        layer: String,
        /// What is wrong, in words.
        reason: String,
    },

    /// TensorRT did not take a layer.
    #[error("TensorRT {version} refuses layer {layer}: {message}")]
    Layer {
        /// The library's version.
        version: super::Version,
        /// The layer.
        layer: Box<LayerContext>,
        /// The words of the library, one line an error.
        message: String,
    },

    /// TensorRT took the layer but gives its output another type or shape than the network says. A bug of the lowering.
    #[error("layer {layer}, tensor {tensor:?}: declared {declared}, TensorRT infers {inferred}")]
    Inference {
        /// The layer.
        layer: Box<LayerContext>,
        /// The tensor's name.
        tensor: String,
        /// What TensorRT says.
        inferred: String,
        /// What the network says.
        declared: String,
    },

    /// TensorRT failed while it optimized the whole network.
    #[error("TensorRT {version} cannot build the network {network:?}: {message}{hint}")]
    Build {
        /// The library's version.
        version: super::Version,
        /// The network's name.
        network: String,
        /// TensorRT's own words, one line an error.
        message: String,
        /// The layer that the message names, if it names one; starts with a separator, or is empty.
        hint: String,
    },

    /// The token counts do not make an optimization profile.
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

    /// TensorRT's C++ objects could not be made at all.
    #[error("TensorRT could not be started: {message}")]
    Start {
        /// The words of the library, one line an error.
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

/// Which library, and why it cannot be used. [`Help`] says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LibraryError {
    /// The feature is off.
    #[error("this lapidary was compiled without TensorRT")]
    NotCompiled,

    /// Engines of the other TensorRT were asked for.
    #[error("this lapidary was compiled for {}, not for {}", FLAVOUR.product, asked.product)]
    OtherFlavour {
        /// The TensorRT asked for.
        asked: &'static Flavour,
    },

    /// Nowhere it was looked for.
    #[error(
        "no {} library found (looked for the Python package {} and for {} on the loader's path)",
        FLAVOUR.product,
        FLAVOUR.python_package,
        FLAVOUR.libraries.join(", ")
    )]
    NotFound,

    /// Nothing is at the path given.
    #[error("the TensorRT library {path:?} given by {by} does not exist")]
    Missing {
        /// The file or folder.
        path: PathBuf,
        /// Who gave it.
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
        /// Who gave it.
        by: super::LibrarySource,
    },

    /// Not a library for this machine.
    #[error("{path:?} cannot be loaded as a library: {reason}")]
    NotALibrary {
        /// The file or folder.
        path: PathBuf,
        /// The loader's own words.
        reason: String,
    },

    /// Another library.
    #[error("{path:?} is a library, but not {}: it does not export {symbol}", FLAVOUR.product)]
    NotTensorRt {
        /// The file or folder.
        path: PathBuf,
        /// The function that it lacks.
        symbol: &'static str,
    },

    /// A version that this was not compiled for.
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
    #[error("a process can use one TensorRT library: {loaded:?} is loaded, {asked:?} was asked for")]
    AnotherLoaded {
        /// The library in use.
        loaded: PathBuf,
        /// The library asked for.
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
            LibraryError::AnotherLoaded { .. } => "use the other in a process of its own".to_string(),
        })
    }
}

/// A layer as error messages show it.
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
