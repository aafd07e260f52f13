//! Launches of the backward scan, in segments of chunks from the right.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::AddressType;

use super::adjoint_main::Wanted;
use super::plan::{Chunks, SUB, ScanShape, SweepConfig, adjoint, segment_chunks, sweep};
use super::{CARRY_UNITS, adjoint_ends, adjoint_main, carry, prepare, sums};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, elem, empty, grid,
    optional,
};
use crate::selective_scan::{ScanGrads, ScanInputs};

/// Most units of a cube in the sweep of adjoint ends: it keeps four numbers a state.
const ENDS_UNITS: usize = 128;
/// Units of a cube in the sum kernels.
const SUM_UNITS: usize = 128;

/// See [`MambaKernels::selective_scan_backward`](crate::MambaKernels::selective_scan_backward).
pub(crate) fn backward(
    inputs: ScanInputs<CubeTensor>,
    saved: CubeTensor,
    dy: CubeTensor,
) -> ScanGrads<CubeTensor> {
    let dtypes = [inputs.b.dtype, inputs.c.dtype];
    let pass = Pass::new(prepare(inputs), saved, contiguous(dy));
    let mut right_edge = None;
    let mut end = pass.chunks.count;
    while end > 0 {
        let begin = end.saturating_sub(pass.segment);
        right_edge = Some(pass.run_segment(begin, end - begin, right_edge));
        end = begin;
    }
    pass.sum_parameters();
    let Pass {
        grads, inputs: own, ..
    } = pass;
    ScanGrads {
        b: cast(grads.b, dtypes[0]),
        c: cast(grads.c, dtypes[1]),
        d: own.d.map(|_| grads.d),
        delta_bias: own.delta_bias.map(|_| grads.delta_bias),
        z: own.z.map(|_| grads.z),
        u: grads.u,
        delta: grads.delta,
        a: grads.a,
    }
}

fn cast(tensor: CubeTensor, dtype: DType) -> CubeTensor {
    burn_cubecl::kernel::cast(tensor, dtype)
}

/// Gradients while they are filled; those of absent inputs hold a one-element or borrowed buffer
/// that no kernel writes.
struct Grads {
    u: CubeTensor,
    delta: CubeTensor,
    a: CubeTensor,
    b: CubeTensor,
    c: CubeTensor,
    d: CubeTensor,
    z: CubeTensor,
    delta_bias: CubeTensor,
}

/// One run of backward.
struct Pass {
    inputs: ScanInputs<CubeTensor>,
    saved: CubeTensor,
    dy: CubeTensor,
    shape: ScanShape,
    chunks: Chunks,
    /// Chunks processed at once.
    segment: usize,
    wanted: Wanted,
    ends: SweepConfig,
    main: SweepConfig,
    types: [ElemType; 4],
    address: AddressType,
    grads: Grads,
    /// Partials of dA, dD and the bias's gradient, `[B, chunks, N + 2, E]`.
    sums_e: CubeTensor,
    ptx: bool,
}

impl Pass {
    fn new(inputs: ScanInputs<CubeTensor>, saved: CubeTensor, dy: CubeTensor) -> Self {
        let saved = contiguous_f32(saved);
        let shape = ScanShape::of(&inputs);
        let device = DeviceTraits::of(&inputs.u);
        let chunks = Chunks::new(&shape, &device);
        let softplus = inputs.delta_softplus;
        let ends = sweep(&shape, &chunks.cut(), &device, softplus, SUB, ENDS_UNITS);
        let main = adjoint(&shape, &chunks, &device, softplus);
        let segment = segment_chunks(&shape, &chunks, &main);
        let ScanShape {
            batch,
            length,
            inner,
            state,
        } = shape;

        let like = &inputs.u;
        let wide = |dtype| empty(like, [batch, length, inner], dtype);
        let narrow = |dtype| empty(like, [batch, length, state], dtype);
        let row = |present: bool| empty(like, [if present { inner } else { 1 }], DType::F32);
        let wanted = Wanted {
            d: inputs.d.is_some(),
            z: inputs.z.is_some(),
            bias: inputs.delta_bias.is_some(),
        };
        let du = wide(inputs.u.dtype);
        let grads = Grads {
            delta: wide(inputs.delta.dtype),
            a: empty(like, [inner, state], DType::F32),
            b: narrow(inputs.b.dtype),
            c: narrow(inputs.c.dtype),
            d: row(wanted.d),
            z: inputs.z.as_ref().map_or(du.clone(), |z| wide(z.dtype)),
            delta_bias: row(wanted.bias),
            u: du,
        };
        let sums_e = empty(like, [batch, chunks.count, state + 2, inner], DType::F32);
        let types = [
            elem(inputs.u.dtype),
            elem(inputs.delta.dtype),
            elem(inputs.b.dtype),
            elem(inputs.z.as_ref().unwrap_or(&inputs.u).dtype),
        ];
        let address = address_type(&[&inputs.u, &inputs.b, &saved, &sums_e]);
        Self {
            address,
            wanted,
            ends,
            main,
            segment,
            types,
            grads,
            sums_e,
            ptx: device.ptx,
            inputs,
            saved,
            dy,
            shape,
            chunks,
        }
    }

    /// Gradients of the `count` chunks from `begin` on, given the adjoint that enters the last of
    /// them from its right; returns what leaves the first one to its left, `[B, E, N]`.
    fn run_segment(
        &self,
        begin: usize,
        count: usize,
        right_edge: Option<CubeTensor>,
    ) -> CubeTensor {
        let ScanShape {
            batch,
            inner,
            state,
            ..
        } = self.shape;
        let positions = count * self.chunks.size;
        let cubes = self.main.cubes(inner);
        let transient = |shape: [usize; 4]| empty(&self.inputs.u, shape, DType::F32);
        let sub_states = transient([batch, positions / SUB, state, inner]);
        let ends = transient([batch, count, state, inner]);
        let steps = transient([batch, count, 1, inner]);
        let sums_bc = transient([batch, cubes, positions, 2 * self.main.states()]);
        let left_edge = empty(&self.inputs.u, [batch, inner, state], DType::F32);
        let address = self
            .address
            .max(address_type(&[&sub_states, &ends, &sums_bc]));

        self.launch_ends(begin, count, address, &sub_states, &ends, &steps);
        self.launch_carry(count, address, &ends, &steps, &right_edge, &left_edge);
        self.launch_main(begin, count, address, &sub_states, &ends, &sums_bc);
        self.launch_sum_cubes(begin, count, address, &sums_bc);
        left_edge
    }

    fn launch_ends(
        &self,
        begin: usize,
        count: usize,
        address: AddressType,
        sub_states: &CubeTensor,
        ends: &CubeTensor,
        steps: &CubeTensor,
    ) {
        let (inputs, shape) = (&self.inputs, &self.shape);
        let blocks = self.ends.cubes(shape.inner) * count * shape.batch;
        // SAFETY: every position is derived from the shapes passed along, whose buffers are
        // contiguous and of just these sizes; units beyond the last channel or cube write nothing.
        unsafe {
            adjoint_ends::adjoint_ends::launch_unchecked(
                &inputs.u.client,
                grid(blocks),
                cube_dim(self.ends.units),
                address,
                buffer(&inputs.u),
                buffer(&inputs.delta),
                buffer(&inputs.b),
                buffer(&inputs.c),
                buffer(&inputs.a),
                optional(&inputs.z),
                optional(&inputs.delta_bias),
                optional(&inputs.resets),
                buffer(&self.dy),
                buffer(&self.saved),
                buffer(sub_states),
                buffer(ends),
                buffer(steps),
                shape.batch,
                shape.length,
                shape.inner,
                shape.state,
                begin,
                count,
                self.ends,
                self.types,
            );
        }
    }

    fn launch_carry(
        &self,
        count: usize,
        address: AddressType,
        ends: &CubeTensor,
        steps: &CubeTensor,
        start: &Option<CubeTensor>,
        finish: &CubeTensor,
    ) {
        let shape = &self.shape;
        let units = shape.batch * shape.state * shape.inner;
        // SAFETY: as in `launch_ends`; units beyond the last state write nothing.
        unsafe {
            carry::carry::launch_unchecked(
                &self.inputs.u.client,
                grid(units.div_ceil(CARRY_UNITS)),
                cube_dim(CARRY_UNITS),
                address,
                buffer(ends),
                buffer(steps),
                buffer(&self.inputs.a),
                optional(start),
                buffer(finish),
                shape.batch,
                count,
                shape.inner,
                shape.state,
                true,
                self.ptx,
            );
        }
    }

    fn launch_main(
        &self,
        begin: usize,
        count: usize,
        address: AddressType,
        sub_states: &CubeTensor,
        entering: &CubeTensor,
        sums_bc: &CubeTensor,
    ) {
        let (inputs, shape, grads) = (&self.inputs, &self.shape, &self.grads);
        let blocks = self.main.cubes(shape.inner) * count * shape.batch;
        // SAFETY: as in `launch_ends`. Without a gate `z` and `dz` borrow the buffers of `u` and
        // `du`, and the kernel has no code for them.
        unsafe {
            adjoint_main::adjoint_main::launch_unchecked(
                &inputs.u.client,
                grid(blocks),
                cube_dim(self.main.units),
                address,
                buffer(&inputs.u),
                buffer(&inputs.delta),
                buffer(&inputs.b),
                buffer(&inputs.c),
                buffer(&inputs.a),
                optional(&inputs.d),
                buffer(inputs.z.as_ref().unwrap_or(&inputs.u)),
                optional(&inputs.delta_bias),
                optional(&inputs.resets),
                buffer(&self.dy),
                buffer(sub_states),
                buffer(entering),
                buffer(&grads.u),
                buffer(&grads.delta),
                buffer(&grads.z),
                buffer(sums_bc),
                buffer(&self.sums_e),
                shape.batch,
                shape.length,
                shape.inner,
                shape.state,
                begin,
                count,
                self.wanted,
                self.main,
                self.types,
            );
        }
    }

    fn launch_sum_cubes(
        &self,
        begin: usize,
        count: usize,
        address: AddressType,
        sums_bc: &CubeTensor,
    ) {
        let shape = &self.shape;
        let positions = count * self.chunks.size;
        let units = shape.batch * positions * 2 * self.main.states();
        // SAFETY: as in `launch_ends`; units beyond the last position or state write nothing.
        unsafe {
            sums::sum_cubes::launch_unchecked(
                &self.inputs.u.client,
                grid(units.div_ceil(SUM_UNITS)),
                cube_dim(SUM_UNITS),
                address,
                buffer(sums_bc),
                buffer(&self.grads.b),
                buffer(&self.grads.c),
                shape.batch,
                shape.length,
                shape.state,
                begin * self.chunks.size,
                positions,
                self.main.cubes(shape.inner),
                self.main.states(),
                self.types[2],
            );
        }
    }

    /// Sums the partials that every chunk left of dA, dD and the bias's gradient.
    fn sum_parameters(&self) {
        let shape = &self.shape;
        let units = (shape.state + 2) * shape.inner;
        // SAFETY: as in `launch_ends`; units beyond the last number write nothing, and absent
        // gradients have no code.
        unsafe {
            sums::sum_chunks::launch_unchecked(
                &self.inputs.u.client,
                grid(units.div_ceil(SUM_UNITS)),
                cube_dim(SUM_UNITS),
                self.address,
                buffer(&self.sums_e),
                buffer(&self.grads.a),
                buffer(&self.grads.d),
                buffer(&self.grads.delta_bias),
                shape.batch * self.chunks.count,
                shape.inner,
                shape.state,
                self.wanted,
            );
        }
    }
}
