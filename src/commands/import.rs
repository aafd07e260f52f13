//! The command `import`: a checkpoint of another program as one of ours.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use mambabyte_datasets::progress::Bar;

use super::{ImportArgs, grouped, scaled, warn_unless_bytes};
use crate::config::{Config, MambaConfig};
use crate::error::{Error, Result, print_warning};
use crate::hub::{Hub, Name};
use crate::interop::Import;
use crate::terminal::say;
use crate::train::Checkpoint;
use crate::train::checkpoint::MANIFEST;

/// Runs the command.
pub fn run(args: &ImportArgs) -> Result<()> {
    refuse_existing(&args.out)?;
    let given = args.config.as_deref();
    match Name::of(&args.from) {
        None => convert(&args.from, given, None, &args.out),
        Some(name) => {
            let found = Hub::from_env(args.offline)?.newest(&name?)?;
            convert(&found.folder, given, Some(&found.source), &args.out)
        }
    }
}

/// The checkpoint that a name on the hub stands for: fetched and converted the first time, then kept
/// beside the files that it was made of.
pub(super) fn of_hub(name: &Name) -> Result<PathBuf> {
    let hub = Hub::from_env(false)?;
    let complete = |folder: &Path| folder.join(MANIFEST).is_file();
    if let Some(known) = hub.converted(name).filter(|known| complete(known)) {
        return Ok(known);
    }
    let found = hub.present(name)?;
    let out = found.converted;
    let lock = out.with_extension("lock");
    let parent = out.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
    // Two programs may want the same checkpoint for the first time.
    let lock_file = File::create(&lock).map_err(Error::io("create", &lock))?;
    lock_file.lock().map_err(Error::io("lock", &lock))?;
    if !complete(&out) {
        convert(&found.folder, None, Some(&found.source), &out)?;
    }
    Ok(out)
}

/// Makes the checkpoint `out` of the one at `from`, which came from `source` if not from this disk.
fn convert(from: &Path, given: Option<&Path>, source: Option<&str>, out: &Path) -> Result<()> {
    let started = Instant::now();
    let import = Import::open(from, given)?;
    for warning in &import.warnings {
        print_warning(warning);
    }
    let config = settings(&import.config)?;
    Checkpoint::save_weights(out, &config, source, |file| import.write(file, &Bar::new()))?;
    let model = &import.config;
    say(&format!(
        "imported {} parameters ({} wide, {} layers, {} norm, {} head, {} tokens) from {} in {:.1} s",
        grouped(model.num_params()),
        model.dim,
        model.depth,
        model.norm,
        if model.tie_embeddings { "tied" } else { "own" },
        model.vocab_size,
        scaled(import.bytes() as f64, "B"),
        started.elapsed().as_secs_f64(),
    ));
    if let Some(source) = source {
        say(&format!("from {source}"));
    }
    warn_unless_bytes(model);
    Ok(())
}

/// Nothing that is there is replaced.
pub(super) fn refuse_existing(out: &Path) -> Result<()> {
    match out.exists() {
        true => Err(Error::Usage {
            message: format!("`{}` exists already", out.display()),
            hint: "name a folder that does not exist, or remove this one".to_owned(),
        }),
        false => Ok(()),
    }
}

/// A config of this model. What training needs besides has no meaning before there is a run.
fn settings(model: &MambaConfig) -> Result<Config> {
    let text = "model.preset = \"tiny\"\ntrain.steps = 1\ndata.path = \"data\"\n";
    let mut config: Config = text.parse()?;
    config.model = model.clone();
    config.validate()?;
    Ok(config)
}
