//! What a person sees of a running training: a bar on a terminal, lines elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::terminal::{say, visible};

/// Between lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Between two looks of the bar at the clock, before the first step.
const TICK: Duration = Duration::from_millis(200);

/// What is going on before a GPU's first step.
const COMPILING: &str = "first step: compiling kernels where they are not in the cache";

/// Shows the course of a run on standard error.
pub(super) struct Display {
    bar: ProgressBar,
    terminal: bool,
    last_line: Option<Instant>,
    steps: u64,
}

impl Display {
    /// A display of a run of `steps` that has done `done`. Before its first step a GPU's kernels are
    /// compiled, which takes seconds: `compiles` says so.
    pub(super) fn new(steps: u64, done: u64, compiles: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            Some(steps),
            match terminal {
                true => ProgressDrawTarget::stderr(),
                false => ProgressDrawTarget::hidden(),
            },
        )
        .with_position(done);
        let template = "{bar:24} {pos}/{len} steps  {msg}  {elapsed}, ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.reset_eta();
        if compiles {
            bar.set_message(COMPILING);
            bar.enable_steady_tick(TICK);
            if !terminal {
                say(COMPILING);
            }
        }
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
        self.bar.disable_steady_tick();
        self.bar.set_position(step);
        self.bar.set_message(text.clone());
        let due = self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY);
        if !self.terminal && (due || step == self.steps) {
            say(&format!("step {step}/{}  {text}", self.steps));
            self.last_line = Some(Instant::now());
        }
    }

    /// A line that stays.
    pub(super) fn note(&self, text: &str) {
        match self.terminal {
            true => self.bar.println(visible(text)),
            false => say(text),
        }
    }

    /// The end of the display.
    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
