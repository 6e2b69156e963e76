//! Maps Lapidary's errors to Dynamo's kinds: client errors, and those that another worker may avoid.

use dynamo_backend_common::{BackendError, DynamoError, ErrorType};
use lapidary::help::{Fault, Help};
use lapidary::serve::{RequestError, SubmitError};

/// An error of this kind. The client sees the message too: it names request fields, never the content of a text.
pub fn error(kind: ErrorType, message: impl Into<String>) -> DynamoError {
    let message = message.into();
    DynamoError::builder()
        .error_type(kind)
        .message(message.clone())
        .public_message(message)
        .build()
}

/// The client's request is invalid or unsupported.
pub fn invalid(message: impl Into<String>) -> DynamoError {
    error(ErrorType::Backend(BackendError::InvalidArgument), message)
}

/// The problem, and a remedy.
fn with_help(error: &dyn Help) -> String {
    match error.help() {
        Some(help) => format!("{error}; {help}"),
        None => error.to_string(),
    }
}

/// A package that cannot be served, because of its configuration or the machine.
pub fn start(error_of_ours: &dyn Help) -> DynamoError {
    match error_of_ours.fault() {
        Fault::Input => invalid(with_help(error_of_ours)),
        _ => error(ErrorType::Backend(BackendError::Unknown), with_help(error_of_ours)),
    }
}

/// A request that is not accepted. The frontend sends it to another worker if this one is full or stopping.
pub fn refused(refusal: &SubmitError) -> DynamoError {
    match refusal {
        SubmitError::Full { .. } => error(ErrorType::WorkerOverloaded, refusal.to_string()),
        SubmitError::Stopping => error(ErrorType::Backend(BackendError::EngineShutdown), refusal.to_string()),
        _ => invalid(with_help(refusal)),
    }
}

/// A request that failed. The frontend continues it on another worker if this one is stopping.
pub fn failed(failure: &RequestError) -> DynamoError {
    match failure {
        RequestError::Stopping => error(ErrorType::Backend(BackendError::EngineShutdown), failure.to_string()),
        RequestError::Cancelled { .. } => error(ErrorType::Backend(BackendError::Cancelled), failure.to_string()),
        _ if failure.fault() == Fault::Input => invalid(with_help(failure)),
        _ => error(ErrorType::Backend(BackendError::Unknown), with_help(failure)),
    }
}

/// The device's thread ended without an error.
pub fn gone() -> DynamoError {
    error(
        ErrorType::Backend(BackendError::EngineShutdown),
        "the device failed; see the worker's log",
    )
}
