//! The way to the thread that has the model: jobs, places for them, and what comes back.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use tokio::sync::mpsc::{self, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Loaded;
use super::desk::{Desk, SLICE};
use crate::device::exhausted;
use crate::error::{Error, Result};
use crate::eval::SequenceScore;
use crate::generate::{Piece, Request};

/// Pieces of a job that wait for its client at most: 1 MiB of text.
const UNSENT: usize = (1 << 20) / SLICE;

/// What came of a job, or why nothing did.
pub(super) type Outcome<T> = std::result::Result<T, Failure>;

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// So many requests wait already.
    Busy,
    /// Its time ran out.
    Deadline,
    /// Its client does not read what was written.
    Unread,
    /// The thread is gone, or the device failed.
    Broken(String),
}

/// A request's place among those at work or waiting, shared by its jobs.
#[derive(Clone)]
pub(super) struct Ticket {
    pub _permit: Arc<OwnedSemaphorePermit>,
}

/// Texts to score.
pub(super) struct ScoreJob {
    pub texts: Vec<Vec<u8>>,
    pub top: usize,
    pub reply: oneshot::Sender<Outcome<Vec<SequenceScore>>>,
    pub deadline: Instant,
    pub _ticket: Ticket,
}

/// Texts to write.
pub(super) struct WriteJob {
    pub requests: Vec<Request>,
    pub pieces: mpsc::Sender<Outcome<Piece>>,
    pub deadline: Instant,
    pub _ticket: Ticket,
}

impl WriteJob {
    /// Tells the client, if it is there. There is room for it: see [`WriteJob::problem`].
    pub fn tell(&self, outcome: Outcome<Piece>) {
        let _ = self.pieces.try_send(outcome);
    }

    /// Why the job should not go on at `now`, where its client still has to be told.
    pub fn problem(&self, now: Instant) -> Option<Failure> {
        if self.deadline <= now {
            return Some(Failure::Deadline);
        }
        // A slice more, and the failure after it, have to fit.
        let full = self.pieces.capacity() < self.requests.len() + 1;
        full.then_some(Failure::Unread)
    }
}

/// What the thread is asked.
pub(super) enum Job {
    Score(ScoreJob),
    Write(WriteJob),
}

/// The way to the thread.
#[derive(Clone)]
pub(super) struct Worker {
    jobs: UnboundedSender<Job>,
    /// One permit for each request at work or waiting: the channel itself needs no bound.
    room: Arc<Semaphore>,
}

/// The end of the thread, which comes before the server's only where it cannot go on.
pub(super) struct Ended(oneshot::Receiver<Error>);

impl Ended {
    /// Waits for it; says why it came.
    pub async fn reason(self) -> Error {
        self.0.await.unwrap_or_else(|_| {
            Error::Other(anyhow::anyhow!(
                "the model's thread has ended, see the message above: start the server again; if it \
                 happens again with the same request, report it as a bug"
            ))
        })
    }
}

impl Worker {
    /// Starts the thread, which loads the model first; says how to learn of the thread's end.
    pub async fn spawn(
        load: impl FnOnce() -> Result<Loaded> + Send + 'static,
        queue: usize,
    ) -> Result<(Self, Ended)> {
        let (jobs, inbox) = unbounded_channel();
        let (loaded, outcome) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        thread::Builder::new()
            .name("model".to_owned())
            .spawn(
                move || match exhausted::guard(|| Ok(Desk::new(load()?, inbox))) {
                    Ok(desk) => {
                        // Nobody waits any more where the server has been ended meanwhile.
                        let _ = loaded.send(Ok(()));
                        if let Err(error) = desk.run() {
                            let _ = end.send(error);
                        }
                    }
                    Err(error) => {
                        let _ = loaded.send(Err(error));
                    }
                },
            )
            .map_err(|error| anyhow::anyhow!("could not start the model's thread: {error}"))?;
        outcome
            .await
            .map_err(|_| Error::Other(anyhow::anyhow!("the model's thread ended")))??;
        let worker = Self {
            jobs,
            room: Arc::new(Semaphore::new(queue)),
        };
        Ok((worker, Ended(ended)))
    }

    /// Requests that would be taken now.
    pub fn room(&self) -> usize {
        self.room.available_permits()
    }

    /// Takes a request in, or says that there is no room.
    pub fn enter(&self) -> Outcome<Ticket> {
        let permit = Arc::clone(&self.room).try_acquire_owned();
        let permit = permit.map_err(|_| Failure::Busy)?;
        Ok(Ticket {
            _permit: Arc::new(permit),
        })
    }

    /// Scores texts, with the `top` likeliest bytes at every place.
    pub async fn score(
        &self,
        ticket: &Ticket,
        texts: Vec<Vec<u8>>,
        top: usize,
        deadline: Instant,
    ) -> Outcome<Vec<SequenceScore>> {
        let (reply, outcome) = oneshot::channel();
        self.send(Job::Score(ScoreJob {
            texts,
            top,
            reply,
            deadline,
            _ticket: ticket.clone(),
        }))?;
        outcome.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Writes texts: the pieces of all of them as they come. Dropping the receiver ends it.
    pub fn write(
        &self,
        ticket: &Ticket,
        requests: Vec<Request>,
        deadline: Instant,
    ) -> Outcome<mpsc::Receiver<Outcome<Piece>>> {
        let (pieces, receiver) = mpsc::channel(UNSENT.max(4 * requests.len()));
        self.send(Job::Write(WriteJob {
            requests,
            pieces,
            deadline,
            _ticket: ticket.clone(),
        }))?;
        Ok(receiver)
    }

    fn send(&self, job: Job) -> Outcome<()> {
        self.jobs.send(job).map_err(|_| gone())
    }
}

pub(super) fn gone() -> Failure {
    Failure::Broken("the model's thread has ended".to_owned())
}
