//! The numbers of one line of `metrics.jsonl`, read without making a value of it first: a long run
//! has a million lines.

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

use super::table::{Place, Table};

/// The numbers of a line.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    pub(super) step: Option<f64>,
    pub(super) bytes: Option<f64>,
    pub(super) time: Option<f64>,
    /// Column and value; what is no finite number is NaN.
    pub(super) values: Vec<(usize, f32)>,
}

impl Numbers {
    /// Reads `line` into this value; new keys become columns of `table`.
    ///
    /// # Errors
    ///
    /// Where the line is no JSON object.
    pub(super) fn read(&mut self, line: &[u8], table: &mut Table) -> serde_json::Result<()> {
        self.step = None;
        self.bytes = None;
        self.time = None;
        self.values.clear();
        let mut deserializer = serde_json::Deserializer::from_slice(line);
        let reading = Reading {
            numbers: self,
            table,
        };
        deserializer.deserialize_map(reading)?;
        deserializer.end()
    }

    /// Where the record stands; what it does not say goes on from `last`.
    pub(super) fn place(&self, last: Place, seconds: f64) -> Option<Place> {
        Some(Place {
            step: self.step?,
            bytes: self.bytes.unwrap_or(last.bytes),
            time: self.time.unwrap_or(last.time + seconds),
        })
    }

    pub(super) fn get(&self, table: &Table, name: &str) -> Option<f32> {
        let column = table.names().iter().position(|it| it == name)?;
        let value = self.values.iter().find(|(it, _)| *it == column)?;
        Some(value.1)
    }
}

struct Reading<'a> {
    numbers: &'a mut Numbers,
    table: &'a mut Table,
}

impl<'de> Visitor<'de> for Reading<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a record")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { numbers, table } = self;
        let mut next = 0;
        while let Some(key) = map.next_key_seed(KeySeed {
            table: &mut *table,
            next,
        })? {
            let value = map.next_value_seed(NumberSeed)?;
            match (key, value) {
                (Key::Step, value) => numbers.step = finite(value),
                (Key::Bytes, value) => numbers.bytes = finite(value),
                (Key::Time, value) => numbers.time = finite(value),
                (Key::Column(column), value) => {
                    next = column + 1;
                    // What is text or a list has no column, unless it had numbers before.
                    if let Some(value) = value {
                        numbers.values.push((column, value as f32));
                    }
                }
                (Key::Other, _) => {}
            }
        }
        Ok(())
    }
}

fn finite(value: Option<f64>) -> Option<f64> {
    value.filter(|it| it.is_finite() && *it >= 0.0)
}

enum Key {
    Step,
    Bytes,
    Time,
    Column(usize),
    Other,
}

struct KeySeed<'a> {
    table: &'a mut Table,
    /// Where the column is if keys come in the order of the line before.
    next: usize,
}

impl<'de> DeserializeSeed<'de> for KeySeed<'_> {
    type Value = Key;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Key, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for KeySeed<'_> {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Key, E> {
        Ok(match key {
            "step" => Key::Step,
            "bytes_seen" => Key::Bytes,
            "time" => Key::Time,
            "kind" => Key::Other,
            _ => match self.table.column_index(key, self.next) {
                Some(column) => Key::Column(column),
                None => Key::Other,
            },
        })
    }
}

/// A number, NaN for `null`, none for everything else.
struct NumberSeed;

impl<'de> DeserializeSeed<'de> for NumberSeed {
    type Value = Option<f64>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<f64>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for NumberSeed {
    type Value = Option<f64>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Some(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Some(value as f64))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Some(f64::from(u8::from(value))))
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Some(f64::NAN))
    }

    fn visit_str<E>(self, _text: &str) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_become_columns_and_nothing_else_does_harm() {
        let mut table = Table::default();
        let mut numbers = Numbers::default();
        let line = br#"{"kind":"train","step":7,"bpb":null,"text":"x","list":[1,{"a":2}],"lr":1e-4,
                        "bytes_seen":70,"time":1.5e9,"gone":{"a":[1]},"flag":true}"#;
        numbers.read(line, &mut table).expect("JSON");
        let place = numbers.place(Place::default(), 0.0).expect("a step");
        assert_eq!((place.step, place.bytes, place.time), (7.0, 70.0, 1.5e9));
        assert!(numbers.get(&table, "bpb").is_some_and(f32::is_nan));
        assert_eq!(numbers.get(&table, "lr"), Some(1e-4));
        assert_eq!(numbers.get(&table, "flag"), Some(1.0));
        assert_eq!(numbers.get(&table, "text"), None);
        for bad in [&b""[..], b"{", b"[1]", b"\0\0", b"{\"step\":1}x", b"3"] {
            assert!(numbers.read(bad, &mut table).is_err());
        }
    }

    #[test]
    fn what_a_line_does_not_say_goes_on() {
        let mut table = Table::default();
        let mut numbers = Numbers::default();
        numbers.read(b"{\"step\":2}", &mut table).expect("JSON");
        let last = Place {
            step: 1.0,
            bytes: 5.0,
            time: 10.0,
        };
        let place = numbers.place(last, 0.5).expect("a step");
        assert_eq!((place.bytes, place.time), (5.0, 10.5));
        numbers.read(b"{\"bpb\":2}", &mut table).expect("JSON");
        assert_eq!(numbers.place(last, 0.0), None);
    }
}
