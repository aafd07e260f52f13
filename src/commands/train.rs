//! The command `train`.

use std::path::PathBuf;

use super::{TrainArgs, checkpoint_folder};
use crate::clock::since_1970;
use crate::config::Config;
use crate::device;
use crate::error::Result;
use crate::terminal::say;
use crate::train;

/// Runs the command.
pub fn run(args: &TrainArgs) -> Result<()> {
    let config = args.config.load()?;
    device::set_threads(config.train.threads);
    let path = run_path(&config, args);
    say(&format!("run: {}", path.display()));
    let init = args.init.as_deref().map(checkpoint_folder).transpose()?;
    train::start(&config, &path, init.as_deref(), args.stop_after)
}

/// The run's folder: the given name, or the config's with the time.
fn run_path(config: &Config, args: &TrainArgs) -> PathBuf {
    let name = args.run.clone().unwrap_or_else(|| {
        let config = args.config.config.file_stem().unwrap_or_default();
        let seconds = since_1970().as_secs();
        format!("{}-{seconds}", config.to_string_lossy())
    });
    config.checkpoint.dir.join(name)
}
