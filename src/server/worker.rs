//! The thread that has the model.
//!
//! It takes jobs from a queue: texts to score, which it computes together, whoever sent them, and
//! texts to write, which it writes side by side. While it writes it looks up every few bytes: for
//! clients that have gone, for deadlines, and for texts to score, which are quick and go first.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use burn::tensor::Device;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::Loaded;
use crate::device::exhausted;
use crate::error::{Error, Result};
use crate::eval::{Lanes, SequenceScore, score_sequences};
use crate::generate::{Generator, GeneratorOptions, Piece, Request, Session};
use crate::model::MambaLm;

/// Bytes written between two looks at the queue.
const SLICE: usize = 16;

/// Texts written side by side at most.
const BESIDE: usize = super::TEXTS;

/// Bytes scored in one go, unless one request has more.
const TOGETHER: usize = 1 << 18;

/// What is computed at once.
const LANES: Lanes = Lanes {
    count: 16,
    positions: 16 * 1024,
};

/// What came of a job, or why nothing did.
pub(super) type Outcome<T> = std::result::Result<T, Failure>;

/// Why a job has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// So many requests wait already.
    Busy,
    /// Its time ran out.
    Deadline,
    /// The thread is gone, or the device failed.
    Broken(String),
}

/// A request's place among those at work or waiting, shared by its jobs.
#[derive(Clone)]
pub(super) struct Ticket {
    _permit: Arc<OwnedSemaphorePermit>,
}

/// Texts to score.
struct ScoreJob {
    texts: Vec<Vec<u8>>,
    top: usize,
    reply: oneshot::Sender<Outcome<Vec<SequenceScore>>>,
    deadline: Instant,
    _ticket: Ticket,
}

/// Texts to write.
struct WriteJob {
    requests: Vec<Request>,
    pieces: UnboundedSender<Outcome<Piece>>,
    deadline: Instant,
    _ticket: Ticket,
}

enum Job {
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

impl Worker {
    /// Starts the thread, which loads the model first.
    pub async fn spawn(
        load: impl FnOnce() -> Result<Loaded> + Send + 'static,
        queue: usize,
    ) -> Result<Self> {
        let (jobs, inbox) = unbounded_channel();
        let (loaded, outcome) = oneshot::channel();
        thread::Builder::new()
            .name("model".to_owned())
            .spawn(move || match load() {
                Ok(model) => {
                    let desk = Desk::new(model, inbox);
                    // Nobody waits any more where the server has been ended meanwhile.
                    let _ = loaded.send(Ok(()));
                    desk.run();
                }
                Err(error) => {
                    let _ = loaded.send(Err(error));
                }
            })
            .map_err(|error| anyhow::anyhow!("could not start the model's thread: {error}"))?;
        outcome
            .await
            .map_err(|_| Error::Other(anyhow::anyhow!("the model's thread ended")))??;
        Ok(Self {
            jobs,
            room: Arc::new(Semaphore::new(queue)),
        })
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
    ) -> Outcome<UnboundedReceiver<Outcome<Piece>>> {
        let (pieces, receiver) = unbounded_channel();
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

fn gone() -> Failure {
    Failure::Broken("the model's thread has ended".to_owned())
}

/// The thread's own side: its model, and what lies before it. Lack of memory fails the texts that were
/// too many or too long, not the server.
struct Desk {
    generator: Generator,
    /// Makes another one, for a session that was broken off leaves it in the middle of things.
    renew: Box<dyn Fn() -> Generator>,
    scorer: Scorer,
}

/// All of the desk but what a session of writing holds on to.
struct Scorer {
    model: MambaLm,
    device: Device,
    inbox: UnboundedReceiver<Job>,
    /// The server is gone: no more jobs will come.
    closed: bool,
    scores: Vec<ScoreJob>,
    writes: Vec<WriteJob>,
}

impl Desk {
    fn new(loaded: Loaded, inbox: UnboundedReceiver<Job>) -> Self {
        let Loaded {
            model,
            device,
            precision,
        } = loaded;
        let options = GeneratorOptions {
            precision,
            plain: false,
        };
        let renew = {
            let (model, device) = (model.clone(), device.clone());
            move || Generator::new(model.clone(), &device, options)
        };
        Self {
            generator: renew(),
            renew: Box::new(renew),
            scorer: Scorer {
                model: model.frozen(),
                device,
                inbox,
                closed: false,
                scores: Vec::new(),
                writes: Vec::new(),
            },
        }
    }

    /// Works until the server is gone, or there is no memory left to write with.
    fn run(mut self) {
        while self.scorer.wait() {
            self.scorer.score();
            if self.scorer.writes.is_empty() {
                continue;
            }
            if let Err(Error::OutOfMemory { .. }) = self.write() {
                match exhausted::guard(|| Ok((self.renew)())) {
                    Ok(generator) => self.generator = generator,
                    Err(error) => return tracing::error!("the model's thread ends: {error}"),
                }
            }
        }
    }

    /// Writes the texts of as many waiting jobs as fit beside each other, to their ends.
    fn write(&mut self) -> Result<()> {
        let mut texts = 0;
        let fit = |job: &WriteJob| {
            texts += job.requests.len();
            texts <= BESIDE
        };
        let count = self
            .scorer
            .writes
            .iter()
            .map(fit)
            .take_while(|it| *it)
            .count();
        let jobs: Vec<WriteJob> = self.scorer.writes.drain(..count.max(1)).collect();
        // Whose text each one of the session is.
        let owners: Vec<(usize, usize)> = jobs
            .iter()
            .enumerate()
            .flat_map(|(job, it)| (0..it.requests.len()).map(move |index| (job, index)))
            .collect();
        let requests: Vec<Request> = jobs.iter().flat_map(|it| it.requests.clone()).collect();
        let outcome = exhausted::guard(|| {
            let session = self.generator.start(&requests)?;
            write_all(session, &jobs, &owners, &mut self.scorer)
        });
        if let Err(error) = &outcome {
            tracing::error!("generation failed: {error}");
            for job in &jobs {
                let _ = job.pieces.send(Err(Failure::Broken(error.to_string())));
            }
        }
        outcome
    }
}

/// Writes a session to its end, and serves others between.
fn write_all(
    mut session: Session<'_>,
    jobs: &[WriteJob],
    owners: &[(usize, usize)],
    scorer: &mut Scorer,
) -> Result<()> {
    while !session.is_finished() {
        for piece in session.advance_ahead(SLICE)? {
            let (job, index) = owners[piece.index];
            let _ = jobs[job].pieces.send(Ok(Piece { index, ..piece }));
        }
        let now = Instant::now();
        for (text, (job, _)) in owners.iter().enumerate() {
            let job = &jobs[*job];
            if job.pieces.is_closed() || job.deadline <= now {
                session.cancel(text);
            }
        }
        for job in jobs.iter().filter(|job| job.deadline <= now) {
            let _ = job.pieces.send(Err(Failure::Deadline));
        }
        scorer.sort_inbox();
        scorer.score();
    }
    Ok(())
}

impl Scorer {
    /// Waits for a job; false when none will ever come.
    fn wait(&mut self) -> bool {
        if self.scores.is_empty() && self.writes.is_empty() {
            match self.inbox.blocking_recv() {
                Some(job) => self.sort(job),
                None => return false,
            }
        }
        self.sort_inbox();
        !self.closed || !self.scores.is_empty() || !self.writes.is_empty()
    }

    /// Takes everything that has come.
    fn sort_inbox(&mut self) {
        use tokio::sync::mpsc::error::TryRecvError;
        loop {
            match self.inbox.try_recv() {
                Ok(job) => self.sort(job),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => {
                    self.closed = true;
                    break;
                }
            }
        }
    }

    fn sort(&mut self, job: Job) {
        match job {
            Job::Score(job) => self.scores.push(job),
            Job::Write(job) => self.writes.push(job),
        }
    }

    /// Scores what waits, as much as is computed well together.
    fn score(&mut self) {
        let now = Instant::now();
        let mut waiting = Vec::new();
        for job in std::mem::take(&mut self.scores) {
            if job.deadline <= now {
                let _ = job.reply.send(Err(Failure::Deadline));
            } else if !job.reply.is_closed() {
                waiting.push(job);
            }
        }
        let mut bytes = 0;
        let fit = |job: &ScoreJob| {
            bytes += job.texts.iter().map(Vec::len).sum::<usize>();
            bytes <= TOGETHER
        };
        let count = waiting.iter().map(fit).take_while(|it| *it).count();
        self.scores = waiting.split_off(count.max(1).min(waiting.len()));
        if waiting.is_empty() {
            return;
        }
        // Long ones first: those beside each other then end together.
        let mut texts: Vec<(usize, usize)> = waiting
            .iter()
            .enumerate()
            .flat_map(|(job, it)| (0..it.texts.len()).map(move |index| (job, index)))
            .collect();
        let text = |(job, index): (usize, usize)| waiting[job].texts[index].as_slice();
        texts.sort_by_key(|place| std::cmp::Reverse(text(*place).len()));
        let sequences: Vec<&[u8]> = texts.iter().map(|place| text(*place)).collect();
        let top = waiting.iter().map(|job| job.top).max().unwrap_or(0);
        let scores =
            exhausted::guard(|| score_sequences(&self.model, &self.device, LANES, &sequences, top));
        match scores {
            Ok(scores) => {
                let mut sorted: Vec<_> = texts.into_iter().zip(scores).collect();
                sorted.sort_by_key(|(place, _)| *place);
                let mut scores = sorted.into_iter().map(|(_, score)| score);
                for job in waiting {
                    let own = scores.by_ref().take(job.texts.len());
                    let own = own.map(|score| first(score, job.top)).collect();
                    let _ = job.reply.send(Ok(own));
                }
            }
            Err(error) => {
                tracing::error!("scoring failed: {error}");
                for job in waiting {
                    let _ = job.reply.send(Err(Failure::Broken(error.to_string())));
                }
            }
        }
    }
}

/// A score with as many of the likeliest bytes as were asked for.
fn first(mut score: SequenceScore, top: usize) -> SequenceScore {
    for byte in &mut score.bytes {
        byte.top.truncate(top);
    }
    score.next.truncate(top);
    score
}
