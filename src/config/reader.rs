//! Walks a TOML document key by key, so that one bad value does not hide the next.
//!
//! serde stops at its first error; a config with five mistakes would take five runs to mend. Here
//! each accessor records what is wrong, returns a stand-in, and reading goes on.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde::Deserialize;
use toml::Value;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::report::{ConfigError, ConfigErrors, Place};
use super::section::{Section, shorten, with_article};
use super::suggest;

/// Every section of a config.
pub(super) const SECTIONS: [&str; 7] = [
    "model",
    "train",
    "optimizer",
    "data",
    "checkpoint",
    "guard",
    "device",
];

/// A value of the document.
pub(super) struct Entry {
    pub(super) value: Value,
    pub(super) place: Option<Place>,
    /// The text of an override, which is the value where a string is expected.
    pub(super) raw: Option<String>,
}

/// A document on its way to a checked config.
pub(super) struct Reader {
    origin: String,
    sections: BTreeMap<String, BTreeMap<String, Entry>>,
    /// Section and key of everything that was asked for.
    known: Vec<(&'static str, &'static str)>,
    /// Where the value of each dotted key stands.
    places: HashMap<String, Place>,
    /// Dotted keys whose value is wrong, and so is a stand-in.
    unsound: HashSet<String>,
    /// Whether part of the text could not be parsed, so that absent keys mean nothing.
    partial: bool,
    errors: Vec<ConfigError>,
}

impl Reader {
    /// Parses `text` and applies `overrides`, recording what cannot be parsed.
    pub(super) fn new(origin: &str, text: &str, overrides: &[String]) -> Self {
        let mut reader = Self {
            origin: origin.to_owned(),
            sections: BTreeMap::new(),
            known: Vec::new(),
            places: HashMap::new(),
            unsound: HashSet::new(),
            partial: false,
            errors: Vec::new(),
        };
        reader.parse(text);
        for text in overrides {
            reader.parse_override(text);
        }
        reader
    }

    fn parse(&mut self, text: &str) {
        let line_of = |offset: usize| {
            let before = text.as_bytes().get(..offset).unwrap_or(text.as_bytes());
            1 + before.iter().filter(|&&byte| byte == b'\n').count()
        };
        let (document, problems) = DeTable::parse_recoverable(text);
        let mut broken = HashSet::new();
        for problem in problems {
            let line = problem.span().map(|span| line_of(span.start));
            // One mistake often breaks the parser's next steps too: its first message is the cause.
            if line.is_none_or(|line| broken.insert(line)) {
                self.errors.push(ConfigError {
                    key: String::new(),
                    place: line.map(Place::Line),
                    got: None,
                    expected: format!("not valid TOML: {}", problem.message().trim()),
                    hint: Some("write one `key = value` a line, text in double quotes".to_owned()),
                });
            }
            self.partial = true;
        }
        for (section, content) in document.into_inner() {
            let line = line_of(section.span().start);
            let section = section.into_inner().into_owned();
            match content.into_inner() {
                // What stands behind a `[` that is not closed is taken for the section's name.
                DeValue::Table(table) if table.is_empty() && broken.contains(&(line - 1)) => {}
                DeValue::Table(table) => {
                    // An empty section is still a section, whose name is checked.
                    self.sections.entry(section.clone()).or_default();
                    for (key, value) in table {
                        let line = line_of(key.span().start);
                        if !broken.contains(&line) {
                            let place = Some(Place::Line(line));
                            let deserializer = ValueDeserializer::from(value);
                            self.insert(&section, key.get_ref(), deserializer, place, None);
                        }
                    }
                }
                _ if broken.contains(&line) => {}
                other => {
                    let known = SECTIONS.contains(&section.as_str());
                    self.errors.push(ConfigError {
                        hint: Some(if known {
                            format!("write `[{section}]` on a line of its own and the keys below")
                        } else {
                            suggest::place_of_key(&section)
                        }),
                        key: section,
                        place: Some(Place::Line(line)),
                        got: None,
                        expected: format!(
                            "found {} outside of any section",
                            with_article(other.type_str())
                        ),
                    });
                }
            }
        }
    }

    fn parse_override(&mut self, text: &str) {
        let parts = text.split_once('=').and_then(|(path, value)| {
            let (section, key) = path.trim().split_once('.')?;
            let plain = |name: &str| !name.is_empty() && !name.contains(['"', '\'', '[', ' ']);
            (plain(section) && plain(key)).then_some((section, key, value.trim()))
        });
        let Some((section, key, value)) = parts else {
            self.errors.push(ConfigError {
                key: String::new(),
                place: Some(Place::Override),
                got: Some(shorten(text)),
                expected: "`section.key=value`".to_owned(),
                hint: Some("for instance `--set train.batch=4`".to_owned()),
            });
            return;
        };
        let raw = Some(value.to_owned());
        match ValueDeserializer::parse(value) {
            Ok(parsed) => self.insert(section, key, parsed, Some(Place::Override), raw),
            // A bare word is not TOML, and is what people type.
            Err(_) => {
                let entry = Entry {
                    value: Value::String(value.to_owned()),
                    place: Some(Place::Override),
                    raw,
                };
                self.put(section, key, entry);
            }
        }
    }

    fn insert(
        &mut self,
        section: &str,
        key: &str,
        value: ValueDeserializer<'_>,
        place: Option<Place>,
        raw: Option<String>,
    ) {
        match Value::deserialize(value) {
            Ok(value) => self.put(section, key, Entry { value, place, raw }),
            Err(error) => {
                let dotted = format!("{section}.{key}");
                self.unsound.insert(dotted.clone());
                self.errors.push(ConfigError {
                    key: dotted,
                    place,
                    got: raw.as_deref().map(shorten),
                    expected: format!("a value that can be read: {}", error.message().trim()),
                    hint: None,
                });
            }
        }
    }

    fn put(&mut self, section: &str, key: &str, entry: Entry) {
        // A later value of the same key wins, also over one that could not be read.
        self.unsound.remove(&format!("{section}.{key}"));
        if let Some(place) = &entry.place {
            self.places
                .insert(format!("{section}.{key}"), place.clone());
        }
        let section = self.sections.entry(section.to_owned()).or_default();
        section.insert(key.to_owned(), entry);
    }

    /// Takes the value of a key out of the document.
    pub(super) fn take(&mut self, section: &'static str, key: &'static str) -> Option<Entry> {
        self.known.push((section, key));
        self.sections.get_mut(section)?.remove(key)
    }

    /// Records that a required key has no value.
    pub(super) fn missing(&mut self, key: String, expected: &str, hint: &str) {
        let explained = self.partial || self.unsound.contains(&key);
        if !explained {
            self.errors.push(ConfigError {
                key: key.clone(),
                place: None,
                got: None,
                expected: format!("missing, expected {expected}"),
                hint: non_empty(hint),
            });
        }
        self.unsound.insert(key);
    }

    /// The section `name`, which must be read before [`Reader::finish`].
    pub(super) fn section(&mut self, name: &'static str) -> Section<'_> {
        debug_assert!(SECTIONS.contains(&name));
        Section::new(name, self)
    }

    /// Whether the values of all these dotted keys are what the document says.
    pub(super) fn sound(&self, keys: &[&str]) -> bool {
        !keys.iter().any(|key| self.unsound.contains(*key))
    }

    /// Records that the value `got` of the dotted `key` cannot be used.
    pub(super) fn reject(&mut self, key: &str, got: String, expected: String, hint: &str) {
        self.unsound.insert(key.to_owned());
        self.errors.push(ConfigError {
            key: key.to_owned(),
            place: self.places.get(key).cloned(),
            got: Some(got),
            expected,
            hint: non_empty(hint),
        });
    }

    /// The errors found, those of keys that nothing asked for included.
    pub(super) fn finish(mut self) -> Result<(), ConfigErrors> {
        for (section, entries) in std::mem::take(&mut self.sections) {
            if !SECTIONS.contains(&section.as_str()) {
                let place = entries
                    .values()
                    .next()
                    .and_then(|entry| entry.place.clone());
                self.errors.push(ConfigError {
                    key: section.clone(),
                    place,
                    got: None,
                    expected: "no such section".to_owned(),
                    hint: Some(suggest::section(&section, &SECTIONS)),
                });
                continue;
            }
            for (key, entry) in entries {
                self.errors.push(ConfigError {
                    hint: Some(suggest::key(&section, &key, &self.known)),
                    key: format!("{section}.{key}"),
                    place: entry.place,
                    got: None,
                    expected: "no such key".to_owned(),
                });
            }
        }
        if self.errors.is_empty() {
            return Ok(());
        }
        Err(ConfigErrors {
            origin: self.origin,
            errors: self.errors,
        })
    }
}

/// An empty hint is none.
fn non_empty(hint: &str) -> Option<String> {
    (!hint.is_empty()).then(|| hint.to_owned())
}
