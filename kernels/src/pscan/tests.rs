use burn::tensor::{Device, Tensor};

use super::pscan;
use crate::testing::{Rng, assert_close, cpu, read, tensor};

/// The recurrence one position at a time.
fn sequential(a: Tensor<4>, x: Tensor<4>) -> Tensor<4> {
    let [batch, length, inner, state] = a.dims();
    let at = |t: &Tensor<4>, i: usize| t.clone().slice([0..batch, i..i + 1]);
    let mut h = Tensor::zeros([batch, 1, inner, state], &a.device());
    let mut all = Vec::new();
    for i in 0..length {
        h = at(&a, i) * h + at(&x, i);
        all.push(h.clone());
    }
    Tensor::cat(all, 1)
}

fn run(f: fn(Tensor<4>, Tensor<4>) -> Tensor<4>, length: usize, device: &Device) -> [Vec<f32>; 3] {
    let dims = [2, length, 3, 2];
    let n = dims.iter().product();
    let mut rng = Rng::new(length as u64);
    let device = device.clone().autodiff();
    let a: Vec<f32> = (0..n).map(|_| 0.5 + 0.5 * rng.uniform()).collect();
    let a = tensor(&a, dims, &device).require_grad();
    let x = tensor(&rng.normals(n, 1.0), dims, &device).require_grad();
    let weight = tensor(&rng.normals(n, 1.0), dims, &device);
    let before = (read(a.clone()), read(x.clone()));
    let h = f(a.clone(), x.clone());
    assert_eq!(before, (read(a.clone()), read(x.clone())), "inputs changed");
    let grads = (h.clone() * weight).sum().backward();
    [
        read(h),
        // Of one position no decay is used, and no gradient reaches it.
        a.grad(&grads).map(read).unwrap_or_else(|| vec![0.0; n]),
        read(x.grad(&grads).expect("tracked")),
    ]
}

#[test]
fn equals_the_sequential_recurrence_at_every_length() {
    for length in (1..=33).chain([64, 100, 127, 128, 129]) {
        let expected = run(sequential, length, &cpu());
        let got = run(pscan, length, &cpu());
        for (name, (got, expected)) in ["h", "da", "dx"].iter().zip(got.iter().zip(&expected)) {
            assert_close(&format!("L {length} {name}"), got, expected, 1e-4, 1e-4);
        }
    }
}
