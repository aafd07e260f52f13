use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Device, Tensor};

use super::{NormKind, NormalizeBackward, NormalizeInputs};
use crate::add_norm::{AddNorm, reference};
use crate::testing::{
    ATOL, RTOL, Raw, Rng, assert_close, assert_same_bits, cpu, for_every_backend, read, tensor,
};

const EPS: f32 = 1e-5;

/// Rows of one vector and less, odd sizes, several vectors a unit, the model's own widths.
const SIZES: [[usize; 2]; 7] = [
    [1, 1],
    [3, 7],
    [70, 34],
    [5, 1024],
    [130, 96],
    [9, 1792],
    [2, 8200],
];

struct Case {
    dims: [usize; 2],
    kind: NormKind,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    dy: Vec<f32>,
    dout: Vec<f32>,
}

/// hat, rstd, normed.
type Forward<B> = [FloatTensor<B>; 3];

impl Case {
    fn new(dims: [usize; 2], kind: NormKind, bias: bool) -> Self {
        let n = dims[0] * dims[1];
        let mut rng = Rng::new(n as u64);
        Self {
            dims,
            kind,
            x: rng.normals(n, 1.0).iter().map(|x| x + 0.5).collect(),
            weight: rng.normals(dims[1], 1.0),
            bias: bias.then(|| rng.normals(dims[1], 1.0)),
            dy: rng.normals(n, 1.0),
            dout: rng.normals(n, 1.0),
        }
    }

    fn all() -> impl Iterator<Item = Self> {
        SIZES.into_iter().flat_map(|dims| {
            [NormKind::Rms, NormKind::Layer]
                .into_iter()
                .flat_map(move |kind| [false, true].map(|bias| Self::new(dims, kind, bias)))
        })
    }

    fn what<B: Raw>(&self, device: &Device) -> String {
        let bias = self.bias.is_some();
        format!("{device:?} {:?} {:?} bias {bias}", self.kind, self.dims)
    }

    fn weight<B: Raw>(&self, device: &Device) -> FloatTensor<B> {
        B::float(tensor(&self.weight, [self.dims[1]], device))
    }

    fn bias<B: Raw>(&self, device: &Device) -> Option<FloatTensor<B>> {
        let bias = self.bias.as_ref()?;
        Some(B::float(tensor(bias, [self.dims[1]], device)))
    }

    fn inputs<B: Raw>(&self, dtype: DType, device: &Device) -> NormalizeInputs<FloatTensor<B>> {
        NormalizeInputs {
            x: B::float(tensor(&self.x, self.dims, device)),
            eps: EPS,
            kind: self.kind,
            dtype,
        }
    }

    fn forward<B: Raw>(&self, dtype: DType, device: &Device) -> Forward<B> {
        let inputs = self.inputs::<B>(dtype, device);
        let (weight, bias) = (self.weight::<B>(device), self.bias::<B>(device));
        let (normalized, normed) = B::normalize_affine(inputs, weight, bias);
        [normalized.hat, normalized.rstd, normed]
    }

    fn backward<B: Raw>(&self, dtype: DType, device: &Device) -> NormalizeBackward<FloatTensor<B>> {
        let [hat, rstd, _] = self.forward::<B>(dtype, device);
        NormalizeBackward {
            hat,
            rstd,
            weight: self.weight::<B>(device),
            has_bias: self.bias.is_some(),
            kind: self.kind,
            dy: B::float(tensor(&self.dy, self.dims, device).cast(dtype)),
            dout: B::float(tensor(&self.dout, self.dims, device)),
        }
    }

    /// Normed rows and the gradients of x, weight and bias, by plain tensor operations.
    fn expected(&self) -> [Vec<f32>; 4] {
        let device = cpu().autodiff();
        let [rows, width] = self.dims;
        let x = tensor(&self.x, [1, rows, width], &device).require_grad();
        let weight = tensor(&self.weight, [width], &device).require_grad();
        let zero = vec![0.0; width];
        let bias = self.bias.as_ref().unwrap_or(&zero);
        let bias = tensor(bias, [width], &device).require_grad();
        let (y, sum) = reference::add_norm(AddNorm {
            x: x.clone(),
            residual: None,
            weight: weight.clone(),
            bias: Some(bias.clone()),
            eps: EPS,
            kind: self.kind,
        });
        let [dy, dout] = [&self.dy, &self.dout].map(|v| tensor(v, [1, rows, width], &device));
        let grads = ((y.clone() * dy).sum() + (sum * dout).sum()).backward();
        [
            read(y),
            read(x.grad(&grads).expect("tracked")),
            read(weight.grad(&grads).expect("tracked")),
            read(bias.grad(&grads).expect("tracked")),
        ]
    }
}

fn values<B: Raw, const D: usize>(raw: FloatTensor<B>) -> Vec<f32> {
    read::<D>(B::tensor(raw))
}

/// The data types of `hat` that a device has, with the tolerance each allows.
fn dtypes(device: &Device) -> impl Iterator<Item = (DType, f32)> + '_ {
    [(DType::F32, RTOL), (DType::F16, 1e-2), (DType::BF16, 5e-2)]
        .into_iter()
        .filter(|(dtype, _)| device.supports_dtype(*dtype))
}

#[test]
fn equals_plain_tensor_operations() {
    fn check<B: Raw>() {
        for case in Case::all() {
            let [y, dx, dweight, dbias] = case.expected();
            // A row of one element has no variance: eps alone sets the scale.
            let single = if case.dims[1] == 1 { 0.5 } else { 0.0 };
            for device in B::devices() {
                for (dtype, tolerance) in dtypes(&device) {
                    let what = format!("{} {dtype:?}", case.what::<B>(&device));
                    let [_, _, normed] = case.forward::<B>(dtype, &device);
                    let grads = B::normalize_backward(case.backward::<B>(dtype, &device));
                    let close = |name: &str, got: &[f32], expected: &[f32], scale: f32| {
                        let what = format!("{what} {name}");
                        let atol = tolerance.max(ATOL) * scale + single;
                        assert_close(&what, got, expected, tolerance, atol);
                    };
                    close("normed", &values::<B, 2>(normed), &y, 1.0);
                    close("dx", &values::<B, 2>(grads.dx), &dx, 1.0);
                    // Rounding errors of the rows add up like a random walk.
                    let rows = (case.dims[0] as f32).sqrt();
                    close("dweight", &values::<B, 1>(grads.weight), &dweight, rows);
                    assert_eq!(grads.bias.is_some(), case.bias.is_some(), "{what}");
                    if let Some(bias) = grads.bias {
                        close("dbias", &values::<B, 1>(bias), &dbias, rows);
                    }
                }
            }
        }
    }
    for_every_backend!(check);
}

#[test]
fn hat_and_rstd_are_the_normalisation() {
    fn check<B: Raw>() {
        for device in B::devices() {
            let case = Case::new([4, 40], NormKind::Layer, false);
            let x = tensor(&case.x, case.dims, &cpu());
            let centred = x.clone() - x.mean_dim(1);
            let variance = centred.clone().square().mean_dim(1);
            let rstd: Tensor<2> = (variance + EPS).sqrt().recip();
            let got = B::normalize(case.inputs::<B>(DType::F32, &device));
            let what = case.what::<B>(&device);
            assert_close(
                &what,
                &values::<B, 1>(got.rstd),
                &read(rstd.clone()),
                1e-5,
                0.0,
            );
            let hat = read(centred * rstd);
            assert_close(&what, &values::<B, 2>(got.hat), &hat, 1e-5, 1e-5);
        }
    }
    for_every_backend!(check);
}

#[test]
fn one_pass_has_the_bits_of_two_whatever_it_keeps() {
    fn check<B: Raw>() {
        for case in Case::all() {
            for device in B::devices() {
                for (dtype, _) in dtypes(&device) {
                    let what = format!("{} {dtype:?}", case.what::<B>(&device));
                    let [hat, rstd, normed] = case.forward::<B>(dtype, &device);
                    let apart = B::normalize(case.inputs::<B>(dtype, &device));
                    let again = B::affine(
                        hat.clone(),
                        case.weight::<B>(&device),
                        case.bias::<B>(&device),
                    );
                    let alone = B::normed(
                        case.inputs::<B>(dtype, &device),
                        case.weight::<B>(&device),
                        case.bias::<B>(&device),
                    );
                    let same =
                        |a, b| assert_same_bits(&what, &values::<B, 2>(a), &values::<B, 2>(b));
                    same(again, normed.clone());
                    same(alone, normed);
                    same(apart.hat, hat);
                    let [apart, rstd] = [apart.rstd, rstd].map(values::<B, 1>);
                    assert_same_bits(&what, &apart, &rstd);
                }
            }
        }
    }
    for_every_backend!(check);
}

/// In place or not, the same bits; a gradient that is still held is not overwritten.
#[test]
fn the_stream_gradient_is_overwritten_only_where_nothing_else_holds_it() {
    fn check<B: Raw>() {
        for device in B::devices() {
            let case = Case::new([70, 34], NormKind::Rms, false);
            let in_place = B::normalize_backward(case.backward::<B>(DType::F32, &device));
            let inputs = case.backward::<B>(DType::F32, &device);
            let held = inputs.dout.clone();
            let apart = B::normalize_backward(inputs);
            let what = case.what::<B>(&device);
            let [in_place, apart] = [in_place.dx, apart.dx].map(values::<B, 2>);
            assert_same_bits(&what, &in_place, &apart);
            assert_same_bits(&what, &values::<B, 2>(held), &case.dout);
        }
    }
    for_every_backend!(check);
}

#[test]
fn two_runs_have_the_same_bits() {
    fn check<B: Raw>() {
        for device in B::devices() {
            let case = Case::new([500, 67], NormKind::Layer, true);
            let run = || {
                let grads = B::normalize_backward(case.backward::<B>(DType::F32, &device));
                let bias = grads.bias.expect("asked for");
                let [weight, bias] = [grads.weight, bias].map(values::<B, 1>);
                [values::<B, 2>(grads.dx), weight, bias].concat()
            };
            assert_same_bits(&case.what::<B>(&device), &run(), &run());
        }
    }
    for_every_backend!(check);
}
