use burn::tensor::{Device, Tensor};

use super::{AdamwState, AdamwStep, adamw_step, adamw_steps, reference};
use crate::testing::{Rng, assert_close, assert_same_bits, devices, read, tensor};

type Update = fn(AdamwState<2>, Tensor<2>, Tensor<1>, AdamwStep) -> AdamwState<2>;

/// Five updates; returns parameter and moments.
fn run(update: Update, dims: [usize; 2], device: &Device) -> [Vec<f32>; 3] {
    let n = dims[0] * dims[1];
    let mut rng = Rng::new(n as u64);
    let mut state = AdamwState {
        param: tensor(&rng.normals(n, 1.0), dims, device),
        moment1: Tensor::zeros(dims, device),
        moment2: Tensor::zeros(dims, device),
    };
    for t in 1..=5 {
        let grad = tensor(&rng.normals(n, 0.3), dims, device);
        let scale = tensor(&[0.5 + 0.1 * t as f32], [1], device);
        let step = AdamwStep::new(t, 1e-2, (0.9, 0.95), 1e-8, 0.1);
        state = update(state, grad, scale, step);
    }
    [read(state.param), read(state.moment1), read(state.moment2)]
}

#[test]
fn equals_reference() {
    for dims in [[1, 1], [3, 7], [129, 257]] {
        for device in devices() {
            let expected = run(reference::adamw_step, dims, &crate::testing::cpu());
            let got = run(adamw_step, dims, &device);
            for (got, expected) in got.iter().zip(&expected) {
                assert_close(&format!("{device:?} {dims:?}"), got, expected, 1e-5, 1e-6);
            }
        }
    }
}

/// More parameters than a launch takes, of lengths that vectors divide and do not.
#[test]
fn many_together_have_the_bits_of_each_alone() {
    const COUNT: usize = 45;
    for device in devices() {
        let mut rng = Rng::new(9);
        let lengths: Vec<usize> = (0..COUNT)
            .map(|i| match i {
                0..40 => [4, 1024, 4096, 1028, 70_000][i % 5],
                _ => [1, 7][i % 2],
            })
            .collect();
        let updates: Vec<_> = lengths
            .iter()
            .map(|n| {
                let mut normals = || tensor(&rng.normals(*n, 1.0), [*n], &device);
                let state = AdamwState {
                    param: normals(),
                    moment1: normals(),
                    moment2: normals().powi_scalar(2),
                };
                (state, normals())
            })
            .collect();
        let step = AdamwStep::new(3, 1e-2, (0.9, 0.95), 1e-8, 0.1);
        let scale = tensor(&[0.7], [1], &device);
        let together = adamw_steps(updates.clone(), scale.clone(), step);
        assert_eq!(together.len(), COUNT);
        for (i, ((state, grad), got)) in updates.into_iter().zip(together).enumerate() {
            let alone = adamw_step(state, grad, scale.clone(), step);
            let what = format!("{device:?} parameter {i}, {} numbers", lengths[i]);
            assert_same_bits(&what, &read(got.param), &read(alone.param));
            assert_same_bits(&what, &read(got.moment1), &read(alone.moment1));
            assert_same_bits(&what, &read(got.moment2), &read(alone.moment2));
        }
    }
}

#[test]
fn no_parameters_are_no_work() {
    for device in devices() {
        let step = AdamwStep::new(1, 0.1, (0.9, 0.95), 1e-8, 0.0);
        let updated = adamw_steps::<1>(Vec::new(), Tensor::ones([1], &device), step);
        assert!(updated.is_empty());
    }
}

/// The first update of Adam moves every element by the learning rate, whatever the gradient.
#[test]
fn first_update_has_the_size_of_the_learning_rate() {
    for device in devices() {
        let state = AdamwState {
            param: tensor(&[1.0, 1.0], [1, 2], &device),
            moment1: Tensor::zeros([1, 2], &device),
            moment2: Tensor::zeros([1, 2], &device),
        };
        let step = AdamwStep::new(1, 0.25, (0.9, 0.95), 0.0, 0.0);
        let one = Tensor::ones([1], &device);
        let out = adamw_step(state, tensor(&[1e-3, -50.0], [1, 2], &device), one, step);
        assert_close("param", &read(out.param), &[0.75, 1.25], 1e-6, 0.0);
    }
}

#[test]
fn a_parameter_held_elsewhere_is_not_overwritten() {
    for device in devices() {
        let held = tensor(&[1.0, 2.0], [1, 2], &device);
        let state = AdamwState {
            param: held.clone(),
            moment1: Tensor::zeros([1, 2], &device),
            moment2: Tensor::zeros([1, 2], &device),
        };
        let step = AdamwStep::new(1, 0.1, (0.9, 0.95), 1e-8, 0.0);
        let out = adamw_step(
            state,
            Tensor::ones([1, 2], &device),
            Tensor::ones([1], &device),
            step,
        );
        assert_close("updated", &read(out.param), &[0.9, 1.9], 1e-5, 0.0);
        assert_close("held", &read(held), &[1.0, 2.0], 0.0, 0.0);
    }
}

/// The parameter is part of a longer tensor: its neighbours must neither move nor be read.
#[test]
fn a_part_of_a_tensor_is_updated_as_the_part_alone() {
    for device in devices() {
        let mut rng = Rng::new(2);
        let n = 64;
        let whole = tensor(&rng.normals(3 * n, 1.0), [3, n], &device);
        let grad = tensor(&rng.normals(n, 1.0), [1, n], &device);
        let step = AdamwStep::new(1, 0.1, (0.9, 0.95), 1e-8, 0.1);
        let run = |param: Tensor<2>| {
            let state = AdamwState {
                param,
                moment1: Tensor::zeros([1, n], &device),
                moment2: Tensor::zeros([1, n], &device),
            };
            let one = Tensor::ones([1], &device);
            read(adamw_step(state, grad.clone(), one, step).param)
        };
        let part = || whole.clone().slice([1..2, 0..n]);
        let alone = tensor(&read(part()), [1, n], &device);
        let what = format!("{device:?}");
        assert_close(&what, &run(part()), &run(alone), 0.0, 0.0);
    }
}

#[test]
fn a_scale_that_is_no_number_changes_nothing() {
    for device in devices() {
        for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let state = AdamwState {
                param: tensor(&[1.0, 2.0, 3.0], [1, 3], &device),
                moment1: tensor(&[0.1, 0.2, 0.3], [1, 3], &device),
                moment2: tensor(&[0.4, 0.5, 0.6], [1, 3], &device),
            };
            let step = AdamwStep::new(3, 0.1, (0.9, 0.95), 1e-8, 0.1);
            let grad = tensor(&[1.0, f32::NAN, 1.0], [1, 3], &device);
            let out = adamw_step(state, grad, tensor(&[scale], [1], &device), step);
            let what = format!("{device:?} {scale}");
            assert_close(&what, &read(out.param), &[1.0, 2.0, 3.0], 0.0, 0.0);
            assert_close(&what, &read(out.moment1), &[0.1, 0.2, 0.3], 0.0, 0.0);
            assert_close(&what, &read(out.moment2), &[0.4, 0.5, 0.6], 0.0, 0.0);
        }
    }
}
