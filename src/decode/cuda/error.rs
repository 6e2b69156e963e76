//! Why a package does not run on a GPU.

use std::path::PathBuf;

use crate::backend::tensorrt::FLAVOUR;
use crate::backend::tensorrt::run::{Objection, Port, RunError};
use crate::decode::DeviceError;
use crate::help::Help;
use crate::network::Profile;

/// An engine's input or output that is unknown to sessions.
pub(super) fn unknown(engine: &str, port: &Port) -> RunError {
    RunError::Mismatch {
        engine: engine.to_string(),
        reason: format!(
            "nothing is known of its {:?}, {} {:?}",
            port.name, port.dtype, port.shape
        ),
    }
}

/// A plan that TensorRT rejects, with the versions if they explain it.
pub(super) fn with_versions(error: RunError, built_by: &str, here: &str) -> RunError {
    match error {
        RunError::Plan { path, objection } if built_by != here => RunError::Plan {
            path,
            objection: Objection {
                reason: format!("{objection}; version {built_by} built it, this is {here}"),
                ..objection
            },
        },
        other => other,
    }
}

pub(super) fn device_error(gpu: &str, error: RunError) -> DeviceError {
    DeviceError {
        device: gpu.to_string(),
        help: error.help(),
        message: error.to_string(),
    }
}

/// Why a package cannot run on this GPU.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No engines for the TensorRT that this build is for.
    #[error("{} has no {} engines", package.display(), FLAVOUR.product)]
    NoEngines {
        /// Its folder.
        package: PathBuf,
    },
    /// TensorRT accepts other values without an error, although the plan was not optimized for them.
    #[error("{}: the engine {profile} was stripped for an identical refit, and the package has another weight set than it was \
             built with", package.display())]
    OtherWeights {
        /// Its folder.
        package: PathBuf,
        /// Profile of the engine.
        profile: Profile,
    },
    /// An error of the driver, the library or the GPU.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Engines cannot be made ready.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The canonical graph cannot be read.
    #[error(transparent)]
    Graph(#[from] crate::onnx::ReadError),
    /// The package cannot be read.
    #[error(transparent)]
    Package(#[from] crate::package::PackageError),
}

impl Help for OpenError {
    fn help(&self) -> Option<String> {
        match self {
            OpenError::NoEngines { .. } => Some(format!(
                "convert the model with --target {}, or run it with --device cpu",
                FLAVOUR.feature
            )),
            OpenError::OtherWeights { .. } => Some(
                "restore the package's weights with `lapidary refit`, or convert again with `--refit general`"
                    .to_string(),
            ),
            OpenError::Run(error) => error.help(),
            OpenError::Device(error) => error.help(),
            OpenError::Package(error) => error.help(),
            OpenError::Graph(error) => error.help(),
        }
    }
}

impl OpenError {
    /// Whether this machine has no GPU or library, or the package no engines, so that `--device auto` uses the CPU. A
    /// library that exists but cannot be used is an error, since it was requested explicitly.
    pub fn is_absence(&self) -> bool {
        use crate::backend::tensorrt::LibraryError::{NotCompiled, NotFound};
        matches!(
            self,
            OpenError::NoEngines { .. }
                | OpenError::Run(
                    RunError::Driver(_) | RunError::Gpu { .. } | RunError::Library(NotFound | NotCompiled)
                )
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::tensorrt::run::ObjectionKind;

    #[test]
    fn a_plan_of_another_version_names_both() {
        let plan = || RunError::Plan {
            path: PathBuf::from("p.plan"),
            objection: Objection {
                kind: ObjectionKind::Plan,
                reason: "TensorRT calls it invalid".into(),
            },
        };
        let error = device_error("L4", with_versions(plan(), "1.6.1", "1.7.0"));
        assert_eq!(
            error.message,
            "the engine p.plan cannot be loaded: TensorRT calls it invalid; version 1.6.1 built it, this is 1.7.0"
        );
        assert_eq!(error.help.as_deref(), Some("convert the model again with this version"));
        let same = device_error("L4", with_versions(plan(), "1.6.1", "1.6.1"));
        assert_eq!(
            same.message,
            "the engine p.plan cannot be loaded: TensorRT calls it invalid"
        );
    }
}
