//! What is wrong with a config: every problem at once, each with its key, its value, what was
//! expected and what to do.

use std::fmt;

/// Where a value stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Line of the file, from 1.
    Line(usize),
    /// An override on the command line.
    Override,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(line) => write!(f, "line {line}"),
            Self::Override => f.write_str("--set"),
        }
    }
}

/// One problem of a config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// Dotted key, for instance `train.length`; empty where the text is not TOML at all.
    pub key: String,
    /// Where the value stands, if it stands anywhere.
    pub place: Option<Place>,
    /// The value found, as it would be written in TOML.
    pub got: Option<String>,
    /// What the value has to be.
    pub expected: String,
    /// What to do about it.
    pub hint: Option<String>,
}

impl fmt::Display for ConfigError {
    /// One line, and one more for the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut subject = Vec::new();
        if !self.key.is_empty() {
            subject.push(format!("`{}`", self.key));
        }
        if let Some(place) = &self.place {
            subject.push(match subject.is_empty() {
                true => place.to_string(),
                false => format!("({place})"),
            });
        }
        if !subject.is_empty() {
            write!(f, "{}: ", subject.join(" "))?;
        }
        match &self.got {
            Some(got) => write!(f, "got `{got}`, expected {}", self.expected)?,
            None => f.write_str(&self.expected)?,
        }
        if let Some(hint) = &self.hint {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

/// Every problem of one config.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// The file, or another name of where the config came from.
    pub origin: String,
    /// The problems; at least one.
    pub errors: Vec<ConfigError>,
}

impl ConfigErrors {
    /// A single problem that concerns the config as a whole.
    pub(super) fn whole(origin: &str, problem: String, hint: &str) -> Self {
        Self {
            origin: origin.to_owned(),
            errors: vec![ConfigError {
                key: String::new(),
                place: None,
                got: None,
                expected: problem,
                hint: Some(hint.to_owned()),
            }],
        }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [only] = self.errors.as_slice() {
            return write!(f, "{}: {only}", self.origin);
        }
        write!(f, "{} has {} problems", self.origin, self.errors.len())?;
        for error in &self.errors {
            write!(f, "\n\n  {}", error.to_string().replace('\n', "\n  "))?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}
