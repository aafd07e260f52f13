//! The sum of gradients over micro-batches.

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};

use super::optimizer::lasting;

/// Gradients of one micro-batch, or their sum over several.
///
/// A sum stays while micro-batches come and go. As Burn's accumulator keeps it, in the tensors of the
/// first one, it lies scattered between theirs and leaves gaps that none of them fits: 1 to 2 GiB of
/// 24 (353M). So it gets memory of its own, like weights and moments.
pub(super) struct GradientSum {
    grads: GradientsParams,
    /// Where the sum is, if there are several micro-batches.
    device: Option<Device>,
}

impl GradientSum {
    /// Nothing yet; of `count` micro-batches.
    pub fn new(count: usize, device: &Device) -> Self {
        Self {
            grads: GradientsParams::new(),
            device: (count > 1).then(|| device.clone()),
        }
    }

    /// Adds gradients of parameters of `module`.
    pub fn add(&mut self, module: &impl Module, grads: GradientsParams) {
        let mut adding = Adding { sum: self, grads };
        module.visit(&mut adding);
    }

    /// The sum.
    pub fn into_grads(self) -> GradientsParams {
        self.grads
    }
}

struct Adding<'a> {
    sum: &'a mut GradientSum,
    grads: GradientsParams,
}

impl ModuleVisitor for Adding<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let Some(new) = self.grads.remove::<D>(param.id) else {
            return;
        };
        let sum = match (self.sum.grads.remove::<D>(param.id), &self.sum.device) {
            (Some(sum), _) => sum.add(new),
            // The clone keeps the product out of the gradient's own memory.
            (None, Some(device)) => lasting(device, |_| new.clone().mul_scalar(1.0)),
            (None, None) => new,
        };
        self.sum.grads.register::<D>(param.id, sum);
    }
}

#[cfg(test)]
mod tests {
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::GradientsAccumulator;

    use super::*;

    /// The gradients of a micro-batch of its own.
    fn gradients(linear: &Linear, device: &Device, number: usize) -> GradientsParams {
        let rows: Vec<f32> = (0..6).map(|i| ((i + 5 * number) as f32).sin()).collect();
        let x = Tensor::<1>::from_floats(rows.as_slice(), device).reshape([2, 3]);
        let loss = linear.forward(x).powf_scalar(2.0).sum();
        GradientsParams::from_grads(loss.backward(), linear)
    }

    fn bits(linear: &Linear, grads: &GradientsParams) -> Vec<u32> {
        let weight = grads.get::<2>(linear.weight.id).expect("there");
        let weight: Vec<f32> = weight.into_data().iter().collect();
        weight.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn a_sum_has_the_bits_of_burn_s() {
        let device = Device::flex().autodiff();
        let linear = LinearConfig::new(3, 4).init(&device);
        for count in [1, 3] {
            let mut expected = GradientsAccumulator::new();
            let mut sum = GradientSum::new(count, &device.clone().inner());
            for number in 0..count {
                expected.accumulate(&linear, gradients(&linear, &device, number));
                sum.add(&linear, gradients(&linear, &device, number));
            }
            let (sum, expected) = (sum.into_grads(), expected.grads());
            assert_eq!(sum.len(), 2);
            assert_eq!(bits(&linear, &sum), bits(&linear, &expected), "{count}");
        }
    }
}
