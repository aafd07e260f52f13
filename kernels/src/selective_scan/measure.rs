//! The op's two passes on raw tensors, for measuring them.

use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;

#[cfg(feature = "cube")]
pub use super::cube::plan::{Choice, Forward, choose};
use super::{Scan, ScanInputs, ScanRequest};
use crate::MambaKernels;

/// The two passes of one scan, without autodiff; their results are dropped.
pub struct Passes {
    /// Runs the forward pass.
    pub forward: Box<dyn Fn()>,
    /// Runs the backward pass, from the states that a forward pass saved.
    pub backward: Box<dyn Fn()>,
}

impl std::fmt::Debug for Passes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passes").finish_non_exhaustive()
    }
}

impl Passes {
    fn of<B: MambaKernels>(inputs: ScanInputs<FloatTensor<B>>, dy: FloatTensor<B>) -> Self
    where
        FloatTensor<B>: 'static,
    {
        let saved = B::selective_scan(inputs.clone()).saved;
        let again = inputs.clone();
        Self {
            forward: Box::new(move || {
                let _ = B::selective_scan(inputs.clone());
            }),
            backward: Box::new(move || {
                let request = ScanRequest::none();
                let _ =
                    B::selective_scan_backward(again.clone(), saved.clone(), dy.clone(), request);
            }),
        }
    }
}

/// The passes of `scan` with `dy` as the gradient of its output; none where the tensors' backend
/// has no kernels or tracks gradients.
pub fn passes(scan: Scan, dy: Tensor<3>) -> Option<Passes> {
    macro_rules! on {
        ($backend:ty) => {
            if let Ok(dy) = dy.clone().try_into_primitive::<$backend>() {
                macro_rules! raw {
                    ($tensor:expr) => {
                        $tensor.try_into_primitive::<$backend>().ok()?
                    };
                }
                macro_rules! optional {
                    ($tensor:expr) => {
                        match $tensor {
                            Some(tensor) => Some(raw!(tensor)),
                            None => None,
                        }
                    };
                }
                let inputs = ScanInputs {
                    u: raw!(scan.u),
                    delta: raw!(scan.delta),
                    a: raw!(scan.a),
                    b: raw!(scan.b),
                    c: raw!(scan.c),
                    d: optional!(scan.d),
                    z: optional!(scan.z),
                    delta_bias: optional!(scan.delta_bias),
                    initial_state: optional!(scan.initial_state),
                    resets: optional!(scan.resets),
                    delta_softplus: scan.delta_softplus,
                };
                return Some(Passes::of::<$backend>(inputs, dy));
            }
        };
    }
    #[cfg(feature = "cube")]
    on!(burn_cubecl::CubeBackend);
    #[cfg(feature = "flex")]
    on!(burn::backend::Flex);
    None
}
