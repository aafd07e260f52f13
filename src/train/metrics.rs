//! What a run records: one JSON object a line in `metrics.jsonl`.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::inspect::Inspection;
use super::telemetry::{MachineReading, StepTimes};
use super::tensorboard::EventWriter;

use crate::clock::since_1970;
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
        /// Where the time went.
        #[serde(flatten)]
        times: StepTimes,
        /// How the machine is doing.
        #[serde(flatten)]
        machine: MachineReading,
    },
    /// A look into the model after a step.
    Inspect {
        /// Steps done.
        step: u64,
        /// Time it took.
        seconds: f64,
        /// What was found.
        #[serde(flatten)]
        inspection: Inspection,
    },
    /// A measurement on held-out bytes.
    Valid {
        /// Steps done.
        step: u64,
        /// Bits a byte.
        bpb: f64,
        /// Bytes measured.
        bytes: u64,
        /// Perplexity a word: bits per byte, with the bytes a word of the whole split.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        word_perplexity: Option<f64>,
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
    /// A step whose update was not applied; stands in place of its `train` line.
    Skip {
        /// The step.
        step: u64,
        /// Why.
        reason: BadStep,
        /// Mean loss in nats a byte, where it is a number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        loss_nats: Option<f32>,
        /// Norm of all gradients, where it is a number.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        grad_norm: Option<f32>,
        /// Loss above which it is a spike, where there was such a limit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        limit_nats: Option<f32>,
        /// Bad steps in a row, with this one.
        in_a_row: u32,
        /// Number of the batch in the run's order of batches.
        batch: u64,
        /// Pass over the data.
        epoch: u64,
        /// Where in the training split's byte stream each row of the batch begins.
        offsets: Vec<u64>,
    },
    /// The run goes back to a checkpoint and on with later data: records of later steps before this
    /// line are superseded.
    Rollback {
        /// Step of the checkpoint.
        step: u64,
        /// Step after which it was decided.
        from: u64,
        /// Why.
        reason: BadStep,
        /// Bytes of this file that stay in effect: lines between there and this one are superseded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// Batches left out by rollbacks so far.
        skipped_batches: u64,
    },
    /// A save has ended. It may have begun some steps before.
    Save {
        /// Step of the checkpoint.
        step: u64,
        /// Time that training stood still for it.
        pause_seconds: f64,
        /// Time that another thread then wrote.
        seconds: f64,
        /// Bytes of its tensors.
        bytes: u64,
        /// Times it was tried.
        attempts: u32,
        /// Why it failed, if it did.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    },
    /// The run goes on from a checkpoint: records of later steps before this line are superseded.
    Resume {
        /// Step of the checkpoint.
        step: u64,
        /// Bytes of this file that stay in effect: lines between there and this one are superseded.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
    },
}

/// Why a step was not applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BadStep {
    /// Loss or gradient norm was not a finite number.
    NonFinite,
    /// The loss was far above those before it.
    Spike,
}

impl MetricRecord {
    /// The step it is about.
    pub fn step(&self) -> u64 {
        match self {
            Self::Train { step, .. }
            | Self::Inspect { step, .. }
            | Self::Valid { step, .. }
            | Self::Sample { step, .. }
            | Self::Skip { step, .. }
            | Self::Rollback { step, .. }
            | Self::Save { step, .. }
            | Self::Resume { step, .. } => *step,
        }
    }
}

/// A record as a line, with the time at which it was written.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    record: &'a MetricRecord,
    /// Seconds since 1970.
    time: f64,
}

/// Seconds since 1970, to the millisecond.
fn now() -> f64 {
    since_1970().as_millis() as f64 / 1e3
}

/// Bits for nats.
pub fn bits(nats: f64) -> f64 {
    nats / std::f64::consts::LN_2
}

/// Bytes of lines that wait for a disk that cannot be written; beyond them the oldest go.
const MOST_WAITING: usize = 16 << 20;

/// Appends records to a run's `metrics.jsonl`.
///
/// A disk that is full or gone does not stop training: lines wait in memory and are written when it
/// is back.
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    /// Length of the file: whole lines.
    written: u64,
    /// Whole lines that could not be written yet.
    waiting: Vec<u8>,
    /// Lines that were given up.
    lost: u64,
    /// TensorBoard's copy, for those who want it.
    events: Option<EventWriter>,
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
        let whole = ends_with_newline(&mut file).map_err(Error::io("read", path))?;
        let written = file.metadata().map_err(Error::io("read", path))?.len();
        let waiting = match whole {
            true => Vec::new(),
            false => b"\n".to_vec(),
        };
        Ok(Self {
            path: path.to_owned(),
            file,
            written,
            waiting,
            lost: 0,
            events: None,
        })
    }

    /// Also writes records to event files for TensorBoard, beside this file. Steps after `step` in
    /// older ones no longer count. Where that fails the run goes on without them.
    pub fn with_events(mut self, step: u64) -> Self {
        let folder = self.path.parent().unwrap_or(Path::new("."));
        match EventWriter::create(folder, step, now()) {
            Ok(events) => self.events = Some(events),
            Err(error) => tracing::warn!("no event files for TensorBoard: {error}"),
        }
        self
    }

    /// Writes one line, whole or not at all; where it cannot be written now it waits.
    ///
    /// # Errors
    ///
    /// None of the disk's: only what cannot be JSON.
    pub fn write(&mut self, record: &MetricRecord) -> Result<()> {
        let time = now();
        let mut line = serde_json::to_vec(&Line { record, time }).map_err(anyhow::Error::from)?;
        line.push(b'\n');
        if let Some(events) = &mut self.events
            && let Err(error) = events.write(record, time)
        {
            tracing::warn!("no more event files for TensorBoard: {error}");
            self.events = None;
        }
        let first = self.waiting.len() <= 1;
        self.waiting.extend_from_slice(&line);
        if let Err(error) = self.flush()
            && first
        {
            tracing::warn!("metrics wait in memory: {error}; training goes on");
        }
        Ok(())
    }

    /// Writes the lines that wait.
    fn flush(&mut self) -> Result<()> {
        if let Err(source) = self.file.write_all(&self.waiting) {
            // What there was room for is half a line.
            let _ = self.file.set_len(self.written);
            self.bound();
            return Err(Error::io("write", &self.path)(source));
        }
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        if self.lost > 0 {
            tracing::warn!("the disk is back; {} lines of metrics were lost", self.lost);
            self.lost = 0;
        }
        Ok(())
    }

    /// Gives up the oldest lines where too many wait.
    fn bound(&mut self) {
        let surplus = self.waiting.len().saturating_sub(MOST_WAITING);
        if surplus > 0 {
            let ends = self.waiting[surplus..].iter().position(|it| *it == b'\n');
            let cut = surplus + ends.map_or(0, |at| at + 1);
            let lines = self.waiting[..cut].iter().filter(|it| **it == b'\n');
            self.lost += lines.count() as u64;
            self.waiting.drain(..cut);
        }
    }

    /// Bytes of the file so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The file, for another thread that makes what was written survive a power failure.
    pub fn file(&self) -> Option<File> {
        self.file.try_clone().ok()
    }

    /// Tries once more to write what waits; at the end of a run.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it still cannot be written.
    pub fn finish(&mut self) -> Result<()> {
        match self.waiting.len() > 1 {
            true => self.flush(),
            false => Ok(()),
        }
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

/// Reads a metrics file; a line cut short by a crash, or damaged, is left out.
pub fn read(path: &Path) -> Result<Vec<MetricRecord>> {
    let text = std::fs::read(path).map_err(Error::io("read", path))?;
    Ok(text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
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
            times: StepTimes::default(),
            machine: MachineReading::default(),
        };
        let line = serde_json::to_string(&record).expect("serialisable");
        let always = "{\"kind\":\"train\",\"step\":3,\"loss_nats\":1.5,\"bpb\":2.164,\"lr\":0.0001,\
                      \"grad_norm\":0.25,\"bytes_per_second\":1000.0,\"bytes_seen\":4096,\
                      \"seconds\":0.5";
        assert_eq!(line, format!("{always},\"wait_seconds\":0.0}}"));
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
        let expected = format!(
            "{always},\"memory_gib\":9.25,\"memory_in_use_gib\":4.0,\"wait_seconds\":0.0}}"
        );
        assert_eq!(line, expected);
    }

    fn resume(step: u64) -> MetricRecord {
        MetricRecord::Resume { step, offset: None }
    }

    #[test]
    fn a_line_cut_short_is_left_out_and_spoils_no_other() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let path = dir.path().join("metrics.jsonl");
        let mut writer = MetricsWriter::append(&path).expect("writable");
        writer.write(&resume(1)).expect("written");
        std::io::Write::write_all(&mut writer.file, b"{\"kind\":\"resu").expect("written");
        let mut writer = MetricsWriter::append(&path).expect("writable");
        let next = resume(2);
        writer.write(&next).expect("written");
        let records = read(&path).expect("readable");
        assert_eq!(records, [resume(1), next]);
    }
}
