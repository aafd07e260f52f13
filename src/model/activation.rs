//! Nonlinearities by name, and a projection with one, for those who build other models of these parts.
//!
//! The definitions are PyTorch's with its default arguments.

use std::fmt;
use std::str::FromStr;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor, activation};

use super::init::Init;
use super::linear::Linear;

/// A function of every number; of a row of numbers in the case of softmax.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x`
    Linear,
    /// `max(x, 0)`
    Relu,
    /// `x` above zero, `0.01 · x` below
    LeakyRelu,
    /// `x` above zero, `exp(x) - 1` below
    Elu,
    /// `x · Φ(x)`, with the normal distribution's Φ itself and no approximation of it
    Gelu,
    /// `x · sigmoid(x)`, also called swish
    Silu,
    /// `tanh(x)`
    Tanh,
    /// `ln(1 + exp(x))`
    Softplus,
    /// `exp(x)` over its sum along the last axis
    Softmax,
}

/// Every name; of several for one function the first is the one that is shown.
const NAMES: [(&str, Activation); 11] = [
    ("linear", Activation::Linear),
    ("relu", Activation::Relu),
    ("leaky_relu", Activation::LeakyRelu),
    ("lrelu", Activation::LeakyRelu),
    ("elu", Activation::Elu),
    ("gelu", Activation::Gelu),
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("tanh", Activation::Tanh),
    ("softplus", Activation::Softplus),
    ("softmax", Activation::Softmax),
];

impl FromStr for Activation {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, activation)| *activation).ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("`{name}` is no activation: expected {}", names.join(", "))
        })
    }
}

impl fmt::Display for Activation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(_, it)| it == self);
        f.write_str(name.map_or("", |(name, _)| name))
    }
}

impl Activation {
    /// Applies the function; the shape stays.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Linear => x,
            Self::Relu => activation::relu(x),
            Self::LeakyRelu => activation::leaky_relu(x, 0.01),
            Self::Elu => activation::elu(x, 1.0),
            Self::Gelu => activation::gelu(x),
            Self::Silu => activation::silu(x),
            Self::Tanh => activation::tanh(x),
            Self::Softplus => activation::softplus(x, 1.0),
            Self::Softmax => activation::softmax(x, D - 1),
        }
    }
}

/// A projection, an activation and dropout.
///
/// ```text
/// y = dropout(activation(x · weight + bias))
/// ```
#[derive(Module, Debug)]
pub struct ActivatedLinear {
    /// The projection.
    pub linear: Linear,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    dropout: f64,
}

impl ActivatedLinear {
    /// Weights as PyTorch's default; a bias, if wanted, starts at zero. `dropout` is the probability
    /// that a number becomes zero in training.
    ///
    /// # Panics
    ///
    /// Unless `dropout` is from 0 to below 1.
    pub fn new(
        widths: [usize; 2],
        bias: bool,
        activation: Activation,
        dropout: f64,
        seed: u64,
        device: &Device,
    ) -> Self {
        assert!(
            (0.0..1.0).contains(&dropout),
            "dropout is {dropout}, expected from 0 to below 1"
        );
        Self {
            linear: Linear::new(&mut Init::new(seed, device), widths, bias, 1.0),
            activation,
            dropout,
        }
    }

    /// Applies all three; dropout only where gradients are computed. What is left is scaled, so that
    /// the mean stays. Which numbers are dropped follows the device's seed.
    ///
    /// # Shapes
    ///
    /// - x: `[B, L, in]`
    /// - output: `[B, L, out]`
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let y = self.activation.forward(self.linear.forward(x));
        if self.dropout == 0.0 || !y.device().is_autodiff() {
            return y;
        }
        let kept = 1.0 - self.dropout;
        let mask = y.random_like(Distribution::Bernoulli(kept));
        y * mask * (1.0 / kept)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    /// What PyTorch gives for -30, -2, -0.5, 0, 0.5, 3 and 30, as it prints them.
    #[allow(clippy::excessive_precision, clippy::approx_constant)]
    const EXPECTED: [(&str, [f32; 7]); 9] = [
        ("linear", [-30.0, -2.0, -0.5, 0.0, 0.5, 3.0, 30.0]),
        ("relu", [0.0, 0.0, 0.0, 0.0, 0.5, 3.0, 30.0]),
        (
            "leaky_relu",
            [-0.29999998, -0.02, -0.0049999999, 0.0, 0.5, 3.0, 30.0],
        ),
        ("elu", [-1.0, -0.86466473, -0.39346933, 0.0, 0.5, 3.0, 30.0]),
        (
            "gelu",
            [
                -0.0,
                -0.045500278,
                -0.15426877,
                0.0,
                0.34573123,
                2.9959497,
                30.0,
            ],
        ),
        (
            "silu",
            [
                -2.807287e-12,
                -0.23840584,
                -0.18877034,
                0.0,
                0.31122968,
                2.8577225,
                30.0,
            ],
        ),
        (
            "tanh",
            [
                -1.0,
                -0.96402758,
                -0.46211717,
                0.0,
                0.46211717,
                0.99505478,
                1.0,
            ],
        ),
        (
            "softplus",
            [
                9.3576229e-14,
                0.126928,
                0.47407699,
                0.69314718,
                0.97407699,
                3.0485873,
                30.0,
            ],
        ),
        (
            "softmax",
            [
                8.7565109e-27,
                1.2664166e-14,
                5.6756852e-14,
                9.3576229e-14,
                1.5428112e-13,
                1.8795289e-12,
                1.0,
            ],
        ),
    ];

    #[test]
    fn functions_are_those_of_pytorch() {
        let device = Device::flex();
        let x = [-30.0, -2.0, -0.5, 0.0, 0.5, 3.0, 30.0];
        for (name, expected) in EXPECTED {
            let activation: Activation = name.parse().expect(name);
            assert_eq!(activation.to_string(), name);
            let y = activation.forward(Tensor::<1>::from_floats(x, &device));
            for (y, expected) in y.into_data().iter::<f32>().zip(expected) {
                let difference = (y - expected).abs();
                assert!(
                    difference <= 1e-5 * expected.abs().max(1e-3),
                    "{name}: {y} {expected}"
                );
            }
        }
        // The other names.
        assert_eq!("lrelu".parse(), Ok(Activation::LeakyRelu));
        assert_eq!("swish".parse(), Ok(Activation::Silu));
        let error = "mish".parse::<Activation>().expect_err("not one of them");
        assert!(
            error.contains("`mish`") && error.contains("softplus"),
            "{error}"
        );
    }

    #[test]
    fn softmax_is_along_the_last_axis() {
        let x = Tensor::<3>::from_floats([[[1.0, 2.0], [5.0, 5.0]]], &Device::flex());
        let sums = Activation::Softmax.forward(x).sum_dim(2);
        for sum in sums.into_data().iter::<f32>() {
            assert!((sum - 1.0).abs() < 1e-6, "{sum}");
        }
    }

    #[test]
    fn a_projection_drops_only_in_training() {
        let x = |device: &Device| Tensor::<3>::ones([1, 50, 16], device);
        let layer = |device: &Device, dropout| {
            ActivatedLinear::new([16, 40], true, Activation::Softplus, dropout, 7, device)
        };
        let device = Device::flex();
        let plain = layer(&device, 0.0).forward(x(&device));
        let product = x(&device).matmul(layer(&device, 0.0).linear.weight.val().unsqueeze());
        let expected = Activation::Softplus.forward(product);
        let difference = (plain.clone() - expected).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-6, "{difference}");
        let still = layer(&device, 0.5).forward(x(&device));
        still
            .into_data()
            .assert_eq(&plain.clone().into_data(), true);

        let training = Device::flex().autodiff();
        training.seed(3);
        let dropped = layer(&training, 0.25).forward(x(&training)).into_data();
        let zeros = dropped.iter::<f32>().filter(|y| *y == 0.0).count();
        // 500 of 2,000 on average, with a deviation of 19.
        assert!((400..600).contains(&zeros), "{zeros}");
        for (dropped, plain) in dropped.iter::<f32>().zip(plain.into_data().iter::<f32>()) {
            assert!(dropped == 0.0 || (dropped - plain / 0.75).abs() < 1e-5);
        }
    }
}
