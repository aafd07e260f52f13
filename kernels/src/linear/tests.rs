use burn::tensor::{DType, Device, Tensor};

use super::{Linear, linear, reference};
use crate::testing::{Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

/// Output and both gradients.
fn run(
    f: fn(Linear) -> Tensor<2>,
    [rows, input, output]: [usize; 3],
    transposed: bool,
    [dtype, out]: [DType; 2],
    device: &Device,
) -> [Vec<f32>; 3] {
    let mut rng = Rng::new((rows * input + output) as u64);
    let device = device.clone().autodiff();
    let dims = if transposed {
        [output, input]
    } else {
        [input, output]
    };
    let x = tensor(&rng.normals(rows * input, 1.0), [rows, input], &device);
    let x = x.require_grad();
    let weight = tensor(&rng.normals(input * output, 0.2), dims, &device).require_grad();
    let along = tensor(&rng.normals(rows * output, 1.0), [rows, output], &device);
    let y = f(Linear {
        x: x.clone().cast(dtype),
        weight: weight.clone(),
        transposed,
        dtype: out,
        tf32: false,
    });
    let grads = (y.clone().cast(DType::F32) * along).sum().backward();
    [
        read(y.cast(DType::F32)),
        read(x.grad(&grads).expect("tracked")),
        read(weight.grad(&grads).expect("tracked")),
    ]
}

const SHAPES: [[usize; 3]; 5] = [
    [1, 1, 1],
    [3, 5, 7],
    [130, 64, 96],
    [65, 96, 256],
    [257, 33, 12],
];

#[test]
fn equals_reference_in_f32() {
    for dims in SHAPES {
        for transposed in [false, true] {
            let f32 = [DType::F32; 2];
            let expected = run(reference::linear, dims, transposed, f32, &cpu());
            for device in devices() {
                let got = run(linear, dims, transposed, f32, &device);
                for (i, what) in ["y", "dx", "dweight"].iter().enumerate() {
                    let what = format!("{device:?} {dims:?} {transposed} {what}");
                    assert_close(&what, &got[i], &expected[i], 1e-4, 1e-4);
                }
            }
        }
    }
}

/// Devices whose bf16 the runtime supports: the CPU, and NVIDIA's.
fn with_bf16() -> Vec<Device> {
    devices()
        .into_iter()
        .filter(|device| !format!("{device:?}").to_lowercase().contains("wgpu"))
        .collect()
}

#[test]
fn reduced_precision_rounds_operands_and_adds_up_in_f32() {
    for dims in SHAPES {
        for out in [DType::BF16, DType::F32] {
            let dtypes = [DType::BF16, out];
            let expected = run(reference::linear, dims, false, dtypes, &cpu());
            for device in with_bf16() {
                let got = run(linear, dims, false, dtypes, &device);
                let what = format!("{device:?} {dims:?} {out:?}");
                // y differs by one rounding of the result; gradients by that of dy.
                let step = if out == DType::F32 { 1e-4 } else { 1e-2 };
                assert_close(&format!("{what} y"), &got[0], &expected[0], step, step);
                assert_close(&format!("{what} dx"), &got[1], &expected[1], 2e-2, 6e-2);
                assert_close(&format!("{what} dw"), &got[2], &expected[2], 2e-2, 6e-2);
            }
        }
    }
}

#[test]
fn same_bits_every_time() {
    for device in devices() {
        let dims = [1025, 64, 96];
        let first = run(linear, dims, false, [DType::F32; 2], &device);
        let second = run(linear, dims, false, [DType::F32; 2], &device);
        for (a, b) in first.iter().zip(&second) {
            assert_same_bits(&format!("{device:?}"), a, b);
        }
    }
}

#[test]
#[should_panic(expected = "linear: x is [M, 3] and the weight [4, 5]")]
fn inner_sizes_must_agree() {
    let device = cpu();
    linear(Linear {
        x: Tensor::zeros([2, 3], &device),
        weight: Tensor::zeros([4, 5], &device),
        transposed: false,
        dtype: DType::F32,
        tf32: false,
    });
}

/// Views as operands and targets, on the backends that have them.
#[cfg(feature = "cube")]
mod views {
    use burn::tensor::DType;
    use burn_cubecl::CubeBackend;

    use crate::MambaKernels;
    use crate::cube::columns;
    use crate::linear::{Product, Target};
    use crate::testing::raw::{cube_devices, from_values, values};
    use crate::testing::{Rng, assert_close};

    #[test]
    fn views_are_read_and_written_in_place() {
        let [rows, wide, narrow, output] = [37, 192, 64, 24];
        let mut rng = Rng::new(5);
        let a = rng.normals(rows * wide, 1.0);
        let b = rng.normals(narrow * output, 1.0);
        let start = rng.normals(rows * wide, 1.0);
        for device in &cube_devices() {
            let view = columns(&from_values(&a, [rows, wide], device), 64, 64 + narrow);
            let whole = from_values(&start, [rows, wide], device);
            let target = columns(&whole, 128, 128 + output);
            let how = Product::plain(DType::F32, false);
            CubeBackend::product(
                view,
                from_values(&b, [narrow, output], device),
                how,
                Target::Into(target),
            );
            let mut expected = start.clone();
            for i in 0..rows {
                for j in 0..output {
                    expected[i * wide + 128 + j] = (0..narrow)
                        .map(|k| a[i * wide + 64 + k] * b[k * output + j])
                        .sum();
                }
            }
            assert_close(
                &format!("{device:?}"),
                &values(whole),
                &expected,
                1e-4,
                1e-4,
            );
        }
    }

    #[test]
    fn a_sum_reuses_its_buffer_only_when_it_owns_it() {
        let (a, b, c) = (
            [1.0, 2.0, 3.0, 4.0],
            [5.0, 6.0, 7.0, 8.0],
            [1.0, 1.0, 1.0, 1.0],
        );
        for device in &cube_devices() {
            let how = Product::plain(DType::F32, false);
            let add = from_values(&c, [2, 2], device);
            let operands = || {
                (
                    from_values(&a, [2, 2], device),
                    from_values(&b, [2, 2], device),
                )
            };
            let (x, y) = operands();
            let shared = CubeBackend::product(x, y, how, Target::Add(add.clone()));
            assert_eq!(values(shared), [20.0, 23.0, 44.0, 51.0], "{device:?}");
            assert_eq!(values(add.clone()), c, "{device:?}: a shared summand stays");
            let (x, y) = operands();
            let owned = CubeBackend::product(x, y, how, Target::Add(add));
            assert_eq!(values(owned), [20.0, 23.0, 44.0, 51.0], "{device:?}");
        }
    }

    /// Large enough that cuBLASLt's algorithms are tried, which must not show in a sum.
    #[cfg(feature = "cuda")]
    #[test]
    fn trying_algorithms_adds_nothing_to_a_sum() {
        let [rows, inner, output] = [2048, 2048, 1024];
        // Every row picks one row of b.
        let mut a = vec![0.0f32; rows * inner];
        for i in 0..rows {
            a[i * inner + (7 * i) % inner] = 1.0;
        }
        let b: Vec<f32> = (0..inner * output).map(|at| (at % 251) as f32).collect();
        let start: Vec<f32> = (0..rows * output).map(|at| (at % 127) as f32).collect();
        let expected: Vec<f32> = (0..rows * output)
            .map(|at| start[at] + b[(7 * (at / output)) % inner * output + at % output])
            .collect();
        let device = &burn_cubecl::CubeDevice::cuda(0).expect("a GPU");
        for _ in 0..2 {
            let sum = CubeBackend::product(
                from_values(&a, [rows, inner], device),
                from_values(&b, [inner, output], device),
                Product::plain(DType::F32, false),
                Target::Add(from_values(&start, [rows, output], device)),
            );
            assert!(values(sum) == expected);
        }
    }
}
