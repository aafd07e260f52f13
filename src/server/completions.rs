//! `POST /v1/completions`: from a request to its answer, whole or streamed.

use std::convert::Infallible;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use mambabyte_datasets::text::{Utf8Stream, lossy_text};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Receiver, Sender, UnboundedReceiver, channel};
use tokio_stream::wrappers::ReceiverStream;

use super::App;
use super::api::{ApiError, CompletionRequest, LogProbs, Order, parse};
use super::tokens::{text_offsets, token};
use super::worker::{Failure, Outcome, Ticket};
use crate::clock::since_1970;
use crate::eval::{ByteLogProb, ByteScore, SequenceScore};
use crate::generate::{Choice, Finish, Piece};

/// What stands before a text that has no prompt, when it is scored: the byte that generation starts
/// behind.
const START: &[u8] = b"\n";

/// A text of an answer.
struct Text {
    bytes: Vec<u8>,
    finish: Finish,
}

/// Handles the request.
pub(super) async fn completions(
    State(app): State<App>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = parse(&body)?;
    let order = request.order(&app.options.name, &app.options.limits)?;
    let ticket = app.worker.enter()?;
    let header = Header::new(&app);
    match order.stream {
        true => stream(&app, &ticket, order, header),
        false => whole(&app, &ticket, &order, &header).await,
    }
}

/// What all pieces of an answer have in common.
#[derive(Clone)]
struct Header {
    id: String,
    created: u64,
    model: String,
}

impl Header {
    fn new(app: &App) -> Self {
        let number = app.next.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("cmpl-{:x}-{number}", app.started),
            created: since_1970().as_secs(),
            model: app.options.name.clone(),
        }
    }

    fn answer(&self, choices: &[Value], usage: Option<Value>) -> Value {
        let mut answer = json!({
            "id": self.id, "object": "text_completion", "created": self.created,
            "model": self.model, "choices": choices,
        });
        if let Some(usage) = usage {
            answer["usage"] = usage;
        }
        answer
    }
}

/// The answer in one piece.
async fn whole(
    app: &App,
    ticket: &Ticket,
    order: &Order,
    header: &Header,
) -> Result<Response, ApiError> {
    let (texts, scores) = match only_scores(order) {
        true => score_and_one_byte(app, ticket, order).await?,
        false => write_and_score(app, ticket, order).await?,
    };
    let mut choices = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let prompt = &order.requests[index].prompt;
        let shown = match order.echo {
            true => [prompt.as_slice(), &text.bytes].concat(),
            false => text.bytes.clone(),
        };
        let logprobs = scores
            .as_ref()
            .map(|scores| log_probs(&shown, &scores[index], order.logprobs.unwrap_or(0)));
        choices.push(json!({
            "index": index, "text": lossy_text(&shown), "logprobs": logprobs,
            "finish_reason": reason(text.finish),
        }));
    }
    let new = texts.iter().map(|text| text.bytes.len()).sum();
    let answer = header.answer(&choices, Some(usage(order, new)));
    Ok(Json(answer).into_response())
}

/// Whether all that is asked follows from one pass over the prompts: their log-probabilities and at
/// most the likeliest byte behind them. It is what evaluation harnesses ask.
fn only_scores(order: &Order) -> bool {
    order.echo
        && order.logprobs.is_some()
        && order.requests.iter().all(|request| {
            let greedy = request.sampling.temperature == 0.0 || request.sampling.top_k == 1;
            let plain = request.sampling.repetition_penalty == 1.0 && request.stop.is_empty();
            !request.prompt.is_empty()
                && (request.max_new_bytes == 0 || (request.max_new_bytes == 1 && greedy && plain))
        })
}

type Scored = (Vec<Text>, Option<Vec<Vec<Option<ByteScore>>>>);

/// One pass over the prompts, whose last logits give the new byte.
async fn score_and_one_byte(app: &App, ticket: &Ticket, order: &Order) -> Result<Scored, ApiError> {
    // With none asked for, the likeliest byte is still the answer.
    let top = order.logprobs.unwrap_or(0).max(1);
    let prompts = order.requests.iter().map(|it| it.prompt.clone()).collect();
    let scores = app
        .worker
        .score(ticket, prompts, top, order.deadline)
        .await?;
    let mut texts = Vec::with_capacity(scores.len());
    let mut all = Vec::with_capacity(scores.len());
    for (request, score) in order.requests.iter().zip(scores) {
        let SequenceScore { bytes, next } = score;
        // The first byte has no score: nothing predicts it.
        let mut bytes: Vec<Option<ByteScore>> = std::iter::once(None)
            .chain(bytes.into_iter().map(Some))
            .collect();
        let new: Vec<u8> = next
            .iter()
            .take(request.max_new_bytes)
            .map(|it| it.0)
            .collect();
        if let (1, Some((_, log_prob))) = (new.len(), next.first()) {
            bytes.push(Some(ByteScore {
                log_prob: *log_prob,
                top: next,
            }));
        }
        texts.push(Text {
            bytes: new,
            finish: Finish::Length,
        });
        all.push(bytes);
    }
    Ok((texts, Some(all)))
}

/// Writes the texts; a pass over prompts and texts together then gives all log-probabilities.
async fn write_and_score(app: &App, ticket: &Ticket, order: &Order) -> Result<Scored, ApiError> {
    let pieces = app
        .worker
        .write(ticket, order.requests.clone(), order.deadline)?;
    let texts = collect(pieces, order.requests.len()).await?;
    let Some(top) = order.logprobs else {
        return Ok((texts, None));
    };
    let contexts: Vec<&[u8]> = order
        .requests
        .iter()
        .map(|request| match request.prompt.is_empty() {
            true => START,
            false => request.prompt.as_slice(),
        })
        .collect();
    let sequences = contexts.iter().zip(&texts);
    let sequences = sequences.map(|(context, text)| [context, text.bytes.as_slice()].concat());
    let scores = app
        .worker
        .score(ticket, sequences.collect(), top.max(1), order.deadline)
        .await?;
    let all = scores.into_iter().enumerate().map(|(index, score)| {
        let scored = std::iter::once(None).chain(score.bytes.into_iter().map(Some));
        let hidden = match order.echo && !order.requests[index].prompt.is_empty() {
            true => 0,
            false => contexts[index].len(),
        };
        scored.skip(hidden).collect()
    });
    let all = all.collect();
    Ok((texts, Some(all)))
}

/// Waits for all texts of a job.
async fn collect(
    mut pieces: UnboundedReceiver<Outcome<Piece>>,
    count: usize,
) -> Result<Vec<Text>, ApiError> {
    let empty = || Text {
        bytes: Vec::new(),
        finish: Finish::Cancelled,
    };
    let mut texts: Vec<Text> = std::iter::repeat_with(empty).take(count).collect();
    let mut left = count;
    while left > 0 {
        let ended = Failure::Broken("the model's thread has ended".to_owned());
        let piece = pieces.recv().await.unwrap_or(Err(ended))?;
        let text = &mut texts[piece.index];
        text.bytes.extend(piece.bytes);
        if let Some(finish) = piece.finish {
            text.finish = finish;
            left -= 1;
        }
    }
    Ok(texts)
}

fn reason(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop(_) => "stop",
        Finish::Length | Finish::Cancelled => "length",
    }
}

fn usage(order: &Order, new: usize) -> Value {
    let prompts: usize = order.requests.iter().map(|it| it.prompt.len()).sum();
    json!({
        "prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new,
    })
}

/// The log-probabilities of `bytes`, with the `top` likeliest at each.
fn log_probs(bytes: &[u8], scores: &[Option<ByteScore>], top: usize) -> LogProbs {
    let likeliest = |score: &ByteScore| {
        let pair = |(byte, log_prob): &ByteLogProb| (token(*byte), number(*log_prob));
        score.top.iter().take(top).map(pair).collect::<Map<_, _>>()
    };
    LogProbs {
        tokens: bytes.iter().map(|byte| token(*byte)).collect(),
        token_logprobs: scores
            .iter()
            .map(|score| score.as_ref().map(|it| f64::from(it.log_prob)))
            .collect(),
        top_logprobs: scores
            .iter()
            .map(|score| score.as_ref().map(likeliest))
            .collect(),
        text_offset: text_offsets(bytes),
    }
}

/// A number in all its digits, so that the sum of a client is ours.
fn number(log_prob: f32) -> Value {
    json!(f64::from(log_prob))
}

/// Events of a stream that wait for the client at most.
const WAITING: usize = 64;

/// The answer as server-sent events.
fn stream(app: &App, ticket: &Ticket, order: Order, header: Header) -> Result<Response, ApiError> {
    let pieces = app
        .worker
        .write(ticket, order.requests.clone(), order.deadline)?;
    let (sender, receiver): (_, Receiver<Result<Event, Infallible>>) = channel(WAITING);
    tokio::spawn(async move {
        // An error here is that the client is gone: dropping `pieces` then ends the work.
        let _ = send_pieces(pieces, &order, &header, &sender).await;
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).into_response())
}

/// The client is gone.
struct Gone;

async fn send_pieces(
    mut pieces: UnboundedReceiver<Outcome<Piece>>,
    order: &Order,
    header: &Header,
    sender: &Sender<Result<Event, Infallible>>,
) -> Result<(), Gone> {
    let send = |data: String| async {
        let event = Event::default().data(data);
        sender.send(Ok(event)).await.map_err(|_| Gone)
    };
    let count = order.requests.len();
    let mut decoders: Vec<Utf8Stream> = std::iter::repeat_with(Utf8Stream::new)
        .take(count)
        .collect();
    if order.echo {
        for (index, request) in order.requests.iter().enumerate() {
            let choice = piece_of_answer(index, &decoders[index].push(&request.prompt), None, None);
            send(header.answer(&[choice], None).to_string()).await?;
        }
    }
    let (mut left, mut new) = (count, 0);
    while left > 0 {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = sender.closed() => return Err(Gone),
        };
        let ended = Failure::Broken("the model's thread has ended".to_owned());
        let piece = match piece.unwrap_or(Err(ended)) {
            Ok(piece) => piece,
            Err(failure) => {
                send(ApiError::from(failure).body().to_string()).await?;
                return Ok(());
            }
        };
        new += piece.bytes.len();
        let decoder = &mut decoders[piece.index];
        let mut text = decoder.push(&piece.bytes);
        if piece.finish.is_some() {
            text += &std::mem::take(decoder).finish();
            left -= 1;
        }
        let logprobs = order.logprobs.map(|top| chosen(&piece.choices, top));
        let choice = piece_of_answer(piece.index, &text, logprobs, piece.finish);
        send(header.answer(&[choice], None).to_string()).await?;
    }
    if order.include_usage {
        send(header.answer(&[], Some(usage(order, new))).to_string()).await?;
    }
    send("[DONE]".to_owned()).await
}

fn piece_of_answer(
    index: usize,
    text: &str,
    logprobs: Option<LogProbs>,
    finish: Option<Finish>,
) -> Value {
    json!({
        "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.map(reason),
    })
}

/// The log-probabilities that bytes were chosen by.
fn chosen(choices: &[Choice], top: usize) -> LogProbs {
    let bytes: Vec<u8> = choices.iter().map(|it| it.byte).collect();
    let score = |choice: &Choice| {
        Some(ByteScore {
            log_prob: choice.logprob,
            top: vec![(choice.top, choice.top_logprob)],
        })
    };
    let scores: Vec<_> = choices.iter().map(score).collect();
    log_probs(&bytes, &scores, top)
}
