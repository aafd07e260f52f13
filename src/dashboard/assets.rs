//! The page's files, which are part of the program.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};

/// Name, kind and content of a file in `assets/`.
macro_rules! files {
    ($($name:literal: $kind:literal),* $(,)?) => {
        const FILES: &[(&str, &str, &[u8])] =
            &[$(($name, $kind, include_bytes!(concat!("assets/", $name)))),*];
    };
}

files! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "vendor/uPlot.css": "text/css; charset=utf-8",
    "vendor/uPlot.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

/// The file of this name.
pub(super) fn answer(name: &str) -> Response {
    match FILES.iter().find(|it| it.0 == name) {
        Some((_, kind, content)) => ([(header::CONTENT_TYPE, *kind)], *content).into_response(),
        None => (StatusCode::NOT_FOUND, "there is no such file\n").into_response(),
    }
}
