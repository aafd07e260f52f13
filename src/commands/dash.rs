//! The command `dash`: the dashboard.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::dashboard;
use crate::error::Result;
use crate::train::run_dir::{RUNS, run_path};

/// Arguments of `dash`.
#[derive(Clone, Debug, Args)]
pub struct DashArgs {
    /// Runs, or folders that hold runs
    #[arg(value_name = "RUN", default_value = RUNS)]
    pub runs: Vec<PathBuf>,
    /// Port on this machine's loopback; 0 is any that is free
    #[arg(long, value_name = "PORT", default_value_t = 6006)]
    pub port: u16,
}

/// Runs the command.
pub fn run(args: &DashArgs) -> Result<()> {
    let paths: Vec<PathBuf> = args.runs.iter().map(|it| run_path(it)).collect();
    if args.runs == [PathBuf::from(RUNS)] && !Path::new(RUNS).exists() {
        // Started before the first run, which may come any moment.
        std::fs::create_dir_all(RUNS).map_err(crate::error::Error::io("create", RUNS))?;
    }
    dashboard::serve(&paths, args.port, |address| {
        let port = address.port();
        // Whoever started it may have closed standard error: no reason to end.
        let _ = write!(
            std::io::stderr(),
            "dashboard: http://localhost:{port}/  (Ctrl-C ends it)\n\
             from another machine: ssh -L {port}:localhost:{port} THIS_MACHINE\n"
        );
    })
}
