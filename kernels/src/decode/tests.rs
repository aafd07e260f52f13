use burn::tensor::{Device, Int};

use super::reference::Reference;
use super::*;
use crate::sampling::{BYTES, Sampling};
use crate::testing::{Rng, assert_close, cpu, devices, read, tensor};

/// Shapes and variants of a small model.
#[derive(Clone, Copy, Debug)]
struct Shape {
    batch: usize,
    depth: usize,
    width: usize,
    inner: usize,
    states: usize,
    rank: usize,
    taps: usize,
    vocabulary: usize,
    /// Rows of the embedding.
    rows: usize,
    kind: NormKind,
    biases: bool,
    norm_f: bool,
    head: bool,
}

const SHAPE: Shape = Shape {
    batch: 1,
    depth: 2,
    width: 64,
    inner: 128,
    states: 16,
    rank: 4,
    taps: 4,
    vocabulary: 256,
    rows: 256,
    kind: NormKind::Rms,
    biases: false,
    norm_f: true,
    head: false,
};

const GREEDY: Sampling = Sampling {
    temperature: 1.0,
    top_k: 1,
    top_p: 1.0,
    min_p: 0.0,
    repetition_penalty: 1.0,
};

impl Shape {
    fn model(&self, device: &Device) -> DecodeModel {
        let mut rng = Rng::new(7);
        let (d, e, n, r) = (self.width, self.inner, self.states, self.rank);
        let mut vector = |size: usize, mean: f32, scale: f32| {
            let values: Vec<f32> = rng.normals(size, scale).iter().map(|x| mean + x).collect();
            tensor(&values, [size], device)
        };
        let layers = (0..self.depth)
            .map(|_| DecodeLayer {
                norm: vector(d, 1.0, 0.1),
                norm_bias: self.biases.then(|| vector(d, 0.0, 0.2)),
                in_proj: vector(d * 2 * e, 0.0, 1.0 / (d as f32).sqrt()).reshape([d, 2 * e]),
                in_bias: self.biases.then(|| vector(2 * e, 0.0, 0.2)),
                conv: vector(e * self.taps, 0.0, 0.5).reshape([e, self.taps]),
                conv_bias: self.biases.then(|| vector(e, 0.0, 0.2)),
                x_proj: vector(e * (r + 2 * n), 0.0, 2.0 / (e as f32).sqrt())
                    .reshape([e, r + 2 * n]),
                dt_proj: vector(r * e, 0.0, 0.5).reshape([r, e]),
                dt_bias: self.biases.then(|| vector(e, -2.0, 0.5)),
                rates: vector(e * n, -2.0, 0.3).reshape([e, n]),
                d: vector(e, 1.0, 0.2),
                out_proj: vector(e * d, 0.0, 1.0 / (e as f32).sqrt()).reshape([e, d]),
                out_bias: self.biases.then(|| vector(d, 0.0, 0.2)),
            })
            .collect();
        let norm_f = (
            vector(d, 1.0, 0.1),
            self.biases.then(|| vector(d, 0.0, 0.2)),
        );
        DecodeModel {
            embedding: vector(self.rows * d, 0.0, 1.0).reshape([self.rows, d]),
            layers,
            norm_f: self.norm_f.then_some(norm_f),
            head: self
                .head
                .then(|| vector(d * self.rows, 0.0, 0.2).reshape([d, self.rows])),
            vocabulary: self.vocabulary,
            norm: self.kind,
            eps: 1e-5,
        }
    }

    fn start(&self, lanes: Vec<Lane>, device: &Device) -> Start {
        let mut rng = Rng::new(11);
        let (b, e, n, past) = (self.batch, self.inner, self.states, self.taps - 1);
        let logits = rng.normals(b * self.vocabulary, 2.0);
        let memory = (0..self.depth).map(|_| {
            let h = rng.normals(b * e * n, 1.0);
            let window = rng.normals(b * e * past, 1.0);
            (
                tensor(&h, [b, e, n], device),
                tensor(&window, [b, e, past], device),
            )
        });
        Start {
            memory: memory.collect(),
            logits: tensor(&logits, [b, self.vocabulary], device),
            lanes,
        }
    }

    fn lanes(&self, sampling: Sampling) -> Vec<Lane> {
        let lane = Lane {
            sampling,
            seen: [false; BYTES],
        };
        vec![lane; self.batch]
    }

    /// Decodes `steps` bytes that are given, on every device, against the reference.
    #[track_caller]
    fn check(self) {
        let steps = 9;
        let mut rng = Rng::new(5);
        let draws: Vec<Draw> = (0..steps * self.batch)
            .map(|_| Draw {
                number: 0.5,
                forced: Some((rng.uniform() * self.vocabulary.min(256) as f32) as u8),
            })
            .collect();
        let lanes = self.lanes(GREEDY);
        let mut reference = Reference::new(&self.model(&cpu()), self.start(lanes.clone(), &cpu()));
        let expected = reference.run(&draws);
        for device in devices() {
            let mut decoder = Decoder::new(&self.model(&device), DType::F32).expect("kernels");
            decoder.begin(self.start(lanes.clone(), &device));
            // In pieces, as it is used: the first step, then some.
            let (first, rest) = draws.split_at(self.batch);
            // The second piece is begun before the first is looked at.
            decoder.queue(first);
            decoder.queue(rest);
            let mut got = decoder.take();
            got.extend(decoder.take());
            let bytes = |choices: &[Choice]| choices.iter().map(|it| it.byte).collect::<Vec<_>>();
            assert_eq!(bytes(&got), bytes(&expected), "{device:?}");
            let logprobs = |choices: &[Choice]| -> Vec<f32> {
                choices
                    .iter()
                    .flat_map(|it| [it.logprob, it.top_logprob])
                    .collect()
            };
            let what = format!("{self:?} on {device:?}");
            assert_close(&what, &logprobs(&got), &logprobs(&expected), 1e-3, 1e-3);
            assert_close(&what, &decoder.logits(), &reference.logits(), 1e-3, 1e-3);
        }
    }
}

#[test]
fn a_step_equals_the_reference() {
    SHAPE.check();
}

#[test]
fn batches_equal_the_reference() {
    for batch in [2, 3, 8, 11] {
        Shape { batch, ..SHAPE }.check();
    }
}

#[test]
fn odd_shapes_equal_the_reference() {
    Shape {
        width: 36,
        inner: 76,
        states: 5,
        rank: 3,
        taps: 3,
        ..SHAPE
    }
    .check();
    Shape {
        batch: 2,
        width: 40,
        inner: 50,
        states: 1,
        rank: 1,
        taps: 1,
        vocabulary: 100,
        rows: 104,
        head: true,
        ..SHAPE
    }
    .check();
    Shape {
        depth: 1,
        width: 320,
        inner: 640,
        states: 24,
        rank: 20,
        vocabulary: 300,
        rows: 304,
        ..SHAPE
    }
    .check();
    // Small planes have no room for the sums of so many.
    Shape {
        depth: 1,
        batch: 8,
        width: 512,
        inner: 1024,
        ..SHAPE
    }
    .check();
}

#[test]
fn variants_equal_the_reference() {
    let layer_norm = Shape {
        kind: NormKind::Layer,
        biases: true,
        head: true,
        ..SHAPE
    };
    layer_norm.check();
    Shape {
        batch: 3,
        norm_f: false,
        ..layer_norm
    }
    .check();
}

/// A sequence's bytes and probabilities have the same bits whatever runs beside it, and a second
/// run gives them again.
#[test]
fn sequences_do_not_depend_on_each_other() {
    let shape = Shape { batch: 5, ..SHAPE };
    let sampling = Sampling {
        top_k: 0,
        temperature: 0.8,
        repetition_penalty: 1.1,
        ..GREEDY
    };
    let mut rng = Rng::new(3);
    let draws: Vec<Draw> = (0..20 * shape.batch)
        .map(|_| Draw::free(rng.uniform()))
        .collect();
    for device in devices() {
        let model = shape.model(&device);
        let mut decoder = Decoder::new(&model, DType::F32).expect("kernels");
        let start = shape.start(shape.lanes(sampling), &device);
        decoder.begin(start.clone());
        let together = decoder.run(&draws);
        decoder.begin(start.clone());
        assert_eq!(decoder.run(&draws), together, "again on {device:?}");
        for b in [0, 3] {
            let row = |t: Tensor<3>| t.narrow(0, b, 1);
            let memory = start.memory.iter().cloned();
            decoder.begin(Start {
                logits: start.logits.clone().narrow(0, b, 1),
                memory: memory.map(|(h, window)| (row(h), row(window))).collect(),
                lanes: vec![start.lanes[b].clone()],
            });
            let own: Vec<Draw> = draws.iter().skip(b).step_by(shape.batch).copied().collect();
            let beside: Vec<Choice> = together
                .iter()
                .skip(b)
                .step_by(shape.batch)
                .copied()
                .collect();
            assert_eq!(decoder.run(&own), beside, "sequence {b} on {device:?}");
        }
    }
}

/// Choices on the device are those of the plain form for the same logits.
#[test]
fn choices_equal_the_reference() {
    let settings = [
        GREEDY,
        Sampling { top_k: 0, ..GREEDY },
        Sampling {
            top_k: 5,
            temperature: 0.7,
            ..GREEDY
        },
        Sampling {
            top_k: 0,
            top_p: 0.6,
            ..GREEDY
        },
        Sampling {
            top_k: 40,
            top_p: 0.9,
            temperature: 1.5,
            ..GREEDY
        },
        Sampling {
            top_k: 0,
            min_p: 0.2,
            ..GREEDY
        },
        Sampling {
            top_k: 0,
            temperature: 0.0,
            ..GREEDY
        },
        Sampling {
            top_k: 256,
            top_p: 0.0,
            repetition_penalty: 2.0,
            ..GREEDY
        },
        Sampling {
            top_k: 0,
            top_p: 1e-9,
            ..GREEDY
        },
    ];
    let shape = Shape {
        batch: settings.len(),
        depth: 1,
        vocabulary: 200,
        rows: 200,
        ..SHAPE
    };
    let mut rng = Rng::new(17);
    let lanes: Vec<Lane> = settings
        .iter()
        .map(|sampling| Lane {
            sampling: *sampling,
            seen: std::array::from_fn(|_| rng.uniform() < 0.3),
        })
        .collect();
    for device in devices() {
        let mut decoder = Decoder::new(&shape.model(&device), DType::F32).expect("kernels");
        decoder.begin(shape.start(lanes.clone(), &device));
        let mut host = lanes.clone();
        for step in 0..30 {
            let logits = decoder.logits();
            let draws: Vec<Draw> = (0..shape.batch)
                .map(|_| Draw::free(rng.uniform()))
                .collect();
            let got = decoder.run(&draws);
            for (b, lane) in host.iter_mut().enumerate() {
                let expected = lane.choose(
                    &logits[b * shape.vocabulary..][..shape.vocabulary],
                    draws[b],
                );
                let what = format!("step {step}, {:?} on {device:?}", lane.sampling);
                assert_eq!(
                    (got[b].byte, got[b].top),
                    (expected.byte, expected.top),
                    "{what}"
                );
                let values = |it: Choice| [it.logprob, it.top_logprob];
                assert_close(&what, &values(got[b]), &values(expected), 1e-4, 1e-4);
                if expected.byte == expected.top {
                    assert_eq!(
                        got[b].logprob.to_bits(),
                        got[b].top_logprob.to_bits(),
                        "{what}"
                    );
                }
            }
        }
    }
}

/// Bytes of equal logits come in their order.
#[test]
fn ties_are_broken_alike_everywhere() {
    let shape = Shape { depth: 1, ..SHAPE };
    let mut values = vec![-1.0; 256];
    for byte in [200, 90, 17] {
        values[byte] = 3.0;
    }
    for device in devices() {
        let mut decoder = Decoder::new(&shape.model(&device), DType::F32).expect("kernels");
        let top = |top_k: u32, number: f32, decoder: &mut Decoder| {
            let lanes = shape.lanes(Sampling { top_k, ..GREEDY });
            decoder.begin(Start {
                logits: tensor(&values, [1, 256], &device),
                ..shape.start(lanes, &device)
            });
            decoder.run(&[Draw::free(number)])[0].byte
        };
        assert_eq!(top(1, 0.9, &mut decoder), 17);
        assert_eq!(top(2, 0.9, &mut decoder), 90);
        assert_eq!(top(3, 0.99, &mut decoder), 200);
        assert_eq!(top(3, 0.0, &mut decoder), 17);
    }
}

/// The memory that steps leave is that of the reference: nothing is kept but what a step needs.
#[test]
fn the_reference_carries_its_memory() {
    let shape = SHAPE;
    let mut memory = shape.start(shape.lanes(GREEDY), &cpu()).memory;
    let before = read(memory[0].1.clone());
    let model = shape.model(&cpu());
    let byte = Tensor::<1, Int>::from_data([65], &cpu());
    let _ = reference::step(&model, byte, &mut memory);
    let after = read(memory[0].1.clone());
    for e in 0..shape.inner {
        assert_eq!(after[3 * e..3 * e + 2], before[3 * e + 1..3 * e + 3]);
    }
}

/// Bytes, probabilities and logits of 70 steps on a GPU, run one way, and what it is called.
#[cfg(feature = "cube")]
fn run_as(
    shape: &Shape,
    mode: cube::Mode,
    processors: Option<usize>,
    device: &Device,
) -> (Vec<Choice>, Vec<f32>, &'static str) {
    let sampling = Sampling {
        top_k: 0,
        temperature: 0.9,
        ..GREEDY
    };
    let mut rng = Rng::new(9);
    let draws = (0..70 * shape.batch).map(|_| Draw::free(rng.uniform()));
    let draws: Vec<Draw> = draws.collect();
    let mut decoder = cube::Decoder::new(&shape.model(device), DType::F32).expect("kernels");
    decoder.set_mode(mode, processors);
    decoder.begin(shape.start(shape.lanes(sampling), device));
    decoder.queue(&draws);
    let choices = decoder.take();
    (choices, decoder.logits(), decoder.describe())
}

/// On a GPU a step is run kernel by kernel, as a graph, or with many others in one kernel: on CUDA,
/// where that is the best way.
#[cfg(feature = "cube")]
#[test]
fn all_ways_to_run_steps_give_the_same_bits() {
    use super::cube::Mode;
    for batch in [1, 3] {
        let shape = Shape { batch, ..SHAPE };
        for device in devices().into_iter().skip(1) {
            let (expected, logits, _) = run_as(&shape, Mode::Kernels, None, &device);
            let (graph, graph_logits, how) = run_as(&shape, Mode::Graph, None, &device);
            assert_eq!(how, "GPU kernels, one graph a byte", "{device:?}");
            assert_eq!((&graph, &graph_logits), (&expected, &logits));
            let (best, best_logits, _) = run_as(&shape, Mode::Best, None, &device);
            assert_eq!((&best, &best_logits), (&expected, &logits));
        }
    }
}

/// A single cube waits for nobody, so every device can run it: a model small enough for one.
#[cfg(feature = "cube")]
#[test]
fn one_kernel_for_many_steps_gives_the_same_bits() {
    use super::cube::Mode;
    let shape = Shape {
        depth: 3,
        width: 16,
        inner: 32,
        vocabulary: 16,
        rows: 16,
        ..SHAPE
    };
    for device in devices().into_iter().skip(1) {
        let (expected, logits, _) = run_as(&shape, Mode::Kernels, Some(1), &device);
        let (got, got_logits, how) = run_as(&shape, Mode::Persistent(1), Some(1), &device);
        assert_eq!(how, "one GPU kernel for many bytes");
        assert_eq!((got, got_logits), (expected, logits), "{device:?}");
    }
}

/// What is no number in the sums of `x_proj` does not get lost.
#[cfg(feature = "cube")]
#[test]
fn infinities_reach_the_logits() {
    let shape = SHAPE;
    for device in devices().into_iter().skip(1) {
        let mut model = shape.model(&device);
        let inputs = model.layers[1].x_proj.clone();
        model.layers[1].x_proj = inputs * f32::INFINITY;
        let mut decoder = Decoder::new(&model, DType::F32).expect("kernels");
        decoder.begin(shape.start(shape.lanes(GREEDY), &device));
        let _ = decoder.run(&[Draw::free(0.5); 3]);
        let logits = decoder.logits();
        assert!(logits.iter().all(|it| !it.is_finite()), "{device:?}");
    }
}

/// The kernels for many sequences give the probabilities of the reference: in f32 on every device, and
/// with products in bf16, replayed as a graph, where a device has them.
#[cfg(feature = "cube")]
#[test]
fn kernels_for_many_sequences_equal_the_reference() {
    for (batch, kind, biases) in [(20, NormKind::Rms, false), (150, NormKind::Layer, true)] {
        let shape = Shape {
            batch,
            width: 48,
            inner: 96,
            rank: 16,
            kind,
            biases,
            head: true,
            ..SHAPE
        };
        let steps = 4;
        let mut rng = Rng::new(5);
        let draws: Vec<Draw> = (0..steps * batch)
            .map(|_| Draw {
                number: 0.5,
                forced: Some((rng.uniform() * 256.0) as u8),
            })
            .collect();
        let lanes = shape.lanes(GREEDY);
        let mut reference =
            Reference::new(&shape.model(&cpu()), shape.start(lanes.clone(), &cpu()));
        let expected = reference.run(&draws);
        let logprobs =
            |choices: &[Choice]| -> Vec<f32> { choices.iter().map(|it| it.logprob).collect() };
        for device in devices().into_iter().skip(1) {
            let model = shape.model(&device);
            let mut ways = vec![(DType::F32, cube::Mode::Wide, 1e-3)];
            if device.supports_dtype(DType::BF16) {
                ways.push((DType::BF16, cube::Mode::Best, 0.15));
            }
            for (dtype, mode, tolerance) in ways {
                let mut decoder = cube::Decoder::new(&model, dtype).expect("kernels");
                decoder.set_mode(mode, None);
                decoder.begin(shape.start(lanes.clone(), &device));
                decoder.queue(&draws);
                let got = decoder.take();
                let what = format!("{shape:?} in {dtype:?} on {device:?}");
                let (got, all) = (logprobs(&got), logprobs(&expected));
                assert_close(&what, &got, &all, tolerance, tolerance);
                let logits = reference.logits();
                assert_close(&what, &decoder.logits(), &logits, tolerance, tolerance);
                if dtype == DType::BF16 {
                    assert_eq!(
                        decoder.describe(),
                        "GPU kernels, one graph a byte",
                        "{what}"
                    );
                }
            }
        }
    }
}
