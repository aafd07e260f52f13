use burn::tensor::{DType, Device, Tensor};

use super::{LayerSettings, MambaLayer, mamba_layer, reference};
use crate::add_norm::NormKind;
use crate::testing::{
    ATOL, RTOL, Raw, Rng, assert_close, assert_same_bits, cpu, devices, for_every_backend, read,
    tensor,
};

/// Which optional inputs a case has.
#[derive(Clone, Copy, Debug)]
struct Case {
    batch: usize,
    length: usize,
    width: usize,
    inner: usize,
    states: usize,
    rank: usize,
    taps: usize,
    norm: NormKind,
    biases: bool,
    memory: bool,
    resets: bool,
}

const PLAIN: Case = Case {
    batch: 2,
    length: 9,
    width: 8,
    inner: 16,
    states: 4,
    rank: 2,
    taps: 4,
    norm: NormKind::Rms,
    biases: false,
    memory: false,
    resets: false,
};

fn cases() -> Vec<Case> {
    vec![
        PLAIN,
        Case {
            batch: 1,
            length: 1,
            memory: true,
            ..PLAIN
        },
        Case {
            length: 130,
            width: 24,
            inner: 40,
            states: 16,
            rank: 3,
            norm: NormKind::Layer,
            biases: true,
            memory: true,
            resets: true,
            ..PLAIN
        },
        // Parts of one tensor begin where views may, on every device.
        Case {
            batch: 3,
            length: 70,
            width: 64,
            inner: 128,
            states: 64,
            rank: 64,
            resets: true,
            ..PLAIN
        },
    ]
}

fn settings(case: &Case, dtype: DType, keep: bool) -> LayerSettings {
    LayerSettings {
        norm: case.norm,
        eps: 1e-5,
        dtype,
        tf32: false,
        keep,
    }
}

/// Outputs, then the gradients of the stream and of every parameter there is.
fn run(
    f: fn(MambaLayer) -> (Tensor<3>, Tensor<3>, Tensor<3>),
    case: Case,
    settings: LayerSettings,
    device: &Device,
) -> Vec<(&'static str, Vec<f32>)> {
    let mut rng = Rng::new(case.length as u64);
    let tracked = device.clone().autodiff();
    let Case {
        batch,
        length,
        width,
        inner,
        states,
        rank,
        taps,
        ..
    } = case;
    let fan_in = |n: usize| (n as f32).sqrt().recip();
    let mut matrix = |rows: usize, columns: usize, scale: f32| {
        tensor(
            &rng.normals(rows * columns, scale),
            [rows, columns],
            &tracked,
        )
        .require_grad()
    };
    let in_proj = matrix(width, 2 * inner, fan_in(width));
    let conv = matrix(inner, taps, 0.5);
    let x_proj = matrix(inner, rank + 2 * states, fan_in(inner));
    let dt_proj = matrix(rank, inner, fan_in(rank));
    let out_proj = matrix(inner, width, fan_in(inner));
    let a_log = matrix(inner, states, 0.5);
    let mut row = |n: usize, around: f32| {
        let values = rng
            .normals(n, 0.3)
            .iter()
            .map(|v| v + around)
            .collect::<Vec<_>>();
        tensor(&values, [n], &tracked).require_grad()
    };
    let (norm, d, dt_bias) = (row(width, 1.0), row(inner, 1.0), row(inner, -1.0));
    let biases = case.biases.then(|| {
        [
            row(width, 0.0),
            row(2 * inner, 0.0),
            row(inner, 0.0),
            row(width, 0.0),
        ]
    });
    let mut cube = |dims: [usize; 3], scale: f32| {
        tensor(&rng.normals(dims.iter().product(), scale), dims, &tracked)
    };
    let stream = cube([batch, length, width], 1.0).require_grad();
    let along = cube([batch, length, width], 1.0);
    let h = case.memory.then(|| cube([batch, inner, states], 0.5));
    let window = case.memory.then(|| cube([batch, inner, taps - 1], 0.5));
    let resets = case
        .resets
        .then(|| tensor(&rng.flags(batch * length, 0.1), [batch, length], &tracked));
    let bias = |i: usize| biases.as_ref().map(|b| b[i].clone());
    let (out, h, window) = f(MambaLayer {
        stream: stream.clone(),
        norm: norm.clone(),
        norm_bias: bias(0),
        in_proj: in_proj.clone(),
        in_bias: bias(1),
        conv: conv.clone(),
        conv_bias: bias(2),
        x_proj: x_proj.clone(),
        dt_proj: dt_proj.clone(),
        dt_bias: Some(dt_bias.clone()),
        a_log: a_log.clone(),
        rates: None,
        d: d.clone(),
        out_proj: out_proj.clone(),
        out_bias: bias(3),
        h,
        window,
        resets,
        settings,
    });
    let grads = (out.clone() * along).sum().backward();
    let mut found = vec![("out", read(out)), ("h", read(h)), ("window", read(window))];
    found.push(("stream", read(stream.grad(&grads).expect("tracked"))));
    for (name, tensor) in [
        ("in_proj", in_proj),
        ("conv", conv),
        ("x_proj", x_proj),
        ("dt_proj", dt_proj),
        ("a_log", a_log),
        ("out_proj", out_proj),
    ] {
        found.push((name, read(tensor.grad(&grads).expect("tracked"))));
    }
    let rows = [("norm", norm), ("d", d), ("dt_bias", dt_bias)];
    let names = ["norm_bias", "in_bias", "conv_bias", "out_bias"];
    for (name, tensor) in rows
        .into_iter()
        .chain(names.into_iter().zip(biases.into_iter().flatten()))
    {
        found.push((name, read(tensor.grad(&grads).expect("tracked"))));
    }
    found
}

#[test]
fn equals_reference() {
    for case in cases() {
        let expected = run(
            reference::mamba_layer,
            case,
            settings(&case, DType::F32, true),
            &cpu(),
        );
        for device in devices() {
            for keep in [true, false] {
                let got = run(
                    mamba_layer,
                    case,
                    settings(&case, DType::F32, keep),
                    &device,
                );
                assert_eq!(got.len(), expected.len());
                for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                    let what = format!("{device:?} {case:?} keep {keep}: {name}");
                    assert_close(&what, got, expected, 2e-3, 2e-3);
                }
            }
        }
    }
}

#[test]
fn what_is_kept_changes_no_bit() {
    for case in cases() {
        for device in devices() {
            let run = |keep| {
                run(
                    mamba_layer,
                    case,
                    settings(&case, DType::F32, keep),
                    &device,
                )
            };
            for ((name, a), (_, b)) in run(true).iter().zip(&run(false)) {
                assert_same_bits(&format!("{device:?} {case:?}: {name}"), a, b);
            }
        }
    }
}

/// The layer with gradients tracked, which has to give what it gives without.
fn both(args: MambaLayer) -> (Tensor<3>, Tensor<3>, Tensor<3>) {
    fn plain<const D: usize>(tensor: &Tensor<D>) -> Tensor<D> {
        tensor.clone().inner()
    }
    fn optional<const D: usize>(tensor: &Option<Tensor<D>>) -> Option<Tensor<D>> {
        tensor.as_ref().map(plain)
    }
    let (stream, h, window) = mamba_layer(MambaLayer {
        stream: plain(&args.stream),
        norm: plain(&args.norm),
        norm_bias: optional(&args.norm_bias),
        in_proj: plain(&args.in_proj),
        in_bias: optional(&args.in_bias),
        conv: plain(&args.conv),
        conv_bias: optional(&args.conv_bias),
        x_proj: plain(&args.x_proj),
        dt_proj: plain(&args.dt_proj),
        dt_bias: optional(&args.dt_bias),
        a_log: plain(&args.a_log),
        rates: None,
        d: plain(&args.d),
        out_proj: plain(&args.out_proj),
        out_bias: optional(&args.out_bias),
        h: optional(&args.h),
        window: optional(&args.window),
        resets: optional(&args.resets),
        settings: args.settings,
    });
    let tracked = mamba_layer(args);
    for (name, a, b) in [
        ("out", &tracked.0, stream),
        ("h", &tracked.1, h),
        ("window", &tracked.2, window),
    ] {
        assert_same_bits(name, &read(a.clone()), &read(b));
    }
    tracked
}

#[test]
fn without_gradients_the_bits_are_the_same() {
    for case in cases() {
        for device in devices() {
            run(both, case, settings(&case, DType::F32, true), &device);
        }
    }
}

/// Relative distance of two lists of numbers.
fn distance(got: &[f32], expected: &[f32]) -> f32 {
    let norm = |it: &mut dyn Iterator<Item = f32>| it.map(|v| v * v).sum::<f32>().sqrt();
    norm(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / norm(&mut expected.iter().copied())
}

#[test]
fn bf16_is_close_to_f32() {
    for case in cases() {
        let expected = run(
            reference::mamba_layer,
            case,
            settings(&case, DType::F32, true),
            &cpu(),
        );
        let no_bf16 = |device: &Device| format!("{device:?}").to_lowercase().contains("wgpu");
        for device in devices().iter().filter(|device| !no_bf16(device)) {
            let got = run(
                mamba_layer,
                case,
                settings(&case, DType::BF16, true),
                device,
            );
            for ((name, got), (_, expected)) in got.iter().zip(&expected) {
                let distance = distance(got, expected);
                assert!(
                    distance < 0.03,
                    "{device:?} {case:?}: {name} is off by {distance}"
                );
            }
        }
    }
}

#[test]
fn weights_are_rounded_as_burn_rounds_them() {
    fn check<B: Raw>() {
        for device in B::devices() {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                if !device.supports_dtype(dtype) {
                    continue;
                }
                // One of them is of the type already, and one has an odd number of numbers.
                let mut rng = Rng::new(11);
                let mut matrix =
                    |dims: [usize; 2]| tensor(&rng.normals(dims[0] * dims[1], 1.0), dims, &device);
                let weights = [
                    matrix([64, 36]),
                    matrix([7, 5]),
                    matrix([300, 8]).cast(dtype),
                ];
                let got = B::rounded(weights.clone().map(B::float), dtype);
                for (got, weight) in got.into_iter().zip(weights) {
                    let got = B::tensor::<2>(got);
                    assert_eq!(got.dtype(), dtype);
                    let what = format!("{device:?} {dtype:?} {:?}", weight.dims());
                    assert_same_bits(&what, &read(got), &read(weight.cast(dtype)));
                }
            }
        }
    }
    for_every_backend!(check);
}

#[test]
fn decay_rates_are_minus_the_exponentials() {
    fn check<B: Raw>() {
        let a_log = Rng::new(12).normals(37 * 5, 2.0);
        let expected: Vec<f32> = a_log.iter().map(|x| -x.exp()).collect();
        for device in B::devices() {
            let rates = B::decay_rates(B::float(tensor(&a_log, [37, 5], &device)));
            let rates = B::tensor::<2>(rates);
            assert_close(&format!("{device:?}"), &read(rates), &expected, RTOL, ATOL);
        }
    }
    for_every_backend!(check);
}
