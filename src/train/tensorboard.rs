//! Event files as TensorBoard reads them.
//!
//! A file is a row of records: length (u64), masked CRC-32C of it, an `Event` message, masked CRC-32C
//! of that; all little-endian. The messages are those of TensorFlow's `event.proto`, `summary.proto`
//! and `tensor.proto`, as far as they are used, with their field numbers.
//!
//! Of metrics, numbers become scalars called `kind/key`, samples text, looks into the model histograms.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write as _};
use std::path::Path;

use prost::Message;
use serde_json::{Map, Value};

use super::metrics::MetricRecord;
use super::telemetry::machine_name;
use crate::error::{Error, Result};

/// What every file says first.
const VERSION: &str = "brain.Event:2";

/// `DT_STRING` of TensorFlow's data types.
const DT_STRING: i32 = 7;

/// `SessionLog.START`: events from its step on in what came before no longer count.
const START: i32 = 1;

/// Keys that are no measurements.
const NOT_SCALARS: [&str; 3] = ["step", "time", "kind"];

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(message, optional, tag = "9")]
    metadata: Option<Metadata>,
    #[prost(oneof = "Content", tags = "2, 5, 8")]
    content: Option<Content>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Content {
    #[prost(float, tag = "2")]
    SimpleValue(f32),
    #[prost(message, tag = "5")]
    Histo(HistogramProto),
    #[prost(message, tag = "8")]
    Tensor(TensorProto),
}

#[derive(Clone, PartialEq, Message)]
struct Metadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct HistogramProto {
    #[prost(double, tag = "1")]
    min: f64,
    #[prost(double, tag = "2")]
    max: f64,
    #[prost(double, tag = "3")]
    num: f64,
    #[prost(double, tag = "4")]
    sum: f64,
    #[prost(double, tag = "5")]
    sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    bucket: Vec<f64>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorShape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dimension>,
}

#[derive(Clone, PartialEq, Message)]
struct Dimension {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// Writes one event file.
pub struct EventWriter {
    file: BufWriter<File>,
}

impl EventWriter {
    /// Makes a new file in `folder`, by the rules that TensorBoard knows them by. In the files before
    /// it, events of steps after `step` no longer count.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it cannot be made.
    pub fn create(folder: &Path, step: u64, time: f64) -> Result<Self> {
        let host = file_host();
        let process = std::process::id();
        // Files are read in the order of their names, so a later one needs a later time or number.
        let mut number = 0;
        let (path, file) = loop {
            let seconds = time as u64;
            let name = format!("events.out.tfevents.{seconds:010}.{host}.{process}.{number}");
            let path = folder.join(name);
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == ErrorKind::AlreadyExists && number < 1000 => {
                    number += 1;
                }
                Err(error) => return Err(Error::io("create", &path)(error)),
            }
        };
        let mut writer = Self {
            file: BufWriter::new(file),
        };
        let begin = [
            (0, What::FileVersion(VERSION.to_owned())),
            (
                step as i64 + 1,
                What::SessionLog(SessionLog { status: START }),
            ),
        ];
        for (step, what) in begin {
            writer
                .event(time, step, what)
                .map_err(Error::io("write", &path))?;
        }
        writer.flush()?;
        Ok(writer)
    }

    /// Writes what TensorBoard can show of a record made at `time`, and hands it to the system.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it cannot be written.
    pub fn write(&mut self, record: &MetricRecord, time: f64) -> Result<()> {
        let value = serde_json::to_value(record).map_err(anyhow::Error::from)?;
        if let Value::Object(fields) = value {
            self.write_fields(&fields, record.step(), time)?;
        }
        self.flush()
    }

    /// The same of a line of `metrics.jsonl`, which may wait in memory.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it cannot be written.
    pub fn write_fields(
        &mut self,
        fields: &Map<String, Value>,
        step: u64,
        time: f64,
    ) -> Result<()> {
        let kind = fields.get("kind").and_then(Value::as_str).unwrap_or("");
        let step = step as i64;
        let what = match kind {
            // The run goes on from there, in this file.
            "rollback" | "resume" => What::SessionLog(SessionLog { status: START }),
            _ => What::Summary(Summary {
                value: values(kind, fields),
            }),
        };
        let step = match what {
            What::SessionLog(_) => step + 1,
            _ => step,
        };
        if matches!(&what, What::Summary(summary) if summary.value.is_empty()) {
            return Ok(());
        }
        self.event(time, step, what).map_err(unwritten)
    }

    /// Hands everything to the system.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where it cannot be written.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush().map_err(unwritten)
    }

    fn event(&mut self, wall_time: f64, step: i64, what: What) -> std::io::Result<()> {
        let event = Event {
            wall_time,
            step,
            what: Some(what),
        };
        self.file.write_all(&framed(&event.encode_to_vec()))
    }
}

fn unwritten(source: std::io::Error) -> Error {
    Error::io("write", "events.out.tfevents")(source)
}

/// A message with its length and checksums.
fn framed(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    [
        &length[..],
        &masked_crc(&length).to_le_bytes(),
        message,
        &masked_crc(message).to_le_bytes(),
    ]
    .concat()
}

/// CRC-32C (Castagnoli), turned so that a checksum of data with a checksum in it is a good one.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
        .rotate_right(15)
        .wrapping_add(0xa282_ead8)
}

/// What can be shown of a record.
fn values(kind: &str, fields: &Map<String, Value>) -> Vec<SummaryValue> {
    match kind {
        "sample" => {
            let text = |key: &str| fields.get(key).and_then(Value::as_str).unwrap_or("");
            vec![text_value("sample", text("prompt"), text("text"))]
        }
        "inspect" => inspection(fields),
        _ => fields
            .iter()
            .filter(|(key, _)| !NOT_SCALARS.contains(&key.as_str()))
            .filter_map(|(key, value)| {
                let number = value.as_f64()?;
                Some(SummaryValue {
                    tag: format!("{kind}/{key}"),
                    metadata: None,
                    content: Some(Content::SimpleValue(number as f32)),
                })
            })
            .collect(),
    }
}

/// TensorBoard takes text for Markdown: indented, it is shown as it is.
fn text_value(tag: &str, prompt: &str, text: &str) -> SummaryValue {
    let whole = format!("{prompt}{text}");
    let lines: Vec<String> = whole.split('\n').map(|it| format!("    {it}")).collect();
    SummaryValue {
        tag: tag.to_owned(),
        metadata: Some(Metadata {
            plugin_data: Some(PluginData {
                plugin_name: "text".to_owned(),
            }),
        }),
        content: Some(Content::Tensor(TensorProto {
            dtype: DT_STRING,
            tensor_shape: Some(TensorShape {
                dim: vec![Dimension { size: 1 }],
            }),
            string_val: vec![lines.join("\n").into_bytes()],
        })),
    }
}

/// Histograms of weights and gradients, and of the layers' norms and step sizes.
fn inspection(fields: &Map<String, Value>) -> Vec<SummaryValue> {
    let numbers = |value: &Value| -> Option<Vec<f64>> {
        value.as_array()?.iter().map(Value::as_f64).collect()
    };
    let mut values = Vec::new();
    for key in ["delta_mean", "delta_max", "grad_norm", "weight_norm"] {
        if let Some(layers) = fields.get(key).and_then(numbers)
            && !layers.is_empty()
        {
            values.push(histogram_value(
                format!("layers/{key}"),
                of_numbers(&layers),
            ));
        }
    }
    let groups = fields.get("groups").and_then(Value::as_array);
    for group in groups.into_iter().flatten() {
        let Some(name) = group.get("name").and_then(Value::as_str) else {
            continue;
        };
        for key in ["weights", "gradients"] {
            let bins = group.get(key).and_then(|it| {
                Some(of_bins(
                    it.get("low")?.as_f64()?,
                    it.get("high")?.as_f64()?,
                    &numbers(it.get("counts")?)?,
                ))
            });
            if let Some(bins) = bins {
                values.push(histogram_value(format!("{key}/{name}"), bins));
            }
        }
    }
    values
}

fn histogram_value(tag: String, histogram: HistogramProto) -> SummaryValue {
    SummaryValue {
        tag,
        metadata: None,
        content: Some(Content::Histo(histogram)),
    }
}

/// Equally wide bins from `low` to `high`. Sums are those of the bins' middles.
fn of_bins(low: f64, high: f64, counts: &[f64]) -> HistogramProto {
    let width = (high - low) / counts.len().max(1) as f64;
    let middle = |i: usize| low + (i as f64 + 0.5) * width;
    let sum = |f: &dyn Fn(f64) -> f64| -> f64 {
        let parts = counts.iter().enumerate();
        parts.map(|(i, count)| count * f(middle(i))).sum()
    };
    HistogramProto {
        min: low,
        max: high,
        num: counts.iter().sum(),
        sum: sum(&|x| x),
        sum_squares: sum(&|x| x * x),
        bucket_limit: (1..=counts.len()).map(|i| low + i as f64 * width).collect(),
        bucket: counts.to_vec(),
    }
}

/// Sixteen bins of these numbers, of which there is one at least.
fn of_numbers(numbers: &[f64]) -> HistogramProto {
    const BINS: usize = 16;
    let low = numbers.iter().copied().fold(f64::INFINITY, f64::min);
    let high = numbers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let width = (high - low) / BINS as f64;
    let mut counts = vec![0.0; BINS];
    for number in numbers {
        let bin = match width > 0.0 {
            true => ((number - low) / width) as usize,
            false => 0,
        };
        counts[bin.min(BINS - 1)] += 1.0;
    }
    HistogramProto {
        sum: numbers.iter().sum(),
        sum_squares: numbers.iter().map(|it| it * it).sum(),
        ..of_bins(low, high, &counts)
    }
}

/// The machine's name in a file's name.
fn file_host() -> String {
    let name = machine_name().unwrap_or_default();
    let plain: String = name
        .chars()
        .filter(|it| it.is_ascii_alphanumeric() || *it == '-')
        .take(64)
        .collect();
    match plain.is_empty() {
        true => "host".to_owned(),
        false => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Messages of a file, each checked against its checksums.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).expect("a file");
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().expect("four"));
            let length = u64::from_le_bytes(rest[..8].try_into().expect("eight")) as usize;
            assert_eq!(word(8), masked_crc(&rest[..8]));
            let message = &rest[12..12 + length];
            assert_eq!(word(12 + length), masked_crc(message));
            events.push(Event::decode(message).expect("an event"));
            rest = &rest[16 + length..];
        }
        events
    }

    fn only_file(folder: &Path) -> std::path::PathBuf {
        let mut files = std::fs::read_dir(folder).expect("a folder");
        files.next().expect("a file").expect("an entry").path()
    }

    /// The values of RFC 3720, appendix B.4: 32 zero bytes.
    #[test]
    fn the_checksum_is_castagnolis() {
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        let masked = 0x8a91_36aa_u32.rotate_right(15).wrapping_add(0xa282_ead8);
        assert_eq!(masked_crc(&[0; 32]), masked);
    }

    #[test]
    fn records_become_scalars_text_and_purges() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut writer = EventWriter::create(folder.path(), 20, 1e9).expect("made");
        let lines = [
            r#"{"kind":"train","step":21,"bpb":1.5,"lr":0.001,"loss_nats":null}"#,
            r#"{"kind":"sample","step":21,"prompt":"a","text":"b\nc"}"#,
            r#"{"kind":"rollback","step":10,"from":21,"reason":"spike"}"#,
        ];
        for line in lines {
            let fields: Map<String, Value> = serde_json::from_str(line).expect("JSON");
            let step = fields["step"].as_u64().expect("a step");
            writer.write_fields(&fields, step, 2e9).expect("written");
        }
        writer.flush().expect("written");
        let events = read(&only_file(folder.path()));
        assert_eq!(events[0].what, Some(What::FileVersion(VERSION.to_owned())));
        let start = Some(What::SessionLog(SessionLog { status: START }));
        assert_eq!((events[1].step, &events[1].what), (21, &start));
        let Some(What::Summary(summary)) = &events[2].what else {
            panic!("{events:?}")
        };
        let tags: Vec<&str> = summary.value.iter().map(|it| it.tag.as_str()).collect();
        assert_eq!(tags, ["train/bpb", "train/lr"]);
        let Some(What::Summary(summary)) = &events[3].what else {
            panic!("{events:?}")
        };
        let Some(Content::Tensor(tensor)) = &summary.value[0].content else {
            panic!("{summary:?}")
        };
        assert_eq!(tensor.string_val, [b"    ab\n    c".to_vec()]);
        assert_eq!((events[4].step, &events[4].what), (11, &start));
        assert_eq!(events.len(), 5);
    }

    #[test]
    fn a_second_writer_makes_a_file_of_its_own() {
        let folder = tempfile::tempdir().expect("a folder");
        for _ in 0..3 {
            EventWriter::create(folder.path(), 0, 1e9).expect("made");
        }
        assert_eq!(std::fs::read_dir(folder.path()).expect("there").count(), 3);
    }

    #[test]
    fn histograms_hold_every_number() {
        let histogram = of_numbers(&[1.0, 2.0, 3.0, 3.0]);
        assert_eq!((histogram.min, histogram.max), (1.0, 3.0));
        assert_eq!(histogram.bucket.iter().sum::<f64>(), 4.0);
        assert_eq!(histogram.bucket_limit.last(), Some(&3.0));
        assert_eq!(of_numbers(&[2.0]).bucket[0], 1.0);
    }
}
