//! The forward pass: every position once, from left to right.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{CHUNK, Sizes, Slices, all_contiguous, load_opt};
use crate::flex::math::{exp, sigmoid};
use crate::flex::tensor::tensor;
use crate::flex::{LANES, Lanes, SharedOut, fma, load, map, mul};
use crate::selective_scan::{ScanInputs, ScanOutputs};

/// Forward pass. `saved` is `[B, L / CHUNK, N, E]`: the state entering every chunk.
pub(crate) fn forward(inputs: ScanInputs<FlexTensor>) -> ScanOutputs<FlexTensor> {
    let dtype = inputs.u.dtype();
    let inputs = all_contiguous(inputs);
    let sizes = Sizes::of(&inputs);
    let Sizes {
        batch,
        length,
        inner,
        state,
    } = sizes;
    let slices = Slices::of(&inputs, sizes);

    let mut y = vec![0.0; batch * length * inner];
    let mut last = vec![0.0; batch * inner * state];
    let mut saved = vec![0.0; batch * sizes.chunks() * state * inner];
    let outs = ForwardOuts {
        y: SharedOut::new(&mut y),
        last: SharedOut::new(&mut last),
        saved: SharedOut::new(&mut saved),
    };
    (0..batch * sizes.groups())
        .into_par_iter()
        .for_each(|task| {
            let (b, group) = (task / sizes.groups(), task % sizes.groups());
            forward_group(&slices, sizes, b, group, outs);
        });
    ScanOutputs {
        y: tensor(y, [batch, length, inner], dtype),
        last_state: tensor(last, [batch, inner, state], DType::F32),
        saved: tensor(saved, [batch, sizes.chunks(), state, inner], DType::F32),
    }
}

/// Outputs of the forward pass; a task writes the places of its own sequence and channels only.
#[derive(Clone, Copy)]
struct ForwardOuts {
    y: SharedOut,
    last: SharedOut,
    saved: SharedOut,
}

/// Runs the channels of one group of one sequence over all positions.
#[multiversion(targets = "simd")]
fn forward_group(s: &Slices, sizes: Sizes, b: usize, group: usize, outs: ForwardOuts) {
    let Sizes {
        length,
        inner,
        state,
        ..
    } = sizes;
    let blocks = sizes.blocks(group);
    let mut h: Vec<Lanes> = Vec::new();
    let mut a: Vec<Lanes> = Vec::new();
    for (e, count) in blocks.clone() {
        for n in 0..state {
            a.push(load(&s.a, n * inner + e, count));
            h.push(initial_state(s, sizes, b, e, count, n));
        }
    }
    for t in 0..length {
        let row = b * length + t;
        if t % CHUNK == 0 {
            let at = (b * sizes.chunks() + t / CHUNK) * state * inner;
            for (i, (e, count)) in blocks.clone().enumerate() {
                for n in 0..state {
                    // SAFETY: sequence b and channels e.. are this task's alone.
                    unsafe {
                        outs.saved
                            .store(at + n * inner + e, count, h[i * state + n])
                    };
                }
            }
        }
        if s.reset_at(row) {
            h.fill([0.0; LANES]);
        }
        let b_t = &s.b[row * state..(row + 1) * state];
        let c_t = &s.c[row * state..(row + 1) * state];
        for (i, (e, count)) in blocks.clone().enumerate() {
            let at = row * inner + e;
            let dt = s.step(s.raw_step(at, load_opt(s.bias, e, count), count));
            let u = load(s.u, at, count);
            let x = mul(dt, u);
            let mut y = mul(load_opt(s.d, e, count), u);
            let h = &mut h[i * state..(i + 1) * state];
            let a = &a[i * state..(i + 1) * state];
            for n in 0..state {
                let decay = map(mul(dt, a[n]), exp);
                h[n] = fma(decay, h[n], mul(x, [b_t[n]; LANES]));
                y = fma(h[n], [c_t[n]; LANES], y);
            }
            if let Some(z) = s.z {
                let z = load(z, at, count);
                y = mul(y, mul(z, map(z, sigmoid)));
            }
            // SAFETY: as above.
            unsafe { outs.y.store(at, count, y) };
        }
    }
    for (i, (e, count)) in blocks.enumerate() {
        for n in 0..state {
            for (lane, value) in h[i * state + n].into_iter().take(count).enumerate() {
                let mut one = [0.0; LANES];
                one[0] = value;
                let at = (b * inner + e + lane) * state + n;
                // SAFETY: as above.
                unsafe { outs.last.store(at, 1, one) };
            }
        }
    }
}

/// State `n` of channels `e ..` before the first position.
#[inline(always)]
fn initial_state(s: &Slices, sizes: Sizes, b: usize, e: usize, count: usize, n: usize) -> Lanes {
    let mut h = [0.0; LANES];
    if let Some(initial) = s.initial {
        for lane in 0..count {
            h[lane] = initial[(b * sizes.inner + e + lane) * sizes.state + n];
        }
    }
    h
}
