//! What a run records: one JSON object a line in `metrics.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// One line of `metrics.jsonl`; the key `kind` names the variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum MetricRecord {
    /// One optimizer step.
    Train {
        /// Steps done, from 1.
        step: u64,
        /// Mean loss of the step's bytes, in nats a byte.
        loss_nats: f32,
        /// The same in bits a byte.
        bpb: f32,
        /// Learning rate of the update.
        lr: f64,
        /// Norm of all gradients together, before clipping.
        grad_norm: f32,
        /// Bytes learnt from in a second, over the step.
        bytes_per_second: f64,
        /// Bytes learnt from since the run began.
        bytes_seen: u64,
        /// Time of the step.
        seconds: f64,
        /// Device memory that the run holds, in GiB: about the peak so far. On CUDA with the
        /// driver's context and libraries. Absent on the CPU.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory_gib: Option<f64>,
        /// Of that, in tensors between this step and the next, in GiB.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        memory_in_use_gib: Option<f64>,
    },
    /// A measurement on held-out bytes.
    Valid {
        /// Steps done.
        step: u64,
        /// Bits a byte.
        bpb: f64,
        /// Bytes measured.
        bytes: u64,
        /// Time it took.
        seconds: f64,
    },
    /// Bytes that the model wrote.
    Sample {
        /// Steps done.
        step: u64,
        /// What it went on from.
        prompt: String,
        /// What it wrote; invalid UTF-8 shows as U+FFFD.
        text: String,
    },
    /// The run goes on from a checkpoint: records of later steps before this line are superseded.
    Resume {
        /// Step of the checkpoint.
        step: u64,
    },
}

/// Bits for nats.
pub fn bits(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

/// Appends records to a run's `metrics.jsonl`.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
}

impl MetricsWriter {
    /// Opens the file to append to it; a line that a crash cut short is ended first.
    pub fn append(path: &Path) -> Result<Self> {
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .append(true)
            .open(path)
            .map_err(Error::io("open", path))?;
        if !ends_with_newline(&mut file).map_err(Error::io("read", path))? {
            file.write_all(b"\n").map_err(Error::io("write", path))?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
        })
    }

    /// Writes one line, whole or not at all.
    pub fn write(&mut self, record: &MetricRecord) -> Result<()> {
        let mut line = serde_json::to_vec(record).map_err(anyhow::Error::from)?;
        line.push(b'\n');
        self.file
            .write_all(&line)
            .map_err(Error::io("write", &self.path))
    }

    /// Makes what was written survive a power failure.
    pub fn sync(&self) -> Result<()> {
        self.file
            .sync_data()
            .map_err(Error::io("write", &self.path))
    }
}

/// Whether the last byte is a newline; an empty file counts.
fn ends_with_newline(file: &mut File) -> std::io::Result<bool> {
    if file.seek(SeekFrom::End(0))? == 0 {
        return Ok(true);
    }
    file.seek(SeekFrom::End(-1))?;
    let mut last = [0];
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Reads a metrics file; a line cut short by a crash at its end is left out.
pub fn read(path: &Path) -> Result<Vec<MetricRecord>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_documented_keys() {
        let mut record = MetricRecord::Train {
            step: 3,
            loss_nats: 1.5,
            bpb: 2.164,
            lr: 1e-4,
            grad_norm: 0.25,
            bytes_per_second: 1000.0,
            bytes_seen: 4096,
            seconds: 0.5,
            memory_gib: None,
            memory_in_use_gib: None,
        };
        let line = serde_json::to_string(&record).expect("serialisable");
        let always = "{\"kind\":\"train\",\"step\":3,\"loss_nats\":1.5,\"bpb\":2.164,\"lr\":0.0001,\
                      \"grad_norm\":0.25,\"bytes_per_second\":1000.0,\"bytes_seen\":4096,\
                      \"seconds\":0.5";
        assert_eq!(line, format!("{always}}}"));
        let MetricRecord::Train {
            memory_gib,
            memory_in_use_gib,
            ..
        } = &mut record
        else {
            unreachable!("made above");
        };
        (*memory_gib, *memory_in_use_gib) = (Some(9.25), Some(4.0));
        let line = serde_json::to_string(&record).expect("serialisable");
        let expected = format!("{always},\"memory_gib\":9.25,\"memory_in_use_gib\":4.0}}");
        assert_eq!(line, expected);
    }

    #[test]
    fn a_line_cut_short_is_left_out_and_spoils_no_other() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::append(&path).expect("writable");
        writer
            .write(&MetricRecord::Resume { step: 1 })
            .expect("written");
        std::io::Write::write_all(&mut writer.file, b"{\"kind\":\"resu").expect("written");
        let mut writer = MetricsWriter::append(&path).expect("writable");
        let next = MetricRecord::Resume { step: 2 };
        writer.write(&next).expect("written");
        let records = read(&path).expect("readable");
        assert_eq!(records, [MetricRecord::Resume { step: 1 }, next]);
    }
}
