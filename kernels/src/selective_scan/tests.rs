use burn::tensor::{DType, Device, Tensor};

use super::{Scan, reference, selective_scan, selective_state_update};
use crate::testing::{ATOL, RTOL, Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

/// Which optional inputs a case has.
#[derive(Clone, Copy, Debug)]
struct With {
    d: bool,
    z: bool,
    bias: bool,
    softplus: bool,
    initial: bool,
    resets: bool,
}

const ALL: With = With {
    d: true,
    z: true,
    bias: true,
    softplus: true,
    initial: true,
    resets: true,
};

/// Inputs of a scan, on the host.
#[derive(Clone)]
struct Case {
    dims: [usize; 4],
    with: With,
    u: Vec<f32>,
    delta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    d: Vec<f32>,
    z: Vec<f32>,
    bias: Vec<f32>,
    initial: Vec<f32>,
    resets: Vec<f32>,
    /// The loss is Σ y · weight.
    weight: Vec<f32>,
}

impl Case {
    fn new(dims: [usize; 4], with: With, seed: u64) -> Self {
        let [batch, length, inner, state] = dims;
        let mut rng = Rng::new(seed);
        let mut delta = rng.normals(batch * length * inner, 0.7);
        if !with.softplus {
            delta.iter_mut().for_each(|d| *d = d.abs() * 0.1);
        }
        Self {
            dims,
            with,
            u: rng.normals(batch * length * inner, 1.0),
            delta,
            a: (0..inner * state)
                .map(|i| -((i % state) as f32 + 1.0) * (0.7 + 0.6 * rng.uniform()))
                .collect(),
            b: rng.normals(batch * length * state, 1.0),
            c: rng.normals(batch * length * state, 1.0),
            d: rng.normals(inner, 1.0),
            z: rng.normals(batch * length * inner, 1.0),
            bias: (0..inner)
                .map(|_| {
                    if with.softplus {
                        -4.0 + 3.0 * rng.uniform()
                    } else {
                        0.05
                    }
                })
                .collect(),
            initial: rng.normals(batch * inner * state, 1.0),
            resets: rng.flags(batch * length, 0.05),
            weight: rng.normals(batch * length * inner, 1.0),
        }
    }

    /// Positions `from..to` of every sequence.
    fn piece(&self, from: usize, to: usize) -> Self {
        let [batch, length, inner, state] = self.dims;
        let cut = |x: &[f32], width: usize| -> Vec<f32> {
            (0..batch)
                .flat_map(|b| &x[(b * length + from) * width..(b * length + to) * width])
                .copied()
                .collect()
        };
        Self {
            dims: [batch, to - from, inner, state],
            u: cut(&self.u, inner),
            delta: cut(&self.delta, inner),
            b: cut(&self.b, state),
            c: cut(&self.c, state),
            z: cut(&self.z, inner),
            resets: cut(&self.resets, 1),
            weight: cut(&self.weight, inner),
            ..self.clone()
        }
    }

    /// Runs `scan` on `device`; activations are stored as `dtype`.
    fn run_as(
        &self,
        scan: fn(Scan) -> (Tensor<3>, Tensor<3>),
        device: &Device,
        dtype: DType,
    ) -> Results {
        let [batch, length, inner, state] = self.dims;
        let device = device.clone().autodiff();
        let with = self.with;
        let wide = |x: &[f32]| {
            tensor(x, [batch, length, inner], &device)
                .cast(dtype)
                .require_grad()
        };
        let narrow = |x: &[f32]| {
            tensor(x, [batch, length, state], &device)
                .cast(dtype)
                .require_grad()
        };
        let row = |x: &[f32]| tensor(x, [inner], &device).require_grad();
        let args = Scan {
            u: wide(&self.u),
            delta: wide(&self.delta),
            a: tensor(&self.a, [inner, state], &device).require_grad(),
            b: narrow(&self.b),
            c: narrow(&self.c),
            d: with.d.then(|| row(&self.d)),
            z: with.z.then(|| wide(&self.z)),
            delta_bias: with.bias.then(|| row(&self.bias)),
            initial_state: with
                .initial
                .then(|| tensor(&self.initial, [batch, inner, state], &device)),
            resets: with
                .resets
                .then(|| tensor(&self.resets, [batch, length], &device)),
            delta_softplus: with.softplus,
        };
        let (y, last) = scan(args.clone());
        let weight = tensor(&self.weight, [batch, length, inner], &device);
        let grads = (y.clone().cast(DType::F32) * weight).sum().backward();
        let g3 = |t: &Tensor<3>| read(t.grad(&grads).expect("tracked"));
        let g1 = |t: &Option<Tensor<1>>| t.as_ref().map(|t| read(t.grad(&grads).expect("tracked")));
        Results {
            y: read(y),
            last: read(last),
            grads: vec![
                ("du", Some(g3(&args.u))),
                ("ddelta", Some(g3(&args.delta))),
                ("da", Some(read(args.a.grad(&grads).expect("tracked")))),
                ("db", Some(g3(&args.b))),
                ("dc", Some(g3(&args.c))),
                ("dd", g1(&args.d)),
                ("dz", args.z.as_ref().map(g3)),
                ("dbias", g1(&args.delta_bias)),
            ],
        }
    }

    fn run(&self, scan: fn(Scan) -> (Tensor<3>, Tensor<3>), device: &Device) -> Results {
        self.run_as(scan, device, DType::F32)
    }
}

struct Results {
    y: Vec<f32>,
    last: Vec<f32>,
    grads: Vec<(&'static str, Option<Vec<f32>>)>,
}

impl Results {
    fn assert_close(&self, expected: &Self, what: &str, rtol: f32, atol: f32) {
        assert_close(&format!("{what} y"), &self.y, &expected.y, rtol, atol);
        assert_close(
            &format!("{what} last"),
            &self.last,
            &expected.last,
            rtol,
            atol,
        );
        for ((name, got), (_, expected)) in self.grads.iter().zip(&expected.grads) {
            assert_eq!(got.is_some(), expected.is_some(), "{what} {name}");
            if let (Some(got), Some(expected)) = (got, expected) {
                assert_close(&format!("{what} {name}"), got, expected, rtol, atol);
            }
        }
    }

    fn assert_same_bits(&self, other: &Self, what: &str) {
        assert_same_bits(&format!("{what} y"), &self.y, &other.y);
        assert_same_bits(&format!("{what} last"), &self.last, &other.last);
        for ((name, a), (_, b)) in self.grads.iter().zip(&other.grads) {
            if let (Some(a), Some(b)) = (a, b) {
                assert_same_bits(&format!("{what} {name}"), a, b);
            }
        }
    }

    fn grad(&self, name: &str) -> &[f32] {
        self.grads
            .iter()
            .find(|(n, _)| *n == name)
            .and_then(|(_, g)| g.as_deref())
            .expect("gradient")
    }
}

fn against_reference(lengths: &[usize], states: &[usize], dims: impl Fn(usize) -> (usize, usize)) {
    for &length in lengths {
        for &state in states {
            let (batch, inner) = dims(length);
            let case = Case::new(
                [batch, length, inner, state],
                ALL,
                (length * 31 + state) as u64,
            );
            let expected = case.run(reference::selective_scan, &cpu());
            for device in devices() {
                let what = format!("{device:?} L {length} E {inner} N {state}");
                case.run(selective_scan, &device)
                    .assert_close(&expected, &what, RTOL, ATOL);
            }
        }
    }
}

#[test]
fn equals_reference_at_short_lengths() {
    against_reference(&[1, 2, 3, 7, 64], &[2, 8, 16, 64], |_| (2, 37));
}

#[test]
fn equals_reference_at_odd_lengths() {
    against_reference(&[255, 372], &[2, 8, 16, 64], |_| (2, 19));
}

#[test]
fn equals_reference_at_long_lengths() {
    against_reference(&[1134, 4096], &[2, 8, 16, 64], |_| (1, 9));
}

#[test]
fn equals_reference_over_many_channels() {
    against_reference(&[70], &[16], |_| (3, 2 * 1024 + 5));
}

#[test]
fn state_sizes_up_to_256_and_one() {
    against_reference(&[9], &[1, 3, 256], |_| (1, 5));
}

#[test]
fn every_combination_of_optional_inputs() {
    for bits in 0..64u32 {
        let on = |i: u32| bits & (1 << i) != 0;
        let with = With {
            d: on(0),
            z: on(1),
            bias: on(2),
            softplus: on(3),
            initial: on(4),
            resets: on(5),
        };
        let case = Case::new([2, 40, 7, 4], with, bits as u64);
        let expected = case.run(reference::selective_scan, &cpu());
        for device in devices() {
            case.run(selective_scan, &device).assert_close(
                &expected,
                &format!("{device:?} {with:?}"),
                RTOL,
                ATOL,
            );
        }
    }
}

/// mamba_ssm's tolerances for reduced precision; the device decides which types it stores.
#[test]
fn reduced_precision_equals_reference() {
    for device in devices() {
        for (dtype, rtol, atol) in [(DType::F16, 3e-3, 5e-3), (DType::BF16, 3e-2, 5e-2)] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let case = Case::new([2, 100, 33, 16], ALL, 5);
            let expected = case.run_as(reference::selective_scan, &cpu(), dtype);
            let got = case.run_as(selective_scan, &device, dtype);
            let what = format!("{device:?} {dtype:?}");
            assert_close(&what, &got.y, &expected.y, rtol, atol);
            for name in ["du", "ddelta", "dz"] {
                assert_close(
                    &format!("{what} {name}"),
                    got.grad(name),
                    expected.grad(name),
                    rtol,
                    atol,
                );
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    const STEP: f32 = 1e-2;
    type Field = fn(&mut Case) -> &mut Vec<f32>;
    let fields: [(&str, Field); 8] = [
        ("du", |c| &mut c.u),
        ("ddelta", |c| &mut c.delta),
        ("da", |c| &mut c.a),
        ("db", |c| &mut c.b),
        ("dc", |c| &mut c.c),
        ("dd", |c| &mut c.d),
        ("dz", |c| &mut c.z),
        ("dbias", |c| &mut c.bias),
    ];
    for device in devices() {
        let mut case = Case::new([1, 5, 3, 2], ALL, 11);
        let analytic = case.run(selective_scan, &device);
        for (name, field) in fields {
            let count = field(&mut case).len();
            let mut numeric = Vec::with_capacity(count);
            for i in 0..count {
                let original = field(&mut case)[i];
                let mut loss = |x: f32| {
                    field(&mut case)[i] = x;
                    let y = case.run(selective_scan, &device).y;
                    y.iter()
                        .zip(&case.weight)
                        .map(|(y, w)| *y as f64 * *w as f64)
                        .sum::<f64>()
                };
                let slope = (loss(original + STEP) - loss(original - STEP)) / (2.0 * STEP as f64);
                numeric.push(slope as f32);
                field(&mut case)[i] = original;
            }
            assert_close(
                &format!("{device:?} {name}"),
                analytic.grad(name),
                &numeric,
                1e-2,
                1e-2,
            );
        }
    }
}

/// Rows `from..to` of a `[B, L, width]` host tensor.
fn rows(x: &[f32], dims: [usize; 2], width: usize, from: usize, to: usize) -> Vec<f32> {
    (0..dims[0])
        .flat_map(|b| &x[(b * dims[1] + from) * width..(b * dims[1] + to) * width])
        .copied()
        .collect()
}

#[test]
fn two_halves_with_carried_state_equal_the_whole() {
    let with = With {
        resets: false,
        ..ALL
    };
    for (length, cut) in [(2 * 64, 64), (101, 37), (8, 1), (70, 69)] {
        let [batch, inner, state] = [2, 21, 16];
        let whole = Case::new([batch, length, inner, state], with, length as u64);
        for device in devices() {
            let what = format!("{device:?} {length} cut at {cut}");
            let all = whole.run(selective_scan, &device);
            let first = whole.piece(0, cut).run(selective_scan, &device);
            let mut second = whole.piece(cut, length);
            second.initial = first.last.clone();
            let second = second.run(selective_scan, &device);
            let part = |x: &[f32], width, from, to| rows(x, [batch, length], width, from, to);
            assert_close(&what, &first.y, &part(&all.y, inner, 0, cut), 1e-5, 1e-5);
            assert_close(
                &what,
                &second.y,
                &part(&all.y, inner, cut, length),
                1e-5,
                1e-5,
            );
            assert_close(&what, &second.last, &all.last, 1e-5, 1e-5);

            // Within a half: the loss of the whole that looks at that half's outputs alone.
            let mut late = whole.clone();
            for b in 0..batch {
                late.weight[b * length * inner..(b * length + cut) * inner].fill(0.0);
            }
            let late = late.run(selective_scan, &device);
            let mut early = whole.clone();
            for b in 0..batch {
                early.weight[(b * length + cut) * inner..(b + 1) * length * inner].fill(0.0);
            }
            let early = early.run(selective_scan, &device);
            for (name, width) in [
                ("du", inner),
                ("ddelta", inner),
                ("db", state),
                ("dc", state),
                ("dz", inner),
            ] {
                let what = format!("{what} {name}");
                assert_close(
                    &what,
                    second.grad(name),
                    &part(late.grad(name), width, cut, length),
                    1e-4,
                    1e-4,
                );
                assert_close(
                    &what,
                    first.grad(name),
                    &part(early.grad(name), width, 0, cut),
                    1e-4,
                    1e-4,
                );
            }
        }
    }
}

#[test]
fn packed_documents_equal_separate_documents() {
    let bounds = [0, 1, 30, 64, 65, 150];
    let length = 150;
    let [inner, state] = [19, 16];
    let with = With {
        initial: false,
        ..ALL
    };
    let mut packed = Case::new([1, length, inner, state], with, 3);
    packed.resets.fill(0.0);
    for start in &bounds[..bounds.len() - 1] {
        packed.resets[*start] = 1.0;
    }
    for device in devices() {
        let all = packed.run(selective_scan, &device);
        for pair in bounds.windows(2) {
            let (from, to) = (pair[0], pair[1]);
            let mut alone = packed.piece(from, to);
            alone.with.resets = false;
            let alone = alone.run(selective_scan, &device);
            let part = |x: &[f32], width| rows(x, [1, length], width, from, to);
            let what = format!("{device:?} document {from}..{to}");
            assert_close(&what, &part(&all.y, inner), &alone.y, 1e-5, 1e-5);
            for (name, width) in [
                ("du", inner),
                ("ddelta", inner),
                ("db", state),
                ("dc", state),
                ("dz", inner),
            ] {
                assert_close(
                    &format!("{what} {name}"),
                    &part(all.grad(name), width),
                    alone.grad(name),
                    1e-4,
                    1e-4,
                );
            }
        }
    }
}

#[test]
fn parallel_scan_in_tensor_operations_equals_reference() {
    for length in [1, 2, 7, 64, 101] {
        let case = Case::new([2, length, 5, 4], ALL, length as u64);
        let expected = case.run(reference::selective_scan, &cpu());
        case.run(crate::pscan::selective_scan, &cpu()).assert_close(
            &expected,
            &format!("L {length}"),
            RTOL,
            ATOL,
        );
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    let case = Case::new([2, 300, 67, 16], ALL, 8);
    for device in devices() {
        let first = case.run(selective_scan, &device);
        case.run(selective_scan, &device)
            .assert_same_bits(&first, &format!("{device:?}"));
    }
}

#[test]
fn stepping_equals_scanning() {
    let [batch, length, inner, state] = [2, 9, 5, 4];
    let case = Case::new(
        [batch, length, inner, state],
        With {
            resets: false,
            ..ALL
        },
        21,
    );
    for device in devices() {
        let whole = case.run(selective_scan, &device);
        let mut h = tensor(&case.initial, [batch, inner, state], &device);
        for t in 0..length {
            let now = case.piece(t, t + 1);
            let wide = |x: &[f32]| tensor(x, [batch, 1, inner], &device);
            let narrow = |x: &[f32]| tensor(x, [batch, 1, state], &device);
            let (y, next) = selective_state_update(Scan {
                d: Some(tensor(&now.d, [inner], &device)),
                z: Some(wide(&now.z)),
                delta_bias: Some(tensor(&now.bias, [inner], &device)),
                initial_state: Some(h),
                ..Scan::new(
                    wide(&now.u),
                    wide(&now.delta),
                    tensor(&now.a, [inner, state], &device),
                    narrow(&now.b),
                    narrow(&now.c),
                )
            });
            h = next;
            let expected = rows(&whole.y, [batch, length], inner, t, t + 1);
            assert_close(
                &format!("{device:?} step {t}"),
                &read(y),
                &expected,
                1e-5,
                1e-5,
            );
        }
        assert_close("state", &read(h), &whole.last, 1e-5, 1e-5);
    }
}

/// On the CPU; the GPU's form of this is with its views.
#[test]
#[cfg(feature = "flex")]
fn backward_returns_the_outputs_again() {
    use super::{ScanInputs, ScanRequest};
    use crate::MambaKernels;
    use burn::backend::Flex;

    let dims = [2, 70, 19];
    let raw = |seed, dims: [usize; 3]| {
        let values = Rng::new(seed).normals(dims.iter().product(), 0.5);
        tensor(&values, dims, &cpu())
            .try_into_primitive::<Flex>()
            .expect("a tensor on the CPU")
    };
    let rates = tensor(&[-1.0; 19 * 4], [19, 4], &cpu());
    let inputs = ScanInputs {
        u: raw(1, dims),
        delta: raw(2, dims),
        a: rates.try_into_primitive::<Flex>().expect("as above"),
        b: raw(3, [2, 70, 4]),
        c: raw(4, [2, 70, 4]),
        d: None,
        z: Some(raw(5, dims)),
        delta_bias: None,
        initial_state: None,
        resets: None,
        delta_softplus: true,
    };
    let forward = Flex::selective_scan(inputs.clone());
    let backward = |y| {
        let request = ScanRequest {
            y,
            ..ScanRequest::none()
        };
        let (inputs, saved) = (inputs.clone(), forward.saved.clone());
        Flex::selective_scan_backward(inputs, saved, raw(6, dims), request).y
    };
    assert!(backward(false).is_none());
    let values = |y| read(Tensor::<3>::from_primitive::<Flex>(y));
    assert_same_bits(
        "y",
        &values(backward(true).expect("asked for")),
        &values(forward.y.clone()),
    );
}

/// The inputs are not changed: the caller's tensors read the same before and after.
#[test]
fn inputs_are_left_alone() {
    for device in devices() {
        let u = tensor(&Rng::new(1).normals(12, 1.0), [1, 4, 3], &device);
        let a = tensor(&[-1.0; 6], [3, 2], &device);
        let b = tensor(&Rng::new(2).normals(8, 1.0), [1, 4, 2], &device);
        let before = (read(u.clone()), read(b.clone()));
        let _ = selective_scan(Scan::new(u.clone(), u.clone(), a, b.clone(), b.clone()));
        assert_eq!(before, (read(u), read(b)));
    }
}

#[test]
#[should_panic(expected = "delta [B, L, E]")]
fn mismatched_shapes_name_the_input() {
    let device = cpu();
    let x = |e| Tensor::<3>::zeros([1, 4, e], &device);
    let _ = selective_scan(Scan::new(
        x(3),
        x(2),
        Tensor::zeros([3, 2], &device),
        x(2),
        x(2),
    ));
}

/// More than 2³¹ elements: a document at the very end equals the same document alone. Needs some
/// 40 GB of device memory: run with `--ignored` on a GPU that has them.
#[test]
#[ignore = "needs a GPU with 40 GB free"]
#[cfg(feature = "cuda")]
fn offsets_beyond_two_to_the_31() {
    let device = Device::cuda(0);
    // Fewer than 2²⁰ rows: Burn's own fills and slices stop there.
    let (batch, length, inner, state) = (1, 1_046_016, 2048 + 8, 2);
    assert!(batch * length * inner > 1 << 31);
    let tail = 48;
    let wide = || {
        Tensor::<3>::random(
            [batch, length, inner],
            burn::tensor::Distribution::Normal(0.0, 1.0),
            &device,
        )
        .cast(DType::BF16)
    };
    let narrow = || {
        Tensor::<3>::random(
            [batch, length, state],
            burn::tensor::Distribution::Normal(0.0, 1.0),
            &device,
        )
        .cast(DType::BF16)
    };
    let (u, delta, b, c) = (wide(), wide(), narrow(), narrow());
    let a = Tensor::<2>::full([inner, state], -1.0, &device);
    let mut flags = vec![0.0; length];
    flags[length - tail] = 1.0;
    let resets = tensor(&flags, [1, length], &device);
    let end =
        |x: &Tensor<3>, width: usize| x.clone().slice([0..1, length - tail..length, 0..width]);
    let (y, last) = selective_scan(Scan {
        resets: Some(resets),
        ..Scan::new(u.clone(), delta.clone(), a.clone(), b.clone(), c.clone())
    });
    let (y_alone, last_alone) = selective_scan(Scan::new(
        end(&u, inner),
        end(&delta, inner),
        a,
        end(&b, state),
        end(&c, state),
    ));
    assert_close("y", &read(end(&y, inner)), &read(y_alone), 1e-2, 1e-2);
    assert_close("last", &read(last), &read(last_alone), 1e-4, 1e-4);
}

#[test]
fn gradients_have_the_data_types_of_their_inputs() {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let tracked = device.clone().autodiff();
            let ones = |dims: [usize; 3]| Tensor::<3>::ones(dims, &tracked);
            let u = ones([1, 3, 8]).cast(dtype).require_grad();
            let [delta, z] = [(); 2].map(|()| ones([1, 3, 8]).require_grad());
            let [b, c] = [(); 2].map(|()| ones([1, 3, 4]).require_grad());
            let a = Tensor::<2>::full([8, 4], -1.0, &tracked);
            let scan = Scan::new(u.clone(), delta.clone(), a, b.clone(), c.clone());
            let (y, _) = selective_scan(Scan {
                z: Some(z.clone()),
                ..scan
            });
            let grads = y.cast(DType::F32).sum().backward();
            for (name, input) in [("u", u), ("delta", delta), ("z", z), ("b", b), ("c", c)] {
                let grad = input.grad(&grads).expect("tracked");
                assert_eq!(grad.dtype(), input.dtype(), "{name} {device:?} {dtype:?}");
            }
        }
    }
}
