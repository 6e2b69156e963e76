//! Why a package does not run on a GPU.

use std::path::PathBuf;

use crate::backend::tensorrt::FLAVOUR;
use crate::backend::tensorrt::run::{Engine, Port, RunError};
use crate::decode::DeviceError;

/// An engine's input or output that no session has anything for.
pub(super) fn unknown(engine: &Engine, port: &Port) -> RunError {
    RunError::Mismatch {
        engine: engine.name().to_string(),
        reason: format!(
            "nothing is known of its {:?}, {} {:?}",
            port.name, port.dtype, port.shape
        ),
    }
}

/// A plan that TensorRT does not take, with the versions if they tell why.
pub(super) fn with_versions(error: RunError, built_by: &str, here: &str) -> RunError {
    match error {
        RunError::Plan { path, reason } if built_by != here => RunError::Plan {
            path,
            reason: format!("{reason}; version {built_by} built it, this is {here}"),
        },
        other => other,
    }
}

/// The message's last clause says what to do.
pub(super) fn device_error(gpu: &str, error: RunError) -> DeviceError {
    let text = error.to_string();
    let (message, help) = match text.rsplit_once("; ") {
        Some((what, remedy)) => (what.to_string(), Some(remedy.to_string())),
        None => (text, None),
    };
    DeviceError {
        device: gpu.to_string(),
        message,
        help,
    }
}

/// Why a package cannot run on the GPU here.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "{} has no {} engines; convert the model with --target {}, or run it with --device cpu",
        package.display(),
        FLAVOUR.product,
        FLAVOUR.feature
    )]
    NoEngines { package: PathBuf },
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Graph(#[from] crate::onnx::ReadError),
    #[error(transparent)]
    Package(#[from] crate::package::PackageError),
}

impl OpenError {
    /// Whether this machine or package simply has no GPU or library to run on, which `--device auto` passes over. A library
    /// that is there and cannot be used is refused: whoever named it wants to know.
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

    #[test]
    fn a_plan_of_another_version_names_both() {
        let plan = || RunError::Plan {
            path: PathBuf::from("p.plan"),
            reason: "TensorRT calls it invalid".into(),
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
