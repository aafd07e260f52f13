//! The page's files, which are part of the program.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};

/// Name, kind and content of a file in `assets/`.
macro_rules! files {
    ($($name:literal: $kind:expr),* $(,)?) => {
        const FILES: &[(&str, &str, &[u8])] =
            &[$(($name, $kind, include_bytes!(concat!("assets/", $name)))),*];
    };
}

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

files! {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "vendor/uPlot.css": "text/css; charset=utf-8",
    "vendor/uPlot.js": JAVASCRIPT,
    "alarms.js": JAVASCRIPT,
    "api.js": JAVASCRIPT,
    "axes.js": JAVASCRIPT,
    "catalog.js": JAVASCRIPT,
    "chart.js": JAVASCRIPT,
    "config.js": JAVASCRIPT,
    "data.js": JAVASCRIPT,
    "dom.js": JAVASCRIPT,
    "events-worker.js": JAVASCRIPT,
    "format.js": JAVASCRIPT,
    "gestures.js": JAVASCRIPT,
    "heatmap.js": JAVASCRIPT,
    "keys.js": JAVASCRIPT,
    "main.js": JAVASCRIPT,
    "model.js": JAVASCRIPT,
    "position.js": JAVASCRIPT,
    "runs.js": JAVASCRIPT,
    "scalars.js": JAVASCRIPT,
    "smooth.js": JAVASCRIPT,
    "stack.js": JAVASCRIPT,
    "state.js": JAVASCRIPT,
    "text.js": JAVASCRIPT,
    "theme.js": JAVASCRIPT,
    "tiles.js": JAVASCRIPT,
    "visible.js": JAVASCRIPT,
}

/// The file of this name.
pub(super) fn answer(name: &str) -> Response {
    match FILES.iter().find(|it| it.0 == name) {
        Some((_, kind, content)) => ([(header::CONTENT_TYPE, *kind)], *content).into_response(),
        None => (StatusCode::NOT_FOUND, "there is no such file\n").into_response(),
    }
}
