//! A streamed answer: its pieces as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::{Instant, timeout_at};
use tokio_stream::wrappers::ReceiverStream;

use super::App;
use super::answer::{Answer, Choice, Header, Usage, reason};
use super::api::Order;
use super::error::ApiError;
use super::tokens::{LogProbs, ShownText};
use super::worker::{Failure, Outcome, Ticket, gone};
use crate::eval::ByteScore;
use crate::generate::{self, Piece};

/// Events of a stream that wait for the client at most.
const WAITING: usize = 64;

/// How long behind the deadline the model's thread may still say that it was reached.
const SLACK: Duration = Duration::from_secs(1);

/// An event; sending one does not fail.
type Sent = Result<Event, Infallible>;

/// The answer as server-sent events.
pub(super) fn stream(
    app: &App,
    ticket: Ticket,
    order: Order,
    header: Header,
) -> Result<Response, ApiError> {
    let pieces = app
        .worker
        .write(&ticket, order.requests.clone(), order.deadline)?;
    let (sender, receiver) = channel(WAITING);
    tokio::spawn(async move {
        deliver(pieces, &order, &header, &sender).await;
        // Only now: a stream that its client has not read takes room.
        drop(ticket);
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).into_response())
}

/// Sends all pieces, until the deadline at most: nothing else ends a stream whose client keeps the
/// connection and does not read.
async fn deliver(
    pieces: Receiver<Outcome<Piece>>,
    order: &Order,
    header: &Header,
    sender: &Sender<Sent>,
) {
    let end = Instant::from_std(order.deadline + SLACK);
    // That the client is gone is no error: dropping `pieces` then ends the work.
    let sending = send_pieces(pieces, order, header, sender);
    if timeout_at(end, sending).await.is_err() {
        let _ = sender.try_send(Ok(error_event(Failure::Deadline)));
    }
}

/// The client is gone.
struct Gone;

async fn send_pieces(
    mut pieces: Receiver<Outcome<Piece>>,
    order: &Order,
    header: &Header,
    sender: &Sender<Sent>,
) -> Result<(), Gone> {
    let send = |event: Event| async { sender.send(Ok(event)).await.map_err(|_| Gone) };
    let count = order.requests.len();
    let mut shown: Vec<ShownText> = std::iter::repeat_with(ShownText::default)
        .take(count)
        .collect();
    if order.echo {
        for (index, request) in order.requests.iter().enumerate() {
            let choice = Choice {
                index,
                text: shown[index].push(&request.prompt).0,
                logprobs: None,
                finish_reason: None,
            };
            send(event(&header.answer(vec![choice], None))).await?;
        }
    }
    let (mut left, mut new) = (count, 0);
    while left > 0 {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = sender.closed() => return Err(Gone),
        };
        let piece = match piece.unwrap_or_else(|| Err(gone())) {
            Ok(piece) => piece,
            Err(failure) => return send(error_event(failure)).await,
        };
        new += piece.bytes.len();
        let text = &mut shown[piece.index];
        let (mut certain, offsets) = text.push(&piece.bytes);
        if piece.finish.is_some() {
            certain += &std::mem::take(text).finish();
            left -= 1;
        }
        let scores: Vec<_> = piece.choices.iter().map(score).collect();
        let choice = Choice {
            index: piece.index,
            text: certain,
            logprobs: order
                .logprobs
                .map(|top| LogProbs::at(offsets, &piece.bytes, &scores, top)),
            finish_reason: piece.finish.map(reason),
        };
        send(event(&header.answer(vec![choice], None))).await?;
    }
    if order.include_usage {
        let usage = Some(Usage::new(order, new));
        send(event(&header.answer(Vec::new(), usage))).await?;
    }
    send(Event::default().data("[DONE]")).await
}

fn event(answer: &Answer<'_>) -> Event {
    // It cannot fail: all keys are text.
    Event::default().data(serde_json::to_string(answer).unwrap_or_default())
}

fn error_event(failure: Failure) -> Event {
    Event::default().data(ApiError::from(failure).body().to_string())
}

/// The log-probability that a byte was chosen by.
fn score(choice: &generate::Choice) -> Option<ByteScore> {
    Some(ByteScore {
        log_prob: choice.logprob,
        top: vec![(choice.top, choice.top_logprob)],
    })
}
