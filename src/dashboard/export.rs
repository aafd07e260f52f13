//! A run's metrics as a file to download, piece by piece.

use std::fmt::Write as _;
use std::sync::{Arc, RwLock};

use serde::Deserialize;

use super::hub::{Shown, read};
use super::table::Table;

/// Rows of a piece: the run is not held for long, and memory is bounded.
const ROWS: usize = 2048;

/// Form of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Format {
    /// Comma-separated, a row a line, first the names.
    Csv,
    /// A list of objects.
    Json,
}

/// The pieces of a file with the rows of training and validation by step.
pub(super) struct Pieces {
    shown: Arc<RwLock<Shown>>,
    format: Format,
    /// Names of training's columns, and of validation's, which are written as `valid_NAME`.
    train: Vec<String>,
    valid: Vec<String>,
    generation: u64,
    next: Option<(usize, usize)>,
    begun: bool,
}

impl Pieces {
    pub(super) fn new(shown: Arc<RwLock<Shown>>, format: Format, columns: Option<&str>) -> Self {
        let wanted: Option<Vec<&str>> = columns.map(|it| it.split(',').collect());
        let (train, valid, generation) = {
            let shown = read(&shown);
            let names = |table: &Table| -> Vec<String> {
                let all = table.names().iter();
                all.filter(|name| wanted.as_ref().is_none_or(|it| it.contains(&name.as_str())))
                    .cloned()
                    .collect()
            };
            (
                names(&shown.run.train),
                names(&shown.run.valid),
                shown.run.generation,
            )
        };
        Self {
            shown,
            format,
            train,
            valid,
            generation,
            next: Some((0, 0)),
            begun: false,
        }
    }

    fn names(&self) -> impl Iterator<Item = String> {
        let valid = self.valid.iter().map(|it| format!("valid_{it}"));
        let own = ["step", "bytes_seen", "time"].map(str::to_owned);
        own.into_iter()
            .chain(self.train.iter().cloned())
            .chain(valid)
    }

    /// The next rows: those of both tables merged by step.
    fn rows(&mut self, text: &mut String) {
        let Some((mut i, mut k)) = self.next else {
            return;
        };
        let shown = read(&self.shown);
        let (train, valid) = (&shown.run.train, &shown.run.valid);
        // Rows have moved: what follows would not fit to what is written.
        if shown.run.generation != self.generation {
            self.next = None;
            return;
        }
        let names: Vec<String> = self.names().collect();
        for _ in 0..ROWS {
            let a = (i < train.rows()).then(|| train.place(i));
            let b = (k < valid.rows()).then(|| valid.place(k));
            let place = match (a, b) {
                (None, None) => {
                    self.next = None;
                    return;
                }
                (Some(a), Some(b)) => {
                    if a.step <= b.step {
                        a
                    } else {
                        b
                    }
                }
                (Some(place), None) | (None, Some(place)) => place,
            };
            let in_train = a.is_some_and(|it| it.step == place.step);
            let in_valid = b.is_some_and(|it| it.step == place.step);
            let value = |table: &Table, name: &str, row: usize, there: bool| {
                let column = table.column(name).filter(|_| there)?;
                let value = column.at(row);
                (value.count > 0).then_some(f64::from(value.mean))
            };
            let numbers = [Some(place.step), Some(place.bytes), Some(place.time)]
                .into_iter()
                .chain(self.train.iter().map(|it| value(train, it, i, in_train)))
                .chain(self.valid.iter().map(|it| value(valid, it, k, in_valid)));
            let first = i + k == 0;
            write_row(text, self.format, first, &names, numbers);
            i += usize::from(in_train);
            k += usize::from(in_valid);
        }
        self.next = Some((i, k));
    }
}

fn write_row(
    text: &mut String,
    format: Format,
    first: bool,
    names: &[String],
    numbers: impl Iterator<Item = Option<f64>>,
) {
    // f32 values as they were written, not with the digits that f64 adds.
    let short = |number: f64| match number as f32 {
        single if f64::from(single) == number && number.abs() < 1e7 => format!("{single}"),
        _ => format!("{number}"),
    };
    match format {
        Format::Csv => {
            let cells: Vec<String> = numbers
                .map(|it| it.map(short).unwrap_or_default())
                .collect();
            let _ = writeln!(text, "{}", cells.join(","));
        }
        Format::Json => {
            let pairs: Vec<String> = names
                .iter()
                .zip(numbers)
                .filter_map(|(name, number)| {
                    let name = serde_json::to_string(name).ok()?;
                    Some(format!("{name}:{}", short(number?)))
                })
                .collect();
            let start = if first { "" } else { ",\n" };
            let _ = write!(text, "{start}{{{}}}", pairs.join(","));
        }
    }
}

impl Iterator for Pieces {
    type Item = String;

    fn next(&mut self) -> Option<String> {
        let mut text = String::new();
        if !self.begun {
            self.begun = true;
            text = match self.format {
                Format::Csv => {
                    let cells: Vec<String> = self.names().map(|it| quoted(&it)).collect();
                    cells.join(",") + "\n"
                }
                Format::Json => "[".to_owned(),
            };
        } else {
            self.next?;
        }
        self.rows(&mut text);
        if self.next.is_none() && self.format == Format::Json {
            text += "]\n";
        }
        Some(text)
    }
}

/// A name as a cell: keys of a file are anybody's.
fn quoted(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    match name.chars().all(plain) {
        true => name.to_owned(),
        false => format!("\"{}\"", name.replace('"', "\"\"")),
    }
}
