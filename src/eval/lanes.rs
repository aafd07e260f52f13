//! Many segments through a model at once, in constant memory: lanes beside each other, each of
//! which reads one segment after the other and carries its state from step to step.
//!
//! A lane's segments follow each other without gaps; the first input of each is marked as a reset,
//! so nothing of the one before it is left. Lengths therefore cost nothing: neither padding, where
//! segments are short, nor memory, where one is a whole book.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::context::Segment;
use crate::error::Result;
use crate::model::{LayerState, MambaLm, State};

/// How many lanes there are, and how much is computed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lanes {
    /// Segments read beside each other at most, B.
    pub count: usize,
    /// Positions of a step at most, B · L: memory grows with it.
    pub positions: usize,
}

/// A segment and whose it is.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Number of its document, or of its sequence.
    pub owner: usize,
    /// What to read of it.
    pub segment: Segment,
}

/// A run of inputs that one lane reads in one step.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    /// The job's owner.
    pub owner: usize,
    /// Index of its first input among the step's positions.
    pub at: usize,
    /// Position of its first input in the document; the prediction made there is of the byte after.
    pub input: u64,
    /// How many inputs.
    pub len: usize,
    /// Bytes of the document that this job scores.
    pub scored: std::ops::Range<u64>,
}

impl Span {
    /// The scored bytes that this span predicts: for each its position in the document and the
    /// index of its prediction among the step's positions.
    pub fn predictions(&self) -> impl Iterator<Item = (u64, usize)> + '_ {
        let first = self.input + 1;
        let from = first.max(self.scored.start);
        let to = (first + self.len as u64).min(self.scored.end);
        (from..to).map(move |target| (target, self.at + (target - first) as usize))
    }
}

/// What one step reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    /// Lanes and positions of each, `[B, L]`.
    pub dims: [usize; 2],
    /// The bytes read; zeros behind a lane's end.
    pub bytes: Vec<i32>,
    /// The byte after each.
    pub targets: Vec<i32>,
    /// 1 where a segment begins.
    pub resets: Vec<f32>,
    /// What lies where.
    pub spans: Vec<Span>,
    /// Which lanes of the step before go on here.
    lanes: Vec<usize>,
}

/// Runs `model` over all `jobs`.
///
/// `read(owner, position, out)` copies bytes of a document; it is asked for one byte more than a
/// segment's inputs, the last target. `take(step, logits)` gets the logits `[B, L, V]` of each step.
pub(crate) fn run(
    model: &MambaLm,
    device: &Device,
    lanes: Lanes,
    jobs: impl Iterator<Item = Job>,
    read: impl FnMut(usize, u64, &mut [u8]) -> Result<()>,
    mut take: impl FnMut(&Step, Tensor<3>) -> Result<()>,
) -> Result<()> {
    let mut plan = Plan {
        jobs: jobs.peekable(),
        read,
        lanes: std::iter::repeat_with(|| None)
            .take(lanes.count.max(1))
            .collect(),
        positions: lanes.positions,
        buffer: Vec::new(),
    };
    let mut state: Option<State> = None;
    while let Some(step) = plan.next()? {
        state = state.map(|state| select(state, &step.lanes));
        let bytes =
            Tensor::<2, Int>::from_data(TensorData::new(step.bytes.clone(), step.dims), device);
        let resets = step.resets.contains(&1.0).then(|| {
            Tensor::<2>::from_data(TensorData::new(step.resets.clone(), step.dims), device)
        });
        let (logits, after) = model.forward(bytes, state, resets);
        state = Some(after);
        take(&step, logits)?;
    }
    Ok(())
}

/// The memory of some lanes.
fn select(state: State, lanes: &[usize]) -> State {
    if lanes.len() == state.batch() {
        return state;
    }
    let rows = |tensor: Tensor<3>| {
        let indices: Vec<i32> = lanes.iter().map(|lane| *lane as i32).collect();
        let indices = Tensor::<1, Int>::from_data(indices.as_slice(), &tensor.device());
        tensor.select(0, indices)
    };
    let layers = state.layers.into_iter().map(|layer| LayerState {
        h: rows(layer.h),
        window: rows(layer.window),
    });
    State {
        layers: layers.collect(),
    }
}

/// A job and the input that is read next.
struct Reading {
    job: Job,
    next: u64,
}

impl From<Job> for Reading {
    fn from(job: Job) -> Self {
        let next = job.segment.inputs.start;
        Self { job, next }
    }
}

/// Which lane reads what next.
struct Plan<I: Iterator<Item = Job>, R> {
    jobs: std::iter::Peekable<I>,
    read: R,
    /// What each lane is in the middle of.
    lanes: Vec<Option<Reading>>,
    positions: usize,
    buffer: Vec<u8>,
}

impl<I, R> Plan<I, R>
where
    I: Iterator<Item = Job>,
    R: FnMut(usize, u64, &mut [u8]) -> Result<()>,
{
    /// The next step; none when all is read.
    fn next(&mut self) -> Result<Option<Step>> {
        // Lanes with nothing to do leave, and the others get longer.
        let mut kept = Vec::with_capacity(self.lanes.len());
        for (index, lane) in std::mem::take(&mut self.lanes).into_iter().enumerate() {
            if lane.is_some() || self.jobs.peek().is_some() {
                kept.push(index);
                let lane = lane.or_else(|| self.jobs.next().map(Reading::from));
                self.lanes.push(lane);
            }
        }
        if kept.is_empty() {
            return Ok(None);
        }
        let length = (self.positions / kept.len()).max(1);
        let mut rows = Vec::with_capacity(kept.len());
        for lane in 0..kept.len() {
            rows.push(self.row(lane, length));
        }
        let width = rows.iter().map(|row| width(row)).max().unwrap_or(0);
        let count = rows.len() * width;
        let mut step = Step {
            dims: [rows.len(), width],
            bytes: vec![0; count],
            targets: vec![0; count],
            resets: vec![0.0; count],
            spans: Vec::new(),
            lanes: kept,
        };
        for (lane, row) in rows.into_iter().enumerate() {
            for (begins, mut span) in row {
                span.at += lane * width;
                step.resets[span.at] = f32::from(u8::from(begins));
                self.fill(&span, &mut step)?;
                step.spans.push(span);
            }
        }
        Ok(Some(step))
    }

    /// What a lane reads in up to `length` positions, each span with whether its segment begins
    /// there.
    fn row(&mut self, lane: usize, length: usize) -> Vec<(bool, Span)> {
        let mut row = Vec::new();
        let mut at = 0;
        while at < length {
            let reading = self.lanes[lane].take();
            let Some(reading) = reading.or_else(|| self.jobs.next().map(Reading::from)) else {
                break;
            };
            let Reading { job, next } = reading;
            let inputs = job.segment.inputs.clone();
            let len = (inputs.end - next).min((length - at) as u64);
            let span = Span {
                owner: job.owner,
                at,
                input: next,
                len: len as usize,
                scored: job.segment.scored.clone(),
            };
            row.push((next == inputs.start, span));
            at += len as usize;
            let next = next + len;
            if next < inputs.end {
                self.lanes[lane] = Some(Reading { job, next });
            }
        }
        row
    }

    /// Copies a span's bytes into the step.
    fn fill(&mut self, span: &Span, step: &mut Step) -> Result<()> {
        self.buffer.resize(span.len + 1, 0);
        (self.read)(span.owner, span.input, &mut self.buffer)?;
        for (i, pair) in self.buffer.windows(2).enumerate() {
            step.bytes[span.at + i] = i32::from(pair[0]);
            step.targets[span.at + i] = i32::from(pair[1]);
        }
        Ok(())
    }
}

/// Positions that a row's spans take.
fn width(row: &[(bool, Span)]) -> usize {
    row.last().map_or(0, |(_, span)| span.at + span.len)
}
