//! Reports of how far a long operation has come.

use std::io::Write as _;

use indicatif::{ProgressBar, ProgressStyle};

/// Receives progress, in bytes, of downloads, preparation and verification.
///
/// Methods may be called from several threads at once.
pub trait Progress: Sync {
    /// A stage of `total` bytes begins. Stages do not overlap.
    fn start(&self, stage: &str, total: u64);
    /// `bytes` more have been handled in the current stage.
    fn advance(&self, bytes: u64);
    /// The current stage has come to `bytes`, which may be less than before.
    fn reach(&self, bytes: u64);
    /// Something worth a line that is not an error, such as a retry.
    fn note(&self, message: &str);
    /// The current stage is done.
    fn finish(&self);
}

/// Reports nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn start(&self, _stage: &str, _total: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn reach(&self, _bytes: u64) {}
    fn note(&self, _message: &str) {}
    fn finish(&self) {}
}

/// A progress bar on standard error, hidden when that is not a terminal.
#[derive(Clone, Debug)]
pub struct Bar {
    bar: ProgressBar,
}

impl Bar {
    /// A bar that appears at the first stage.
    pub fn new() -> Self {
        let bar = ProgressBar::no_length();
        let template = "{msg:>20} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        // The template is a constant; a plain bar is the harmless answer to a mistake in it.
        let style = ProgressStyle::with_template(template)
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> ");
        bar.set_style(style);
        Self { bar }
    }
}

impl Default for Bar {
    fn default() -> Self {
        Self::new()
    }
}

impl Progress for Bar {
    fn start(&self, stage: &str, total: u64) {
        self.bar.reset();
        self.bar.set_length(total);
        self.bar.set_message(stage.to_owned());
    }

    fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    fn reach(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    fn note(&self, message: &str) {
        // With standard error gone there is nobody left to tell.
        self.bar.suspend(|| {
            let _ = writeln!(std::io::stderr(), "{message}");
        });
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
