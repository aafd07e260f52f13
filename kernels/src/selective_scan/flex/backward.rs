//! The backward pass: chunk by chunk from right to left.

use burn::tensor::DType;
use burn_flex::FlexTensor;
use multiversion::multiversion;
use rayon::prelude::*;

use super::{CHUNK, Sizes, Slices, all_contiguous, load_opt, transposed};
use crate::flex::math::{exp, sigmoid};
use crate::flex::tensor::{contiguous, tensor, values};
use crate::flex::{LANES, Lanes, SharedOut, add, fma, load, map, mul, sum};
use crate::selective_scan::{ScanGrads, ScanInputs, ScanRequest};

/// Sums over positions that one task keeps for each of its blocks.
struct BlockSums {
    /// Adjoint of the state, carried from the position to the right.
    g: Vec<Lanes>,
    a: Vec<Lanes>,
    d: Lanes,
    bias: Lanes,
}

/// Gradients that tasks share; a task writes the places of its own sequence and channels only.
#[derive(Clone, Copy)]
struct BackwardOuts {
    u: SharedOut,
    delta: SharedOut,
    z: Option<SharedOut>,
    /// `[B, N, E]`
    a: SharedOut,
    /// `[B, E]`
    d: SharedOut,
    /// `[B, E]`
    bias: SharedOut,
    y: Option<SharedOut>,
}

/// Backward pass from the states that [`forward`] saved. The views of `request` are left alone:
/// nothing is written in place here.
pub(crate) fn backward(
    inputs: ScanInputs<FlexTensor>,
    saved: FlexTensor,
    dy: FlexTensor,
    request: ScanRequest<FlexTensor>,
) -> ScanGrads<FlexTensor> {
    let dtype = inputs.u.dtype();
    let delta_dtype = inputs.delta.dtype();
    let bc_dtype = [inputs.b.dtype(), inputs.c.dtype()];
    let z_dtype = inputs.z.as_ref().map_or(dtype, |z| z.dtype());
    let inputs = all_contiguous(inputs);
    let dy = contiguous(dy);
    let sizes = Sizes::of(&inputs);
    let Sizes {
        batch,
        length,
        inner,
        state,
    } = sizes;
    let groups = sizes.groups();
    let slices = Slices::of(&inputs, sizes);
    let (saved, dy) = (values(&saved), values(&dy));

    let full = batch * length * inner;
    let mut du = vec![0.0; full];
    let mut ddelta = vec![0.0; full];
    let mut dz = inputs.z.as_ref().map(|_| vec![0.0; full]);
    let mut da = vec![0.0; batch * state * inner];
    let mut dd = vec![0.0; batch * inner];
    let mut dbias = vec![0.0; batch * inner];
    let mut y = request.y.then(|| vec![0.0; full]);
    // One row of dB and one of dC a position and group, summed over the groups afterwards.
    let mut partial = vec![0.0; batch * groups * length * 2 * state];
    let outs = BackwardOuts {
        u: SharedOut::new(&mut du),
        delta: SharedOut::new(&mut ddelta),
        z: dz.as_mut().map(|z| SharedOut::new(z)),
        a: SharedOut::new(&mut da),
        d: SharedOut::new(&mut dd),
        bias: SharedOut::new(&mut dbias),
        y: y.as_mut().map(|y| SharedOut::new(y)),
    };
    partial
        .par_chunks_mut(length * 2 * state)
        .enumerate()
        .for_each(|(task, partial)| {
            let (b, group) = (task / groups, task % groups);
            backward_group(&slices, saved, dy, sizes, b, group, outs, partial);
        });

    let (db, dc) = sum_groups(&partial, sizes);
    ScanGrads {
        u: tensor(du, [batch, length, inner], dtype),
        delta: tensor(ddelta, [batch, length, inner], delta_dtype),
        a: tensor(
            transposed(&sum_batch(&da, batch), state, inner),
            [inner, state],
            DType::F32,
        ),
        b: tensor(db, [batch, length, state], bc_dtype[0]),
        c: tensor(dc, [batch, length, state], bc_dtype[1]),
        d: inputs
            .d
            .map(|_| tensor(sum_batch(&dd, batch), [inner], DType::F32)),
        z: dz.map(|z| tensor(z, [batch, length, inner], z_dtype)),
        delta_bias: inputs
            .delta_bias
            .map(|_| tensor(sum_batch(&dbias, batch), [inner], DType::F32)),
        y: y.map(|y| tensor(y, [batch, length, inner], dtype)),
    }
}

/// Sums the sequences' parts, in order.
fn sum_batch(x: &[f32], batch: usize) -> Vec<f32> {
    let len = x.len() / batch;
    let mut out = x[..len].to_vec();
    for part in x[len..].chunks_exact(len) {
        for (o, x) in out.iter_mut().zip(part) {
            *o += x;
        }
    }
    out
}

/// Sums the groups' parts of dB and dC, in order.
fn sum_groups(partial: &[f32], sizes: Sizes) -> (Vec<f32>, Vec<f32>) {
    let Sizes {
        batch,
        length,
        state,
        ..
    } = sizes;
    let groups = sizes.groups();
    let mut db = vec![0.0; batch * length * state];
    let mut dc = vec![0.0; batch * length * state];
    db.par_chunks_mut(state)
        .zip(dc.par_chunks_mut(state))
        .enumerate()
        .for_each(|(row, (db, dc))| {
            let (b, t) = (row / length, row % length);
            for group in 0..groups {
                let at = ((b * groups + group) * length + t) * 2 * state;
                for n in 0..state {
                    db[n] += partial[at + n];
                    dc[n] += partial[at + state + n];
                }
            }
        });
    (db, dc)
}

/// Runs the adjoint of one group of channels of one sequence from the last position to the first.
#[multiversion(targets = "simd")]
fn backward_group(
    s: &Slices,
    saved: &[f32],
    dy: &[f32],
    sizes: Sizes,
    b: usize,
    group: usize,
    outs: BackwardOuts,
    partial: &mut [f32],
) {
    let Sizes {
        length,
        inner,
        state,
        ..
    } = sizes;
    let blocks = sizes.blocks(group);
    let mut sums: Vec<BlockSums> = blocks
        .clone()
        .map(|_| BlockSums {
            g: vec![[0.0; LANES]; state],
            a: vec![[0.0; LANES]; state],
            d: [0.0; LANES],
            bias: [0.0; LANES],
        })
        .collect();
    let zeros = vec![[0.0; LANES]; (CHUNK + 1) * state];
    let mut buffers = ChunkBuffers {
        h: zeros.clone(),
        decay: zeros.clone(),
        db: zeros.clone(),
        dc: zeros,
    };
    for chunk in (0..sizes.chunks()).rev() {
        let start = chunk * CHUNK;
        let end = (start + CHUNK).min(length);
        buffers.db.fill([0.0; LANES]);
        buffers.dc.fill([0.0; LANES]);
        for (sums, (e, count)) in sums.iter_mut().zip(blocks.clone()) {
            let place = Place {
                row: b * length + start,
                positions: end - start,
                e,
                count,
            };
            let entering = (b * sizes.chunks() + chunk) * state * inner + e;
            recompute_chunk(s, saved, entering, sizes, place, &mut buffers);
            adjoint_chunk(s, dy, sizes, place, &mut buffers, sums, outs);
        }
        for t in 0..end - start {
            let row = &mut partial[(start + t) * 2 * state..(start + t + 1) * 2 * state];
            for n in 0..state {
                row[n] = sum(buffers.db[t * state + n]);
                row[state + n] = sum(buffers.dc[t * state + n]);
            }
        }
    }
    for (sums, (e, count)) in sums.iter().zip(blocks) {
        // SAFETY: sequence b and channels e.. are this task's alone.
        unsafe {
            for n in 0..state {
                outs.a.store((b * state + n) * inner + e, count, sums.a[n]);
            }
            outs.d.store(b * inner + e, count, sums.d);
            outs.bias.store(b * inner + e, count, sums.bias);
        }
    }
}

/// One chunk's working memory.
struct ChunkBuffers {
    /// `[CHUNK + 1][N]`: the state before each position, then after the last.
    h: Vec<Lanes>,
    /// `[CHUNK][N]`: the decay at each position (zero at a reset).
    decay: Vec<Lanes>,
    /// `[CHUNK][N]`: gradients of B and C, not yet summed over lanes.
    db: Vec<Lanes>,
    dc: Vec<Lanes>,
}

/// A run of positions of a block of channels.
#[derive(Clone, Copy)]
struct Place {
    /// First position, counted over the batch.
    row: usize,
    positions: usize,
    /// First channel.
    e: usize,
    count: usize,
}

/// Fills `h` and `decay` of one chunk from the state saved at its start.
#[inline(always)]
fn recompute_chunk(
    s: &Slices,
    saved: &[f32],
    entering: usize,
    sizes: Sizes,
    place: Place,
    buffers: &mut ChunkBuffers,
) {
    let Sizes { inner, state, .. } = sizes;
    let Place { e, count, .. } = place;
    for n in 0..state {
        buffers.h[n] = load(saved, entering + n * inner, count);
    }
    let bias = load_opt(s.bias, e, count);
    for t in 0..place.positions {
        let row = place.row + t;
        let at = row * inner + e;
        let dt = s.step(s.raw_step(at, bias, count));
        let x = mul(dt, load(s.u, at, count));
        let b_t = &s.b[row * state..(row + 1) * state];
        let reset = s.reset_at(row);
        let (before, after) = buffers.h[t * state..(t + 2) * state].split_at_mut(state);
        let decay = &mut buffers.decay[t * state..(t + 1) * state];
        for n in 0..state {
            decay[n] = if reset {
                [0.0; LANES]
            } else {
                map(mul(dt, load(&s.a, n * inner + e, count)), exp)
            };
            after[n] = fma(decay[n], before[n], mul(x, [b_t[n]; LANES]));
        }
    }
}

/// Runs the adjoint over one recomputed chunk, right to left.
#[inline(always)]
fn adjoint_chunk(
    s: &Slices,
    dy: &[f32],
    sizes: Sizes,
    place: Place,
    buffers: &mut ChunkBuffers,
    sums: &mut BlockSums,
    outs: BackwardOuts,
) {
    let Sizes { inner, state, .. } = sizes;
    let Place { e, count, .. } = place;
    let bias = load_opt(s.bias, e, count);
    let d = load_opt(s.d, e, count);
    for t in (0..place.positions).rev() {
        let row = place.row + t;
        let at = row * inner + e;
        let raw = s.raw_step(at, bias, count);
        let dt = s.step(raw);
        let u = load(s.u, at, count);
        let x = mul(dt, u);
        let dout = load(dy, at, count);
        let z = load_opt(s.z, at, count);
        let gate = map(z, sigmoid);
        let dy = match s.z {
            Some(_) => mul(dout, mul(z, gate)),
            None => dout,
        };
        let b_t = &s.b[row * state..(row + 1) * state];
        let c_t = &s.c[row * state..(row + 1) * state];
        let h = &buffers.h[t * state..(t + 2) * state];
        let decay = &buffers.decay[t * state..(t + 1) * state];
        let db = &mut buffers.db[t * state..(t + 1) * state];
        let dc = &mut buffers.dc[t * state..(t + 1) * state];
        // y before the gate; dx is the gradient of x = dt · u, ddt that of dt through the decay.
        let mut y = mul(d, u);
        let mut dx = [0.0; LANES];
        let mut ddt = [0.0; LANES];
        for n in 0..state {
            let g = fma([c_t[n]; LANES], dy, sums.g[n]);
            let after = h[state + n];
            let carried = mul(decay[n], h[n]);
            y = fma(after, [c_t[n]; LANES], y);
            dc[n] = fma(dy, after, dc[n]);
            db[n] = fma(g, x, db[n]);
            dx = fma(g, [b_t[n]; LANES], dx);
            let g_carried = mul(g, carried);
            ddt = fma(g_carried, load(&s.a, n * inner + e, count), ddt);
            sums.a[n] = fma(g_carried, dt, sums.a[n]);
            sums.g[n] = mul(decay[n], g);
        }
        ddt = fma(dx, u, ddt);
        let draw = if s.softplus {
            mul(ddt, map(raw, sigmoid))
        } else {
            ddt
        };
        sums.d = fma(dy, u, sums.d);
        sums.bias = add(sums.bias, draw);
        // SAFETY: this sequence's rows and channels e.. are this task's alone.
        unsafe {
            outs.u.store(at, count, fma(dx, dt, mul(d, dy)));
            outs.delta.store(at, count, draw);
            if let Some(dz) = outs.z {
                // silu'(z) = σ(z) · (1 + z · (1 - σ(z)))
                let slope = mul(gate, fma(z, map(gate, |s| 1.0 - s), [1.0; LANES]));
                dz.store(at, count, mul(dout, mul(y, slope)));
            }
            if let Some(out) = outs.y {
                let gated = match s.z {
                    Some(_) => mul(y, mul(z, gate)),
                    None => y,
                };
                out.store(at, count, gated);
            }
        }
    }
}
