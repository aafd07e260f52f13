//! The command `eval-tasks`.

use std::fmt::Write as _;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::eval::{CheckpointArgs, bar};
use super::{print, print_json};
use crate::error::Result;
use crate::eval::Lanes;
use crate::eval::tasks::{Share, Task, TaskScore, score_task};
use crate::new_file::NewFile;

/// What is computed at once. Texts of tasks are short: many beside each other.
pub(crate) const LANES: Lanes = Lanes {
    count: 16,
    positions: 16 * 1024,
};

/// Arguments of `eval-tasks`.
#[derive(Clone, Debug, Args)]
pub struct EvalTasksArgs {
    #[command(flatten)]
    model: CheckpointArgs,
    /// Files of JSON lines, one task each
    #[arg(long, value_name = "FILE.jsonl", num_args = 1.., required = true)]
    pub tasks: Vec<PathBuf>,
    /// Score so many items of each from the beginning; all if left out
    #[arg(long, value_name = "N", value_parser = super::positive)]
    pub limit: Option<usize>,
    /// Write the log-probability of every option of every item to this file, as JSON lines
    #[arg(long, value_name = "FILE.jsonl")]
    pub samples: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A line of `--samples`.
#[derive(Serialize)]
struct Sample<'a> {
    task: &'a str,
    item: usize,
    log_probs: &'a [f64],
}

/// Runs the command.
pub fn run(args: &EvalTasksArgs) -> Result<()> {
    let tasks = args.tasks.iter().map(|path| Task::read(path));
    let tasks: Vec<Task> = tasks.collect::<Result<_>>()?;
    let found = args.model.find()?;
    let file = args.samples.as_deref().map(NewFile::create).transpose()?;
    let (model, device, _) = found.load()?;
    let model = model.frozen();
    let progress = bar();
    let mut scores = Vec::with_capacity(tasks.len());
    for task in &tasks {
        let limit = args.limit;
        scores.push(score_task(
            &model,
            &device,
            LANES,
            task,
            limit,
            progress.as_ref(),
        )?);
    }
    if let Some(file) = file {
        file.put(samples(&scores)?.as_bytes())?;
    }
    match args.json {
        true => print_json(&scores),
        false => print(&table(&scores)),
    }
}

fn samples(scores: &[TaskScore]) -> Result<String> {
    let mut lines = String::new();
    for score in scores {
        for (item, log_probs) in score.log_probs.iter().enumerate() {
            let sample = Sample {
                task: &score.name,
                item,
                log_probs,
            };
            lines += &serde_json::to_string(&sample).map_err(anyhow::Error::from)?;
            lines.push('\n');
        }
    }
    Ok(lines)
}

fn table(scores: &[TaskScore]) -> String {
    let mut text = format!(
        "{:>26} {:>6}  {:>15}  {:>15}  {:>10}\n",
        "task", "items", "acc", "acc_norm", "perplexity"
    );
    let share = |it: Share| format!("{:.2} ± {:.2} %", 100.0 * it.value, 100.0 * it.stderr);
    for score in scores {
        let _ = writeln!(
            text,
            "{:>26} {:>6}  {:>15}  {:>15}  {:>10}",
            score.name,
            score.items,
            share(score.acc),
            score.acc_norm.map(share).unwrap_or_default(),
            score
                .perplexity
                .map(|it| format!("{it:.2}"))
                .unwrap_or_default(),
        );
    }
    text
}
