//! Decoding on a GPU: a few kernels a layer, recorded once as a graph and replayed for every byte.
//!
//! The choice of a byte is part of the graph, so bytes reach the host in pieces, not one by one.

mod exchange;
mod pending;
mod persistent;
mod phases;
mod plan;
mod steps;
mod weights;
mod wide;

use std::collections::VecDeque;

use burn::tensor::DType;
use cubecl::client::Graph;
use cubecl::server::Handle;

use self::pending::Pending;
use self::persistent::Exchange;
use self::plan::{Sizes, StepConfig};
use self::weights::{Weights, raw, whole_words};
use self::wide::{WideBuffers, WideConfig};
use super::{DecodeModel, Start};
use crate::add_norm::NormKind;
use crate::cube::DeviceTraits;
use crate::linear;
use crate::sampling::cube::{CHOICE, SETTINGS};
use crate::sampling::{BYTES, Choice, Draw, Lane};

/// Steps whose draws and choices are on the device at once.
const AHEAD: usize = 64;
/// Most sequences whose products are done row by row where those of matrices are to be had.
const NARROW: usize = 4;

/// Most sequences of one kernel for many steps: with more, what cubes hand to each other takes longer
/// than getting from one kernel to the next.
const TOGETHER: usize = 2;

/// What is written while decoding, for one number of sequences.
#[derive(Clone, Debug)]
pub(super) struct Buffers {
    pub batch: usize,
    /// `[layers, B, E, N]`.
    pub h: Handle,
    /// `[layers, B, E, K-1]`.
    pub window: Handle,
    /// `[B, D]`.
    pub stream: Handle,
    /// `[B, E]`.
    pub u: Handle,
    /// `[B, E]`.
    pub z: Handle,
    /// `[B, E]`.
    pub y: Handle,
    /// `[B, parts, R + 2N]`.
    pub parts: Handle,
    /// `[B, V]`.
    pub logits: Handle,
    /// `[B, 256]`.
    pub seen: Handle,
    /// `[B, 5]`.
    pub settings: Handle,
    /// `[AHEAD, B]`.
    pub draws: Handle,
    /// `[AHEAD, B, 4]`.
    pub choices: Handle,
    /// Steps since `draws` was written.
    pub position: Handle,
}

/// See [`super::Decoder`].
#[derive(Debug)]
pub struct Decoder {
    weights: Weights,
    sizes: Sizes,
    traits: DeviceTraits,
    mode: Mode,
    session: Option<Session>,
}

/// Which of the ways to run steps; all give the same bits, but for `Wide`, which adds up in another order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// The fastest that the device has.
    Best,
    /// One graph a step.
    Graph,
    /// Kernel by kernel.
    Kernels,
    /// Many steps in one kernel of so many cubes.
    #[cfg(test)]
    Persistent(usize),
    /// The kernels for many sequences.
    #[cfg(test)]
    Wide,
}

impl Mode {
    /// The way that the variable MAMBABYTE_DECODE names, for comparisons: `graph` or `kernels`.
    fn from_environment() -> Self {
        match std::env::var("MAMBABYTE_DECODE").as_deref() {
            Ok("graph") => Self::Graph,
            Ok("kernels") => Self::Kernels,
            _ => Self::Best,
        }
    }
}

/// How many cubes run a whole step in one kernel; none where there is too much work, or where cubes
/// that wait for each other are not sure to run at the same time.
fn persistent_cubes(config: &StepConfig, batch: usize, traits: &DeviceTraits) -> Option<usize> {
    let cubes = config.cubes_at_once(batch)?;
    let fits = cubes <= traits.busy_units / 1024 && config.fits_together(traits.shared_bytes);
    (traits.ptx && batch <= TOGETHER && fits).then_some(cubes)
}

/// A number of sequences with all that belongs to it.
#[derive(Debug)]
struct Session {
    config: StepConfig,
    /// Sequences; the buffers have places for more.
    sequences: usize,
    buffers: Buffers,
    /// For many sequences.
    wide: Option<(WideConfig, WideBuffers)>,
    graph: Recording,
    /// Pieces that the device works on, each of one launch or several.
    queued: VecDeque<Vec<Pending>>,
}

/// How steps are run.
#[derive(Debug)]
enum Recording {
    /// Many of them in one kernel.
    Persistent(Box<Exchange>),
    /// One by one, as a graph that is not there yet: nothing ran.
    None,
    Graph(Graph),
    /// This device records none.
    Impossible,
}

impl Decoder {
    /// See [`super::Decoder::new`].
    pub(super) fn new(model: &DecodeModel, dtype: DType) -> Option<Self> {
        let layer = model.layers.first()?;
        let [inner, states] = layer.rates.dims();
        let sizes = Sizes {
            width: model.embedding.dims()[1],
            inner,
            states,
            rank: whole_words(layer.dt_proj.dims()[0], dtype),
            taps: layer.conv.dims()[1],
            rows: model.vocabulary,
            centred: model.norm == NormKind::Layer,
            norm_f: model.norm_f.is_some(),
            weight_bytes: dtype.size(),
        };
        let traits = DeviceTraits::of(&raw(layer.d.clone()));
        StepConfig::new(sizes, 1, &traits)?;
        let weights = Weights::new(model, dtype);
        let most = weights.embedding.client.properties().memory.max_page_size;
        (weights.largest() as u64 <= most).then_some(Self {
            weights,
            sizes,
            traits,
            mode: Mode::from_environment(),
            session: None,
        })
    }

    /// Runs steps another way, dividing the work for so many processors.
    #[cfg(test)]
    pub(super) fn set_mode(&mut self, mode: Mode, processors: Option<usize>) {
        self.mode = mode;
        self.session = None;
        if let Some(processors) = processors {
            self.traits.busy_units = 1024 * processors;
        }
    }

    /// See [`super::Decoder::begin`].
    pub(super) fn begin(&mut self, start: Start) {
        // Kernels are compiled for a number of sequences: a power of two, so that there are few. The
        // places beyond the last sequence are idle.
        let batch = start.lanes.len().next_power_of_two();
        let session = self.session.as_ref();
        if session.is_none_or(|it| it.buffers.batch != batch) {
            // The old one's memory is free before the new one's is taken.
            self.session = None;
            self.session = Some(Session::new(
                &self.weights,
                self.sizes,
                batch,
                &self.traits,
                self.mode,
            ));
        }
        if let Some(session) = &mut self.session {
            session.load(&self.weights, start);
        }
    }

    /// See [`super::Decoder::queue`].
    pub(super) fn queue(&mut self, draws: &[Draw]) {
        let Some(session) = &mut self.session else {
            panic!("decode: begin() comes first");
        };
        let launches = draws.chunks(AHEAD * session.sequences);
        let piece = launches.map(|draws| session.launch(&self.weights, draws));
        let piece = piece.collect();
        session.queued.push_back(piece);
    }

    /// See [`super::Decoder::take`].
    pub(super) fn take(&mut self) -> Vec<Choice> {
        let Some(session) = &mut self.session else {
            panic!("decode: begin() comes first");
        };
        let Some(piece) = session.queued.pop_front() else {
            panic!("decode: queue() comes first");
        };
        piece
            .into_iter()
            .flat_map(|launched| session.choices(launched))
            .collect()
    }

    /// See [`super::Decoder::logits`].
    pub(super) fn logits(&self) -> Vec<f32> {
        match &self.session {
            Some(session) => {
                let client = &self.weights.embedding.client;
                let mut logits = Pending::read(client, &session.buffers.logits, 0).wait();
                logits.truncate(session.sequences * session.config.rows);
                logits
            }
            None => Vec::new(),
        }
    }

    pub(super) fn describe(&self) -> &'static str {
        match self.session.as_ref().map(|session| &session.graph) {
            Some(Recording::Graph(_)) => "GPU kernels, one graph a byte",
            Some(Recording::Persistent(_)) => "one GPU kernel for many bytes",
            _ => "GPU kernels",
        }
    }
}

impl Session {
    fn new(
        weights: &Weights,
        sizes: Sizes,
        batch: usize,
        traits: &DeviceTraits,
        mode: Mode,
    ) -> Self {
        let config = StepConfig::new(sizes, batch, traits)
            .unwrap_or_else(|| panic!("decode: {batch} sequences do not fit the device"));
        let client = &weights.embedding.client;
        let floats = |count: usize| client.empty(4 * count.max(1));
        let channels = batch * sizes.inner;
        let tensor = wide::has_tensor_cores(&weights.embedding, weights.in_proj.dtype);
        let wide = || {
            let processors = traits.busy_units / 1024;
            WideConfig::new(config, batch, processors, tensor, weights.biased)
        };
        let wide = match mode {
            #[cfg(test)]
            Mode::Wide => wide(),
            #[cfg(test)]
            Mode::Persistent(_) => None,
            // Without products that a graph can replay, getting one to the device takes longer than
            // doing its work.
            _ if batch > NARROW && tensor && linear::cube::replayable(&weights.embedding) => wide(),
            _ => None,
        };
        let wide = wide.map(|wide| (wide, WideBuffers::new(weights, &config, batch)));
        let exchange = |cubes: usize| Box::new(Exchange::new(weights, &config, batch, cubes));
        let parts = wide
            .as_ref()
            .map_or(config.parts, |(wide, _)| wide.step.parts);
        Self {
            buffers: Buffers {
                batch,
                h: floats(weights.layers * channels * sizes.states),
                window: floats(weights.layers * channels * (sizes.taps - 1)),
                stream: floats(batch * sizes.width),
                u: floats(channels),
                z: floats(channels),
                y: floats(channels),
                parts: floats(batch * parts * config.low()),
                logits: floats(batch * sizes.rows),
                seen: floats(batch * BYTES),
                settings: floats(batch * SETTINGS),
                draws: floats(AHEAD * batch),
                choices: floats(AHEAD * batch * CHOICE),
                position: floats(1),
            },
            graph: match mode {
                Mode::Kernels => Recording::Impossible,
                Mode::Graph => Recording::None,
                Mode::Best => match persistent_cubes(&config, batch, traits) {
                    Some(cubes) if wide.is_none() => Recording::Persistent(exchange(cubes)),
                    _ => Recording::None,
                },
                #[cfg(test)]
                Mode::Wide => Recording::None,
                #[cfg(test)]
                Mode::Persistent(cubes) => Recording::Persistent(exchange(cubes)),
            },
            config,
            sequences: 0,
            wide,
            queued: VecDeque::new(),
        }
    }

    /// Copies where the sequences stand into the buffers, which stay where they are: a graph that
    /// was recorded goes on with them.
    fn load(&mut self, weights: &Weights, start: Start) {
        self.queued.clear();
        self.sequences = start.lanes.len();
        let batch = self.buffers.batch;
        let client = &weights.embedding.client;
        let c = self.config;
        let memory = start.memory.into_iter();
        let (h, window): (Vec<_>, Vec<_>) = memory.map(|(h, past)| (raw(h), raw(past))).unzip();
        steps::copy(&h, &self.buffers.h, batch * c.inner * c.states);
        if c.taps > 1 {
            let stride = batch * c.inner * (c.taps - 1);
            steps::copy(&window, &self.buffers.window, stride);
        }
        steps::copy(&[raw(start.logits)], &self.buffers.logits, 0);
        let write = |handle: &Handle, mut values: Vec<f32>, each: usize| {
            values.resize(batch * each, 0.0);
            let bytes = cubecl::bytes::Bytes::from_elems(values);
            client.write(handle, bytes);
        };
        let settings = |lane: &Lane| {
            let it = lane.sampling;
            [
                it.temperature,
                it.top_k as f32,
                it.top_p,
                it.min_p,
                it.repetition_penalty,
            ]
        };
        let seen = |lane: &Lane| lane.seen.map(|seen| if seen { 1.0 } else { 0.0 });
        let lanes = start.lanes.iter();
        write(
            &self.buffers.settings,
            lanes.clone().flat_map(settings).collect(),
            SETTINGS,
        );
        write(&self.buffers.seen, lanes.flat_map(seen).collect(), BYTES);
    }

    /// Has the device run at most [`AHEAD`] steps.
    fn launch(&mut self, weights: &Weights, draws: &[Draw]) -> Pending {
        let (batch, sequences) = (self.buffers.batch, self.sequences);
        let steps = draws.len() / sequences;
        let client = &weights.embedding.client;
        let number = |draw: &Draw| match draw.forced {
            Some(byte) => -1.0 - f32::from(byte),
            None => draw.number,
        };
        let mut numbers = vec![0.0; AHEAD * batch];
        for (row, draws) in numbers.chunks_mut(batch).zip(draws.chunks(sequences)) {
            row.iter_mut()
                .zip(draws)
                .for_each(|(it, draw)| *it = number(draw));
        }
        client.write(
            &self.buffers.draws,
            cubecl::bytes::Bytes::from_elems(numbers),
        );
        match &mut self.graph {
            Recording::Persistent(exchange) => {
                persistent::launch(weights, &self.buffers, exchange, &self.config, steps);
            }
            _ => {
                let zero = cubecl::bytes::Bytes::from_elems(vec![0u32]);
                client.write(&self.buffers.position, zero);
                (0..steps).for_each(|_| self.step(weights));
            }
        }
        Pending::read(client, &self.buffers.choices, steps)
    }

    /// What was chosen in a launch.
    fn choices(&self, launched: Pending) -> Vec<Choice> {
        let steps = launched.steps;
        let values = launched.wait();
        let choice = |it: &[f32]| Choice {
            byte: it[0] as u8,
            logprob: it[1],
            top: it[2] as u8,
            top_logprob: it[3],
        };
        let rows = values.chunks_exact(CHOICE * self.buffers.batch).take(steps);
        rows.flat_map(|row| row.chunks_exact(CHOICE).take(self.sequences))
            .map(choice)
            .collect()
    }

    /// One step of all sequences. The first one is launched kernel by kernel and then recorded.
    fn step(&mut self, weights: &Weights) {
        let client = &weights.embedding.client;
        match &self.graph {
            Recording::Graph(graph) => {
                // SAFETY: the graph reads and writes the weights and buffers that this decoder holds
                // and no other thread has; the replay is on the stream it was recorded on, as are
                // all writes and reads of the buffers (the decoder stays on its thread).
                let replayed = unsafe { graph.replay() };
                if let Err(error) = replayed {
                    panic!("decode: the graph of a step: {error:?}");
                }
            }
            Recording::Impossible | Recording::Persistent(_) => {
                steps::launch(weights, &self.buffers, &self.config, self.wide.as_ref());
            }
            Recording::None => {
                let prepared = client.graph_prepare().is_ok();
                let launch =
                    || steps::launch(weights, &self.buffers, &self.config, self.wide.as_ref());
                let replayable = launch();
                self.graph = Recording::Impossible;
                if prepared && replayable && client.start_capture().is_ok() {
                    let replayable = launch();
                    // Without a graph bytes come all the same, more slowly.
                    if let (true, Ok(graph)) = (replayable, client.stop_capture()) {
                        self.graph = Recording::Graph(graph);
                    }
                }
            }
        }
    }
}
