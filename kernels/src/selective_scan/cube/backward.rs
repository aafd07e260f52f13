//! Launches of the backward scan, in segments of chunks from the right.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::ElemType;
use cubecl::prelude::AddressType;

use super::adjoint_ends::Wanted;
use super::adjoint_parts::InPlace;
use super::plan::{Chunks, SUB, ScanShape, SweepConfig, adjoint, segment_chunks, sweep};
use super::{
    CARRY_UNITS, RowStrides, address, adjoint_ends, adjoint_main, alignment, carry, in_eights,
    prepare, sums,
};
use crate::cube::{
    DeviceTraits, address_type, buffer, contiguous, contiguous_f32, cube_dim, dims, elem, empty,
    grid, optional, row_stride,
};
use crate::selective_scan::{ScanGrads, ScanInputs, ScanRequest};

/// Most units of a cube in the sweep of adjoint ends: it keeps four numbers a state, and just does
/// with the 128 registers a unit that this leaves it.
const ENDS_UNITS: usize = 512;
/// Units of a cube in the sum kernels.
const SUM_UNITS: usize = 128;

/// See [`MambaKernels::selective_scan_backward`](crate::MambaKernels::selective_scan_backward).
pub(crate) fn backward(
    inputs: ScanInputs<CubeTensor>,
    saved: CubeTensor,
    dy: CubeTensor,
    request: ScanRequest<CubeTensor>,
) -> ScanGrads<CubeTensor> {
    let pass = Pass::new(inputs, saved, contiguous(dy), request);
    let mut right_edge = None;
    let mut end = pass.chunks.count;
    while end > 0 {
        let begin = end.saturating_sub(pass.segment);
        right_edge = Some(pass.run_segment(begin, end - begin, right_edge));
        end = begin;
    }
    pass.sum_parameters();
    let (grads, own) = (pass.grads, pass.inputs);
    ScanGrads {
        b: grads.b,
        c: grads.c,
        d: own.d.map(|_| grads.d),
        delta_bias: own.delta_bias.map(|_| grads.delta_bias),
        z: own.z.map(|_| grads.z),
        y: pass.wanted.y.then_some(grads.y),
        u: grads.u,
        delta: grads.delta,
        a: grads.a,
    }
}

/// The view to write a gradient into: the one asked for, or a new tensor.
fn target(
    name: &str,
    view: Option<CubeTensor>,
    shape: [usize; 3],
    new: impl FnOnce() -> CubeTensor,
) -> (CubeTensor, usize) {
    let view = view.unwrap_or_else(new);
    assert_eq!(
        dims::<3>(&view),
        shape,
        "selective_scan: view for the gradient of {name}"
    );
    let stride = row_stride(&view);
    let stride = stride.expect("selective_scan: views to write into are rows of columns");
    (view, stride)
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
    y: CubeTensor,
    /// Rows of `b`, `c` and `z`.
    strides: RowStrides,
    y_stride: usize,
}

/// One run of backward.
struct Pass {
    inputs: ScanInputs<CubeTensor>,
    strides: RowStrides,
    saved: CubeTensor,
    dy: CubeTensor,
    shape: ScanShape,
    chunks: Chunks,
    /// Chunks processed at once.
    segment: usize,
    wanted: Wanted,
    in_place: InPlace,
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
    fn new(
        inputs: ScanInputs<CubeTensor>,
        saved: CubeTensor,
        dy: CubeTensor,
        request: ScanRequest<CubeTensor>,
    ) -> Self {
        let bc_types = [inputs.b.dtype, inputs.c.dtype];
        let (inputs, strides) = prepare(inputs);
        let saved = contiguous_f32(saved);
        let shape = ScanShape::of(&inputs);
        let device = DeviceTraits::of(&inputs.u);
        let chunks = Chunks::new(&shape, &device);
        let softplus = inputs.delta_softplus;
        let ScanShape {
            batch,
            length,
            inner,
            state,
        } = shape;

        let like = &inputs.u;
        let wide = |dtype| empty(like, [batch, length, inner], dtype);
        let narrow = |name, view, dtype| {
            let shape = [batch, length, state];
            target(name, view, shape, || empty(like, shape, dtype))
        };
        let in_place = InPlace {
            delta: inputs.delta.can_mut(),
            dy: dy.can_mut() && dy.dtype == inputs.u.dtype,
        };
        let row = |present: bool| empty(like, [if present { inner } else { 1 }], DType::F32);
        let wanted = Wanted {
            d: inputs.d.is_some(),
            z: inputs.z.is_some(),
            bias: inputs.delta_bias.is_some(),
            y: request.y,
        };
        let du = if in_place.dy {
            dy.clone()
        } else {
            wide(inputs.u.dtype)
        };
        let (db, b_stride) = narrow("b", request.b, bc_types[0]);
        let (dc, c_stride) = narrow("c", request.c, bc_types[1]);
        let (dz, z_stride) = match &inputs.z {
            Some(z) => target("z", request.z, [batch, length, inner], || wide(z.dtype)),
            None => (du.clone(), 0),
        };
        let (y, y_stride) = match wanted.y {
            true => target("y", request.y_into, [batch, length, inner], || {
                wide(inputs.u.dtype)
            }),
            false => (du.clone(), 0),
        };
        let outputs = [(&dz, z_stride), (&dy, inner)];
        let alignment = alignment(&inputs, &strides, &shape, &outputs);
        let ends = sweep(
            &shape,
            &chunks.cut(),
            &device,
            alignment,
            softplus,
            ENDS_UNITS,
        )
        .copy_ahead(in_eights(&inputs, &strides, &shape, &dy), &device);
        let main = adjoint(&shape, &chunks, &device, alignment, softplus);
        let segment = segment_chunks(&shape, &chunks, &main);
        let grads = Grads {
            delta: if in_place.delta {
                inputs.delta.clone()
            } else {
                wide(inputs.delta.dtype)
            },
            a: empty(like, [inner, state], DType::F32),
            b: db,
            c: dc,
            d: row(wanted.d),
            z: dz,
            delta_bias: row(wanted.bias),
            y,
            y_stride,
            strides: RowStrides {
                b: b_stride,
                c: c_stride,
                z: z_stride,
            },
            u: du,
        };
        let sums_e = empty(like, [batch, chunks.count, state + 2, inner], DType::F32);
        let types = [
            elem(inputs.u.dtype),
            elem(inputs.delta.dtype),
            elem(inputs.b.dtype),
            elem(inputs.z.as_ref().unwrap_or(&inputs.u).dtype),
        ];
        let views = [&saved, &sums_e, &grads.b, &grads.c, &grads.z, &grads.y];
        let address = address(&inputs, &views);
        Self {
            address,
            wanted,
            in_place,
            ends,
            main,
            segment,
            types,
            grads,
            sums_e,
            ptx: device.ptx,
            inputs,
            strides,
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
        let padded = state.next_multiple_of(4);
        let sub_states = transient([batch, positions / SUB, padded, inner]);
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
        let (inputs, shape, grads) = (&self.inputs, &self.shape, &self.grads);
        let blocks = self.ends.cubes(shape.inner) * count * shape.batch;
        // SAFETY: every position is derived from the shapes passed along, whose buffers are
        // contiguous and of just these sizes; units beyond the last channel or cube write nothing.
        unsafe {
            adjoint_ends::adjoint_ends::launch_unchecked(
                &inputs.u.client,
                grid(blocks),
                cube_dim(self.ends.units),
                address,
                self.ends.source,
                buffer(&inputs.u),
                buffer(&inputs.delta),
                buffer(&inputs.b),
                buffer(&inputs.c),
                buffer(&inputs.a),
                optional(&inputs.d),
                optional(&inputs.z),
                optional(&inputs.delta_bias),
                optional(&inputs.resets),
                buffer(&self.dy),
                buffer(&self.saved),
                buffer(sub_states),
                buffer(ends),
                buffer(steps),
                buffer(&grads.z),
                buffer(&grads.y),
                buffer(&self.sums_e),
                shape.batch,
                shape.length,
                shape.inner,
                shape.state,
                self.strides.b,
                self.strides.c,
                self.strides.z,
                grads.strides.z,
                grads.y_stride,
                begin,
                count,
                self.wanted,
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
        // What is read through a gradient's buffer must not be bound as an input too.
        let input = |in_place: bool, tensor| buffer(if in_place { &inputs.u } else { tensor });
        // SAFETY: as in `launch_ends`. What is absent or not wanted borrows the buffers of `u`
        // and `du`, and the kernel has no code for it. For gradients in the place of inputs see
        // `InPlace`.
        unsafe {
            adjoint_main::adjoint_main::launch_unchecked(
                &inputs.u.client,
                grid(blocks),
                cube_dim(self.main.units),
                address,
                self.main.vector,
                self.main.source,
                buffer(&inputs.u),
                input(self.in_place.delta, &inputs.delta),
                buffer(&inputs.b),
                buffer(&inputs.c),
                buffer(&inputs.a),
                optional(&inputs.d),
                optional(&inputs.z),
                optional(&inputs.delta_bias),
                optional(&inputs.resets),
                input(self.in_place.dy, &self.dy),
                buffer(sub_states),
                buffer(entering),
                buffer(&grads.u),
                buffer(&grads.delta),
                buffer(sums_bc),
                buffer(&self.sums_e),
                shape.batch,
                shape.length,
                shape.inner,
                shape.state,
                self.strides.b,
                self.strides.c,
                self.strides.z,
                begin,
                count,
                self.wanted,
                self.in_place,
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
                self.grads.strides.b,
                self.grads.strides.c,
                begin * self.chunks.size,
                positions,
                self.main.cubes(shape.inner),
                self.main.states(),
                [elem(self.grads.b.dtype), elem(self.grads.c.dtype)],
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
