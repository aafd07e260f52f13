//! What a person sees of a running training: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Shows the course of a run on standard error.
pub(super) struct Display {
    bar: ProgressBar,
    terminal: bool,
    last_line: Option<Instant>,
    steps: u64,
}

impl Display {
    /// A display of a run of `steps` that has done `done`.
    pub(super) fn new(steps: u64, done: u64) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(steps),
            match terminal {
                true => ProgressDrawTarget::stderr(),
                false => ProgressDrawTarget::hidden(),
            },
        )
        .with_position(done);
        let template = "{bar:24} {pos}/{len} steps  {msg}  ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        Self {
            bar,
            terminal,
            last_line: None,
            steps,
        }
    }

    /// One more step.
    pub(super) fn step(&mut self, step: u64, bpb: f32, lr: f64, bytes_per_second: f64) {
        let text = format!(
            "{bpb:.3} bpb  lr {lr:.1e}  {:.1} kB/s",
            bytes_per_second / 1e3
        );
        self.bar.set_position(step);
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        if !self.terminal && (due || step == self.steps) {
            eprintln!("step {step}/{}  {text}", self.steps);
            self.last_line = Some(Instant::now());
        }
    }

    /// A line that stays.
    pub(super) fn note(&self, text: &str) {
        match self.terminal {
            true => self.bar.println(text),
            false => eprintln!("{text}"),
        }
    }

    /// The end of the display.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
