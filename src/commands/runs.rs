//! The command `runs`: a table of runs.

use std::path::PathBuf;

use clap::Args;
use serde_json::Value;

use super::{grouped, print, print_json, scaled};
use crate::dashboard;
use crate::error::Result;
use crate::terminal::say;
use crate::train::run_dir::{no_run, run_path};

/// Arguments of `runs`.
#[derive(Clone, Debug, Args)]
pub struct RunsArgs {
    /// Runs, or folders that hold runs
    #[arg(value_name = "RUN", default_value = "checkpoints")]
    pub runs: Vec<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &RunsArgs) -> Result<()> {
    let paths: Vec<PathBuf> = args.runs.iter().map(|it| run_path(it)).collect();
    if let Some(missing) = paths.iter().find(|it| !it.exists()) {
        return Err(no_run(missing));
    }
    let runs = dashboard::summaries(&paths);
    if args.json {
        return print_json(&runs);
    }
    if runs.is_empty() {
        say("no runs; `make train` starts one");
        return Ok(());
    }
    print(&table(&runs))
}

/// Columns as wide as they have to be; names to the left, numbers to the right.
fn table(runs: &[Value]) -> String {
    let head = [
        "run",
        "state",
        "step",
        "of",
        "bpb",
        "valid bpb",
        "speed",
        "left",
        "alarms",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(runs.iter().map(row));
    let widths: Vec<usize> = (0..head.len())
        .map(|i| {
            rows.iter()
                .map(|it| it[i].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate();
        let cells: Vec<String> = cells
            .map(|(i, (cell, width))| match i {
                0 | 1 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            })
            .collect();
        text += cells.join("  ").trim_end();
        text.push('\n');
    }
    text
}

fn row(run: &Value) -> [String; 9] {
    let number = |key: &str| run[key].as_f64();
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let bits = |key: &str| or_dash(number(key).map(|it| format!("{it:.4}")));
    let count = |key: &str| or_dash(number(key).map(|it| grouped(it as u64)));
    let state = run["state"].as_str().unwrap_or_default();
    let left = number("seconds_left").filter(|_| state == "running");
    let alarms = run["alarms"].as_array().map_or(0, Vec::len);
    [
        run["id"].as_str().unwrap_or_default().to_owned(),
        state.to_owned(),
        count("step"),
        count("total"),
        bits("bpb"),
        bits("valid_bpb"),
        or_dash(number("bytes_per_second").map(|it| scaled(it, "B/s"))),
        or_dash(left.map(duration)),
        match alarms {
            0 => "-".to_owned(),
            some => some.to_string(),
        },
    ]
}

/// `3d 4h`, `5m 3s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds as u64;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86_400 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_table_is_aligned_and_knows_nothing_it_was_not_told() {
        let runs = [
            json!({ "id": "first", "state": "running", "step": 1200.0, "total": 80_000.0,
                    "bpb": 1.23456, "bytes_per_second": 100_400.0, "seconds_left": 93_784.0,
                    "alarms": [{}, {}] }),
            json!({ "id": "a-longer-name", "state": "stopped", "step": 0.0, "alarms": [] }),
        ];
        let text = table(&runs);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        for word in ["1,200", "80,000", "1.2346", "100.40 kB/s", "1d 2h", "2"] {
            assert!(lines[1].contains(word), "{text}");
        }
        let end = |line: &str, word: &str| line.find(word).map(|at| at + word.len());
        assert_eq!(end(lines[0], " step"), end(lines[1], "1,200"), "{text}");
        assert!(
            lines[2].ends_with('-') && !lines[2].contains("NaN"),
            "{text}"
        );
    }

    #[test]
    fn durations_have_two_units() {
        assert_eq!(duration(59.9), "59s");
        assert_eq!(duration(61.0), "1m 1s");
        assert_eq!(duration(7_260.0), "2h 1m");
    }
}
