//! What the operations' tests share: devices, reproducible data, comparison.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{
    BackendTensor, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, Flex,
};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::MambaKernels;

/// Tolerances of mamba_ssm's own tests at fp32.
pub(crate) const RTOL: f32 = 6e-4;
/// See [`RTOL`].
pub(crate) const ATOL: f32 = 2e-3;

/// The CPU, where references run.
pub(crate) fn cpu() -> Device {
    Device::flex()
}

/// Every device this build has kernels for.
pub(crate) fn devices() -> Vec<Device> {
    [
        Some(cpu()),
        #[cfg(feature = "wgpu")]
        Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        Some(Device::cuda(0)),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// Reproducible pseudo-random numbers.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in [0, 1).
    pub(crate) fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }

    /// About normal, with mean 0 and deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.uniform() - 0.5).sum::<f32>() * 1.732
    }

    pub(crate) fn normals(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.normal() * scale).collect()
    }

    /// Zeros and ones, a one with probability `p`.
    pub(crate) fn flags(&mut self, n: usize, p: f32) -> Vec<f32> {
        (0..n)
            .map(|_| if self.uniform() < p { 1.0 } else { 0.0 })
            .collect()
    }
}

/// A tensor of `values` on `device`.
pub(crate) fn tensor<const D: usize>(
    values: &[f32],
    dims: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), dims), device)
}

/// The values of a tensor, read back as f32.
pub(crate) fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Fails, naming the first and the worst element, unless `|got - expected| <= atol + rtol · |expected|`.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f32], rtol: f32, atol: f32) {
    assert_eq!(got.len(), expected.len(), "{what}: number of elements");
    let excess = |i: usize| (got[i] - expected[i]).abs() - (atol + rtol * expected[i].abs());
    // A NaN is bad too.
    let bad = |i: &usize| excess(*i) > 0.0 || excess(*i).is_nan();
    if let Some(first) = (0..got.len()).find(|i| bad(i)) {
        let worst = (0..got.len())
            .max_by(|a, b| excess(*a).total_cmp(&excess(*b)))
            .unwrap_or(first);
        let count = (0..got.len()).filter(bad).count();
        panic!(
            "{what}: {count} of {} elements differ; first [{first}] got {} expected {}; \
             worst [{worst}] got {} expected {}",
            got.len(),
            got[first],
            expected[first],
            got[worst],
            expected[worst],
        );
    }
}

/// Fails unless both have the same bits.
#[track_caller]
pub(crate) fn assert_same_bits(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}: number of elements");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}[{i}]: {a} and {b}");
    }
}

/// Tensors of the GPU backend itself, below Burn's user-facing type.
#[cfg(feature = "cube")]
pub(crate) mod raw {
    use burn::backend::ops::FloatTensorOps;
    use burn::tensor::TensorData;
    use burn_cubecl::tensor::CubeTensor;
    use burn_cubecl::{CubeBackend, CubeDevice};

    /// Every GPU this build has kernels for.
    pub(crate) fn cube_devices() -> Vec<CubeDevice> {
        [
            #[cfg(feature = "wgpu")]
            CubeDevice::wgpu(cubecl::device::WgpuDeviceKind::DefaultDevice).expect("a GPU"),
            #[cfg(feature = "cuda")]
            CubeDevice::cuda(0).expect("a GPU"),
        ]
        .to_vec()
    }

    pub(crate) fn from_values<const D: usize>(
        values: &[f32],
        dims: [usize; D],
        device: &CubeDevice,
    ) -> CubeTensor {
        CubeBackend::float_from_data(TensorData::new(values.to_vec(), dims), device)
    }

    pub(crate) fn values(tensor: CubeTensor) -> Vec<f32> {
        let read = CubeBackend::float_into_data(tensor);
        let data = cubecl::future::block_on(read).expect("readable");
        data.iter::<f32>().collect()
    }
}

/// A backend whose raw tensors tests can make from and turn into tensors of the user-facing API.
pub(crate) trait Raw: MambaKernels {
    /// The devices of the backend.
    fn devices() -> Vec<Device>;
    /// The raw tensor of a tensor on one of the backend's devices.
    fn float<const D: usize>(tensor: Tensor<D>) -> FloatTensor<Self>;
    /// See [`float`](Self::float).
    fn int<const D: usize>(tensor: Tensor<D, Int>) -> IntTensor<Self>;
    /// The inverse of [`float`](Self::float).
    fn tensor<const D: usize>(raw: FloatTensor<Self>) -> Tensor<D>;
}

/// Implements [`Raw`] for a backend that is a variant of Burn's dispatch.
macro_rules! raw {
    ($backend:ty, $variant:ident, $devices:expr) => {
        impl Raw for $backend {
            fn devices() -> Vec<Device> {
                $devices
            }

            fn float<const D: usize>(tensor: Tensor<D>) -> FloatTensor<Self> {
                match tensor.into_dispatch().kind {
                    DispatchTensorKind::$variant(tensor) => tensor.float(),
                    other => panic!("a tensor of another backend: {other:?}"),
                }
            }

            fn int<const D: usize>(tensor: Tensor<D, Int>) -> IntTensor<Self> {
                match tensor.into_dispatch().kind {
                    DispatchTensorKind::$variant(tensor) => tensor.int(),
                    other => panic!("a tensor of another backend: {other:?}"),
                }
            }

            fn tensor<const D: usize>(raw: FloatTensor<Self>) -> Tensor<D> {
                Tensor::from_dispatch(DispatchTensor {
                    kind: DispatchTensorKind::$variant(BackendTensor::Float(raw)),
                    autodiff: DispatchAutodiffContext::Disabled,
                })
            }
        }
    };
}

raw!(Flex, Flex, vec![cpu()]);
#[cfg(feature = "cube")]
raw!(burn_cubecl::CubeBackend, Cube, devices().split_off(1));

/// Calls a function that is generic over [`Raw`] for every backend of this build.
macro_rules! for_every_backend {
    ($function:ident) => {
        $function::<burn::backend::Flex>();
        #[cfg(feature = "cube")]
        $function::<burn_cubecl::CubeBackend>();
    };
}
pub(crate) use for_every_backend;
