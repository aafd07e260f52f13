//! Errors in answers.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::worker::Failure;

/// An error as OpenAI's API tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    status: StatusCode,
    message: String,
}

impl ApiError {
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
        }
    }

    /// A request that cannot be met as it is.
    pub fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// The body of the answer.
    pub fn body(&self) -> Value {
        let kind = match self.status.is_client_error() {
            true => "invalid_request_error",
            false => "server_error",
        };
        json!({ "error": {
            "message": self.message, "type": kind, "param": null, "code": self.status.as_u16(),
        }})
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Busy => Self::new(
                StatusCode::TOO_MANY_REQUESTS,
                "as many requests as this server takes are waiting: try again later",
            ),
            Failure::Deadline => Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "the request's time ran out before its answer was complete",
            ),
            Failure::Unread => Self::new(
                StatusCode::REQUEST_TIMEOUT,
                "the client reads more slowly than is written: too much waits for it",
            ),
            Failure::Broken(why) => Self::new(StatusCode::INTERNAL_SERVER_ERROR, why),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}
