//! The update on the CPU: blocks in parallel, in place where nothing else holds the buffers.

use burn::backend::Flex;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{AdamwStep, BLOCK, BLOCK_WORDS, RawMoments};
use crate::flex::tensor::{contiguous, values, values_mut, words_mut};

/// Blocks a task handles.
const BLOCKS: usize = 64;

/// Returns the parameter and its moments, updated.
pub(crate) fn step(
    param: FlexTensor,
    grad: FlexTensor,
    moments: RawMoments<Flex>,
    grad_scale: FlexTensor,
    step: AdamwStep,
) -> (FlexTensor, RawMoments<Flex>) {
    let (mut param, grad) = (contiguous(param), contiguous(grad));
    let mut moments = RawMoments::<Flex> {
        first: moments.first.to_contiguous(),
        first_scale: contiguous(moments.first_scale),
        second: moments.second.to_contiguous(),
        second_scale: contiguous(moments.second_scale),
    };
    let grad_scale = values(&contiguous(grad_scale))[0];
    if !grad_scale.is_finite() {
        return (param, moments);
    }
    let firsts = words_mut(&mut moments.first)
        .par_chunks_mut(BLOCK_WORDS)
        .zip(values_mut(&mut moments.first_scale));
    let seconds = words_mut(&mut moments.second)
        .par_chunks_mut(BLOCK_WORDS)
        .zip(values_mut(&mut moments.second_scale));
    values_mut(&mut param)
        .par_chunks_mut(BLOCK)
        .zip(values(&grad).par_chunks(BLOCK))
        .zip(firsts.zip(seconds))
        .with_min_len(BLOCKS)
        .for_each(|((p, g), (first, second))| {
            update(p, g, first, second, grad_scale, step);
        });
    (param, moments)
}

/// The codes of one moment of a block, and their scale.
type Codes<'a> = (&'a mut [i32], &'a mut f32);

/// Updates one block.
#[multiversion(targets = "simd")]
fn update(
    p: &mut [f32],
    g: &[f32],
    first: Codes<'_>,
    second: Codes<'_>,
    grad_scale: f32,
    step: AdamwStep,
) {
    let keep = 1.0 - step.lr * step.weight_decay;
    let (mut m, mut root) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    unpack(first.0, &mut m, |code| {
        let c = f32::from(code as i8);
        c * c.abs() * (*first.1 / (127.0 * 127.0))
    });
    unpack(second.0, &mut root, |code| {
        let c = f32::from(code);
        c * c * (*second.1 / (255.0 * 255.0))
    });
    let moments = m.iter_mut().zip(&mut root);
    for ((p, g), (m, root)) in p.iter_mut().zip(g).zip(moments) {
        let g = g * grad_scale;
        *m = step.beta1 * *m + (1.0 - step.beta1) * g;
        let v = step.beta2 * *root * *root + (1.0 - step.beta2) * g * g;
        *root = v.sqrt();
        let update = (*m / step.correction1) / ((v / step.correction2).sqrt() + step.eps);
        *p = keep * *p - step.lr * update;
    }
    *first.1 = largest(&m);
    *second.1 = largest(&root);
    let share = |x: f32, scale: f32| if scale > 0.0 { (x / scale).sqrt() } else { 0.0 };
    pack(first.0, &m, |m| {
        let c = (share(m.abs(), *first.1) * 127.0 + 0.5).floor();
        (if m < 0.0 { -c } else { c }) as i8 as u8
    });
    pack(second.0, &root, |root| {
        let c = (share(root, *second.1) * 255.0 + 0.5).floor();
        if root > 0.0 { c.max(1.0) as u8 } else { 0 }
    });
}

#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// Decodes the bytes of `words`.
#[inline(always)]
fn unpack(words: &[i32], out: &mut [f32; BLOCK], decode: impl Fn(u8) -> f32) {
    for (word, out) in words.iter().zip(out.chunks_exact_mut(4)) {
        for (byte, out) in word.to_le_bytes().into_iter().zip(out) {
            *out = decode(byte);
        }
    }
}

/// The inverse of [`unpack`].
#[inline(always)]
fn pack(words: &mut [i32], x: &[f32; BLOCK], encode: impl Fn(f32) -> u8) {
    for (word, x) in words.iter_mut().zip(x.chunks_exact(4)) {
        *word = i32::from_le_bytes([encode(x[0]), encode(x[1]), encode(x[2]), encode(x[3])]);
    }
}
