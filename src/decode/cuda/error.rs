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
    /// Whether this machine or package simply has no GPU to run on, which `--device auto` passes over.
    pub fn is_absence(&self) -> bool {
        matches!(
            self,
            OpenError::NoEngines { .. }
                | OpenError::Run(RunError::Driver(_) | RunError::Gpu { .. } | RunError::Library(_))
        )
    }
}
