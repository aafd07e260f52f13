use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{embedding, reference};
use crate::testing::{Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

/// B, L, V, D.
type Dims = [usize; 4];

/// Rows, and the gradient of the table.
fn run(
    f: fn(Tensor<2>, Tensor<2, Int>) -> Tensor<3>,
    [batch, length, rows, width]: Dims,
    device: &Device,
) -> [Vec<f32>; 2] {
    let device = device.clone().autodiff();
    let count = batch * length;
    let mut rng = Rng::new(count as u64);
    let weight = tensor(&rng.normals(rows * width, 1.0), [rows, width], &device).require_grad();
    // Few values make up most of a text.
    let bytes: Vec<i32> = (0..count)
        .map(|_| (rng.uniform().powi(3) * rows as f32) as i32)
        .collect();
    let bytes = TensorData::new(bytes, [batch, length]);
    let y = f(weight.clone(), Tensor::from_data(bytes, &device));
    let dy = tensor(
        &rng.normals(count * width, 1.0),
        [batch, length, width],
        &device,
    );
    let grads = (y.clone() * dy).sum().backward();
    [read(y), read(weight.grad(&grads).expect("tracked"))]
}

/// One row, odd sizes, several tiles, and more values than one table holds.
#[test]
fn equals_reference() {
    for dims in [
        [1, 1, 1, 1],
        [2, 3, 5, 7],
        [2, 40, 256, 33],
        [3, 700, 256, 64],
        [1, 300, 700, 34],
    ] {
        let [y, grad] = run(reference::embedding, dims, &cpu());
        for device in devices() {
            let [got_y, got_grad] = run(embedding, dims, &device);
            let what = format!("{device:?} {dims:?}");
            assert_close(&format!("{what} y"), &got_y, &y, 0.0, 0.0);
            assert_close(&format!("{what} dweight"), &got_grad, &grad, 1e-5, 1e-4);
        }
    }
}

#[test]
fn a_value_that_never_occurs_has_no_gradient() {
    for device in devices() {
        let device = device.autodiff();
        let weight = Tensor::<2>::ones([3, 2], &device).require_grad();
        let bytes = Tensor::<2, Int>::from_data([[2, 0, 2]], &device);
        let grads = embedding(weight.clone(), bytes).sum().backward();
        let grad = read(weight.grad(&grads).expect("tracked"));
        assert_same_bits(
            &format!("{device:?}"),
            &grad,
            &[1.0, 1.0, 0.0, 0.0, 2.0, 2.0],
        );
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    for device in devices() {
        let [a, b] = [0, 1].map(|_| run(embedding, [4, 500, 256, 40], &device));
        assert_same_bits(&format!("{device:?} dweight"), &a[1], &b[1]);
    }
}
