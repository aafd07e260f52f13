use burn::tensor::{DType, Device, Tensor};

use super::{AddNorm, NormInputs, NormKind, NormSaved, add_norm, reference};
use crate::testing::{
    ATOL, RTOL, Raw, Rng, assert_close, assert_same_bits, cpu, devices, for_every_backend, read,
    tensor,
};

struct Case {
    dims: [usize; 3],
    kind: NormKind,
    residual: bool,
    bias: bool,
    x: Vec<f32>,
    residual_values: Vec<f32>,
    weight: Vec<f32>,
    bias_values: Vec<f32>,
    /// The loss is Σ y · w₁ + Σ sum · w₂: both outputs are used, as in a model.
    loss: [Vec<f32>; 2],
}

/// y, sum, then gradients of x, residual, weight and bias.
type Results = Vec<(&'static str, Option<Vec<f32>>)>;

impl Case {
    fn new(dims: [usize; 3], kind: NormKind, residual: bool, bias: bool) -> Self {
        let n = dims.iter().product();
        let mut rng = Rng::new(n as u64);
        Self {
            dims,
            kind,
            residual,
            bias,
            x: rng.normals(n, 1.0).iter().map(|x| x + 0.5).collect(),
            residual_values: rng.normals(n, 2.0),
            weight: rng.normals(dims[2], 1.0),
            bias_values: rng.normals(dims[2], 1.0),
            loss: [rng.normals(n, 1.0), rng.normals(n, 1.0)],
        }
    }

    fn run(
        &self,
        norm: fn(AddNorm) -> (Tensor<3>, Tensor<3>),
        device: &Device,
        dtype: DType,
    ) -> Results {
        let width = self.dims[2];
        let device = device.clone().autodiff();
        let args = AddNorm {
            x: tensor(&self.x, self.dims, &device)
                .cast(dtype)
                .require_grad(),
            residual: self
                .residual
                .then(|| tensor(&self.residual_values, self.dims, &device).require_grad()),
            weight: tensor(&self.weight, [width], &device).require_grad(),
            bias: self
                .bias
                .then(|| tensor(&self.bias_values, [width], &device).require_grad()),
            eps: 1e-5,
            kind: self.kind,
        };
        let (y, sum) = norm(args.clone());
        let [w1, w2] = [0, 1].map(|i: usize| tensor(&self.loss[i], self.dims, &device));
        let grads = ((y.clone().cast(DType::F32) * w1).sum() + (sum.clone() * w2).sum()).backward();
        vec![
            ("y", Some(read(y))),
            ("sum", Some(read(sum))),
            ("dx", Some(read(args.x.grad(&grads).expect("tracked")))),
            (
                "dresidual",
                args.residual
                    .map(|r| read(r.grad(&grads).expect("tracked"))),
            ),
            (
                "dweight",
                Some(read(args.weight.grad(&grads).expect("tracked"))),
            ),
            (
                "dbias",
                args.bias.map(|b| read(b.grad(&grads).expect("tracked"))),
            ),
        ]
    }
}

fn for_each_kind(mut f: impl FnMut(NormKind, bool, bool)) {
    for kind in [NormKind::Rms, NormKind::Layer] {
        for residual in [false, true] {
            for bias in [false, true] {
                f(kind, residual, bias);
            }
        }
    }
}

#[test]
fn equals_reference() {
    for dims in [
        [1, 1, 1],
        [1, 3, 7],
        [2, 70, 33],
        [1, 5, 1024],
        [3, 130, 96],
    ] {
        for_each_kind(|kind, residual, bias| {
            let case = Case::new(dims, kind, residual, bias);
            let expected = case.run(reference::add_norm, &cpu(), DType::F32);
            for device in devices() {
                let got = case.run(add_norm, &device, DType::F32);
                for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                    let what = format!("{device:?} {kind:?} {dims:?} residual {residual} {name}");
                    assert_eq!(got.is_some(), expected.is_some(), "{what}");
                    if let (Some(got), Some(expected)) = (got, expected) {
                        // A row of one element has no variance: eps alone sets the scale.
                        let atol = if dims[2] == 1 { 0.5 } else { ATOL };
                        assert_close(&what, got, expected, RTOL, atol);
                    }
                }
            }
        });
    }
}

#[test]
fn half_precision_rows_keep_an_f32_residual() {
    for device in devices() {
        if !device.supports_dtype(DType::BF16) {
            continue;
        }
        let case = Case::new([2, 40, 64], NormKind::Layer, true, true);
        let expected = case.run(reference::add_norm, &cpu(), DType::BF16);
        let got = case.run(add_norm, &device, DType::BF16);
        for ((name, got), (_, expected)) in got.iter().zip(&expected) {
            if let (Some(got), Some(expected)) = (got, expected) {
                let tight = *name == "sum";
                let tolerance = if tight { 1e-6 } else { 3e-2 };
                assert_close(
                    &format!("{device:?} {name}"),
                    got,
                    expected,
                    tolerance,
                    tolerance,
                );
            }
        }
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    let case = Case::new([3, 200, 67], NormKind::Layer, true, true);
    for device in devices() {
        let first = case.run(add_norm, &device, DType::F32);
        let second = case.run(add_norm, &device, DType::F32);
        for ((name, a), (_, b)) in first.iter().zip(&second) {
            assert_same_bits(name, a.as_ref().expect(name), b.as_ref().expect(name));
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    const STEP: f32 = 1e-2;
    for device in devices() {
        for_each_kind(|kind, residual, bias| {
            let mut case = Case::new([1, 2, 6], kind, residual, bias);
            let analytic = case.run(add_norm, &device, DType::F32);
            let numeric: Vec<f32> = (0..case.x.len())
                .map(|i| {
                    let original = case.x[i];
                    let mut loss = |x: f32| -> f64 {
                        case.x[i] = x;
                        let out = case.run(add_norm, &device, DType::F32);
                        (0..2)
                            .flat_map(|k| out[k].1.iter().flatten().zip(&case.loss[k]))
                            .map(|(y, w)| *y as f64 * *w as f64)
                            .sum()
                    };
                    let slope =
                        (loss(original + STEP) - loss(original - STEP)) / (2.0 * STEP as f64);
                    case.x[i] = original;
                    slope as f32
                })
                .collect();
            let dx = analytic[2].1.as_ref().expect("dx");
            assert_close(&format!("{device:?} {kind:?}"), dx, &numeric, 2e-2, 2e-2);
        });
    }
}

#[test]
#[should_panic(expected = "add_norm: x must have at least one position, got [1, 0, 8]")]
fn there_must_be_positions() {
    let device = cpu();
    add_norm(AddNorm {
        x: Tensor::zeros([1, 0, 8], &device),
        residual: None,
        weight: Tensor::ones([8], &device),
        bias: None,
        eps: 1e-5,
        kind: NormKind::Rms,
    });
}

/// The gradient of the sum takes its place only where nothing else holds it, with the same bits.
#[test]
fn a_sum_that_is_held_is_not_overwritten() {
    fn check<B: Raw>() {
        for device in B::devices() {
            let case = Case::new([1, 70, 34], NormKind::Layer, false, true);
            let rows = |values: &[f32]| B::float(tensor(values, [70, 34], &device));
            let row = |values: &[f32]| B::float(tensor(values, [34], &device));
            let gradient = |hold: bool| {
                let x = rows(&case.x);
                let held = hold.then(|| x.clone());
                let out = B::add_norm(NormInputs {
                    x,
                    residual: None,
                    weight: row(&case.weight),
                    bias: Some(row(&case.bias_values)),
                    eps: 1e-5,
                    kind: case.kind,
                });
                let saved = NormSaved {
                    sum: out.sum,
                    mean: out.mean,
                    rstd: out.rstd,
                    weight: row(&case.weight),
                    has_bias: true,
                    kind: case.kind,
                };
                let grads = B::add_norm_backward(saved, rows(&case.loss[0]));
                let read = |raw| read(B::tensor::<2>(raw));
                (read(grads.sum), held.map(read))
            };
            let (in_place, _) = gradient(false);
            let (apart, held) = gradient(true);
            let what = format!("{device:?}");
            assert_same_bits(&what, &in_place, &apart);
            assert_same_bits(&what, &held.expect("held"), &case.x);
        }
    }
    for_every_backend!(check);
}
