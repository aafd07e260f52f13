//! What a page can ask for. All of it comes from memory: names in requests are looked up among the
//! runs found, and never become paths.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router, middleware};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio_stream::wrappers::BroadcastStream;
use tokio_stream::wrappers::errors::BroadcastStreamRecvError;
use tokio_stream::{Stream, StreamExt as _};

use super::assets;
use super::export::{Format, Pieces};
use super::guard::guard;
use super::hub::{Hub, Shown, now, read};
use super::table::{AxisKind, Table, View};

/// Pages connected at a time.
const MOST_PAGES: usize = 256;

/// Points of a line at most.
const MOST_POINTS: usize = 4000;

/// Between two signs of life on a quiet connection.
const ALIVE: Duration = Duration::from_secs(15);

/// What handlers share.
#[derive(Clone)]
struct App {
    hub: Arc<Hub>,
    pages: Arc<AtomicUsize>,
}

/// All addresses.
pub(super) fn router(hub: Arc<Hub>) -> Router {
    let app = App {
        hub,
        pages: Arc::default(),
    };
    Router::new()
        .route("/", get(|| async { assets::answer("index.html") }))
        .route("/assets/{*name}", get(asset))
        .route("/api/runs", get(runs))
        .route("/api/run", get(run))
        .route("/api/series", get(series))
        .route("/api/samples", get(samples))
        .route("/api/inspections", get(inspections))
        .route("/api/evaluations", get(evaluations))
        .route("/api/download", get(download))
        .route("/api/events", get(events))
        .fallback(|| async { (StatusCode::NOT_FOUND, "there is no such page\n") })
        .layer(middleware::from_fn(guard))
        .with_state(app)
}

/// A run that is not there, or not any more.
fn unknown_run() -> Response {
    let body = json!({ "error": "there is no such run" });
    (StatusCode::NOT_FOUND, Json(body)).into_response()
}

/// Text that is JSON already.
fn json_text(text: String) -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

async fn asset(Path(name): Path<String>) -> Response {
    assets::answer(&name)
}

async fn runs(State(app): State<App>) -> Json<Value> {
    Json(app.hub.list())
}

/// Which run.
#[derive(Deserialize)]
struct Which {
    run: String,
}

impl App {
    /// The answer of `f` about the run that a request names.
    fn about(&self, id: &str, f: impl FnOnce(&Shown) -> Response) -> Response {
        match self.hub.get(id) {
            Some(shared) => f(&read(&shared)),
            None => unknown_run(),
        }
    }
}

async fn run(State(app): State<App>, Query(which): Query<Which>) -> Response {
    app.about(&which.run, |shown| {
        let now = now();
        let table = |table: &Table| {
            json!({
                "rows": table.rows(),
                "stride": table.stride(),
                "columns": table.names(),
                "first": table.first().map(|it| [it.step, it.bytes, it.time]),
                "last": table.last().map(|it| [it.step, it.bytes, it.time]),
            })
        };
        Json(json!({
            "summary": shown.summary(now),
            "config": shown.config,
            "train": table(&shown.run.train),
            "valid": table(&shown.run.valid),
            "save": table(&shown.run.save),
            "marks": shown.run.marks,
            "alarms": shown.alarms(now),
            "bad_lines": shown.run.bad_lines,
            "complete": shown.complete,
        }))
        .into_response()
    })
}

/// Which part of a run's metrics, and how finely.
#[derive(Deserialize)]
struct Part {
    run: String,
    /// `step`, `bytes` or `time`.
    x: Option<String>,
    from: Option<f64>,
    to: Option<f64>,
    points: Option<usize>,
    /// Zero of a logarithmic axis; without one the axis is linear.
    log_from: Option<f64>,
    /// Columns, separated by commas; all without.
    columns: Option<String>,
}

async fn series(State(app): State<App>, Query(part): Query<Part>) -> Response {
    let axis = match part.x.as_deref() {
        None | Some("step") => AxisKind::Step,
        Some("bytes") => AxisKind::Bytes,
        Some("time") => AxisKind::Time,
        Some(_) => {
            let body = json!({ "error": "x is step, bytes or time" });
            return (StatusCode::BAD_REQUEST, Json(body)).into_response();
        }
    };
    let bound = |value: Option<f64>, default: f64| match value {
        Some(value) if value.is_finite() => value,
        _ => default,
    };
    let wanted: Option<Vec<&str>> = part.columns.as_deref().map(|it| it.split(',').collect());
    app.about(&part.run, |shown| {
        let draw = |table: &Table| {
            let (first, last) = match (table.first(), table.last()) {
                (Some(first), Some(last)) => (first, last),
                _ => return json!({ "step": [], "bytes": [], "time": [], "records": [], "columns": {} }),
            };
            let (low, high) = match axis {
                AxisKind::Step => (first.step, last.step),
                AxisKind::Bytes => (first.bytes, last.bytes),
                AxisKind::Time => (first.time, last.time),
            };
            // Within what there is, so that points are not spent on emptiness.
            let from = bound(part.from, low).max(low);
            let view = View {
                axis,
                from,
                to: bound(part.to, high).min(high).max(from),
                points: part.points.unwrap_or(800).clamp(1, MOST_POINTS),
                log_from: part.log_from.filter(|it| it.is_finite()),
            };
            let names: Vec<&String> = table
                .names()
                .iter()
                .filter(|name| wanted.as_ref().is_none_or(|it| it.contains(&name.as_str())))
                .collect();
            let columns: Vec<_> = names.iter().filter_map(|it| table.column(it)).collect();
            let (places, drawn) = table.draw(&view, &columns);
            let columns: Map<String, Value> = names
                .into_iter()
                .cloned()
                .zip(drawn.iter().map(|it| json!(it)))
                .collect();
            json!({
                "step": places.iter().map(|it| it.0.step).collect::<Vec<_>>(),
                "bytes": places.iter().map(|it| it.0.bytes).collect::<Vec<_>>(),
                "time": places.iter().map(|it| it.0.time).collect::<Vec<_>>(),
                "records": places.iter().map(|it| it.1).collect::<Vec<_>>(),
                "columns": columns,
            })
        };
        let run = &shown.run;
        Json(json!({
            "id": shown.id,
            "generation": run.generation,
            "train": draw(&run.train),
            "valid": draw(&run.valid),
            "save": draw(&run.save),
        }))
        .into_response()
    })
}

async fn samples(State(app): State<App>, Query(which): Query<Which>) -> Response {
    app.about(&which.run, |shown| Json(&shown.run.samples).into_response())
}

async fn inspections(State(app): State<App>, Query(which): Query<Which>) -> Response {
    app.about(&which.run, |shown| {
        let records: Vec<&str> = shown
            .run
            .inspections
            .iter()
            .map(|it| it.json.as_str())
            .collect();
        json_text(format!("[{}]", records.join(",")))
    })
}

async fn evaluations(State(app): State<App>, Query(which): Query<Which>) -> Response {
    app.about(&which.run, |shown| {
        let list: Vec<Value> = shown
            .evaluations
            .iter()
            .map(|(name, report)| json!({ "name": name, "report": report }))
            .collect();
        Json(list).into_response()
    })
}

/// What to download.
#[derive(Deserialize)]
struct Wanted {
    run: String,
    format: Format,
    columns: Option<String>,
}

async fn download(State(app): State<App>, Query(wanted): Query<Wanted>) -> Response {
    let Some(shared) = app.hub.get(&wanted.run) else {
        return unknown_run();
    };
    let name = file_name(&wanted.run);
    let pieces = Pieces::new(shared, wanted.format, wanted.columns.as_deref());
    let stream = tokio_stream::iter(pieces).map(|it| Ok::<_, Infallible>(Bytes::from(it)));
    let (kind, ending) = match wanted.format {
        Format::Csv => ("text/csv; charset=utf-8", "csv"),
        Format::Json => ("application/json", "json"),
    };
    let attachment = format!("attachment; filename=\"{name}.{ending}\"");
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, attachment),
    ];
    (headers, Body::from_stream(stream)).into_response()
}

/// A run's name as that of a file.
fn file_name(id: &str) -> String {
    id.chars()
        .map(|c| match c.is_ascii_alphanumeric() || "-_.".contains(c) {
            true => c,
            false => '_',
        })
        .collect()
}

/// Counts a page for as long as it is connected.
struct Page(Arc<AtomicUsize>);

impl Page {
    fn enter(pages: &Arc<AtomicUsize>) -> Option<Self> {
        let page = Self(Arc::clone(pages));
        (pages.fetch_add(1, Ordering::Relaxed) < MOST_PAGES).then_some(page)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn events(State(app): State<App>) -> Response {
    let Some(page) = Page::enter(&app.pages) else {
        let busy = "too many pages are open\n";
        return (StatusCode::SERVICE_UNAVAILABLE, busy).into_response();
    };
    let keep_alive = KeepAlive::new().interval(ALIVE);
    Sse::new(messages(app.hub, page))
        .keep_alive(keep_alive)
        .into_response()
}

/// First the list of runs, then what happens.
fn messages(hub: Arc<Hub>, page: Page) -> impl Stream<Item = Result<Event, Infallible>> {
    // Subscribed before the list is made: nothing falls between the two.
    let events = BroadcastStream::new(hub.subscribe());
    let first = Event::default().event("runs").data(hub.list().to_string());
    drop(hub);
    let rest = events.map(move |message| {
        let _connected = &page;
        match message {
            Ok(message) => {
                let (event, data) = message.split_once('\n').unwrap_or(("note", &message));
                Event::default().event(event).data(data)
            }
            // A page that was too slow: it has to fetch everything again.
            Err(BroadcastStreamRecvError::Lagged(_)) => Event::default().event("lagged").data(""),
        }
    });
    tokio_stream::once(first).chain(rest).map(Ok)
}
