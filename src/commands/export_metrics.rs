//! The command `export-metrics`: a run's metrics in the form of other programs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde_json::{Map, Value};

use super::import::refuse_existing;
use crate::error::{Error, Result};
use crate::train::run_dir::{no_run, run_path};
use crate::train::tensorboard::EventWriter;

/// Form to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MetricsFormat {
    /// One table: a row for each step, a column for each number
    Csv,
    /// A folder with an event file for TensorBoard
    Tensorboard,
}

/// Arguments of `export-metrics`.
#[derive(Clone, Debug, Args)]
pub struct ExportMetricsArgs {
    /// The run's folder, or its name in `checkpoints/`
    #[arg(value_name = "RUN")]
    pub run: PathBuf,
    /// What to write
    #[arg(long, value_enum)]
    pub format: MetricsFormat,
    /// File (csv; standard output if left out) or folder (tensorboard) to make
    #[arg(long, value_name = "PATH", required_if_eq("format", "tensorboard"))]
    pub out: Option<PathBuf>,
}

/// A record with its step.
type Record = (u64, Map<String, Value>);

/// Runs the command.
pub fn run(args: &ExportMetricsArgs) -> Result<()> {
    let run = run_path(&args.run);
    if !run.exists() {
        return Err(no_run(&run));
    }
    let path = run.join("metrics.jsonl");
    if let Some(out) = &args.out {
        refuse_existing(out)?;
    }
    let records = in_effect(&path)?;
    match (args.format, &args.out) {
        (MetricsFormat::Csv, None) => {
            let mut text = Vec::new();
            write_csv(&records, &mut text).map_err(Error::Stdout)?;
            let mut out = std::io::stdout().lock();
            out.write_all(&text).map_err(Error::Stdout)
        }
        (MetricsFormat::Csv, Some(out)) => {
            let file = File::create_new(out).map_err(Error::io("create", out))?;
            let mut file = BufWriter::new(file);
            write_csv(&records, &mut file)
                .and_then(|()| file.flush())
                .map_err(Error::io("write", out))
        }
        (MetricsFormat::Tensorboard, out) => {
            let out = out.as_deref().unwrap_or(Path::new("."));
            fs::create_dir_all(out).map_err(Error::io("create", out))?;
            write_events(&records, out)
        }
    }
}

/// The records of a run without those that a later resume or rollback supersedes, by step.
fn in_effect(path: &Path) -> Result<Vec<Record>> {
    let file = File::open(path).map_err(Error::io("read", path))?;
    let mut records: Vec<Record> = Vec::new();
    for line in BufReader::new(file).split(b'\n') {
        let line = line.map_err(Error::io("read", path))?;
        // What a crash cut short is no record.
        let Ok(Value::Object(fields)) = serde_json::from_slice(&line) else {
            continue;
        };
        let Some(step) = fields.get("step").and_then(Value::as_u64) else {
            continue;
        };
        match fields.get("kind").and_then(Value::as_str) {
            Some("resume" | "rollback") => records.retain(|it| it.0 <= step),
            _ => records.push((step, fields)),
        }
    }
    records.sort_by_key(|it| it.0);
    Ok(records)
}

/// A row for each step with the numbers of all its records; columns are `kind.key`.
fn write_csv(records: &[Record], out: &mut dyn Write) -> std::io::Result<()> {
    let named = |fields: &Map<String, Value>| -> Vec<(String, String)> {
        let kind = fields.get("kind").and_then(Value::as_str).unwrap_or("");
        let numbers = fields
            .iter()
            .filter(|(key, value)| value.is_number() && *key != "step");
        numbers
            .map(|(key, value)| (format!("{kind}.{key}"), value.to_string()))
            .collect()
    };
    let names: BTreeSet<String> = records
        .iter()
        .flat_map(|it| named(&it.1))
        .map(|it| it.0)
        .collect();
    let names: Vec<String> = names.into_iter().collect();
    let head: Vec<&str> = ["step"]
        .into_iter()
        .chain(names.iter().map(String::as_str))
        .collect();
    writeln!(out, "{}", head.join(","))?;
    for of_step in records.chunk_by(|a, b| a.0 == b.0) {
        let mut cells = vec![String::new(); names.len()];
        for (name, value) in of_step.iter().flat_map(|it| named(&it.1)) {
            if let Ok(column) = names.binary_search(&name) {
                cells[column] = value;
            }
        }
        writeln!(out, "{},{}", of_step[0].0, cells.join(","))?;
    }
    Ok(())
}

fn write_events(records: &[Record], out: &Path) -> Result<()> {
    let time = |fields: &Map<String, Value>| fields.get("time").and_then(Value::as_f64);
    let first = records.first().and_then(|it| time(&it.1)).unwrap_or(0.0);
    let mut writer = EventWriter::create(out, 0, first)?;
    let mut now = first;
    for (step, fields) in records {
        // Runs of old have no times: what TensorBoard shows then is steps.
        now = time(fields).unwrap_or(now);
        writer.write_fields(fields, *step, now)?;
    }
    writer.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_resume_supersedes_is_not_exported() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("metrics.jsonl");
        let text = "{\"kind\":\"train\",\"step\":1,\"bpb\":3.5}\n\
                    {\"kind\":\"train\",\"step\":2,\"bpb\":9}\n\
                    {\"kind\":\"resume\",\"step\":1}\n\
                    {\"kind\":\"train\",\"step\":2,\"bpb\":2.25,\"lr\":1e-3}\n\
                    {\"kind\":\"valid\",\"step\":2,\"bpb\":2.5}\n{\"kind\":\"tr";
        fs::write(&path, text).expect("written");
        let records = in_effect(&path).expect("readable");
        let mut out = Vec::new();
        write_csv(&records, &mut out).expect("written");
        let lines: Vec<String> = String::from_utf8(out)
            .expect("text")
            .lines()
            .map(str::to_owned)
            .collect();
        assert_eq!(
            lines,
            [
                "step,train.bpb,train.lr,valid.bpb",
                "1,3.5,,",
                "2,2.25,0.001,2.5"
            ]
        );
    }
}
