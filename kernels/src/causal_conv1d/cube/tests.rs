use burn::tensor::{DType, Device, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;

use super::{backward, forward};
use crate::causal_conv1d::ConvInputs;
use crate::cube::{columns, row_stride};
use crate::testing::{Raw, Rng, assert_same_bits, read, tensor};

type B = CubeBackend;

/// What the columns of the canvas hold that no gradient goes to.
const UNTOUCHED: f32 = 7.0;

/// B, L, columns `from .. from + E` of S.
struct View {
    batch: usize,
    length: usize,
    inner: usize,
    wide: usize,
    from: usize,
    dtype: DType,
}

impl View {
    fn of(&self, values: &[f32], device: &Device) -> CubeTensor {
        let dims = [self.batch, self.length, self.wide];
        let wide = B::float(tensor(values, dims, device).cast(self.dtype));
        let view = columns(&wide, self.from, self.from + self.inner);
        // CUDA pads rows.
        assert!(row_stride(&view) >= Some(self.wide));
        view
    }

    fn copied(&self, values: &[f32]) -> Vec<f32> {
        values
            .chunks_exact(self.wide)
            .flat_map(|row| &row[self.from..self.from + self.inner])
            .copied()
            .collect()
    }

    fn contiguous(&self, values: &[f32], device: &Device) -> CubeTensor {
        let dims = [self.batch, self.length, self.inner];
        B::float(tensor(&self.copied(values), dims, device).cast(self.dtype))
    }
}

fn values(raw: CubeTensor) -> Vec<f32> {
    read::<3>(B::tensor(raw))
}

fn check(view: &View, device: &Device) {
    let size = view.batch * view.length * view.wide;
    let mut rng = Rng::new(size as u64);
    let (x, dy) = (rng.normals(size, 1.0), rng.normals(size, 1.0));
    let weight = rng.normals(view.inner * 4, 0.5);
    let resets = rng.flags(view.batch * view.length, 0.1);
    let inputs = |x: CubeTensor| ConvInputs {
        x,
        weight: B::float(tensor(&weight, [view.inner, 4], device)),
        bias: None,
        initial_window: None,
        resets: Some(B::float(tensor(&resets, [view.batch, view.length], device))),
        silu: true,
    };
    let seen = inputs(view.of(&x, device));
    let copied = inputs(view.contiguous(&x, device));
    let what = format!(
        "{device:?} {:?} {} of {} from {}",
        view.dtype, view.inner, view.wide, view.from
    );

    let expected = values(forward(copied.clone()).y);
    assert_same_bits(
        &format!("{what} y"),
        &values(forward(seen.clone()).y),
        &expected,
    );

    let wide = [view.batch, view.length, view.wide];
    let canvas = B::float(Tensor::<3>::full(wide, UNTOUCHED, device).cast(view.dtype));
    let into = columns(&canvas, view.from, view.from + view.inner);
    let expected = backward(copied, view.contiguous(&dy, device), None);
    let got = backward(seen, view.of(&dy, device), Some(into));
    let dx = values(expected.x);
    let canvas = values(canvas);
    assert_same_bits(&format!("{what} dx"), &view.copied(&canvas), &dx);
    assert_same_bits(&format!("{what} returned dx"), &values(got.x), &dx);
    let untouched = canvas.iter().filter(|x| **x == UNTOUCHED).count();
    assert_eq!(
        untouched,
        size - dx.len(),
        "{what}: columns beside the view"
    );
    let [got, expected] = [got.weight, expected.weight].map(|weight| read::<2>(B::tensor(weight)));
    assert_same_bits(&format!("{what} dweight"), &got, &expected);
}

/// Columns that begin where every device may begin a buffer (128 numbers), in rows whose stride
/// vectors of four, of two, and of one number divide.
#[test]
fn views_in_and_out_equal_contiguous_tensors() {
    for device in B::devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            for (inner, wide, from) in [
                (128, 256, 0),
                (128, 256, 128),
                (128, 258, 128),
                (128, 257, 128),
                (37, 256, 128),
            ] {
                let view = View {
                    batch: 2,
                    length: 21,
                    inner,
                    wide,
                    from,
                    dtype,
                };
                check(&view, &device);
            }
        }
    }
}

#[test]
fn tensors_without_uniform_rows_are_copied() {
    for device in B::devices() {
        let (x, weight) = (
            Rng::new(3).normals(2 * 9 * 8, 1.0),
            Rng::new(4).normals(32, 1.0),
        );
        let x = tensor(&x, [2, 8, 9], &device).swap_dims(1, 2);
        let straight = tensor(&read(x.clone()), [2, 9, 8], &device);
        let [got, expected] = [x, straight].map(|x| {
            let out = forward(ConvInputs {
                x: B::float(x),
                weight: B::float(tensor(&weight, [8, 4], &device)),
                bias: None,
                initial_window: None,
                resets: None,
                silu: false,
            });
            values(out.y)
        });
        assert_same_bits("y", &got, &expected);
    }
}
