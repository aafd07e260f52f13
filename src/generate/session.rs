//! Sequences that are being written side by side.

use std::time::{Duration, Instant};

use mambabyte_kernels::sampling::{BYTES, Choice, Draw, Lane};

use super::request::{Finish, Piece, Request, Timing};
use super::sampling::Draws;
use super::stop::StopFilter;
use super::{Generator, prefill};
use crate::error::{Error, Result};

/// Requests at work.
#[derive(Debug)]
pub struct Session<'g> {
    generator: &'g mut Generator,
    texts: Vec<Text>,
    timing: Timing,
    /// Steps of the piece that has been begun ahead, if any.
    begun: usize,
}

/// One text on its way.
#[derive(Debug)]
struct Text {
    /// Bytes still to choose.
    left: usize,
    /// Bytes chosen.
    chosen: usize,
    forced: Vec<u8>,
    draws: Draws,
    stop: StopFilter,
    finish: Option<Finish>,
    /// Whether the last piece has been handed out.
    told: bool,
}

impl Text {
    fn new(request: &Request) -> Self {
        Self {
            left: request.max_new_bytes,
            chosen: 0,
            forced: request.forced.clone(),
            draws: Draws::new(request.seed, request.stream),
            stop: StopFilter::new(request.stop.clone()),
            finish: (request.max_new_bytes == 0).then_some(Finish::Length),
            told: false,
        }
    }

    /// What its byte number `ahead` behind those chosen is chosen with.
    fn draw(&mut self, ahead: usize) -> Draw {
        Draw {
            number: self.draws.next(),
            forced: self.forced.get(self.chosen + ahead).copied(),
        }
    }

    /// Takes chosen bytes; returns those that are certain to be part of the text.
    fn take(&mut self, choices: impl Iterator<Item = Choice>) -> Vec<Choice> {
        let mut out = Vec::new();
        for choice in choices {
            if self.finish.is_some() {
                break;
            }
            self.left -= 1;
            self.chosen += 1;
            if let Some(index) = self.stop.push(choice, &mut out) {
                self.finish = Some(Finish::Stop(index));
            } else if self.left == 0 {
                self.stop.finish(&mut out);
                self.finish = Some(Finish::Length);
            }
        }
        out
    }
}

impl<'g> Session<'g> {
    pub(super) fn start(generator: &'g mut Generator, requests: &[Request]) -> Result<Self> {
        requests.iter().try_for_each(Request::check)?;
        let began = Instant::now();
        let prompts: Vec<&[u8]> = requests.iter().map(|it| it.prompt.as_slice()).collect();
        if !prompts.is_empty() {
            let (logits, state) = prefill::read(&generator.model, &generator.device, &prompts);
            let lanes = requests.iter().map(lane).collect();
            generator.decoder.begin(logits, state, lanes);
            // Reading the prompts is over when the device has done it.
            generator.sync()?;
        }
        Ok(Self {
            generator,
            texts: requests.iter().map(Text::new).collect(),
            timing: Timing {
                prompt_bytes: prompts.iter().map(|prompt| prompt.len()).sum(),
                prefill: began.elapsed(),
                ..Timing::default()
            },
            begun: 0,
        })
    }

    /// Whether every text has ended, and has been handed out to its end.
    pub fn is_finished(&self) -> bool {
        self.texts.iter().all(|text| text.told)
    }

    /// Writes up to `most` more bytes of every text that has not ended: what is new of each, with
    /// the texts that have nothing new left out.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn advance(&mut self, most: usize) -> Result<Vec<Piece>> {
        self.write(most, false)
    }

    /// As [`advance`](Self::advance), and has a GPU begin the next piece before this one is waited for,
    /// so that it does not stand still between the two. The next piece, whoever asks for it, has these
    /// `most` bytes.
    ///
    /// # Errors
    ///
    /// If the device fails.
    pub fn advance_ahead(&mut self, most: usize) -> Result<Vec<Piece>> {
        self.write(most, true)
    }

    fn write(&mut self, most: usize, ahead: bool) -> Result<Vec<Piece>> {
        let batch = self.texts.len();
        let began = Instant::now();
        if self.begun == 0 {
            self.begun = self.begin(0, most);
        }
        let steps = self.begun;
        let mut choices = Vec::new();
        // What was begun ahead of an end is of no use.
        if steps > 0 && self.texts.iter().any(|text| text.finish.is_none()) {
            self.begun = if ahead { self.begin(steps, most) } else { 0 };
            choices = self.generator.decoder.take();
            self.timing.decode += began.elapsed();
            self.timing.new_bytes += choices.len();
        }
        let mut pieces = Vec::new();
        for (index, text) in self.texts.iter_mut().enumerate() {
            let new = choices.iter().skip(index).step_by(batch).copied();
            let choices = text.take(new);
            if choices.iter().any(|choice| choice.logprob.is_nan()) {
                return Err(Error::NotNumbers {
                    text: "the text so far".to_owned(),
                });
            }
            if text.told || (choices.is_empty() && text.finish.is_none()) {
                continue;
            }
            text.told = text.finish.is_some();
            pieces.push(Piece {
                index,
                bytes: choices.iter().map(|choice| choice.byte).collect(),
                choices,
                finish: text.finish,
            });
        }
        Ok(pieces)
    }

    /// Has the bytes chosen that come `behind` so many more, at most `most` of them; returns their
    /// number.
    fn begin(&mut self, behind: usize, most: usize) -> usize {
        let unfinished = self.texts.iter().filter(|text| text.finish.is_none());
        let left = unfinished.map(|text| text.left).max().unwrap_or(0);
        let steps = most.min(left.saturating_sub(behind));
        if steps > 0 {
            let mut draws = Vec::with_capacity(steps * self.texts.len());
            for step in behind..behind + steps {
                draws.extend(self.texts.iter_mut().map(|text| text.draw(step)));
            }
            self.generator.decoder.queue(draws);
        }
        steps
    }

    /// Ends a text where it is; bytes held back are dropped.
    pub fn cancel(&mut self, index: usize) {
        let text = &mut self.texts[index];
        text.finish.get_or_insert(Finish::Cancelled);
    }

    /// How long it took so far.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// How long a step took so far; none before the first.
    pub fn step_time(&self) -> Option<Duration> {
        let steps = self.timing.new_bytes / self.texts.len().max(1);
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        self.timing.decode.checked_div(steps)
    }

    /// Scores of what comes next, `[B][V]`: the logits that the next byte of each sequence is chosen
    /// from, behind what has been begun ahead. For sequences that ended before others they are of no
    /// use.
    pub fn logits(&self) -> Vec<Vec<f32>> {
        let logits = self.generator.decoder.logits();
        let vocabulary = logits.len() / self.texts.len().max(1);
        logits
            .chunks(vocabulary.max(1))
            .map(<[f32]>::to_vec)
            .collect()
    }
}

/// A sequence with all bytes of its prompt seen.
fn lane(request: &Request) -> Lane {
    let mut seen = [false; BYTES];
    for byte in &request.prompt {
        seen[usize::from(*byte)] = true;
    }
    Lane {
        sampling: request.sampling.kernel(),
        seen,
    }
}
