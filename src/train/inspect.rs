//! A look into the model: norms of each layer, step sizes Δ, and how weights and gradients are spread.
//!
//! Norms are over all numbers. Spreads are of a sample of each tensor, so that little is read back
//! from the device: what a look costs is measured, and recorded with it.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Int, Tensor, TensorData};
use mambabyte_kernels::sum_squares::sum_squares;
use serde::{Deserialize, Serialize};

use super::parameters::Path;
use crate::model::MambaLm;

/// Numbers sampled of a tensor.
const SAMPLED: usize = 1024;

/// Bins of a histogram.
const BINS: usize = 32;

/// Bytes that step sizes are measured on.
const POSITIONS: usize = 1024;

/// Parameters of all layers have names of this form.
const LAYERS: &str = "backbone.layers.";

/// How the numbers of a group of tensors are spread.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Lower bound of the first bin.
    pub low: f32,
    /// Upper bound of the last one.
    pub high: f32,
    /// Sampled numbers in each of equally wide bins.
    pub counts: Vec<u32>,
}

/// The same parameter of all layers, or one outside of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Group {
    /// Its name without the layer: `mixer.in_proj.weight`.
    pub name: String,
    /// Spread of the weights, after the update.
    pub weights: Histogram,
    /// Spread of the gradients, before clipping.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gradients: Option<Histogram>,
}

/// What a look into the model found. Lists are by layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inspection {
    /// Mean step size Δ.
    pub delta_mean: Vec<f32>,
    /// Largest step size Δ.
    pub delta_max: Vec<f32>,
    /// Norm of the layer's gradients, before clipping.
    pub grad_norm: Vec<f32>,
    /// Norm of the layer's weights.
    pub weight_norm: Vec<f32>,
    /// By parameter.
    pub groups: Vec<Group>,
}

/// Norms and samples of tensors, on the device until they are read.
pub(super) struct Sketch {
    /// Sums of squares of each layer.
    squares: Vec<Tensor<1>>,
    /// Samples by group, in the order of first appearance.
    samples: Vec<(String, Vec<Tensor<1>>)>,
}

/// A sketch that was read.
struct Read {
    norms: Vec<f32>,
    histograms: Vec<(String, Histogram)>,
}

impl Sketch {
    /// Of the gradients of `model`.
    pub(super) fn gradients(model: &MambaLm, grads: &GradientsParams) -> Self {
        Self::of(model, Some(grads))
    }

    /// Of the weights of `model`, which is without gradients.
    fn weights(model: &MambaLm) -> Self {
        Self::of(model, None)
    }

    fn of(model: &MambaLm, grads: Option<&GradientsParams>) -> Self {
        let mut visitor = Collector {
            path: Path::default(),
            grads,
            tensors: Vec::new(),
        };
        model.visit(&mut visitor);
        let mut layers: BTreeMap<usize, Vec<Tensor<1>>> = BTreeMap::new();
        let mut samples: Vec<(String, Vec<Tensor<1>>)> = Vec::new();
        for (name, tensor) in visitor.tensors {
            let (layer, group) = split(&name);
            let sample = sample(tensor.clone());
            match samples.iter_mut().find(|it| it.0 == group) {
                Some((_, all)) => all.push(sample),
                None => samples.push((group.to_owned(), vec![sample])),
            }
            if let Some(layer) = layer {
                layers.entry(layer).or_default().push(tensor);
            }
        }
        Self {
            squares: layers.into_values().map(sum_squares).collect(),
            samples,
        }
    }

    /// Brings it to the host, in one piece.
    fn read(self) -> Read {
        let layers = self.squares.len();
        let lengths: Vec<(String, usize)> = self
            .samples
            .iter()
            .map(|(name, all)| (name.clone(), all.iter().map(|it| it.dims()[0]).sum()))
            .collect();
        let samples = self.samples.into_iter().flat_map(|it| it.1);
        let all: Vec<Tensor<1>> = self.squares.into_iter().chain(samples).collect();
        if all.is_empty() {
            return Read {
                norms: Vec::new(),
                histograms: Vec::new(),
            };
        }
        let numbers: Vec<f32> = Tensor::cat(all, 0).into_data().iter().collect();
        let (squares, mut rest) = numbers.split_at(layers);
        let histograms = lengths.into_iter().map(|(name, length)| {
            let (own, others) = rest.split_at(length);
            rest = others;
            (name, Histogram::of(own))
        });
        Read {
            norms: squares.iter().map(|it| it.sqrt()).collect(),
            histograms: histograms.collect(),
        }
    }
}

/// Looks into `model`, which is without gradients: at its weights, at what `gradients` has of the
/// step before, and at its step sizes on `bytes`.
pub(super) fn inspect(
    model: &MambaLm,
    gradients: Option<Sketch>,
    bytes: &[u8],
    device: &Device,
) -> Inspection {
    let weights = Sketch::weights(model).read();
    let gradients = gradients.map(Sketch::read);
    let (delta_mean, delta_max) = step_sizes(model, bytes, device);
    let groups = weights.histograms.into_iter().map(|(name, weights)| {
        let all = gradients.iter().flat_map(|it| &it.histograms);
        let gradients = all.into_iter().find(|it| it.0 == name);
        Group {
            gradients: gradients.map(|it| it.1.clone()),
            name,
            weights,
        }
    });
    Inspection {
        delta_mean,
        delta_max,
        groups: groups.collect(),
        grad_norm: gradients.map_or_else(Vec::new, |it| it.norms),
        weight_norm: weights.norms,
    }
}

/// Mean and largest step size of every layer on `bytes`, from zero memory.
fn step_sizes(model: &MambaLm, bytes: &[u8], device: &Device) -> (Vec<f32>, Vec<f32>) {
    let bytes = &bytes[..bytes.len().min(POSITIONS)];
    if bytes.is_empty() {
        return (Vec::new(), Vec::new());
    }
    let numbers: Vec<i32> = bytes.iter().map(|it| i32::from(*it)).collect();
    let data = TensorData::new(numbers, [1, bytes.len()]);
    let bytes = Tensor::<2, Int>::from_data(data, device);
    let sizes = model.step_sizes(bytes);
    let depth = sizes.len();
    let (means, largest): (Vec<_>, Vec<_>) = sizes.into_iter().unzip();
    let all = Tensor::cat(means.into_iter().chain(largest).collect(), 0);
    let numbers: Vec<f32> = all.into_data().iter().collect();
    (numbers[..depth].to_vec(), numbers[depth..].to_vec())
}

/// Layer and name within it, of a parameter's name.
fn split(name: &str) -> (Option<usize>, &str) {
    let inside = name.strip_prefix(LAYERS).and_then(|it| it.split_once('.'));
    match inside.and_then(|(layer, rest)| Some((layer.parse().ok()?, rest))) {
        Some((layer, rest)) => (Some(layer), rest),
        None => (None, name),
    }
}

/// About [`SAMPLED`] numbers of a tensor at equal distances. These are odd, so that they do not
/// always meet the same column of a matrix.
fn sample(tensor: Tensor<1>) -> Tensor<1> {
    let [count] = tensor.dims();
    let distance = (count / SAMPLED).saturating_sub(1) | 1;
    let rows = count / distance;
    if distance == 1 {
        let kept = count.min(SAMPLED);
        return tensor.narrow(0, 0, kept);
    }
    let rows = rows.min(SAMPLED);
    tensor
        .narrow(0, 0, rows * distance)
        .reshape([rows, distance])
        .slice([0..rows, 0..1])
        .reshape([rows])
}

impl Histogram {
    /// Of these numbers, as far as they are finite.
    fn of(numbers: &[f32]) -> Self {
        let finite = || numbers.iter().copied().filter(|it| it.is_finite());
        let low = finite().reduce(f32::min).unwrap_or(0.0);
        let high = finite().reduce(f32::max).unwrap_or(0.0);
        let mut counts = vec![0; BINS];
        let width = (high - low) / BINS as f32;
        for number in finite() {
            let bin = match width > 0.0 {
                true => ((number - low) / width) as usize,
                false => 0,
            };
            counts[bin.min(BINS - 1)] += 1;
        }
        Self { low, high, counts }
    }
}

/// Collects parameters, or their gradients, flat and without a graph.
struct Collector<'a> {
    path: Path,
    grads: Option<&'a GradientsParams>,
    tensors: Vec<(String, Tensor<1>)>,
}

impl ModuleVisitor for Collector<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.enter(name);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = match self.grads {
            Some(grads) => grads.get::<D>(param.id),
            None => Some(param.val()),
        };
        if let Some(tensor) = tensor {
            let count = tensor.shape().num_elements();
            self.tensors
                .push((self.path.join(), tensor.reshape([count])));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MambaConfig;

    #[test]
    fn names_have_a_layer_or_none() {
        let name = "backbone.layers.12.mixer.in_proj.weight";
        assert_eq!(split(name), (Some(12), "mixer.in_proj.weight"));
        assert_eq!(split("embedding.weight"), (None, "embedding.weight"));
    }

    #[test]
    fn samples_are_spread_over_the_tensor() {
        let device = Device::flex();
        for count in [1, 7, 1024, 1025, 4096, 100_000] {
            let tensor = Tensor::<1>::from_data(
                TensorData::new((0..count).map(|i| i as f32).collect(), [count]),
                &device,
            );
            let numbers: Vec<f32> = sample(tensor).into_data().iter().collect();
            assert_eq!(numbers.len(), count.min(SAMPLED), "{count}");
            let last = numbers[numbers.len() - 1] as usize;
            assert!(count <= 2 * SAMPLED || last > count / 2, "{count}: {last}");
            let distance = numbers.get(1).map_or(1, |it| *it as usize);
            assert!(distance % 2 == 1, "{count}: {distance}");
        }
    }

    #[test]
    fn a_histogram_counts_every_finite_number() {
        let histogram = Histogram::of(&[-1.0, 0.0, 0.9, 1.0, f32::NAN, f32::INFINITY]);
        assert_eq!((histogram.low, histogram.high), (-1.0, 1.0));
        assert_eq!(histogram.counts.iter().sum::<u32>(), 4);
        assert_eq!(histogram.counts[0], 1);
        assert_eq!(
            (histogram.counts[BINS - 2], histogram.counts[BINS - 1]),
            (1, 1)
        );
        assert_eq!(Histogram::of(&[2.0; 5]).counts[0], 5);
        assert_eq!(Histogram::of(&[]).counts.iter().sum::<u32>(), 0);
    }

    /// Against numbers computed plainly on the host.
    #[test]
    fn norms_are_those_of_the_weights_and_step_sizes_are_positive() {
        let device = Device::flex();
        let config = MambaConfig::new(16, 2);
        let model = config.init_lm(1, &device);
        let found = inspect(&model, None, b"some bytes of text", &device);
        let named = crate::train::parameters::collect(&model);
        for (layer, norm) in found.weight_norm.iter().enumerate() {
            let own = named.iter().filter(|it| split(&it.name).0 == Some(layer));
            let squares: f64 = own
                .flat_map(|it| (it.read)().iter::<f32>().collect::<Vec<_>>())
                .map(|it| f64::from(it).powi(2))
                .sum();
            assert!((squares.sqrt() - f64::from(*norm)).abs() < 1e-3, "{norm}");
        }
        assert_eq!((found.weight_norm.len(), found.grad_norm.len()), (2, 0));
        assert_eq!((found.delta_mean.len(), found.delta_max.len()), (2, 2));
        for (mean, max) in found.delta_mean.iter().zip(&found.delta_max) {
            // The bias draws step sizes from 0.001 to 0.1 at the start.
            assert!(*mean > 0.001 && mean < max && *max < 1.0, "{mean} {max}");
        }
        let names: Vec<&str> = found.groups.iter().map(|it| it.name.as_str()).collect();
        assert!(names.contains(&"mixer.in_proj.weight") && names.contains(&"embedding.weight"));
    }
}
