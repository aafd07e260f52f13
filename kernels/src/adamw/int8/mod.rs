//! AdamW with its moments in 8 bits: the update of [`adamw`](super), 2 bytes of state a number
//! instead of 8.
//!
//! The numbers are cut into blocks of [`BLOCK`], each with the largest magnitude of the block as its
//! scale. A number x is stored as a code c with
//!
//! ```text
//! mean of the gradients         x  = scale · sign(c) · (c / 127)²    c = -127 … 127
//! root of the mean of squares   √v = scale · (c / 255)²              c = 0 … 255
//! ```
//!
//! Why so:
//!
//! - The square spends the codes on small numbers: with even steps everything below 1/254 of its
//!   block's largest would round to zero, and such a parameter would stop moving. This way the
//!   smallest number is 1/16129 of the scale (1/65025 of it for the root), and the error at a
//!   thousandth of the scale is about a tenth.
//! - The root of the second moment spans half the orders of magnitude of the moment itself, and is
//!   what the update divides by.
//! - Where v is not zero its code is at least 1: a small v that rounded to zero would leave only
//!   `eps` to divide by, and the parameter would jump.
//! - Rounding is to the nearest code: the same bits every run.
//!
//! The update itself uses the moments before they are rounded. Four codes are one 32-bit word, the
//! first in the lowest byte: the bytes of the words in little-endian order are the codes in order,
//! those of the mean as `i8`, those of the root as `u8`. The last block is filled up with zeros.

#[cfg(feature = "cube")]
pub(crate) mod cube;
#[cfg(feature = "flex")]
pub(crate) mod flex;
#[cfg(test)]
mod tests;

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType};
use burn::tensor::{DType, Device, Int, Tensor};

use super::AdamwStep;
use crate::backend::MambaOps;

/// Numbers that share a scale.
pub const BLOCK: usize = 256;
/// Words that hold the codes of a block.
pub const BLOCK_WORDS: usize = BLOCK / 4;

/// Moments of one parameter, raw; see [`Int8Moments`].
#[derive(Clone, Debug, ExtensionType)]
pub struct RawMoments<B: Backend> {
    /// `[BLOCK_WORDS · blocks]`, i32.
    pub first: IntTensor<B>,
    /// `[blocks]`, f32.
    pub first_scale: FloatTensor<B>,
    /// `[BLOCK_WORDS · blocks]`, i32.
    pub second: IntTensor<B>,
    /// `[blocks]`, f32.
    pub second_scale: FloatTensor<B>,
}

/// Moments of one parameter in 8 bits.
#[derive(Clone, Debug)]
pub struct Int8Moments {
    /// Codes of the mean of the gradients, four a word, `[BLOCK_WORDS · blocks]`, i32.
    pub first: Tensor<1, Int>,
    /// Scales of `first`, `[blocks]`.
    pub first_scale: Tensor<1>,
    /// Codes of the root of the mean of their squares, as `first`.
    pub second: Tensor<1, Int>,
    /// Scales of `second`, `[blocks]`.
    pub second_scale: Tensor<1>,
}

impl Int8Moments {
    /// The moments of a parameter of `count` numbers before the first update.
    pub fn zeros(count: usize, device: &Device) -> Self {
        let blocks = count.div_ceil(BLOCK);
        let codes = || Tensor::zeros([blocks * BLOCK_WORDS], (device, DType::I32));
        let scales = || Tensor::zeros([blocks], (device, DType::F32));
        Self {
            first: codes(),
            first_scale: scales(),
            second: codes(),
            second_scale: scales(),
        }
    }

    /// Panics, naming the tensor, unless the moments are those of `count` numbers.
    fn check(&self, count: usize) {
        let blocks = count.div_ceil(BLOCK);
        for (name, codes, scale) in [
            ("first", &self.first, &self.first_scale),
            ("second", &self.second, &self.second_scale),
        ] {
            assert_eq!(
                (codes.dims(), codes.dtype(), scale.dims()),
                ([blocks * BLOCK_WORDS], DType::I32, [blocks]),
                "adamw_int8_step: the {name} moment of {count} numbers: shape and data type of \
                 its codes, shape of its scales"
            );
        }
    }
}

/// Updates one parameter, as [`adamw_step`](super::adamw_step): returns it and its moments.
///
/// Buffers that nothing else holds are updated in place.
///
/// # Shapes
///
/// - param, grad: `[count]`
/// - grad_scale: `[1]`
///
/// # Panics
///
/// If shapes disagree.
pub fn adamw_int8_step(
    param: Tensor<1>,
    moments: Int8Moments,
    grad: Tensor<1>,
    grad_scale: Tensor<1>,
    step: AdamwStep,
) -> (Tensor<1>, Int8Moments) {
    assert_eq!(
        param.dims(),
        grad.dims(),
        "adamw_int8_step: shapes of parameter and gradient"
    );
    moments.check(param.dims()[0]);
    let moments = RawMoments {
        first: moments.first.into_dispatch(),
        first_scale: moments.first_scale.into_dispatch(),
        second: moments.second.into_dispatch(),
        second_scale: moments.second_scale.into_dispatch(),
    };
    let (param, moments) = <Dispatch as MambaOps>::adamw_int8_op(
        param.into_dispatch(),
        grad.into_dispatch(),
        moments,
        grad_scale.into_dispatch(),
        step,
    );
    let moments = Int8Moments {
        first: Tensor::from_dispatch(moments.first),
        first_scale: Tensor::from_dispatch(moments.first_scale),
        second: Tensor::from_dispatch(moments.second),
        second_scale: Tensor::from_dispatch(moments.second_scale),
    };
    (Tensor::from_dispatch(param), moments)
}
