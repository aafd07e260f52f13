//! The command `estimate`: how much device memory training takes, before it is tried.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{positive, print, print_json};
use crate::config::{Config, Preset};
use crate::error::{Result, print_warning};
use crate::memory::{self, Estimate};

/// Arguments of `estimate`.
#[derive(Clone, Debug, Args)]
pub struct EstimateArgs {
    /// Config file (TOML), the name of one in `configs/`, or of a set of model sizes
    #[arg(long, value_name = "FILE|NAME")]
    pub config: PathBuf,
    /// Change one key of the config; may be given several times
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Sequences at once, in the place of `train.batch`; several make a table
    #[arg(long, value_name = "N", num_args = 1.., value_parser = positive)]
    pub batch: Vec<usize>,
    /// Print JSON, in bytes
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &EstimateArgs) -> Result<()> {
    let config = load(args)?;
    let summary = Summary::new(&config, &args.batch)?;
    if args.json {
        print_json(&summary)
    } else {
        print(&summary.table())
    }
}

/// The config: a file, else a name.
fn load(args: &EstimateArgs) -> Result<Config> {
    let (path, overrides) = (&args.config, &args.overrides);
    let named = Path::new("configs").join(path).with_extension("toml");
    let name = path.to_str().unwrap_or_default();
    let config = if path.is_file() {
        Config::load(path, overrides)?
    } else if named.is_file() {
        Config::load(&named, overrides)?
    } else if name.parse::<Preset>().is_ok() {
        let text = format!(
            "model.preset = \"{name}\"\ntrain.steps = 1\ntrain.validate_every = 0\n\
             train.sample_every = 0\noptimizer.warmup_steps = 0\ndata.path = \"-\"\n"
        );
        Config::parse(name, &text, overrides)?
    } else {
        // Its error says what is wrong with the path.
        Config::load(path, overrides)?
    };
    for warning in config.warnings() {
        print_warning(&warning);
    }
    Ok(config)
}

/// What `--json` prints; bytes where nothing else is said.
#[derive(Serialize)]
struct Summary {
    length: usize,
    accumulation: usize,
    precision: String,
    depth: usize,
    /// `train.recompute` as configured.
    recompute: String,
    /// `train.checkpoint_every` as configured.
    checkpoint_every: usize,
    memory_limit: Option<u64>,
    /// The largest `train.batch` within the limit.
    largest_batch: Option<usize>,
    estimates: Vec<Row>,
}

/// The estimate for one batch.
#[derive(Serialize)]
struct Row {
    batch: usize,
    /// First layers that are recomputed, `"auto"` resolved.
    recomputed_layers: usize,
    #[serde(flatten)]
    peak: Estimate,
    total: u64,
    /// Whether that is within the limit; none without one.
    fits: Option<bool>,
    /// What `train.recompute = "auto"` comes to; none without a limit, and where that is over it.
    automatic_recompute: Option<usize>,
}

impl Summary {
    /// The estimates for `batches`, or for the config's.
    fn new(config: &Config, batches: &[usize]) -> Result<Self> {
        let limit = config.train.memory_limit.bytes();
        let batches = match batches {
            [] => &[config.train.batch],
            batches => batches,
        };
        let row = |&batch: &usize| {
            let mut config = config.clone();
            config.train.batch = batch;
            config.validate()?;
            Ok(Row::new(config, limit))
        };
        Ok(Self {
            length: config.train.length,
            accumulation: config.train.accumulation,
            precision: config.train.precision.to_string(),
            depth: config.model.depth,
            recompute: config.train.recompute.to_string(),
            checkpoint_every: config.train.checkpoint_every,
            memory_limit: limit,
            largest_batch: limit.and_then(|limit| memory::largest_batch(config, limit)),
            estimates: batches.iter().map(row).collect::<Result<_>>()?,
        })
    }

    fn table(&self) -> String {
        let rows = self.rows();
        let columns = self.estimates.len();
        let widest = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..=columns).map(widest).collect();
        let mut text = format!(
            "peak of training, {} bytes a sequence, {}, of {} layers",
            self.length, self.precision, self.depth
        );
        if self.checkpoint_every > 0 {
            let _ = write!(text, " in groups of {}", self.checkpoint_every);
        }
        text.push_str("\n\n");
        for row in &rows {
            let mut line = format!("{:<1$}", row[0], widths[0]);
            for (cell, width) in row[1..].iter().zip(&widths[1..]) {
                let _ = write!(line, "  {cell:>width$}");
            }
            let _ = writeln!(text, "{}", line.trim_end());
        }
        text.push_str(&self.advice());
        text
    }

    /// The table's rows: a name, and a cell for each batch.
    fn rows(&self) -> Vec<Vec<String>> {
        let row = |name: &str, cell: &dyn Fn(&Row) -> String| {
            let cells = self.estimates.iter().map(cell);
            std::iter::once(name.to_owned()).chain(cells).collect()
        };
        let bytes = |name: &str, part: fn(&Row) -> u64| row(name, &|it| memory::size(part(it)));
        vec![
            row("batch", &|it| it.batch.to_string()),
            row("layers recomputed", &|it| it.recomputed_layers.to_string()),
            row("fullest at", &|it| it.peak.moment.to_string()),
            bytes("weights", |it| it.peak.weights),
            bytes("gradients", |it| it.peak.gradients),
            bytes("optimizer", |it| it.peak.optimizer),
            bytes("activations", |it| it.peak.activations),
            bytes("workspace", |it| it.peak.workspace),
            bytes("unused in pages", |it| it.peak.pages),
            bytes("driver's context", |it| it.peak.context),
            bytes("total", |it| it.total),
        ]
    }

    /// What fits the limit.
    fn advice(&self) -> String {
        let Some(limit) = self.memory_limit else {
            return "\n`train.memory_limit` is none: set it to see what fits\n".to_owned();
        };
        let mut text = format!("\nwithin {} (`train.memory_limit`):\n", memory::size(limit));
        for row in &self.estimates {
            let batch = row.batch;
            let _ = match (row.fits, row.automatic_recompute) {
                (Some(true), _) => writeln!(text, "batch {batch} fits"),
                (_, Some(layers)) => writeln!(
                    text,
                    "batch {batch} does not fit; it does with `train.recompute` = {layers}"
                ),
                _ => writeln!(
                    text,
                    "batch {batch} does not fit with any `train.recompute`"
                ),
            };
        }
        let _ = match self.largest_batch {
            Some(batch) => writeln!(
                text,
                "the largest batch with `train.recompute` = {} is {batch}",
                self.recompute
            ),
            None => writeln!(
                text,
                "no batch fits with `train.recompute` = {}",
                self.recompute
            ),
        };
        text
    }
}

impl Row {
    fn new(mut config: Config, limit: Option<u64>) -> Self {
        let automatic = limit.and_then(|limit| {
            let layers = memory::automatic(&config, limit);
            let fits = memory::estimate_with(&config, layers).total() <= limit;
            fits.then_some(layers)
        });
        memory::settle(&mut config, limit);
        let peak = memory::estimate(&config);
        let total = peak.total();
        Self {
            batch: config.train.batch,
            recomputed_layers: config.train.recompute.layers(config.model.depth),
            peak,
            total,
            fits: limit.map(|limit| total <= limit),
            automatic_recompute: automatic,
        }
    }
}
