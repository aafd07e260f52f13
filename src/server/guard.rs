//! Who may ask, and how: checked before anything else of a request is looked at.
//!
//! A server on the own machine is within reach of every web page that its user opens: a page may
//! send requests to 127.0.0.1, and with a name that it makes resolve to 127.0.0.1 (DNS rebinding) it
//! may read the answers as well. So `Host` has to be a name of this machine itself, and an `Origin`
//! from elsewhere is refused.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::App;
use super::error::ApiError;
use super::worker::Ticket;
use crate::loopback::{is_own, only_host, origin_host};

/// Checks a request, gives it its place, bounds its time, and marks its answer.
pub(super) async fn guard(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let checked = check(&app, request.method(), request.headers());
    let mut response = match checked.and_then(|()| admit(&app, &mut request)) {
        Err(error) => error.into_response(),
        Ok(_ticket) => {
            let deadline = app.options.limits.deadline;
            match tokio::time::timeout(deadline, next.run(request)).await {
                Ok(response) => response,
                // The request's future is gone, and with it what it waited for.
                Err(_) => ApiError::new(
                    StatusCode::GATEWAY_TIMEOUT,
                    format!("no answer within {} s", deadline.as_secs_f64()),
                )
                .into_response(),
            }
        }
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Gives a request that brings a body its place: bodies on their way are as many as the queue is long.
fn admit(app: &App, request: &mut Request) -> Result<Option<Ticket>, ApiError> {
    if request.method() != Method::POST {
        return Ok(None);
    }
    let ticket = app.worker.enter()?;
    request.extensions_mut().insert(ticket.clone());
    Ok(Some(ticket))
}

fn check(app: &App, method: &Method, headers: &HeaderMap) -> Result<(), ApiError> {
    let options = &app.options;
    let text = |name| {
        headers
            .get(name)
            .and_then(|value: &HeaderValue| value.to_str().ok())
            .unwrap_or_default()
    };
    // Where others are meant to ask, the machine has names we do not know; there the key protects.
    if options.host.is_loopback() && !only_host(headers).is_some_and(is_own) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "the header `Host` names another machine: use localhost, 127.0.0.1 or [::1]",
        ));
    }
    let mut origins = headers.get_all(header::ORIGIN).iter();
    if origins.any(|origin| !origin.to_str().is_ok_and(is_local_origin)) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "requests of web pages from elsewhere are not served",
        ));
    }
    if let Some(key) = &options.key {
        let given = text(header::AUTHORIZATION).split_once(' ');
        let fits = |(scheme, given): (&str, &str)| {
            scheme.eq_ignore_ascii_case("Bearer") && same(given.as_bytes(), key.as_bytes())
        };
        if !given.is_some_and(fits) {
            return Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "the header `Authorization: Bearer` with the server's key is needed",
            ));
        }
    }
    let content = text(header::CONTENT_TYPE)
        .split(';')
        .next()
        .unwrap_or_default();
    if method == Method::POST && !content.trim().eq_ignore_ascii_case("application/json") {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "the body has to be JSON, and the header `Content-Type` to say so: application/json",
        ));
    }
    Ok(())
}

fn is_local_origin(origin: &str) -> bool {
    origin_host(origin).is_some_and(is_own)
}

/// Equality in a time that does not tell where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |sum, (a, b)| sum | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_this_machine() {
        for origin in [
            "http://localhost",
            "https://localhost:3000",
            "http://127.0.0.2:80",
            "http://[::1]:80",
        ] {
            assert!(is_local_origin(origin), "{origin}");
        }
        for origin in [
            "null",
            "",
            "localhost",
            "file://localhost",
            "http://evil.example",
        ] {
            assert!(!is_local_origin(origin), "{origin}");
        }
    }

    #[test]
    fn keys_are_compared_whole() {
        assert!(same(b"key", b"key"));
        assert!(!same(b"key", b"kez") && !same(b"key", b"ke") && !same(b"", b"k"));
    }
}
