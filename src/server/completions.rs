//! `POST /v1/completions`: from a request to its answer.

use axum::Extension;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use mambabyte_datasets::text::lossy_text;
use tokio::sync::mpsc::Receiver;

use super::App;
use super::answer::{Choice, Header, Usage, reason};
use super::api::{CompletionRequest, Order, parse};
use super::error::ApiError;
use super::stream::stream;
use super::tokens::LogProbs;
use super::worker::{Outcome, Ticket, gone};
use crate::eval::{ByteScore, SequenceScore};
use crate::generate::{Finish, Piece};

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
    Extension(ticket): Extension<Ticket>,
    body: std::result::Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = parse(&body)?;
    let order = request.order(&app.options.name, &app.options.limits)?;
    let header = Header::new(&app);
    match order.stream {
        true => stream(&app, ticket, order, header),
        false => whole(&app, ticket, order, header).await,
    }
}

/// The answer in one piece.
async fn whole(
    app: &App,
    ticket: Ticket,
    order: Order,
    header: Header,
) -> Result<Response, ApiError> {
    let scored = match only_scores(&order) {
        true => score_and_one_byte(app, &ticket, &order).await?,
        false => write_and_score(app, &ticket, &order).await?,
    };
    // A second or so for megabytes, which the threads that answer everybody do not have.
    let body = tokio::task::spawn_blocking(move || {
        // It goes on where the client is gone meanwhile, and so keeps its place.
        let _ticket = ticket;
        body(&order, &header, &scored)
    });
    let body = match body.await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return Err(not_made(&error)),
        Err(error) => return Err(not_made(&error)),
    };
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], body).into_response())
}

fn not_made(error: &dyn std::error::Error) -> ApiError {
    tracing::error!("the answer could not be made: {error}");
    let message = format!("the answer could not be made: {error}");
    ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
}

/// The answer as JSON.
fn body(order: &Order, header: &Header, scored: &Scored) -> serde_json::Result<Vec<u8>> {
    let (texts, scores) = scored;
    let shown: Vec<Vec<u8>> = order
        .requests
        .iter()
        .zip(texts)
        .map(|(request, text)| match order.echo {
            true => [request.prompt.as_slice(), &text.bytes].concat(),
            false => text.bytes.clone(),
        })
        .collect();
    let mut choices = Vec::with_capacity(texts.len());
    for (index, (bytes, text)) in shown.iter().zip(texts).enumerate() {
        let top = order.logprobs.unwrap_or(0);
        choices.push(Choice {
            index,
            text: lossy_text(bytes),
            logprobs: scores
                .as_ref()
                .map(|scores| LogProbs::new(bytes, &scores[index], top)),
            finish_reason: Some(reason(text.finish)),
        });
    }
    let new = texts.iter().map(|text| text.bytes.len()).sum();
    serde_json::to_vec(&header.answer(choices, Some(Usage::new(order, new))))
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
    mut pieces: Receiver<Outcome<Piece>>,
    count: usize,
) -> Result<Vec<Text>, ApiError> {
    let empty = || Text {
        bytes: Vec::new(),
        finish: Finish::Cancelled,
    };
    let mut texts: Vec<Text> = std::iter::repeat_with(empty).take(count).collect();
    let mut left = count;
    while left > 0 {
        let piece = pieces.recv().await.unwrap_or_else(|| Err(gone()))?;
        let text = &mut texts[piece.index];
        text.bytes.extend(piece.bytes);
        if let Some(finish) = piece.finish {
            text.finish = finish;
            left -= 1;
        }
    }
    Ok(texts)
}
