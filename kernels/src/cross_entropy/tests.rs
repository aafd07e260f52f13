use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::{cross_entropy, reference};
use crate::testing::{
    Raw, Rng, assert_close, assert_same_bits, cpu, devices, for_every_backend, read, tensor,
};

fn run(
    f: fn(Tensor<2>, Tensor<1, Int>) -> Tensor<1>,
    [rows, vocabulary]: [usize; 2],
    scale: f32,
    device: &Device,
) -> [Vec<f32>; 2] {
    let mut rng = Rng::new((rows * vocabulary) as u64);
    let device = device.clone().autodiff();
    let logits = rng.normals(rows * vocabulary, scale);
    let targets: Vec<i32> = (0..rows)
        .map(|_| (rng.uniform() * vocabulary as f32) as i32)
        .collect();
    let weight = tensor(&rng.normals(rows, 1.0), [rows], &device);
    let logits = tensor(&logits, [rows, vocabulary], &device).require_grad();
    let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [rows]), &device);
    let loss = f(logits.clone(), targets);
    let grads = (loss.clone() * weight).sum().backward();
    [read(loss), read(logits.grad(&grads).expect("tracked"))]
}

#[test]
fn equals_reference() {
    for dims in [
        [1, 1],
        [1, 256],
        [7, 3],
        [130, 256],
        [65, 259],
        [9, 1030],
        [3, 5000],
    ] {
        for scale in [1.0, 30.0] {
            let [loss, grad] = run(reference::cross_entropy, dims, scale, &cpu());
            for device in devices() {
                let [got_loss, got_grad] = run(cross_entropy, dims, scale, &device);
                let what = format!("{device:?} {dims:?} scale {scale}");
                assert_close(&what, &got_loss, &loss, 1e-5, 1e-5);
                assert_close(&what, &got_grad, &grad, 1e-5, 1e-5);
            }
        }
    }
}

#[test]
fn uniform_logits_cost_the_logarithm_of_the_vocabulary() {
    for device in devices() {
        let logits = Tensor::<2>::full([2, 256], 3.0, &device);
        let targets = Tensor::<1, Int>::from_data([0, 255], &device);
        let expected = [256f32.ln(); 2];
        assert_close(
            "loss",
            &read(cross_entropy(logits, targets)),
            &expected,
            1e-6,
            1e-6,
        );
    }
}

#[test]
fn large_logits_stay_finite() {
    for device in devices() {
        let logits = tensor(&[1e4, -1e4, 0.0, 3e4], [2, 2], &device);
        let targets = Tensor::<1, Int>::from_data([0, 1], &device);
        assert_close(
            "loss",
            &read(cross_entropy(logits, targets)),
            &[0.0, 0.0],
            0.0,
            1e-6,
        );
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    for device in devices() {
        let [a, b] = [0, 1].map(|_| run(cross_entropy, [300, 256], 2.0, &device));
        assert_same_bits("loss", &a[0], &b[0]);
        assert_same_bits("gradient", &a[1], &b[1]);
    }
}

/// Logits and their gradient each in reduced precision, against the same numbers in f32.
#[test]
fn reduced_precision_equals_f32() {
    fn check<B: Raw>() {
        let [rows, classes] = [33, 256];
        let mut rng = Rng::new(9);
        let values = rng.normals(rows * classes, 2.0);
        let targets: Vec<i32> = (0..rows).map(|i| (i * 31 % classes) as i32).collect();
        let weights = rng.normals(rows, 1.0);
        for device in B::devices() {
            for dtype in [DType::F16, DType::BF16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                let logits = tensor(&values, [rows, classes], &device).cast(dtype);
                let targets = TensorData::new(targets.clone(), [rows]);
                let targets = B::int(Tensor::<1, Int>::from_data(targets, &device));
                let dloss = B::float(tensor(&weights, [rows], &device));
                let run = |logits: Tensor<2>, dtype: DType| {
                    let logits = B::float(logits);
                    let (losses, total) = B::cross_entropy(logits.clone(), targets.clone());
                    let grad = B::cross_entropy_backward(
                        logits,
                        targets.clone(),
                        total,
                        dloss.clone(),
                        dtype,
                    );
                    (read(B::tensor::<1>(losses)), B::tensor::<2>(grad))
                };
                let (expected, wide) = run(logits.clone().cast(DType::F32), DType::F32);
                let (losses, narrow) = run(logits, dtype);
                let what = format!("{device:?} {dtype:?}");
                assert_same_bits(&what, &losses, &expected);
                assert_eq!(narrow.dtype(), dtype, "{what}");
                assert_same_bits(&what, &read(narrow), &read(wide.cast(dtype)));
            }
        }
    }
    for_every_backend!(check);
}

#[test]
#[should_panic(expected = "cross_entropy: logits must have at least one number, got [0, 8]")]
fn there_must_be_rows() {
    let device = cpu();
    cross_entropy(Tensor::zeros([0, 8], &device), Tensor::zeros([0], &device));
}
