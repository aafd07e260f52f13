//! What the thread that has the model does.
//!
//! It takes jobs from a queue: texts to score, which it computes together, whoever sent them, and
//! texts to write, which it writes side by side. While it writes it looks up every few bytes: for
//! clients that have gone, for deadlines, and for texts to score, which are quick and go first.

use std::time::Instant;

use burn::tensor::Device;
use tokio::sync::mpsc::UnboundedReceiver;

use super::Loaded;
use super::worker::{Failure, Job, ScoreJob, WriteJob};
use crate::device::exhausted;
use crate::error::{Error, Result};
use crate::eval::{Lanes, SequenceScore, score_sequences_while};
use crate::generate::{Generator, GeneratorOptions, Piece, Request, Session};
use crate::model::MambaLm;

/// Bytes written between two looks at the queue.
pub(super) const SLICE: usize = 16;

/// Texts written side by side at most.
const BESIDE: usize = super::TEXTS;

/// Bytes scored in one go, unless one request has more.
const TOGETHER: usize = 1 << 18;

/// What is computed at once.
const LANES: Lanes = Lanes {
    count: 16,
    positions: 16 * 1024,
};

/// The thread's own side: its model, and what lies before it. Lack of memory fails the texts that were
/// too many or too long, not the server.
pub(super) struct Desk {
    /// None while a new one is made.
    generator: Option<Generator>,
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
    pub fn new(loaded: Loaded, inbox: UnboundedReceiver<Job>) -> Self {
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
            generator: Some(renew()),
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

    /// Works until the server is gone.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfMemory`] if there is no memory left to write with.
    pub fn run(mut self) -> Result<()> {
        while self.scorer.wait() {
            self.scorer.score();
            self.scorer.forget();
            if self.scorer.writes.is_empty() {
                continue;
            }
            if let Err(Error::OutOfMemory { .. }) = self.write() {
                // Its memory first: it is what was missing.
                self.generator = None;
                self.generator = Some(exhausted::guard(|| Ok((self.renew)()))?);
            }
        }
        Ok(())
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
        let Some(generator) = &mut self.generator else {
            return Ok(());
        };
        let outcome = exhausted::guard(|| {
            let session = generator.start(&requests)?;
            write_all(session, &jobs, &owners, &mut self.scorer)
        });
        if let Err(error) = &outcome {
            tracing::error!("generation failed: {error}");
            for job in &jobs {
                job.tell(Err(Failure::Broken(error.to_string())));
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
            jobs[job].tell(Ok(Piece { index, ..piece }));
        }
        let now = Instant::now();
        let problems: Vec<Option<Failure>> = jobs.iter().map(|job| job.problem(now)).collect();
        for (text, (job, _)) in owners.iter().enumerate() {
            if jobs[*job].pieces.is_closed() || problems[*job].is_some() {
                session.cancel(text);
            }
        }
        for (job, problem) in jobs.iter().zip(problems) {
            if let Some(failure) = problem {
                job.tell(Err(failure));
            }
        }
        scorer.sort_inbox();
        scorer.forget();
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

    /// Lets go of texts to write that have not been begun, and that nobody waits for any more.
    fn forget(&mut self) {
        let now = Instant::now();
        self.writes.retain(|job| {
            if job.deadline <= now {
                job.tell(Err(Failure::Deadline));
            }
            job.deadline > now && !job.pieces.is_closed()
        });
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
        let wanted = || {
            let now = Instant::now();
            let waits = |job: &ScoreJob| job.deadline > now && !job.reply.is_closed();
            match waiting.iter().any(waits) {
                true => Ok(()),
                false => Err(Error::Interrupted {
                    state: "nobody waits for the scores".to_owned(),
                }),
            }
        };
        let scores = exhausted::guard(|| {
            score_sequences_while(&self.model, &self.device, LANES, &sequences, top, wanted)
        });
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
            Err(Error::Interrupted { .. }) => {
                for job in waiting {
                    let _ = job.reply.send(Err(Failure::Deadline));
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::mpsc::{Receiver, UnboundedSender, channel, unbounded_channel};
    use tokio::sync::oneshot;

    use super::super::tests::{loaded, ticket};
    use super::super::worker::Outcome;
    use super::*;

    /// A desk and the way to it.
    fn desk(vocabulary: usize) -> (UnboundedSender<Job>, Desk) {
        let (jobs, inbox) = unbounded_channel();
        (jobs, Desk::new(loaded(vocabulary), inbox))
    }

    /// A text to write, and its pieces, of which so many may wait.
    fn job(length: usize, room: usize, deadline: Instant) -> (Job, Receiver<Outcome<Piece>>) {
        let (pieces, receiver) = channel(room);
        let request = Request {
            max_new_bytes: length,
            ..Request::new("the ")
        };
        let job = WriteJob {
            requests: vec![request],
            pieces,
            deadline,
            _ticket: ticket(),
        };
        (Job::Write(job), receiver)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    /// A model that fails as soon as it reads a letter: nothing is read.
    #[test]
    fn what_nobody_waits_for_is_not_begun() {
        let (jobs, desk) = desk(2);
        let (overdue, mut told) = job(3, 4, Instant::now());
        let (gone, receiver) = job(3, 4, soon());
        drop(receiver);
        for job in [overdue, gone] {
            assert!(jobs.send(job).is_ok());
        }
        drop(jobs);
        desk.run().expect("nothing to do");
        assert_eq!(told.blocking_recv(), Some(Err(Failure::Deadline)));
        assert_eq!(told.blocking_recv(), None);
    }

    /// What is written for a client that does not read it is bounded, and it learns so.
    #[test]
    fn a_client_that_does_not_read_is_given_up() {
        let (jobs, desk) = desk(256);
        let (unread, mut pieces) = job(100_000, 8, soon());
        let (other, mut others) = job(400, 100, soon());
        for job in [unread, other] {
            assert!(jobs.send(job).is_ok());
        }
        drop(jobs);
        desk.run().expect("it works");
        let mut written = 0;
        let failure = loop {
            match pieces.blocking_recv().expect("an end") {
                Ok(piece) => written += piece.bytes.len(),
                Err(failure) => break failure,
            }
        };
        assert_eq!(failure, Failure::Unread);
        assert_eq!(written, 7 * SLICE);
        let mut written = 0;
        while let Some(piece) = others.blocking_recv() {
            written += piece.expect("it is read later").bytes.len();
        }
        assert_eq!(written, 400);
    }

    #[test]
    fn scoring_ends_at_the_deadline() {
        let (jobs, desk) = desk(256);
        let (reply, mut outcome) = oneshot::channel();
        let job = ScoreJob {
            texts: vec![vec![b'a'; 1 << 22]],
            top: 5,
            reply,
            deadline: Instant::now() + Duration::from_millis(100),
            _ticket: ticket(),
        };
        assert!(jobs.send(Job::Score(job)).is_ok());
        drop(jobs);
        desk.run().expect("it works");
        let outcome = outcome.try_recv().expect("an answer");
        assert_eq!(outcome, Err(Failure::Deadline));
    }
}
