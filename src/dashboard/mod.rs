//! The dashboard: a page in the browser that shows runs while they train.
//!
//! A process of its own reads every run's `metrics.jsonl` as it grows, so that a fault in it cannot
//! hurt training. Nothing is written, nothing is fetched from elsewhere: the page is in the program.
//!
//! ```text
//! metrics.jsonl ─► tail ─► record ─► run (tables, alarms, samples) ─► hub ─► api ─► page
//! ```
//!
//! | file | owns |
//! | --- | --- |
//! | `scan` | which runs there are, their configs and evaluations, who holds their locks |
//! | `tail` | a growing file as lines, in bounded memory |
//! | `record` | the numbers of a line |
//! | `column`, `table` | rows in memory, with summaries; a screen's worth of any stretch |
//! | `alarms` | what a person should not miss |
//! | `run` | what a run's lines add up to; steps that are run again count once |
//! | `hub` | all runs, the thread that follows them, messages to pages |
//! | `guard`, `api`, `export`, `assets` | HTTP |
//! | `assets/` | the page: HTML, CSS and JavaScript modules as they are, no build step |

mod alarms;
mod api;
mod assets;
mod column;
mod export;
mod guard;
mod hub;
mod record;
mod run;
mod scan;
mod table;
mod tail;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::connections::{self, Patience};
use crate::error::{Error, Result};
use crate::train::run_dir::no_run;

/// Serves the runs at and below `paths` on `port` of loopback until the process is told to end. Port
/// 0 is one that is free. `ready` is told the address.
///
/// # Errors
///
/// Where the port is taken, or a path does not exist.
pub fn serve(paths: &[PathBuf], port: u16, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    for path in paths {
        if !path.exists() {
            return Err(no_run(path));
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)?;
    runtime.block_on(async {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|error| Error::Usage {
                message: format!("cannot listen on port {port}: {error}"),
                hint: "choose another with `--port`, or 0 for any that is free".to_owned(),
            })?;
        let hub = hub::Hub::start(paths.to_vec()).map_err(anyhow::Error::from)?;
        ready(listener.local_addr().map_err(anyhow::Error::from)?);
        // Pages stay connected for ever, so there is nothing to wait for at the end.
        let (router, grace) = (api::router(hub), Duration::ZERO);
        let end = tokio::signal::ctrl_c();
        let end = connections::serve(listener, router, Patience::default(), grace, end).await;
        Ok(end.map_err(anyhow::Error::from)?)
    })
}

/// The runs at and below `paths` in short, newest first: the list that pages get.
pub fn summaries(paths: &[PathBuf]) -> Vec<Value> {
    hub::read_all(paths)
}
