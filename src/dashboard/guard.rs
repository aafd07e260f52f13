//! What every request and answer passes: only this machine's own pages are served.
//!
//! A page of another site cannot reach a server on loopback unless its name is made to point there
//! (DNS rebinding); its requests then carry that name as `Host`. So requests are answered only for
//! names of this machine, which also holds through an SSH tunnel, and nothing but GET and HEAD.

use axum::extract::Request;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use crate::loopback::{is_own, only_host, origin_host};

/// Nothing from elsewhere, no scripts or styles in the page itself, no frames around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' data: blob:; connect-src 'self'; worker-src 'self'; \
                      manifest-src 'self'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// Headers of every answer.
const HEADERS: [(header::HeaderName, &str); 5] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
];

/// Lets a request through, or says why not.
pub(super) async fn guard(request: Request, next: Next) -> Response {
    let mut response = match refusal(request.method(), request.uri().host(), request.headers()) {
        Some((status, reason)) => (status, reason).into_response(),
        None => next.run(request).await,
    };
    for (name, value) in HEADERS {
        response
            .headers_mut()
            .entry(name)
            .or_insert(HeaderValue::from_static(value));
    }
    let own = HeaderValue::from_static("same-origin");
    let headers = response.headers_mut();
    headers.insert("cross-origin-resource-policy", own);
    response
}

fn refusal(
    method: &Method,
    uri_host: Option<&str>,
    headers: &HeaderMap,
) -> Option<(StatusCode, &'static str)> {
    if method != Method::GET && method != Method::HEAD {
        return Some((
            StatusCode::METHOD_NOT_ALLOWED,
            "the dashboard changes nothing: GET only\n",
        ));
    }
    let host = only_host(headers);
    if !host.is_some_and(is_own) || !uri_host.is_none_or(is_own) {
        return Some((
            StatusCode::FORBIDDEN,
            "refused: open the dashboard as http://localhost:PORT or http://127.0.0.1:PORT, \
             through an SSH tunnel as well\n",
        ));
    }
    let from_elsewhere = headers.get_all(header::ORIGIN).iter().any(|origin| {
        let own = origin.to_str().ok().and_then(origin_host);
        // The same name and port as the page's.
        own != host
    });
    if from_elsewhere {
        return Some((
            StatusCode::FORBIDDEN,
            "refused: the request comes from a page of another site\n",
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_hosts_origins_and_methods_are_refused() {
        let status = |method: Method, host: &str, origin: Option<&str>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, host.parse().expect("a header"));
            if let Some(origin) = origin {
                headers.insert(header::ORIGIN, origin.parse().expect("a header"));
            }
            refusal(&method, None, &headers).map(|it| it.0.as_u16())
        };
        let own = "localhost:6006";
        assert_eq!(status(Method::GET, own, None), None);
        assert_eq!(
            status(Method::HEAD, own, Some("http://localhost:6006")),
            None
        );
        assert_eq!(status(Method::POST, own, None), Some(405));
        assert_eq!(status(Method::GET, "evil.example:6006", None), Some(403));
        for origin in [
            "http://evil.example",
            "null",
            "http://localhost:80",
            "file://",
        ] {
            assert_eq!(
                status(Method::GET, own, Some(origin)),
                Some(403),
                "{origin}"
            );
        }
        assert_eq!(
            refusal(&Method::GET, None, &HeaderMap::new()).map(|it| it.0.as_u16()),
            Some(403)
        );
    }
}
