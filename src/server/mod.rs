//! A model behind HTTP: the completions of OpenAI's API, byte by byte.
//!
//! | file | owns |
//! | --- | --- |
//! | `api` | requests and answers as JSON, and which requests are refused |
//! | `error` | why a request was not met |
//! | `prompt` | the four forms of a prompt |
//! | `completions` | from a request to its answer |
//! | `stream` | the answer in pieces, as server-sent events |
//! | `answer` | its form |
//! | `guard` | who may ask: host, origin, key, form of the body, time |
//! | `worker` | the way to the thread that has the model |
//! | `desk` | what that thread does; requests to score are computed together |
//! | `tokens` | bytes as tokens in JSON, with places and log-probabilities |
//!
//! Tokens are bytes: the id of a token is its value. The form is the one that
//! lm-evaluation-harness's `local-completions` and OpenAI's client libraries speak.

mod answer;
mod api;
mod completions;
mod desk;
mod error;
mod guard;
mod prompt;
mod stream;
#[cfg(test)]
mod tests;
mod tokens;
mod worker;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware;
use axum::routing::{get, post};
use burn::tensor::Device;
use tokio::net::TcpListener;
use tokio::sync::watch::{self, Receiver};

use crate::clock::since_1970;
use crate::config::Precision;
use crate::connections::{self, Patience};
use crate::error::{Error, Result};
use crate::model::MambaLm;
use worker::Worker;

/// How long a server that was asked to end waits for its answers.
const GRACE: Duration = Duration::from_secs(5);

/// What a server offers, and to whom.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Where to listen.
    pub host: IpAddr,
    /// The port; 0 takes a free one.
    pub port: u16,
    /// Name of the model in requests and answers.
    pub name: String,
    /// What requests have to give as `Authorization: Bearer`; without one all are served.
    pub key: Option<String>,
    /// Bounds of what is asked.
    pub limits: Limits,
}

/// A model that is ready to be served.
#[derive(Debug)]
pub struct Loaded {
    /// Without gradients, on `device`.
    pub model: MambaLm,
    /// Where it computes.
    pub device: Device,
    /// The number format of its products.
    pub precision: Precision,
}

/// Bounds of requests.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of all prompts of a request, times `n`; bytes with log-probabilities that are written.
    pub prompt_bytes: usize,
    /// Bytes that may be generated for one prompt.
    pub new_bytes: usize,
    /// Requests on their way, waiting or at work; more are refused with 429.
    pub queue: usize,
    /// Time from a request's arrival to the end of its answer.
    pub deadline: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            prompt_bytes: 1 << 20,
            new_bytes: 65_536,
            queue: 64,
            deadline: Duration::from_secs(300),
        }
    }
}

impl Limits {
    /// Bytes of a request: a prompt's bytes take up to 6 each in JSON, as `\u0000` or as `255, `.
    fn body_bytes(&self) -> usize {
        self.prompt_bytes.saturating_mul(6).saturating_add(1 << 16)
    }
}

/// Texts of one request at most: prompts times `n`.
pub(crate) const TEXTS: usize = 256;

/// What all requests share.
struct Shared {
    options: ServerOptions,
    worker: Worker,
    /// Number of the next answer.
    next: AtomicU64,
    started: u64,
}

type App = Arc<Shared>;

/// Serves a model until the process is told to end (SIGINT, SIGTERM).
///
/// `load` makes the model; it runs on the thread that then computes. `ready` is told
/// the address.
///
/// # Errors
///
/// What `load` says; [`Error::Usage`] for an address that cannot be taken, or one that others can
/// reach without a key; what ended the model's thread, if it cannot go on.
pub fn serve(
    options: ServerOptions,
    load: impl FnOnce() -> Result<Loaded> + Send + 'static,
    ready: impl FnOnce(SocketAddr) -> Result<()>,
) -> Result<()> {
    check(&options)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| anyhow::anyhow!("could not start the server's threads: {error}"))?;
    runtime.block_on(async {
        let signals = catch_signals()?;
        // The port first: it is taken in no time, and a model may load for minutes.
        let address = SocketAddr::new(options.host, options.port);
        let listener = TcpListener::bind(address)
            .await
            .map_err(|error| Error::Usage {
                message: format!("cannot listen on {address}: {error}"),
                hint: "choose another --port, or end what uses this one".to_owned(),
            })?;
        let (worker, ended) = tokio::select! {
            worker = Worker::spawn(load, options.limits.queue) => worker?,
            () = told_to_end(signals.clone()) => return Ok(()),
        };
        let address = listener.local_addr().map_err(anyhow::Error::from)?;
        ready(address)?;
        let end = async {
            tokio::select! {
                () = told_to_end(signals) => Ok(()),
                error = ended.reason() => Err(error),
            }
        };
        let router = router(options, worker);
        connections::serve(listener, router, Patience::default(), GRACE, end).await
    })
}

/// An address that others can reach needs a key.
fn check(options: &ServerOptions) -> Result<()> {
    if options.host.is_loopback() || options.key.is_some() {
        return Ok(());
    }
    Err(Error::Usage {
        message: format!(
            "--host {} can be reached from other machines, and there is no key",
            options.host
        ),
        hint: "put a secret into a file and give --key-file, or listen on 127.0.0.1".to_owned(),
    })
}

/// Catches SIGINT and SIGTERM from now on: true once one of them has come.
fn catch_signals() -> Result<Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    #[cfg(unix)]
    let came = {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt()).map_err(anyhow::Error::from)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(anyhow::Error::from)?;
        async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        }
    };
    #[cfg(not(unix))]
    let came = async {
        let _ = tokio::signal::ctrl_c().await;
    };
    tokio::spawn(async move {
        came.await;
        let _ = sender.send(true);
    });
    Ok(receiver)
}

/// Waits for the signal.
async fn told_to_end(mut signals: Receiver<bool>) {
    let _ = signals.wait_for(|came| *came).await;
}

/// All routes, behind all guards.
fn router(options: ServerOptions, worker: Worker) -> Router {
    let limit = DefaultBodyLimit::max(options.limits.body_bytes());
    let app = Arc::new(Shared {
        options,
        worker,
        next: AtomicU64::new(0),
        started: since_1970().as_secs(),
    });
    Router::new()
        .route("/health", get(api::health))
        .route("/v1/models", get(api::models))
        .route("/v1/models/{name}", get(api::model))
        .route("/v1/completions", post(completions::completions))
        .route("/tokenizer_info", get(api::tokenizer_info))
        .route("/tokenize", post(api::tokenize))
        .route("/detokenize", post(api::detokenize))
        .fallback(api::no_such_route)
        .method_not_allowed_fallback(api::no_such_method)
        .layer(limit)
        .layer(middleware::from_fn_with_state(app.clone(), guard::guard))
        .with_state(app)
}
