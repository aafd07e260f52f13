use burn::tensor::{Device, Tensor};

use super::{BLOCK, Int8Moments, adamw_int8_step};
use crate::adamw::{AdamwState, AdamwStep, adamw_step};
use crate::testing::{Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

const BETAS: (f64, f64) = (0.9, 0.95);

/// A parameter with exact or 8-bit moments.
#[allow(clippy::large_enum_variant)]
enum Optimizer {
    Exact(AdamwState<1>),
    Int8(Tensor<1>, Int8Moments),
}

impl Optimizer {
    fn new(int8: bool, param: &[f32], device: &Device) -> Self {
        let n = param.len();
        let param = tensor(param, [n], device);
        if int8 {
            return Self::Int8(param, Int8Moments::zeros(n, device));
        }
        Self::Exact(AdamwState {
            param,
            moment1: Tensor::zeros([n], device),
            moment2: Tensor::zeros([n], device),
        })
    }

    fn step(self, grad: &[f32], scale: f32, step: AdamwStep) -> Self {
        let device = self.param().device();
        let grad = tensor(grad, [grad.len()], &device);
        let scale = tensor(&[scale], [1], &device);
        match self {
            Self::Exact(state) => Self::Exact(adamw_step(state, grad, scale, step)),
            Self::Int8(param, moments) => {
                let (param, moments) = adamw_int8_step(param, moments, grad, scale, step);
                Self::Int8(param, moments)
            }
        }
    }

    fn param(&self) -> &Tensor<1> {
        match self {
            Self::Exact(state) => &state.param,
            Self::Int8(param, _) => param,
        }
    }
}

/// A quadratic bowl with curvatures over three orders of magnitude and noisy gradients, the same
/// for every optimizer: loss = Σ h · x² / 2.
struct Bowl {
    curvature: Vec<f32>,
    start: Vec<f32>,
}

impl Bowl {
    /// Two whole blocks and a part of one, whose length is no multiple of a word.
    const SIZE: usize = 2 * BLOCK + 87;

    fn new() -> Self {
        let mut rng = Rng::new(1);
        Self {
            curvature: (0..Self::SIZE)
                .map(|_| 10f32.powf(-3.0 * rng.uniform()))
                .collect(),
            start: rng.normals(Self::SIZE, 1.0),
        }
    }

    fn loss(&self, x: &[f32]) -> f32 {
        let terms = x.iter().zip(&self.curvature).map(|(x, h)| 0.5 * h * x * x);
        terms.sum()
    }

    /// Loss and parameter after 200 steps.
    fn descend(&self, int8: bool, device: &Device) -> (f32, Vec<f32>) {
        let mut rng = Rng::new(2);
        let mut optimizer = Optimizer::new(int8, &self.start, device);
        for t in 1..=200u64 {
            let x = read(optimizer.param().clone());
            let grad: Vec<f32> = x
                .iter()
                .zip(&self.curvature)
                .map(|(x, h)| h * (x + 0.3 * rng.normal()))
                .collect();
            let lr = 0.02 * (1.0 - t as f64 / 200.0);
            optimizer = optimizer.step(&grad, 1.0, AdamwStep::new(t, lr, BETAS, 1e-8, 0.0));
        }
        let x = read(optimizer.param().clone());
        (self.loss(&x), x)
    }
}

/// The loss falls at least twentyfold, and ends within a tenth of where the exact moments lead.
#[test]
fn stays_close_to_exact_moments_over_200_steps() {
    let bowl = Bowl::new();
    let start = bowl.loss(&bowl.start);
    for device in devices() {
        let (exact, _) = bowl.descend(false, &device);
        let (int8, _) = bowl.descend(true, &device);
        assert!(exact < 0.05 * start, "{device:?}: {start} to {exact}");
        let apart = (int8 - exact).abs() / exact;
        assert!(apart < 0.1, "{device:?}: {int8} and exact {exact}");
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    for device in devices() {
        let bowl = Bowl::new();
        let [a, b] = [0, 1].map(|_| bowl.descend(true, &device).1);
        assert_same_bits(&format!("{device:?}"), &a, &b);
    }
}

/// Numbers a thousand times smaller than their block's largest: with even steps their mean would
/// round to zero, with a root that rounds to zero they would jump.
#[test]
fn small_gradients_move_their_parameters_as_far_as_large_ones() {
    let grads: Vec<f32> = (0..BLOCK)
        .map(|i| [1.0, -1e-1, 1e-2, -1e-3][i % 4])
        .collect();
    for device in devices() {
        let mut optimizer = Optimizer::new(true, &vec![0.0; BLOCK], &device);
        for t in 1..=30 {
            let step = AdamwStep::new(t, 0.01, BETAS, 1e-8, 0.0);
            optimizer = optimizer.step(&grads, 1.0, step);
        }
        let moved = read(optimizer.param().clone());
        let expected: Vec<f32> = grads.iter().map(|g| -0.3 * g.signum()).collect();
        assert_close(&format!("{device:?}"), &moved, &expected, 0.15, 0.0);
    }
}

/// The first update meets no rounded moment: it has the bits of the exact one, or nearly.
#[test]
fn the_first_update_is_exact() {
    let mut rng = Rng::new(3);
    for n in [1, 4, 255, 1000] {
        let (param, grad) = (rng.normals(n, 1.0), rng.normals(n, 0.1));
        for device in devices() {
            let step = AdamwStep::new(1, 1e-2, BETAS, 1e-8, 0.1);
            let [exact, int8] = [false, true].map(|int8| {
                let optimizer = Optimizer::new(int8, &param, &device);
                read(optimizer.step(&grad, 0.5, step).param().clone())
            });
            assert_close(&format!("{device:?} {n}"), &int8, &exact, 1e-5, 1e-6);
        }
    }
}

/// Codes and scales of all devices agree; a number at a rounding border may differ by one step.
#[test]
fn every_device_stores_the_same_codes() {
    let stored = |device: &Device| {
        let mut rng = Rng::new(4);
        let mut optimizer = Optimizer::new(true, &rng.normals(700, 1.0), device);
        for t in 1..=3 {
            let step = AdamwStep::new(t, 1e-2, BETAS, 1e-8, 0.0);
            optimizer = optimizer.step(&rng.normals(700, 0.1), 1.0, step);
        }
        let Optimizer::Int8(_, moments) = optimizer else {
            unreachable!("asked for above")
        };
        let codes = [moments.first, moments.second].map(|codes| {
            let words = codes.into_data().try_to_vec::<i32>().expect("i32 words");
            words
                .into_iter()
                .flat_map(i32::to_le_bytes)
                .collect::<Vec<_>>()
        });
        let scales = [moments.first_scale, moments.second_scale].map(read);
        (codes, scales)
    };
    let (expected, expected_scales) = stored(&cpu());
    for device in devices() {
        let (codes, scales) = stored(&device);
        let signed = |x: &u8| f32::from(*x as i8);
        let unsigned = |x: &u8| f32::from(*x);
        let decode: [&dyn Fn(&u8) -> f32; 2] = [&signed, &unsigned];
        for i in 0..2 {
            let [got, expected] = [&codes[i], &expected[i]]
                .map(|codes| codes.iter().map(decode[i]).collect::<Vec<_>>());
            assert_close(&format!("{device:?} codes {i}"), &got, &expected, 0.0, 1.0);
            let what = format!("{device:?} scales {i}");
            assert_close(&what, &scales[i], &expected_scales[i], 0.02, 0.0);
            let largest = got.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert_eq!(largest, [127.0, 255.0][i], "{what}: the largest code");
        }
    }
}

#[test]
fn moments_held_elsewhere_are_not_overwritten() {
    for device in devices() {
        let moments = Int8Moments::zeros(5, &device);
        let held = moments.clone();
        let step = AdamwStep::new(1, 0.1, BETAS, 1e-8, 0.0);
        let ones = || Tensor::<1>::ones([5], &device);
        let one = Tensor::<1>::ones([1], &device);
        let (_, moments) = adamw_int8_step(ones(), moments, ones(), one, step);
        assert_eq!(read(held.first_scale), [0.0], "{device:?}");
        assert_close(
            &format!("{device:?}"),
            &read(moments.first_scale),
            &[0.1],
            1e-5,
            0.0,
        );
        let held = held
            .first
            .into_data()
            .try_to_vec::<i32>()
            .expect("i32 words");
        assert!(held.iter().all(|word| *word == 0), "{device:?}");
    }
}
