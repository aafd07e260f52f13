use std::ops::ControlFlow;

use burn::tensor::activation::log_softmax;
use burn::tensor::{Int, Tensor, TensorData};

use super::*;
use crate::config::{MambaConfig, Norm};

fn config() -> MambaConfig {
    MambaConfig {
        norm: Norm::Rms,
        tie_embeddings: true,
        ..MambaConfig::new(32, 3)
    }
}

fn generator(config: &MambaConfig, plain: bool) -> Generator {
    let device = Device::flex();
    let options = GeneratorOptions {
        plain,
        ..GeneratorOptions::default()
    };
    Generator::new(config.init_lm(1, &device), &device, options)
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|i| (i * i * 31 + i * 7) as u8).collect()
}

fn write(generator: &mut Generator, requests: &[Request]) -> Vec<Completion> {
    let all = generator.generate(requests, &mut |_| ControlFlow::Continue(()));
    all.expect("valid requests")
}

/// ln p of every byte of `text` after the first, by the forward pass that training runs.
fn log_probabilities(config: &MambaConfig, text: &[u8]) -> Vec<f32> {
    let device = Device::flex();
    let values: Vec<i32> = text.iter().map(|byte| i32::from(*byte)).collect();
    let input = TensorData::new(values, [1, text.len()]);
    let input = Tensor::<2, Int>::from_data(input, &device);
    let (logits, _) = config.init_lm(1, &device).forward(input, None, None);
    let rows: Vec<f32> = log_softmax(logits, 2).into_data().iter::<f32>().collect();
    let row = |i: usize| &rows[i * 256..][..256];
    (1..text.len())
        .map(|i| row(i - 1)[usize::from(text[i])])
        .collect()
}

/// A model of damaged weights says so, and does not write as if it knew something.
#[test]
fn scores_that_are_no_numbers_are_an_error() {
    let config = MambaConfig {
        initializer_range: f64::NAN,
        ..config()
    };
    for plain in [false, true] {
        let request = Request {
            max_new_bytes: 3,
            ..Request::new(b"abc")
        };
        let error = generator(&config, plain)
            .generate(&[request], &mut |_| ControlFlow::Continue(()))
            .expect_err("no numbers");
        assert!(error.to_string().contains("are not numbers"), "{error}");
    }
}

/// Reading a prompt at once, stepping through the rest, and the forward pass of training agree
/// wherever the text is cut, for both ways to step.
#[test]
fn prompt_steps_and_training_agree() {
    let layer_norm = MambaConfig::new(24, 2);
    for config in [config(), layer_norm] {
        let text = bytes(60);
        let expected = log_probabilities(&config, &text);
        for plain in [false, true] {
            let mut generator = generator(&config, plain);
            for cut in [1, 2, 17, 59] {
                let request = Request {
                    forced: text[cut..].to_vec(),
                    max_new_bytes: text.len() - cut,
                    ..Request::new(&text[..cut])
                };
                let done = write(&mut generator, &[request]);
                assert_eq!(done[0].bytes, text[cut..]);
                for (choice, expected) in done[0].choices.iter().zip(&expected[cut - 1..]) {
                    assert!(
                        (choice.logprob - expected).abs() < 2e-4,
                        "{choice:?} {expected}"
                    );
                }
            }
        }
    }
}

/// Texts do not depend on what is written beside them, nor prompts on what is read beside them.
#[test]
fn requests_do_not_depend_on_each_other() {
    let mut generator = generator(&config(), false);
    let prompts = [bytes(5), bytes(12), Vec::new(), bytes(5), bytes(40)];
    let requests: Vec<Request> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| Request {
            seed: i as u64,
            max_new_bytes: 10 + 7 * i,
            ..Request::new(prompt.clone())
        })
        .collect();
    let together = write(&mut generator, &requests);
    for (request, expected) in requests.iter().zip(&together) {
        let alone = write(&mut generator, std::slice::from_ref(request));
        assert_eq!(alone[0].bytes, expected.bytes);
        assert_eq!(expected.bytes.len(), request.max_new_bytes);
        assert_eq!(expected.finish, Finish::Length);
    }
}

#[test]
fn a_seed_and_a_stream_decide_the_text() {
    let mut generator = generator(&config(), false);
    let request = Request {
        max_new_bytes: 30,
        sampling: SamplingConfig::plain(),
        ..Request::new("a")
    };
    let samples = write(&mut generator, &request.samples(3));
    assert_eq!(samples, write(&mut generator, &request.samples(3)));
    assert!(samples[0].bytes != samples[1].bytes && samples[1].bytes != samples[2].bytes);
    let other = Request {
        seed: 1,
        ..request.clone()
    };
    assert_ne!(write(&mut generator, &[other])[0].bytes, samples[0].bytes);
    // Greedy choices need no draws.
    let greedy = |seed| Request {
        seed,
        sampling: SamplingConfig::greedy(),
        ..request.clone()
    };
    let texts = write(&mut generator, &[greedy(1), greedy(2)]);
    assert_eq!(texts[0], texts[1]);
}

/// In whatever pieces a session is advanced, the text is the same; cancelled sequences end.
#[test]
fn pieces_make_up_the_text_and_sequences_can_be_cancelled() {
    let mut generator = generator(&config(), false);
    let request = Request {
        max_new_bytes: 50,
        ..Request::new("some text")
    };
    let expected = write(&mut generator, std::slice::from_ref(&request));
    let mut session = generator.start(&request.samples(2)).expect("valid");
    let mut text = Vec::new();
    let mut ends = [None; 2];
    let mut steps = 1;
    while !session.is_finished() {
        for piece in session.advance(steps).expect("no failure") {
            if piece.index == 0 {
                text.extend(piece.bytes);
            }
            ends[piece.index] = piece.finish;
        }
        if text.len() > 20 {
            session.cancel(1);
        }
        steps = steps % 7 + 1;
    }
    assert_eq!(text, expected[0].bytes);
    assert_eq!(ends, [Some(Finish::Length), Some(Finish::Cancelled)]);
    let timing = session.timing();
    assert_eq!((timing.prompt_bytes, timing.new_bytes), (18, 100));
    // The sink of `generate` can end everything.
    let done = generator
        .generate(&request.samples(2), &mut |_| ControlFlow::Break(()))
        .expect("valid");
    assert!(done.iter().all(|text| text.finish == Finish::Cancelled));
}

#[test]
fn stop_strings_end_one_text_and_not_the_others() {
    let mut generator = generator(&config(), false);
    let request = Request {
        forced: b"one, two. three".to_vec(),
        max_new_bytes: 15,
        ..Request::new("x")
    };
    let stopping = Request {
        stop: vec![b". ".to_vec(), b"two".to_vec()],
        ..request.clone()
    };
    let done = write(&mut generator, &[request, stopping]);
    assert_eq!(done[0].bytes, b"one, two. three");
    assert_eq!(
        (done[1].bytes.as_slice(), done[1].finish),
        (&b"one, "[..], Finish::Stop(1))
    );
    assert_eq!(done[1].choices.len(), 5);
}

#[test]
fn nothing_can_be_asked_for() {
    let mut generator = generator(&config(), false);
    let nothing = Request {
        max_new_bytes: 0,
        ..Request::new("x")
    };
    let done = write(
        &mut generator,
        &[
            nothing,
            Request {
                max_new_bytes: 2,
                ..Request::new("")
            },
        ],
    );
    assert_eq!((done[0].bytes.len(), done[1].bytes.len()), (0, 2));
    assert_eq!(done[0].finish, Finish::Length);
    assert!(write(&mut generator, &[]).is_empty());
}

#[test]
fn settings_outside_their_range_are_named() {
    let mut generator = generator(&config(), false);
    for (sampling, name) in [
        (
            SamplingConfig {
                temperature: -1.0,
                ..SamplingConfig::default()
            },
            "temperature",
        ),
        (
            SamplingConfig {
                top_k: 257,
                ..SamplingConfig::default()
            },
            "top_k",
        ),
        (
            SamplingConfig {
                top_p: 1.5,
                ..SamplingConfig::default()
            },
            "top_p",
        ),
        (
            SamplingConfig {
                min_p: f64::NAN,
                ..SamplingConfig::default()
            },
            "min_p",
        ),
        (
            SamplingConfig {
                repetition_penalty: 0.0,
                ..SamplingConfig::default()
            },
            "repetition_penalty",
        ),
    ] {
        let request = Request {
            sampling,
            ..Request::new("x")
        };
        let error = generator
            .start(&[request])
            .expect_err("out of range")
            .to_string();
        assert!(error.contains(name), "{error}");
    }
    let request = Request {
        stop: vec![Vec::new()],
        ..Request::new("x")
    };
    assert!(generator.start(&[request]).is_err(), "an empty stop string");
}

/// Scores are the logits that the next byte is chosen from.
#[test]
fn logits_are_those_of_the_next_byte() {
    let mut generator = generator(&config(), false);
    let request = Request {
        sampling: SamplingConfig::greedy(),
        ..Request::new("abc")
    };
    let mut session = generator.start(&[request]).expect("valid");
    for _ in 0..5 {
        let logits = session.logits().remove(0);
        let best = (0..256)
            .rev()
            .max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
        let pieces = session.advance(1).expect("no failure");
        assert_eq!(Some(usize::from(pieces[0].bytes[0])), best);
    }
}
