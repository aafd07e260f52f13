//! The command `generate`.

use std::borrow::Cow;
use std::io::{IsTerminal as _, Read as _, Write as _};
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::model_args::ModelArgs;
use super::{positive, print, print_json, read_named};
use crate::error::{Error, Result};
use crate::generate::{Completion, Finish, Request, SamplingConfig, Session, Timing, Utf8Stream};
use crate::terminal::{say, visible};

/// How often new text should reach the reader.
const BETWEEN_PIECES: Duration = Duration::from_millis(40);
/// Most bytes between two writes.
const MOST: usize = 64;

/// How bytes are chosen.
#[derive(Clone, Debug, Args)]
pub struct SamplingArgs {
    /// Divides the logits; 0 always takes the likeliest byte
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = super::temperature)]
    pub temperature: f64,
    /// Choose among so many likeliest bytes; 0 is no limit, 1 takes the likeliest
    #[arg(long, value_name = "K", default_value_t = 256, aliases = ["top_k", "topk"],
          value_parser = clap::value_parser!(u16).range(0..=256))]
    pub top_k: u16,
    /// Choose among the likeliest bytes that have this probability together
    #[arg(long, value_name = "P", default_value_t = 0.98, aliases = ["top_p", "topp"],
          value_parser = super::fraction)]
    pub top_p: f64,
    /// Choose among bytes at least this fraction as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, aliases = ["min_p", "minp"],
          value_parser = super::fraction)]
    pub min_p: f64,
    /// Make bytes that the text has already less likely: 1 does nothing, 1.2 is usual
    #[arg(long, value_name = "X", default_value_t = 1.0, alias = "repetition_penalty",
          value_parser = penalty)]
    pub repetition_penalty: f64,
}

impl SamplingArgs {
    /// The settings.
    pub fn config(&self) -> SamplingConfig {
        SamplingConfig {
            temperature: self.temperature,
            top_k: self.top_k.into(),
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
        }
    }
}

fn penalty(text: &str) -> Result<f64, String> {
    super::number_where(
        text,
        |it| (0.01..=100.0).contains(&it),
        "expected a number from 0.01 to 100",
    )
}

/// Arguments of `generate`.
#[derive(Clone, Debug, Args)]
pub struct GenerateArgs {
    /// The model.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text to go on from
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub prompt: String,
    /// File whose bytes to go on from; - is standard input
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub prompt_file: Option<std::path::PathBuf>,
    /// Bytes to write at most
    #[arg(long, value_name = "N", default_value_t = 256, aliases = ["max_new_tokens", "max-new-tokens"],
          value_parser = positive)]
    pub max_new_bytes: usize,
    /// Number of texts, each with draws of its own
    #[arg(long, value_name = "N", default_value_t = 1, alias = "num_samples", value_parser = positive)]
    pub num_samples: usize,
    /// How bytes are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Seed of the choices
    #[arg(long, value_name = "SEED", default_value_t = 4740)]
    pub seed: u64,
    /// End before this text comes; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,
    /// Write the prompt, too
    #[arg(long)]
    pub echo: bool,
    /// Write bytes as they are even to a terminal, control characters, too; elsewhere they always are
    #[arg(long)]
    pub raw: bool,
    /// Say on standard error how long prompt and bytes took
    #[arg(long)]
    pub timing: bool,
    /// Print JSON: the texts with their bytes, probabilities and ends
    #[arg(long, conflicts_with = "raw")]
    pub json: bool,
}

impl GenerateArgs {
    fn request(&self) -> Result<Request> {
        let prompt = match &self.prompt_file {
            Some(path) if path.as_os_str() == "-" => {
                let mut prompt = Vec::new();
                let read = std::io::stdin().lock().read_to_end(&mut prompt);
                read.map_err(Error::io("read", "standard input"))?;
                prompt
            }
            Some(path) => read_named(path)?,
            None => self.prompt.as_bytes().to_vec(),
        };
        Ok(Request {
            max_new_bytes: self.max_new_bytes,
            sampling: self.sampling.config(),
            seed: self.seed,
            stop: self.stop.iter().map(|it| it.as_bytes().to_vec()).collect(),
            ..Request::new(prompt)
        })
    }
}

/// Runs the command: new bytes go to standard output as they are chosen.
pub fn run(args: &GenerateArgs) -> Result<()> {
    let request = args.request()?;
    let mut opened = args.model.open()?;
    let how = opened.generator.describe();
    let mut session = opened.generator.start(&request.samples(args.num_samples))?;
    let mut output = Output::new(args, &request.prompt);
    let mut texts: Vec<Text> = (0..args.num_samples).map(Text::new).collect();
    if args.num_samples == 1 && !args.json {
        output.begin()?;
    }
    while !session.is_finished() {
        for piece in session.advance_ahead(steps(&session))? {
            if args.num_samples == 1 && !args.json {
                output.write(&piece.bytes)?;
            } else {
                texts[piece.index].take(piece);
            }
        }
    }
    let timing = session.timing();
    if args.json {
        let texts = texts.iter_mut().map(Text::finish).collect::<Vec<_>>();
        print_json(&Report {
            prompt: &String::from_utf8_lossy(&request.prompt),
            texts,
            timing: args.timing.then(|| seconds(timing)),
        })?;
    } else if args.num_samples > 1 {
        for text in &texts {
            output.heading(text.index)?;
            output.begin()?;
            output.write(&text.completion.bytes)?;
            output.finish()?;
        }
    } else {
        output.finish()?;
    }
    if args.timing && !args.json {
        say(&describe(timing, how));
    }
    Ok(())
}

/// Steps until the reader should see something again.
fn steps(session: &Session<'_>) -> usize {
    match session.step_time() {
        Some(step) => {
            let steps = BETWEEN_PIECES.as_secs_f64() / step.as_secs_f64().max(1e-9);
            (steps as usize).clamp(1, MOST)
        }
        None => 1,
    }
}

/// A line on how long it took.
fn describe(timing: Timing, how: &str) -> String {
    let rate = |bytes: usize, time: Duration| bytes as f64 / time.as_secs_f64().max(1e-9);
    format!(
        "prompt: {} bytes in {:.1} ms; written: {} bytes in {:.1} ms, {:.0} bytes/s ({how})",
        timing.prompt_bytes,
        timing.prefill.as_secs_f64() * 1e3,
        timing.new_bytes,
        timing.decode.as_secs_f64() * 1e3,
        rate(timing.new_bytes, timing.decode),
    )
}

/// Standard output: text for a terminal, bytes for everything else.
struct Output<'a> {
    echo: &'a [u8],
    /// None where bytes go out as they are.
    text: Option<Utf8Stream>,
    /// Whether text ended with a carriage return, which with a line feed after it ends a line.
    returned: bool,
}

impl<'a> Output<'a> {
    fn new(args: &GenerateArgs, prompt: &'a [u8]) -> Self {
        let as_text = !args.raw && std::io::stdout().is_terminal();
        Self {
            echo: if args.echo { prompt } else { &[] },
            text: as_text.then(Utf8Stream::new),
            returned: false,
        }
    }

    fn heading(&self, index: usize) -> Result<()> {
        // Text has a line's end behind it already.
        let before = if index > 0 && self.text.is_none() {
            "\n"
        } else {
            ""
        };
        print(&format!("{before}--- sample {} ---\n", index + 1))
    }

    fn begin(&mut self) -> Result<()> {
        let echo = self.echo;
        self.write(echo)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let shown = self.shown(bytes);
        let mut stdout = std::io::stdout().lock();
        stdout
            .write_all(&shown)
            .and_then(|()| stdout.flush())
            .map_err(Error::Stdout)
    }

    /// What is written for these bytes.
    fn shown<'b>(&mut self, bytes: &'b [u8]) -> Cow<'b, [u8]> {
        match &mut self.text {
            Some(text) => {
                let text = text.push(bytes);
                self.shown_text(text).into()
            }
            None => bytes.into(),
        }
    }

    fn shown_text(&mut self, text: String) -> Vec<u8> {
        let before = if self.returned { "\r" } else { "" };
        let mut text = before.to_owned() + &text;
        self.returned = text.ends_with('\r');
        if self.returned {
            text.pop();
        }
        visible(&text).into_owned().into_bytes()
    }

    /// The end of a text.
    fn finish(&mut self) -> Result<()> {
        let Some(text) = &mut self.text else {
            return Ok(());
        };
        let end = match std::mem::take(&mut self.returned) {
            true => "\r",
            false => "",
        };
        print(&(visible(end).into_owned() + &text.finish() + "\n"))
    }
}

/// A text that is shown when it is whole.
struct Text {
    index: usize,
    completion: Completion,
}

impl Text {
    fn new(index: usize) -> Self {
        let completion = Completion {
            bytes: Vec::new(),
            choices: Vec::new(),
            finish: Finish::Cancelled,
        };
        Self { index, completion }
    }

    fn take(&mut self, piece: crate::generate::Piece) {
        self.completion.bytes.extend(piece.bytes);
        self.completion.choices.extend(piece.choices);
        if let Some(finish) = piece.finish {
            self.completion.finish = finish;
        }
    }

    fn finish(&mut self) -> TextReport {
        let it = &self.completion;
        TextReport {
            text: String::from_utf8_lossy(&it.bytes).into_owned(),
            logprobs: it.choices.iter().map(|choice| choice.logprob).collect(),
            finish: match it.finish {
                Finish::Length => "length",
                Finish::Stop(_) => "stop",
                Finish::Cancelled => "cancelled",
            },
            bytes: it.bytes.clone(),
        }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    prompt: &'a str,
    texts: Vec<TextReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timing: Option<Seconds>,
}

#[derive(Serialize)]
struct TextReport {
    text: String,
    bytes: Vec<u8>,
    logprobs: Vec<f32>,
    finish: &'static str,
}

/// [`Timing`] in seconds.
#[derive(Serialize)]
struct Seconds {
    prompt_bytes: usize,
    prefill_seconds: f64,
    new_bytes: usize,
    decode_seconds: f64,
}

fn seconds(timing: Timing) -> Seconds {
    Seconds {
        prompt_bytes: timing.prompt_bytes,
        prefill_seconds: timing.prefill.as_secs_f64(),
        new_bytes: timing.new_bytes,
        decode_seconds: timing.decode.as_secs_f64(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_text_and_all_else_the_bytes() {
        let shown = |text: Option<Utf8Stream>| {
            let mut output = Output {
                echo: &[],
                text,
                returned: false,
            };
            [&b"\x1b]0;title\x07\xc3"[..], b"\xa9\r", b"\n\r", b"\r\n"]
                .map(|bytes| output.shown(bytes).into_owned())
                .concat()
        };
        let expected = "␛]0;title␇é\r\n␍\r\n";
        assert_eq!(shown(Some(Utf8Stream::new())), expected.as_bytes());
        assert_eq!(shown(None), b"\x1b]0;title\x07\xc3\xa9\r\n\r\r\n");
    }
}
