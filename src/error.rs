//! The errors of the program, their exit codes, and how they are shown.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};

use mambabyte_datasets::DataError;

use crate::config::ConfigErrors;
use crate::terminal::{say, visible};

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a command could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The config has problems, all of them listed.
    #[error(transparent)]
    Config(#[from] ConfigErrors),

    /// The command line asks for what cannot be done.
    #[error("{message}")]
    Usage {
        /// What is wrong with it.
        message: String,
        /// What to write instead.
        hint: String,
    },

    /// Data could not be read, written or fetched.
    #[error(transparent)]
    Data(#[from] DataError),

    /// A checkpoint could not be written, or what is there cannot be used.
    #[error("checkpoint `{}`: {reason}", path.display())]
    Checkpoint {
        /// Folder or file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        hint: String,
    },

    /// A model's scores are no numbers.
    #[error("the model's scores of {text} are not numbers")]
    NotNumbers {
        /// What it read.
        text: String,
    },

    /// The device that was asked for cannot be used.
    #[error("device `{device}`: {reason}")]
    Device {
        /// The device as in a config, for instance `cuda:0`.
        device: String,
        /// Why it cannot be used.
        reason: String,
        /// What to do.
        hint: String,
    },

    /// The device's memory does not suffice.
    #[error("out of memory on {device}: {reason}")]
    OutOfMemory {
        /// The device.
        device: String,
        /// What did not fit, with sizes where they are known.
        reason: String,
        /// What to do.
        hint: String,
    },

    /// Training does not get anywhere any more.
    #[error("training diverged at step {step}: {reason}")]
    Diverged {
        /// The optimizer step.
        step: u64,
        /// What was seen, with the numbers.
        reason: String,
        /// What to do.
        hint: String,
    },

    /// The user asked to stop.
    #[error("interrupted: {state}")]
    Interrupted {
        /// What is on disk now and how to go on.
        state: String,
    },

    /// The operating system refused an operation on a file.
    #[error("could not {action} `{}`: {source}", path.display())]
    Io {
        /// What was attempted, as a verb: "read", "create".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },

    /// Standard output could not be written.
    #[error("could not write to standard output: {0}")]
    Stdout(#[source] io::Error),

    /// Anything that no other kind describes.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl Error {
    /// Maker of [`Error::Io`] for `map_err`.
    pub fn io(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }

    /// Maker of the error of a file that the command line names and that cannot be read:
    /// [`Error::Usage`] where it does not exist or is a folder, else [`Error::Io`].
    pub(crate) fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => Self::Usage {
                message: format!("there is nothing at `{}`", path.display()),
                hint: "name a file that is there".to_owned(),
            },
            io::ErrorKind::IsADirectory => Self::Usage {
                message: format!("`{}` is a folder", path.display()),
                hint: "name a file".to_owned(),
            },
            _ => Self::io("read", path)(source),
        }
    }

    /// The process's exit code.
    ///
    /// | code | meaning |
    /// | --- | --- |
    /// | 0 | done (also where the reader of standard output went away) |
    /// | 1 | unexpected |
    /// | 2 | command line or config |
    /// | 3 | data |
    /// | 4 | checkpoint |
    /// | 5 | device |
    /// | 6 | out of memory |
    /// | 7 | training diverged |
    /// | 130 | interrupted |
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Stdout(source) if source.kind() == io::ErrorKind::BrokenPipe => 0,
            Self::Io { .. } | Self::Stdout(_) | Self::Other(_) => 1,
            Self::Config(_) | Self::Usage { .. } => 2,
            Self::Data(_) => 3,
            Self::Checkpoint { .. } | Self::NotNumbers { .. } => 4,
            Self::Device { .. } => 5,
            Self::OutOfMemory { .. } => 6,
            Self::Diverged { .. } => 7,
            Self::Interrupted { .. } => 130,
        }
    }

    /// What to do about it, where the message does not say so itself.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Usage { hint, .. }
            | Self::Checkpoint { hint, .. }
            | Self::Device { hint, .. }
            | Self::OutOfMemory { hint, .. }
            | Self::Diverged { hint, .. } => hint.clone(),
            Self::NotNumbers { .. } => {
                "its weights are damaged, or too large for this precision; if \
                                        it is so with `--precision fp32`, it is the weights"
                    .to_owned()
            }
            Self::Io { .. } => {
                "check that the path exists, that you may use it and that the disk is not full"
                    .to_owned()
            }
            _ => String::new(),
        };
        (!hint.is_empty()).then_some(hint)
    }

    /// The text shown to the user, without the leading "error:": the message, its causes, and a
    /// line that begins with `hint:`.
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        // A message usually quotes its immediate cause; only what is not yet said is added.
        let mut cause = std::error::Error::source(self);
        while let Some(source) = cause {
            let said = source.to_string();
            if !text.contains(&said) {
                let _ = write!(text, "\n  caused by: {said}");
            }
            cause = source.source();
        }
        if let Some(hint) = self.hint() {
            let _ = write!(text, "\nhint: {hint}");
        }
        text
    }

    /// Shows the error on standard error, unless it is only that nobody reads the output any more.
    pub fn print(&self) {
        if self.exit_code() != 0 {
            print_problem("error", "31", &self.report());
        }
    }
}

/// Shows something the user should know, on standard error.
pub fn print_warning(text: &str) {
    print_problem("warning", "33", text);
}

/// Whether to use colours on a stream: a terminal, and the user has not said no.
pub(crate) fn colored(terminal: bool) -> bool {
    terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn print_problem(label: &str, color: &str, text: &str) {
    let terminal = io::stderr().is_terminal();
    // Messages quote what files and names hold.
    let text = match terminal {
        true => visible(text),
        false => text.into(),
    };
    say(&match colored(terminal) {
        true => format!("\x1b[1;{color}m{label}:\x1b[0m {text}"),
        false => format!("{label}: {text}"),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_exit_code() {
        let config = ""
            .parse::<crate::config::Config>()
            .expect_err("nothing required is there");
        let text = String::new;
        let cases = [
            (Error::Config(config), 2),
            (
                Error::Usage {
                    message: text(),
                    hint: text(),
                },
                2,
            ),
            (
                Error::Checkpoint {
                    path: "x".into(),
                    reason: text(),
                    hint: text(),
                },
                4,
            ),
            (
                Error::Device {
                    device: text(),
                    reason: text(),
                    hint: text(),
                },
                5,
            ),
            (
                Error::OutOfMemory {
                    device: text(),
                    reason: text(),
                    hint: text(),
                },
                6,
            ),
            (
                Error::Diverged {
                    step: 1,
                    reason: text(),
                    hint: text(),
                },
                7,
            ),
            (Error::Interrupted { state: text() }, 130),
            (Error::io("read", "x")(io::ErrorKind::NotFound.into()), 1),
            (Error::Stdout(io::ErrorKind::StorageFull.into()), 1),
            (Error::Stdout(io::ErrorKind::BrokenPipe.into()), 0),
            (anyhow::anyhow!("odd").into(), 1),
        ];
        for (error, code) in cases {
            assert_eq!(error.exit_code(), code, "{error:?}");
        }
        let data = DataError::LoaderStopped { step: 1 };
        assert_eq!(Error::from(data).exit_code(), 3);
    }

    #[test]
    fn a_report_has_a_hint_line_and_no_repeated_cause() {
        let error = Error::io("read", "a.toml")(io::Error::other("the disk is on fire"));
        let report = error.report();
        assert_eq!(report.matches("the disk is on fire").count(), 1);
        assert!(
            report
                .lines()
                .nth(1)
                .is_some_and(|line| line.starts_with("hint: "))
        );
        let error = Error::Other(anyhow::anyhow!("inner").context("outer"));
        assert_eq!(error.report(), "outer\n  caused by: inner");
    }
}
