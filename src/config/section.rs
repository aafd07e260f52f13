//! Typed access to the keys of one section.

use toml::Value;

use super::reader::{Entry, Reader};
use super::suggest;
use super::values::{Choice, DtRank, MemoryLimit, Recompute, list_names};

/// Largest integer that TOML has to support; a larger one could not be written back.
pub(super) const MAX: u64 = i64::MAX as u64;

/// Range of a number that need not be whole.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    low: f64,
    low_included: bool,
    high: f64,
    high_included: bool,
}

impl Bounds {
    /// Greater than `low`.
    pub(super) fn above(low: f64) -> Self {
        Self {
            low,
            low_included: false,
            high: f64::MAX,
            high_included: true,
        }
    }

    /// `low` or greater.
    pub(super) fn from(low: f64) -> Self {
        Self {
            low_included: true,
            ..Self::above(low)
        }
    }

    /// `high` or less.
    pub(super) fn up_to(self, high: f64) -> Self {
        Self { high, ..self }
    }

    /// Less than `high`.
    pub(super) fn below(self, high: f64) -> Self {
        Self {
            high,
            high_included: false,
            ..self
        }
    }

    /// Whether `number` lies within; not a number never does.
    fn contains(&self, number: f64) -> bool {
        (number > self.low || self.low_included && number == self.low)
            && (number < self.high || self.high_included && number == self.high)
    }

    fn describe(&self) -> String {
        let low = if self.low_included { "from" } else { "above" };
        let mut text = format!("a number {low} {}", self.low);
        if self.high < f64::MAX {
            let high = if self.high_included { "up to" } else { "below" };
            text += &format!(" and {high} {}", self.high);
        }
        text
    }
}

/// One section of the document.
///
/// Each accessor takes a key, its range, and its default; `None` makes the key a required one. A
/// value that is wrong is recorded and replaced by a stand-in, so that reading goes on.
pub(super) struct Section<'a> {
    name: &'static str,
    reader: &'a mut Reader,
}

impl<'a> Section<'a> {
    pub(super) fn new(name: &'static str, reader: &'a mut Reader) -> Self {
        Self { name, reader }
    }

    fn dotted(&self, key: &str) -> String {
        format!("{}.{key}", self.name)
    }

    /// Whether the values of all these keys are what the document says.
    pub(super) fn sound(&self, keys: &[&str]) -> bool {
        keys.iter()
            .all(|key| self.reader.sound(&[&self.dotted(key)]))
    }

    /// Records that the value `got` of `key` cannot be used.
    pub(super) fn reject(&mut self, key: &str, got: String, expected: String, hint: &str) {
        self.reader.reject(&self.dotted(key), got, expected, hint);
    }

    /// Reads one key: `parse` gives the value or, for what is not its type, a hint.
    fn value<T>(
        &mut self,
        key: &'static str,
        default: Option<T>,
        stand_in: T,
        expected: &str,
        missing: &str,
        parse: impl FnOnce(&Entry) -> Result<T, String>,
    ) -> T {
        match (self.reader.take(self.name, key), default) {
            (Some(entry), _) => parse(&entry).unwrap_or_else(|hint| {
                let got = shorten(&entry.value.to_string());
                self.reject(key, got, expected.to_owned(), &hint);
                stand_in
            }),
            (None, Some(default)) => default,
            (None, None) => {
                self.reader.missing(self.dotted(key), expected, missing);
                stand_in
            }
        }
    }

    /// A whole number from `low` to `high`.
    pub(super) fn integer(
        &mut self,
        key: &'static str,
        low: u64,
        high: u64,
        default: Option<u64>,
        hint: &str,
    ) -> u64 {
        let expected = describe_range(low, high);
        self.value(
            key,
            default,
            low,
            &expected,
            hint,
            |entry| match whole_number(&entry.value) {
                Ok(number) if (low..=high).contains(&number) => Ok(number),
                Err(own) if !own.is_empty() => Err(own),
                _ => Err(hint.to_owned()),
            },
        )
    }

    /// A whole number that counts things in memory.
    pub(super) fn size(
        &mut self,
        key: &'static str,
        low: usize,
        high: usize,
        default: Option<usize>,
        hint: &str,
    ) -> usize {
        let default = default.map(|size| size as u64);
        self.integer(key, low as u64, high as u64, default, hint) as usize
    }

    /// A number within `bounds`.
    pub(super) fn float(&mut self, key: &'static str, bounds: Bounds, default: f64) -> f64 {
        let expected = bounds.describe();
        self.value(key, Some(default), default, &expected, "", |entry| {
            let number = match &entry.value {
                Value::Float(number) => *number,
                Value::Integer(number) => *number as f64,
                other => return Err(quoted_hint(other, |text| text.parse::<f64>().is_ok())),
            };
            if bounds.contains(number) {
                Ok(number)
            } else {
                Err(String::new())
            }
        })
    }

    /// `true` or `false`.
    pub(super) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        let expected = "`true` or `false`";
        self.value(key, Some(default), default, expected, "", |entry| {
            let yes_or_no = |text: &str| ["true", "false"].contains(&text);
            entry
                .value
                .as_bool()
                .ok_or_else(|| quoted_hint(&entry.value, yes_or_no))
        })
    }

    /// Any text.
    pub(super) fn string(&mut self, key: &'static str, default: &str) -> String {
        let default = Some(default.to_owned());
        self.value(key, default, String::new(), "text", "", text)
    }

    /// Text of at least one character.
    pub(super) fn name(&mut self, key: &'static str, default: Option<&str>, hint: &str) -> String {
        let default = default.map(str::to_owned);
        let expected = "text that is not empty";
        self.value(key, default, String::new(), expected, hint, |entry| {
            let text = text(entry)?;
            let usable = !text.trim().is_empty() && !text.contains('\0');
            if usable {
                Ok(text)
            } else {
                Err(hint.to_owned())
            }
        })
    }

    /// A value chosen by name.
    pub(super) fn choice<T: Choice>(
        &mut self,
        key: &'static str,
        default: Option<T>,
        hint: &str,
    ) -> T {
        let stand_in = default.unwrap_or(T::NAMES[0].1);
        self.value(key, default, stand_in, &list_names::<T>(), hint, |entry| {
            let name = entry.value.as_str().unwrap_or_default();
            T::from_name(name).ok_or_else(|| {
                let names = T::NAMES.iter().map(|(name, _)| *name);
                match suggest::nearest(name, names) {
                    Some(name) => format!("did you mean \"{name}\"?"),
                    None => hint.to_owned(),
                }
            })
        })
    }

    /// A rank, or `"auto"`.
    pub(super) fn dt_rank(&mut self, key: &'static str, default: DtRank) -> DtRank {
        let expected = "\"auto\" or an integer from 1 to 65536";
        self.value(key, Some(default), default, expected, "", |entry| {
            match (entry.value.as_str(), whole_number(&entry.value)) {
                (Some("auto"), _) => Ok(DtRank::Auto),
                (_, Ok(rank @ 1..=65_536)) => Ok(DtRank::Fixed(rank as usize)),
                (_, Err(hint)) => Err(hint),
                _ => Err(String::new()),
            }
        })
    }

    /// A number of layers, or `"auto"`, `"none"`, or `"all"`.
    pub(super) fn recompute(&mut self, key: &'static str, default: Recompute) -> Recompute {
        let expected = "\"auto\", \"none\", \"all\" or an integer from 0 to 4096";
        self.value(key, Some(default), default, expected, "", |entry| {
            match (entry.value.as_str(), whole_number(&entry.value)) {
                (Some("auto"), _) => Ok(Recompute::Auto),
                (Some("none"), _) => Ok(Recompute::None),
                (Some("all"), _) => Ok(Recompute::All),
                (_, Ok(layers @ 0..=4096)) => Ok(Recompute::First(layers as usize)),
                (_, Err(hint)) => Err(hint),
                _ => Err(String::new()),
            }
        })
    }

    /// An amount of memory with its unit, or `"none"`.
    pub(super) fn memory(&mut self, key: &'static str, default: MemoryLimit) -> MemoryLimit {
        let expected = "\"none\" or an amount of memory with its unit";
        let example = "for instance \"24GiB\"; units are B, kB, KiB, MB, MiB, GB, GiB, TB, TiB";
        self.value(
            key,
            Some(default),
            default,
            expected,
            "",
            |entry| match entry.value.as_str().map(str::parse) {
                Some(Ok(limit)) => Ok(limit),
                Some(Err(problem)) => Err(format!("{problem}; {example}")),
                None => Err(example.to_owned()),
            },
        )
    }
}

/// The text of a value; whatever was typed in an override is text.
fn text(entry: &Entry) -> Result<String, String> {
    match (&entry.value, &entry.raw) {
        (Value::String(text), _) => Ok(text.clone()),
        (_, Some(raw)) => Ok(raw.clone()),
        _ => Err("write it in double quotes".to_owned()),
    }
}

/// A number that is whole and not negative, or a hint, which may be empty.
fn whole_number(value: &Value) -> Result<u64, String> {
    match value {
        Value::Integer(number) => {
            u64::try_from(*number).map_err(|_| "it cannot be negative".to_owned())
        }
        Value::Float(number) if number.fract() == 0.0 && (0.0..1e18).contains(number) => Err(
            format!("write `{number:.0}`, without a decimal point or an exponent"),
        ),
        other => Err(quoted_hint(other, |text| text.parse::<i64>().is_ok())),
    }
}

/// Advice for text where something else is expected.
fn quoted_hint(value: &Value, would_do: impl FnOnce(&str) -> bool) -> String {
    match value {
        Value::String(text) if would_do(text) => "write it without quotes".to_owned(),
        _ => String::new(),
    }
}

fn describe_range(low: u64, high: u64) -> String {
    if high >= MAX {
        format!("an integer of at least {low}")
    } else {
        format!("an integer from {low} to {high}")
    }
}

/// "an array", "a string".
pub(super) fn with_article(noun: &str) -> String {
    let article = if noun.starts_with(['a', 'e', 'i', 'o', 'u']) {
        "an"
    } else {
        "a"
    };
    format!("{article} {noun}")
}

/// `text` on one line of bounded length, for use in a message.
pub(super) fn shorten(text: &str) -> String {
    const MOST: usize = 60;
    let mut line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MOST)
        .collect();
    if text.chars().count() > MOST {
        line.push('…');
    }
    line
}
