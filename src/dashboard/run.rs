//! One run as its `metrics.jsonl` tells it.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::alarms::{Alarm, AlarmKind, Vital, Watch};
use super::record::Numbers;
use super::table::{Place, Table};

/// Samples and inspections kept: above it every other one goes, the newest never.
const KEPT: usize = 512;

/// Bytes of samples, and of inspections, kept of a run.
const KEPT_BYTES: usize = 16 << 20;

/// Marks kept, the newest.
const KEPT_MARKS: usize = 1000;

/// New rows held until pages are told. With more they are told to fetch them.
const MOST_FRESH: usize = 256;

/// Text that the model wrote.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Sample {
    pub(super) step: f64,
    pub(super) time: Option<f64>,
    pub(super) prompt: String,
    pub(super) text: String,
}

/// Something that happened at a step: a resume, a skipped step, and the like.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Mark {
    pub(super) kind: String,
    pub(super) step: f64,
    pub(super) time: f64,
    /// What else the record says.
    pub(super) fields: Map<String, Value>,
}

/// A record that is passed on as it is.
#[derive(Clone, Debug)]
pub(super) struct Inspection {
    step: f64,
    pub(super) json: String,
}

/// Which table a row belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Train,
    Valid,
    Save,
}

/// Columns of a row with their values.
type Values = Vec<(usize, f32)>;

/// Rows that pages have not been told of.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    rows: Vec<(Part, Place, Values)>,
    /// Kinds of other records that came.
    kinds: Vec<&'static str>,
    /// Pages have to fetch everything again.
    all: bool,
}

/// What a run's file has said so far.
#[derive(Debug, Default)]
pub(super) struct Run {
    pub(super) train: Table,
    pub(super) valid: Table,
    pub(super) save: Table,
    pub(super) samples: Vec<Sample>,
    pub(super) inspections: Vec<Inspection>,
    pub(super) marks: Vec<Mark>,
    pub(super) watch: Watch,
    /// Grows with every change other than rows at the end.
    pub(super) generation: u64,
    /// Lines that are no records.
    pub(super) bad_lines: u64,
    /// Rows of a table at most.
    pub(super) row_limit: usize,
    numbers: Numbers,
    fresh: Fresh,
}

impl Run {
    pub(super) fn new(row_limit: usize) -> Self {
        Self {
            row_limit,
            ..Self::default()
        }
    }

    /// One line of the file.
    pub(super) fn apply(&mut self, line: &[u8]) {
        if line.iter().all(u8::is_ascii_whitespace) {
            return;
        }
        let known = match kind_of(line).as_deref() {
            Some("train") => self.row(Part::Train, line),
            Some("valid") => self.row(Part::Valid, line),
            Some("save") => {
                self.failed_save(line);
                self.row(Part::Save, line)
            }
            Some(_) => self.other(line),
            None => false,
        };
        self.bad_lines += u64::from(!known);
    }

    fn row(&mut self, part: Part, line: &[u8]) -> bool {
        let last_train = self.train.last().unwrap_or_default();
        let table = match part {
            Part::Train => &mut self.train,
            Part::Valid => &mut self.valid,
            Part::Save => &mut self.save,
        };
        if self.numbers.read(line, table).is_err() {
            return false;
        }
        let seconds = match part {
            Part::Train => self.numbers.get(table, "seconds").unwrap_or(0.0),
            Part::Valid | Part::Save => 0.0,
        };
        let Some(place) = self.numbers.place(last_train, f64::from(seconds)) else {
            return false;
        };
        // A step that is there already: the run has begun again from the start without saying so.
        if table.last().is_some_and(|it| it.step >= place.step) {
            table.truncate_after(place.step - 0.5);
            self.fresh.all = true;
        }
        table.push(place, &self.numbers.values);
        if self.fresh.rows.len() < MOST_FRESH && !self.fresh.all {
            let values = self.numbers.values.clone();
            self.fresh.rows.push((part, place, values));
        } else {
            self.fresh.all = true;
        }
        if part == Part::Train {
            let get = |name: &str| self.numbers.get(&self.train, name);
            let vital = Vital {
                bpb: get("bpb"),
                grad_norm: get("grad_norm"),
                seconds: get("seconds"),
                wait: get("wait_seconds"),
                memory: get("memory_in_use_gib"),
                host_memory: get("host_memory_gib"),
            };
            self.watch.row(place, vital);
        }
        let limit = self.row_limit;
        match part {
            Part::Train => self.train.limit(limit),
            Part::Valid => self.valid.limit(limit),
            Part::Save => self.save.limit(limit),
        }
        true
    }

    /// A save that did not succeed is an alarm.
    fn failed_save(&mut self, line: &[u8]) {
        #[derive(serde::Deserialize)]
        struct Save {
            step: f64,
            error: Option<String>,
        }
        if let Ok(Save {
            step,
            error: Some(error),
        }) = serde_json::from_slice(line)
        {
            let last = self.train.last().unwrap_or_default();
            let text = format!("checkpoint of step {step} was not saved: {error}");
            self.watch.report(AlarmKind::Save, last, text);
        }
    }

    fn other(&mut self, line: &[u8]) -> bool {
        let Ok(Value::Object(mut fields)) = serde_json::from_slice::<Value>(line) else {
            return false;
        };
        let kind = fields.remove("kind");
        let kind = kind.as_ref().and_then(Value::as_str).unwrap_or_default();
        let Some(step) = fields.get("step").and_then(Value::as_f64) else {
            return false;
        };
        let last = self.train.last().unwrap_or_default();
        let time = fields.get("time").and_then(Value::as_f64);
        match kind {
            "sample" => {
                let text = |key: &str| match fields.get(key) {
                    Some(Value::String(text)) => text.clone(),
                    _ => String::new(),
                };
                self.samples.retain(|it| it.step < step);
                self.samples.push(Sample {
                    step,
                    time,
                    prompt: text("prompt"),
                    text: text("text"),
                });
                thin(&mut self.samples, |it| it.text.len() + it.prompt.len());
                self.note("samples");
            }
            "inspect" => {
                self.inspections.retain(|it| it.step < step);
                self.inspections.push(Inspection {
                    step,
                    json: String::from_utf8_lossy(line).into_owned(),
                });
                thin(&mut self.inspections, |it| it.json.len());
                self.note("inspections");
            }
            _ => {
                let place = Place {
                    step,
                    time: time.unwrap_or(last.time),
                    ..last
                };
                self.mark(kind, place, fields);
            }
        }
        true
    }

    /// A record of something that happened.
    fn mark(&mut self, kind: &str, place: Place, mut fields: Map<String, Value>) {
        if goes_back(kind) {
            // `step` is where the run goes on.
            self.go_back(place.step);
        }
        let reason = fields.get("reason").and_then(Value::as_str);
        if let Some((alarm, text)) = alarm_of(kind, reason.unwrap_or("unknown reason")) {
            self.watch.report(alarm, place, text);
        }
        fields.remove("step");
        fields.remove("time");
        if self.marks.len() == KEPT_MARKS {
            self.marks.remove(0);
        }
        self.marks.push(Mark {
            kind: kind.to_owned(),
            step: place.step,
            time: place.time,
            fields,
        });
        self.note("marks");
    }

    /// Forgets what came after `step`.
    fn go_back(&mut self, step: f64) {
        let later = |place: Option<Place>| place.is_some_and(|it| it.step > step);
        let changed = later(self.train.last()) || later(self.valid.last());
        self.train.truncate_after(step);
        self.valid.truncate_after(step);
        self.save.truncate_after(step);
        self.samples.retain(|it| it.step <= step);
        self.inspections.retain(|it| it.step <= step);
        self.watch.go_back(step);
        if changed {
            self.fresh.all = true;
        }
    }

    fn note(&mut self, kind: &'static str) {
        if !self.fresh.kinds.contains(&kind) {
            self.fresh.kinds.push(kind);
        }
    }

    /// All alarms; `at_work` and `now` decide about a stall.
    pub(super) fn alarms(&self, at_work: bool, now: f64) -> Vec<Alarm> {
        self.watch.alarms(at_work, now)
    }

    /// What pages are to be told since the last call; none where nothing came.
    pub(super) fn news(&mut self, id: &str) -> Option<Value> {
        let fresh = std::mem::take(&mut self.fresh);
        if fresh.all {
            self.generation += 1;
            return Some(json!({ "id": id, "generation": self.generation, "all": true }));
        }
        if fresh.rows.is_empty() && fresh.kinds.is_empty() {
            return None;
        }
        let part = |part: Part, table: &Table| {
            let rows: Vec<_> = fresh.rows.iter().filter(|it| it.0 == part).collect();
            let mut columns: BTreeMap<&str, Vec<Option<f32>>> = BTreeMap::new();
            for (i, (_, _, values)) in rows.iter().enumerate() {
                for (column, value) in values {
                    let name = table.names()[*column].as_str();
                    let values = columns
                        .entry(name)
                        .or_insert_with(|| vec![None; rows.len()]);
                    values[i] = value.is_finite().then_some(*value);
                }
            }
            json!({
                "step": rows.iter().map(|it| it.1.step).collect::<Vec<_>>(),
                "bytes": rows.iter().map(|it| it.1.bytes).collect::<Vec<_>>(),
                "time": rows.iter().map(|it| it.1.time).collect::<Vec<_>>(),
                "columns": columns,
            })
        };
        Some(json!({
            "id": id,
            "generation": self.generation,
            "train": part(Part::Train, &self.train),
            "valid": part(Part::Valid, &self.valid),
            "save": part(Part::Save, &self.save),
            "changed": fresh.kinds,
        }))
    }

    /// Bytes of memory, about.
    pub(super) fn bytes(&self) -> usize {
        let samples: usize = self.samples.iter().map(|it| it.text.len()).sum();
        let inspections: usize = self.inspections.iter().map(|it| it.json.len()).sum();
        self.train.bytes() + self.valid.bytes() + self.save.bytes() + samples + inspections
    }
}

/// Whether the run goes on from an earlier step after a record of this kind.
fn goes_back(kind: &str) -> bool {
    matches!(kind, "resume" | "rollback")
}

/// Kinds of records that are alarms in themselves.
fn alarm_of(kind: &str, reason: &str) -> Option<(AlarmKind, String)> {
    match (kind, reason) {
        ("skip", "nonfinite") => Some((
            AlarmKind::NotANumber,
            "step skipped: loss or gradient is not a number".to_owned(),
        )),
        ("skip", reason) => Some((AlarmKind::Spike, format!("step skipped: {reason}"))),
        ("rollback", reason) => Some((AlarmKind::Spike, format!("rolled back: {reason}"))),
        _ => None,
    }
}

/// The value of `kind`, which is the first key in lines of ours.
fn kind_of(line: &[u8]) -> Option<String> {
    const START: &[u8] = b"{\"kind\":\"";
    if let Some(rest) = line.strip_prefix(START) {
        let end = rest.iter().position(|it| *it == b'"')?;
        return std::str::from_utf8(&rest[..end]).ok().map(str::to_owned);
    }
    #[derive(serde::Deserialize)]
    struct Kind {
        kind: String,
    }
    serde_json::from_slice(line).ok().map(|it: Kind| it.kind)
}

/// Drops every other entry, but not the newest, until there are few enough.
fn thin<T>(entries: &mut Vec<T>, bytes: impl Fn(&T) -> usize) {
    while entries.len() > 1
        && (entries.len() > KEPT || entries.iter().map(&bytes).sum::<usize>() > KEPT_BYTES)
    {
        let newest = entries.len() - 1;
        let mut i = 0;
        entries.retain(|_| {
            i += 1;
            (newest + 1 - i).is_multiple_of(2)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(step: u32, bpb: f32) -> Vec<u8> {
        format!(
            "{{\"kind\":\"train\",\"step\":{step},\"bpb\":{bpb},\"bytes_seen\":{},\"time\":{}}}",
            10 * step,
            1000 + step
        )
        .into_bytes()
    }

    #[test]
    fn steps_that_are_run_again_are_there_once() {
        let mut run = Run::new(1 << 20);
        for step in 1..=50 {
            run.apply(&train(step, 3.0));
        }
        run.apply(br#"{"kind":"sample","step":45,"prompt":"a","text":"b"}"#);
        run.apply(br#"{"kind":"resume","step":40,"time":2000.0}"#);
        for step in 41..=60 {
            run.apply(&train(step, 2.0));
        }
        assert_eq!(run.train.rows(), 60);
        let steps: Vec<f64> = (0..60).map(|i| run.train.place(i).step).collect();
        assert!(steps.iter().zip(1..).all(|(a, b)| *a == f64::from(b)));
        assert_eq!(run.train.newest("bpb", 1), Some(2.0));
        assert_eq!((run.samples.len(), run.marks.len()), (0, 1));
        assert_eq!(run.bad_lines, 0);
    }

    #[test]
    fn pages_are_told_rows_or_to_begin_anew() {
        let mut run = Run::new(1 << 20);
        run.apply(&train(1, 3.0));
        run.apply(&train(2, f32::NAN.max(2.5)));
        let news = run.news("a").expect("rows");
        assert_eq!(news["train"]["step"], json!([1.0, 2.0]));
        assert_eq!(news["train"]["columns"]["bpb"], json!([3.0, 2.5]));
        assert!(run.news("a").is_none());
        run.apply(br#"{"kind":"resume","step":1}"#);
        let news = run.news("a").expect("a change");
        assert_eq!(
            (&news["all"], &news["generation"]),
            (&json!(true), &json!(1))
        );
        for step in 2..1000 {
            run.apply(&train(step, 1.0));
        }
        assert_eq!(run.news("a").expect("too many")["all"], json!(true));
    }

    #[test]
    fn skips_rollbacks_and_failed_saves_are_alarms() {
        let mut run = Run::new(1 << 20);
        for step in 1..=50 {
            run.apply(&train(step, 3.0));
        }
        run.apply(
            br#"{"kind":"skip","step":51,"reason":"nonfinite","in_a_row":1,"offsets":[1,2]}"#,
        );
        run.apply(br#"{"kind":"save","step":50,"pause_seconds":0.1,"seconds":2,"bytes":9}"#);
        run.apply(br#"{"kind":"save","step":50,"pause_seconds":0.1,"seconds":2,"error":"full"}"#);
        run.apply(br#"{"kind":"rollback","step":40,"from":52,"reason":"3 skips in a row"}"#);
        let alarms: Vec<_> = run.alarms(false, 0.0).iter().map(|it| it.kind).collect();
        let expected = [AlarmKind::NotANumber, AlarmKind::Save, AlarmKind::Spike];
        assert_eq!(alarms, expected);
        assert_eq!(
            (run.train.rows(), run.save.rows(), run.bad_lines),
            (40, 0, 0)
        );
        assert_eq!(run.marks.len(), 2);
    }

    #[test]
    fn what_is_no_record_is_counted_and_passed_over() {
        let mut run = Run::new(1 << 20);
        for line in [
            "",
            "x",
            "{}",
            "{\"kind\":\"train\"}",
            "{\"kind\":\"sample\"}",
            "\0\0",
        ] {
            run.apply(line.as_bytes());
        }
        assert_eq!((run.bad_lines, run.train.rows()), (5, 0));
        run.apply(br#"{"step":3,"bpb":1.5,"kind":"train"}"#);
        assert_eq!(run.train.newest("bpb", 1), Some(1.5));
    }

    #[test]
    fn samples_are_thinned_and_the_newest_stays() {
        let mut run = Run::new(1 << 20);
        for step in 1..=2000 {
            let line = format!("{{\"kind\":\"sample\",\"step\":{step},\"text\":\"t{step}\"}}");
            run.apply(line.as_bytes());
        }
        assert!(run.samples.len() <= KEPT);
        assert_eq!(run.samples.last().map(|it| it.step), Some(2000.0));
        assert!(run.samples.is_sorted_by(|a, b| a.step < b.step));
    }
}
