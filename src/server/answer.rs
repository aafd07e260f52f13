//! The form of an answer to `POST /v1/completions`, and of the pieces of a streamed one.

use std::sync::atomic::Ordering;

use serde::Serialize;

use super::App;
use super::api::Order;
use super::tokens::LogProbs;
use crate::clock::since_1970;
use crate::generate::Finish;

/// What all pieces of an answer have in common.
pub(super) struct Header {
    id: String,
    created: u64,
    model: String,
}

impl Header {
    pub fn new(app: &App) -> Self {
        let number = app.next.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("cmpl-{:x}-{number}", app.started),
            created: since_1970().as_secs(),
            model: app.options.name.clone(),
        }
    }

    pub fn answer<'a>(&'a self, choices: Vec<Choice<'a>>, usage: Option<Usage>) -> Answer<'a> {
        Answer {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices,
            usage,
        }
    }
}

/// An answer, or a piece of one.
#[derive(Serialize)]
pub(super) struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Usage>,
}

/// A text of an answer, or a piece of one.
#[derive(Serialize)]
pub(super) struct Choice<'a> {
    /// Number of the text.
    pub index: usize,
    pub text: String,
    pub logprobs: Option<LogProbs<'a>>,
    /// Set in the last piece.
    pub finish_reason: Option<&'static str>,
}

/// Why a text ended, in OpenAI's words.
pub(super) fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop(_) => "stop",
        Finish::Length | Finish::Cancelled => "length",
    }
}

/// The counts of an answer, in bytes.
#[derive(Clone, Copy, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

impl Usage {
    /// Of an answer with `new` bytes written.
    pub fn new(order: &Order, new: usize) -> Self {
        let prompts = order.requests.iter().map(|it| it.prompt.len()).sum();
        Self {
            prompt_tokens: prompts,
            completion_tokens: new,
            total_tokens: prompts + new,
        }
    }
}
