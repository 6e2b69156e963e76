//! Refusals and failures in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`.

use axum::body::Body;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::decode::SessionError;
use crate::decode::batch::BatchError;
use crate::help::{Fault, Help};
use crate::sample::SettingsError;
use crate::serve::{RequestError, SubmitError};

/// The message of errors without details.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    /// A code for programs, more specific than the status.
    pub code: Option<&'static str>,
    /// The invalid field.
    pub param: Option<String>,
    pub message: String,
    /// Seconds until a retry is useful.
    pub retry_after: Option<u64>,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        ApiError {
            status,
            code: None,
            param: None,
            message: message.into(),
            retry_after: None,
        }
    }

    /// The request is wrong.
    pub fn bad(message: impl Into<String>) -> Self {
        ApiError::new(StatusCode::BAD_REQUEST, message)
    }

    /// This field of the request is wrong.
    pub fn field(name: &str, message: impl std::fmt::Display) -> Self {
        ApiError {
            param: Some(name.to_string()),
            ..ApiError::bad(format!("{name}: {message}"))
        }
    }

    pub fn code(self, code: &'static str) -> Self {
        ApiError {
            code: Some(code),
            ..self
        }
    }

    /// An error of the library on a client's input.
    pub fn of(error: &(impl Help + ?Sized)) -> Self {
        let status = match error.fault() {
            Fault::Input => StatusCode::BAD_REQUEST,
            Fault::Machine | Fault::Bug | Fault::Stopped => StatusCode::INTERNAL_SERVER_ERROR,
        };
        ApiError::new(status, error.to_string())
    }

    /// The response, also the last event of a stream.
    pub fn document(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = Response::builder()
            .status(self.status)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(seconds) = self.retry_after {
            response = response.header(header::RETRY_AFTER, seconds);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response = response.header(header::WWW_AUTHENTICATE, "Bearer");
        }
        let body = Body::from(self.document().to_string());
        response
            .body(body)
            .expect("names and values of headers are well formed")
    }
}

impl From<&SessionError> for ApiError {
    fn from(error: &SessionError) -> Self {
        let found = ApiError::of(error);
        match error {
            SessionError::Capacity { .. } => found.code("context_length_exceeded"),
            _ => found,
        }
    }
}

impl From<&SettingsError> for ApiError {
    fn from(error: &SettingsError) -> Self {
        ApiError::field(error.parameter, format!("{} is not {}", error.value, error.wanted))
    }
}

impl From<&RequestError> for ApiError {
    fn from(error: &RequestError) -> Self {
        match error {
            RequestError::Batch(BatchError::Session(error)) => error.into(),
            RequestError::Settings(error) => error.into(),
            // Nothing else runs that could end: waiting would not help.
            RequestError::Batch(BatchError::Memory { taken: 0, .. }) => {
                ApiError::bad(error.to_string()).code("context_length_exceeded")
            }
            RequestError::Batch(BatchError::Memory { .. } | BatchError::Full { .. }) => ApiError {
                retry_after: Some(1),
                ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, error.to_string()).code("out_of_memory")
            },
            RequestError::Generate(_) | RequestError::Constraint(_) => ApiError::of(error),
            RequestError::Deadline { .. } => {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, error.to_string()).code("timeout")
            }
            RequestError::Cancelled { .. } => ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
            RequestError::Stopping => stopping(),
        }
    }
}

impl From<&SubmitError> for ApiError {
    fn from(error: &SubmitError) -> Self {
        match error {
            SubmitError::Prompt(error) => error.into(),
            SubmitError::Request(error) => error.into(),
            SubmitError::NoTokenizer => ApiError::field("stop", error),
            SubmitError::Full { .. } => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, error.to_string()).code("queue_full")
            }
            SubmitError::Stopping => stopping(),
        }
    }
}

/// The server accepts no more requests.
pub fn stopping() -> ApiError {
    ApiError {
        retry_after: Some(5),
        ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping").code("stopping")
    }
}
