use burn::tensor::{DType, Device, Tensor};

use super::{Conv, causal_conv1d, reference};
use crate::testing::{ATOL, RTOL, Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

#[derive(Clone)]
struct Case {
    /// B, L, E, K
    dims: [usize; 4],
    bias: bool,
    initial: bool,
    silu: bool,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias_values: Vec<f32>,
    window: Vec<f32>,
    resets: Option<Vec<f32>>,
    /// The loss is Σ y · loss_weight.
    loss_weight: Vec<f32>,
}

struct Results {
    y: Vec<f32>,
    window: Vec<f32>,
    dx: Vec<f32>,
    dweight: Vec<f32>,
    dbias: Option<Vec<f32>>,
}

impl Case {
    fn new(dims: [usize; 4], seed: u64) -> Self {
        let [batch, length, inner, width] = dims;
        let mut rng = Rng::new(seed);
        Self {
            dims,
            bias: true,
            initial: true,
            silu: true,
            x: rng.normals(batch * length * inner, 1.0),
            weight: rng.normals(inner * width, 0.5),
            bias_values: rng.normals(inner, 0.5),
            window: rng.normals(batch * inner * (width - 1), 1.0),
            resets: Some(rng.flags(batch * length, 0.1)),
            loss_weight: rng.normals(batch * length * inner, 1.0),
        }
    }

    fn piece(&self, from: usize, to: usize) -> Self {
        let [batch, length, inner, width] = self.dims;
        let cut = |x: &[f32], w: usize| -> Vec<f32> {
            (0..batch)
                .flat_map(|b| &x[(b * length + from) * w..(b * length + to) * w])
                .copied()
                .collect()
        };
        Self {
            dims: [batch, to - from, inner, width],
            x: cut(&self.x, inner),
            resets: self.resets.as_ref().map(|r| cut(r, 1)),
            loss_weight: cut(&self.loss_weight, inner),
            ..self.clone()
        }
    }

    fn run(&self, conv: fn(Conv) -> (Tensor<3>, Tensor<3>), device: &Device) -> Results {
        let [batch, length, inner, width] = self.dims;
        let device = device.clone().autodiff();
        let args = Conv {
            x: tensor(&self.x, [batch, length, inner], &device).require_grad(),
            weight: tensor(&self.weight, [inner, width], &device).require_grad(),
            bias: self
                .bias
                .then(|| tensor(&self.bias_values, [inner], &device).require_grad()),
            initial_window: self
                .initial
                .then(|| tensor(&self.window, [batch, inner, width - 1], &device)),
            resets: self
                .resets
                .as_ref()
                .map(|r| tensor(r, [batch, length], &device)),
            silu: self.silu,
        };
        let (y, window) = conv(args.clone());
        let weight = tensor(&self.loss_weight, [batch, length, inner], &device);
        let grads = (y.clone() * weight).sum().backward();
        Results {
            y: read(y),
            window: read(window),
            dx: read(args.x.grad(&grads).expect("tracked")),
            dweight: read(args.weight.grad(&grads).expect("tracked")),
            dbias: args.bias.map(|b| read(b.grad(&grads).expect("tracked"))),
        }
    }

    fn check(&self, what: &str) {
        let expected = self.run(reference::causal_conv1d, &cpu());
        for device in devices() {
            let got = self.run(causal_conv1d, &device);
            let what = format!("{device:?} {what} {:?}", self.dims);
            assert_close(&format!("{what} y"), &got.y, &expected.y, RTOL, ATOL);
            assert_close(
                &format!("{what} window"),
                &got.window,
                &expected.window,
                0.0,
                0.0,
            );
            assert_close(&format!("{what} dx"), &got.dx, &expected.dx, RTOL, ATOL);
            assert_close(
                &format!("{what} dweight"),
                &got.dweight,
                &expected.dweight,
                RTOL,
                ATOL,
            );
            if let (Some(got), Some(expected)) = (&got.dbias, &expected.dbias) {
                assert_close(&format!("{what} dbias"), got, expected, RTOL, ATOL);
            }
        }
    }
}

#[test]
fn equals_reference_at_every_length() {
    for length in [1, 2, 3, 7, 64, 255, 372, 1134, 4096] {
        let inner = if length > 400 { 9 } else { 37 };
        Case::new([2, length, inner, 4], length as u64).check("");
    }
}

#[test]
fn every_width() {
    for width in [1, 2, 3, 4, 5, 8] {
        for length in [1, 2, 5, 70] {
            Case::new([2, length, 19, width], width as u64).check("");
        }
    }
}

/// Widths that vectors of four, of two, and of one channel divide.
#[test]
fn every_vector_of_channels() {
    for inner in [4, 6, 40, 517, 518, 520] {
        Case::new([2, 21, inner, 4], inner as u64).check("");
    }
}

/// Rows that large cubes of the backward pass fill, and enough of them.
#[test]
fn long_rows_equal_reference() {
    Case::new([1, 1300, 1024, 4], 3).check("");
}

#[test]
fn every_combination_of_optional_inputs() {
    for bits in 0..16u32 {
        let on = |i: u32| bits & (1 << i) != 0;
        let mut case = Case::new([2, 20, 5, 4], bits as u64);
        (case.bias, case.initial, case.silu) = (on(0), on(1), on(2));
        if !on(3) {
            case.resets = None;
        }
        case.check(&format!("options {bits:04b}"));
    }
}

#[test]
fn two_halves_with_carried_window_equal_the_whole() {
    for (length, cut) in [(128, 64), (9, 1), (9, 2), (9, 8), (70, 33)] {
        let [batch, inner, width] = [2, 11, 4];
        let whole = Case::new([batch, length, inner, width], length as u64);
        for device in devices() {
            let all = whole.run(causal_conv1d, &device);
            let first = whole.piece(0, cut).run(causal_conv1d, &device);
            let mut second = whole.piece(cut, length);
            second.window = first.window;
            let second = second.run(causal_conv1d, &device);
            let mut joined = Vec::new();
            for b in 0..batch {
                joined.extend_from_slice(&first.y[b * cut * inner..(b + 1) * cut * inner]);
                let rest = (length - cut) * inner;
                joined.extend_from_slice(&second.y[b * rest..(b + 1) * rest]);
            }
            let what = format!("{device:?} {length} cut at {cut}");
            assert_same_bits(&what, &joined, &all.y);
            assert_same_bits(&what, &second.window, &all.window);
        }
    }
}

#[test]
fn packed_documents_equal_separate_documents() {
    let (length, inner) = (40, 7);
    let bounds = [0, 1, 3, 20, 40];
    let mut packed = Case::new([1, length, inner, 4], 4);
    packed.initial = false;
    let mut flags = vec![0.0; length];
    bounds[..4].iter().for_each(|b| flags[*b] = 1.0);
    packed.resets = Some(flags);
    for device in devices() {
        let all = packed.run(causal_conv1d, &device);
        for pair in bounds.windows(2) {
            let mut alone = packed.piece(pair[0], pair[1]);
            alone.resets = None;
            let alone = alone.run(causal_conv1d, &device);
            let part = |x: &[f32]| x[pair[0] * inner..pair[1] * inner].to_vec();
            assert_same_bits("y", &part(&all.y), &alone.y);
            assert_close("dx", &part(&all.dx), &alone.dx, 1e-6, 1e-6);
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    const STEP: f32 = 1e-2;
    type Field = fn(&mut Case) -> &mut Vec<f32>;
    for device in devices() {
        let mut case = Case::new([1, 6, 3, 4], 11);
        let analytic = case.run(causal_conv1d, &device);
        let fields: [(&[f32], Field); 3] = [
            (&analytic.dx, |c| &mut c.x),
            (&analytic.dweight, |c| &mut c.weight),
            (analytic.dbias.as_ref().expect("bias"), |c| {
                &mut c.bias_values
            }),
        ];
        for (analytic, field) in fields {
            let numeric: Vec<f32> = (0..analytic.len())
                .map(|i| {
                    let original = field(&mut case)[i];
                    let mut loss = |x: f32| -> f64 {
                        field(&mut case)[i] = x;
                        let y = case.run(causal_conv1d, &device).y;
                        y.iter()
                            .zip(&case.loss_weight)
                            .map(|(y, w)| *y as f64 * *w as f64)
                            .sum()
                    };
                    let slope =
                        (loss(original + STEP) - loss(original - STEP)) / (2.0 * STEP as f64);
                    field(&mut case)[i] = original;
                    slope as f32
                })
                .collect();
            assert_close(&format!("{device:?}"), analytic, &numeric, 1e-2, 1e-2);
        }
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    let case = Case::new([2, 300, 67, 4], 8);
    for device in devices() {
        let (a, b) = (
            case.run(causal_conv1d, &device),
            case.run(causal_conv1d, &device),
        );
        assert_same_bits("y", &a.y, &b.y);
        assert_same_bits("dx", &a.dx, &b.dx);
        assert_same_bits("dweight", &a.dweight, &b.dweight);
    }
}

#[test]
fn reduced_precision_equals_reference() {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let case = Case::new([2, 50, 36, 4], 6);
            let [batch, length, inner, width] = case.dims;
            let run = |conv: fn(Conv) -> (Tensor<3>, Tensor<3>), device: &Device| {
                let device = device.clone().autodiff();
                let x = tensor(&case.x, [batch, length, inner], &device)
                    .cast(dtype)
                    .require_grad();
                let weight = tensor(&case.weight, [inner, width], &device).require_grad();
                let y = conv(Conv {
                    bias: Some(tensor(&case.bias_values, [inner], &device)),
                    ..Conv::new(x.clone(), weight.clone())
                })
                .0;
                let grads = y.clone().sum().backward();
                [
                    read(y),
                    read(x.grad(&grads).expect("tracked")),
                    read(weight.grad(&grads).expect("tracked")),
                ]
            };
            let expected = run(reference::causal_conv1d, &cpu());
            let got = run(causal_conv1d, &device);
            let what = format!("{device:?} {dtype:?}");
            for (got, expected) in got.iter().zip(&expected) {
                assert_close(&what, got, expected, 1e-2, 2e-2);
            }
        }
    }
}
