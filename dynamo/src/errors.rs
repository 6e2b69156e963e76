//! Dynamo's kinds of errors for ours: which are the client's, which another worker may do better.

use dynamo_backend_common::{BackendError, DynamoError, ErrorType};
use lapidary::help::{Fault, Help};
use lapidary::serve::{RequestError, SubmitError};

/// An error of this kind. The message goes to the client, too: it names what was asked, never what a text says.
pub fn error(kind: ErrorType, message: impl Into<String>) -> DynamoError {
    let message = message.into();
    DynamoError::builder()
        .error_type(kind)
        .message(message.clone())
        .public_message(message)
        .build()
}

/// The client asked for what cannot be done.
pub fn invalid(message: impl Into<String>) -> DynamoError {
    error(ErrorType::Backend(BackendError::InvalidArgument), message)
}

/// What is wrong, and what to do about it.
fn with_help(error: &dyn Help) -> String {
    match error.help() {
        Some(help) => format!("{error}; {help}"),
        None => error.to_string(),
    }
}

/// A package that cannot be served: the operator's fault or the machine's.
pub fn start(error_of_ours: &dyn Help) -> DynamoError {
    match error_of_ours.fault() {
        Fault::Input => invalid(with_help(error_of_ours)),
        _ => error(ErrorType::Backend(BackendError::Unknown), with_help(error_of_ours)),
    }
}

/// A request that is not taken. The frontend gives it to another worker where this one is full or stops.
pub fn refused(refusal: &SubmitError) -> DynamoError {
    match refusal {
        SubmitError::Full { .. } => error(ErrorType::WorkerOverloaded, refusal.to_string()),
        SubmitError::Stopping => error(ErrorType::Backend(BackendError::EngineShutdown), refusal.to_string()),
        _ => invalid(with_help(refusal)),
    }
}

/// A request that failed. The frontend goes on with it on another worker where this one stops.
pub fn failed(failure: &RequestError) -> DynamoError {
    match failure {
        RequestError::Stopping => error(ErrorType::Backend(BackendError::EngineShutdown), failure.to_string()),
        RequestError::Cancelled { .. } => error(ErrorType::Backend(BackendError::Cancelled), failure.to_string()),
        _ if failure.fault() == Fault::Input => invalid(with_help(failure)),
        _ => error(ErrorType::Backend(BackendError::Unknown), with_help(failure)),
    }
}

/// The device's thread is gone without a word.
pub fn gone() -> DynamoError {
    error(
        ErrorType::Backend(BackendError::EngineShutdown),
        "the device failed; see the worker's log",
    )
}
