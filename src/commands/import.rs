//! The command `import`: a checkpoint of another program as one of ours.

use std::path::Path;
use std::time::Instant;

use mambabyte_datasets::progress::Bar;

use super::{ImportArgs, grouped, scaled};
use crate::config::{Config, MambaConfig};
use crate::error::{Error, Result, print_warning};
use crate::interop::Import;
use crate::train::Checkpoint;

/// Runs the command.
pub fn run(args: &ImportArgs) -> Result<()> {
    if let Some(name) = args.from.to_str().and_then(|it| it.strip_prefix("hf:")) {
        return Err(Error::Usage {
            message: format!(
                "`hf:{name}` is a name on Hugging Face, and nothing is downloaded here"
            ),
            hint: format!(
                "fetch it, for instance with `hf download {name} --local-dir {folder}`, and \
                 give `--from {folder}`",
                folder = name.rsplit('/').next().unwrap_or(name)
            ),
        });
    }
    refuse_existing(&args.out)?;
    let started = Instant::now();
    let import = Import::open(&args.from, args.config.as_deref())?;
    for warning in &import.warnings {
        print_warning(warning);
    }
    let config = settings(&import.config)?;
    Checkpoint::save_weights(&args.out, &config, |file| import.write(file, &Bar::new()))?;
    let model = &import.config;
    eprintln!(
        "imported {} parameters ({} wide, {} layers, {} norm, {} head, {} tokens) from {} in {:.1} s",
        grouped(model.num_params()),
        model.dim,
        model.depth,
        model.norm,
        if model.tie_embeddings { "tied" } else { "own" },
        model.vocab_size,
        scaled(import.bytes() as f64, "B"),
        started.elapsed().as_secs_f64(),
    );
    if model.vocab_size != 256 {
        print_warning(&format!(
            "the model has {} tokens of a tokenizer that is not here: its logits can be had for \
             token numbers below 256 only, and it cannot write text",
            model.vocab_size
        ));
    }
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
