use burn::tensor::{DType, Device, Tensor};

use super::sum_squares;
use crate::testing::{Rng, assert_close, assert_same_bits, devices, read, tensor};

/// Lengths that fill vectors and cubes and that do not, and more than one turn of the grid.
const LENGTHS: [usize; 7] = [1, 3, 4, 257, 4096, 70_001, 1_200_000];

fn data() -> Vec<Vec<f32>> {
    let mut rng = Rng::new(5);
    LENGTHS.map(|n| rng.normals(n, 0.1)).to_vec()
}

fn tensors(data: &[Vec<f32>], dtype: DType, device: &Device) -> Vec<Tensor<1>> {
    data.iter()
        .map(|x| tensor(x, [x.len()], device).cast(dtype))
        .collect()
}

fn truth(data: &[Vec<f32>]) -> f32 {
    let squares = data.iter().flatten().map(|x| f64::from(*x) * f64::from(*x));
    squares.sum::<f64>() as f32
}

#[test]
fn equals_the_sum_in_double_precision() {
    for device in devices() {
        let data = data();
        let all = read(sum_squares(tensors(&data, DType::F32, &device)));
        assert_close(&format!("{device:?}"), &all, &[truth(&data)], 1e-5, 0.0);
        for x in data {
            let what = format!("{device:?} {} elements", x.len());
            let one = read(sum_squares(tensors(
                std::slice::from_ref(&x),
                DType::F32,
                &device,
            )));
            assert_close(&what, &one, &[truth(&[x])], 1e-5, 0.0);
        }
    }
}

#[test]
fn reduced_precision_is_summed_in_f32() {
    for device in devices() {
        for dtype in [DType::F16, DType::BF16] {
            if !device.supports_dtype(dtype) {
                continue;
            }
            let rounded = tensors(&data(), dtype, &device);
            let data: Vec<_> = rounded.iter().map(|x| read(x.clone())).collect();
            let what = format!("{device:?} {dtype:?}");
            assert_close(
                &what,
                &read(sum_squares(rounded)),
                &[truth(&data)],
                1e-5,
                0.0,
            );
        }
    }
}

#[test]
fn two_runs_have_the_same_bits() {
    for device in devices() {
        let run = || read(sum_squares(tensors(&data(), DType::F32, &device)));
        assert_same_bits(&format!("{device:?}"), &run(), &run());
    }
}

#[test]
#[should_panic(expected = "no tensors")]
fn nothing_has_no_sum() {
    sum_squares(Vec::new());
}
