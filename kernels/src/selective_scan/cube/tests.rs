use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_cubecl::ops::into_data_sync;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};

use super::plan::{
    Alignment, Choice, Chunks, Forward, SUB, ScanShape, adjoint, adjoint_shared_bytes, choose,
    segment_chunks, shares, sweep,
};
use crate::MambaKernels;
use crate::cube::{DeviceTraits, columns, contiguous, shares_columns};
use crate::selective_scan::{Scan, ScanGrads, ScanInputs, ScanRequest, reference, selective_scan};
use crate::testing::{ATOL, RTOL, Rng, assert_close, assert_same_bits, cpu, devices, read, tensor};

/// Devices that differ in what plans depend on.
fn kinds_of_device() -> impl Iterator<Item = DeviceTraits> {
    [(1, 256), (8, 1024), (16, 512), (32, 1024), (64, 1024)]
        .into_iter()
        .map(|(plane, max_units)| DeviceTraits {
            ptx: false,
            plane,
            max_units,
            busy_units: 132 * 1024,
            shared_bytes: 32 * 1024,
            processor_shared_bytes: 32 * 1024,
        })
}

fn shapes() -> impl Iterator<Item = ScanShape> {
    let sizes = [
        (1, 1, 1),
        (2, 33, 5),
        (1, 8192, 2048),
        (3, 512, 1537),
        (64, 300, 4096),
    ];
    sizes.into_iter().flat_map(|(batch, length, inner)| {
        (1..=256).map(move |state| ScanShape {
            batch,
            length,
            inner,
            state,
        })
    })
}

#[test]
fn plans_cover_every_state_within_every_limit() {
    for device in kinds_of_device() {
        for shape in shapes() {
            let chunks = Chunks::new(&shape, &device);
            assert!((chunks.count - 1) * chunks.size < shape.length);
            assert!(chunks.count * chunks.size >= shape.length);
            let alignment = Alignment {
                channels: 2,
                states: 4,
            };
            for config in [
                sweep(&shape, &chunks, &device, alignment, true, 1024),
                sweep(&shape, &chunks.cut(), &device, alignment, true, 512)
                    .copy_ahead(true, &device),
            ] {
                let what = format!("{device:?} {shape:?} {config:?}");
                assert!(config.states() >= shape.state, "{what}");
                assert!(config.lanes <= device.plane, "{what}");
                assert!(config.units <= device.max_units, "{what}");
                assert!(config.tile.is_multiple_of(SUB), "{what}");
                assert!(config.shared_bytes() <= device.shared_bytes, "{what}");
                assert!(config.units.is_multiple_of(device.plane), "{what}");
                assert!(chunks.size.is_multiple_of(config.tile), "{what}");
            }
            let config = adjoint(&shape, &chunks, &device, alignment, true);
            let what = format!("{device:?} {shape:?} {config:?}");
            assert!(config.states() >= shape.state, "{what}");
            assert!(config.lanes <= device.plane, "{what}");
            assert!(config.per_unit <= config.lanes, "{what}");
            assert!(config.units.is_multiple_of(device.plane), "{what}");
            assert!(chunks.size.is_multiple_of(config.tile), "{what}");
            assert!(
                adjoint_shared_bytes(&config) <= device.shared_bytes,
                "{what}"
            );
            let segment = segment_chunks(&shape, &chunks, &config);
            assert!(segment >= 1 && segment <= chunks.count, "{what}");
        }
    }
}

/// The model of 353M has channels for four states a unit with a batch of 4 on an H200, and of 1 on an RTX
/// 3090, which has less shared memory, and for two with fewer; what a cube cannot have goes the other ways.
#[test]
fn enough_channels_share_their_states() {
    let device = |processors: usize, shared: usize| DeviceTraits {
        ptx: true,
        plane: 32,
        max_units: 1024,
        busy_units: processors * 1024,
        shared_bytes: 48 * 1024,
        processor_shared_bytes: shared * 1024,
    };
    let (h200, rtx3090) = (device(132, 227), device(82, 99));
    let shape = |batch, length, inner, state| ScanShape {
        batch,
        length,
        inner,
        state,
    };
    let own = |shape, device: &DeviceTraits| shares(&shape, device).map(|layout| layout.own);
    for (device, batch, inner, expected) in [
        (h200, 4, 2048, Some(4)),
        (h200, 2, 2048, Some(2)),
        (h200, 1, 2048, Some(2)),
        (h200, 1, 3584, Some(2)),
        (h200, 2, 3584, Some(4)),
        (h200, 1, 1536, None),
        (rtx3090, 2, 2048, Some(4)),
        (rtx3090, 1, 2048, Some(4)),
        (rtx3090, 1, 1280, Some(2)),
        (rtx3090, 1, 512, None),
    ] {
        let what = format!("{device:?} {batch} {inner}");
        assert_eq!(
            own(shape(batch, 8192, inner, 16), &device),
            expected,
            "{what}"
        );
    }
    assert_eq!(own(shape(64, 1, 2048, 16), &h200), None);
    assert_eq!(own(shape(64, 8192, 2048, 8), &h200), None);
    assert_eq!(own(shape(64, 8192, 2047, 16), &h200), None);
    let few_units = DeviceTraits {
        max_units: 128,
        ..h200
    };
    assert_eq!(own(shape(64, 8192, 2048, 16), &few_units), None);
    let little = DeviceTraits {
        shared_bytes: 16 * 1024,
        processor_shared_bytes: 16 * 1024,
        ..h200
    };
    assert_eq!(own(shape(64, 8192, 2048, 16), &little), None);
}

fn scan_inputs(dims: [usize; 4], device: &Device) -> Scan {
    let [batch, length, inner, state] = dims;
    let device = device.clone().autodiff();
    let mut rng = Rng::new(7);
    let wide = [batch, length, inner];
    let narrow = [batch, length, state];
    let count = batch * length * inner;
    let mut scan = Scan::new(
        tensor(&rng.normals(count, 1.0), wide, &device).require_grad(),
        tensor(&rng.normals(count, 0.7), wide, &device).require_grad(),
        tensor(
            &(0..inner * state)
                .map(|i| -((i % state) as f32) - 1.0)
                .collect::<Vec<_>>(),
            [inner, state],
            &device,
        )
        .require_grad(),
        tensor(&rng.normals(batch * length * state, 1.0), narrow, &device).require_grad(),
        tensor(&rng.normals(batch * length * state, 1.0), narrow, &device).require_grad(),
    );
    scan.z = Some(tensor(&rng.normals(count, 1.0), wide, &device));
    scan.delta_bias = Some(tensor(&vec![-2.0; inner], [inner], &device));
    scan.initial_state = Some(tensor(
        &rng.normals(batch * inner * state, 1.0),
        [batch, inner, state],
        &device,
    ));
    scan.resets = Some(tensor(
        &rng.flags(batch * length, 0.03),
        [batch, length],
        &device,
    ));
    scan
}

/// Enough channels that forward takes one pass over several chunks, from whose states backward
/// then starts: walking, and with the states of a channel spread over lanes.
#[test]
fn a_pass_without_cutting_time_equals_reference() {
    for dims in [[4, 70, 2053, 3], [2, 90, 401, 16]] {
        a_pass_over_several_chunks_equals_reference(dims);
    }
}

fn a_pass_over_several_chunks_equals_reference(dims: [usize; 4]) {
    let expected = results(scan_inputs(dims, &cpu()), reference::selective_scan);
    for device in devices() {
        let got = results(scan_inputs(dims, &device), selective_scan);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_close(&format!("{device:?} result {i}"), got, expected, RTOL, ATOL);
        }
    }
}

/// Outputs, last state and gradients.
fn results(scan: Scan, op: fn(Scan) -> (Tensor<3>, Tensor<3>)) -> [Vec<f32>; 7] {
    let (y, last) = op(scan.clone());
    let grads = y.clone().sum().backward();
    let grad = |t: &Tensor<3>| read(t.grad(&grads).expect("tracked"));
    let da = read(scan.a.grad(&grads).expect("tracked"));
    [
        read(y),
        read(last),
        grad(&scan.u),
        grad(&scan.delta),
        grad(&scan.b),
        grad(&scan.c),
        da,
    ]
}

/// One pass with shared states, for lengths within a tile, with and without a whole last one, and
/// channels that fill cubes, or do not; with all optional inputs and without any.
#[test]
fn shared_states_equal_reference() {
    for [batch, length, inner] in [
        [2, 90, 404],
        [3, 64, 32],
        [1, 33, 36],
        [1, 1, 4],
        [2, 17, 8],
        [1, 307, 68],
    ] {
        let dims = [batch, length, inner, 16];
        for (bare, own) in [(false, 4), (true, 4), (false, 2), (true, 2)] {
            let inputs = |device: &Device| {
                let mut scan = scan_inputs(dims, device);
                let device = device.clone().autodiff();
                scan.d = Some(tensor(&Rng::new(8).normals(inner, 1.0), [inner], &device));
                match bare {
                    false => scan,
                    true => Scan {
                        // Small steps, where they are as they come.
                        delta: scan.delta.abs().mul_scalar(0.1).detach().require_grad(),
                        delta_softplus: false,
                        d: None,
                        z: None,
                        delta_bias: None,
                        initial_state: None,
                        resets: None,
                        ..scan
                    },
                }
            };
            let expected = results(inputs(&cpu()), reference::selective_scan);
            choose(Choice {
                forward: Some(Forward::Share(own)),
            });
            for device in cube_devices() {
                let inputs = inputs_with_columns(dims, &device);
                let chosen = shares(&ScanShape::of(&inputs), &DeviceTraits::of(&inputs.u));
                assert_eq!(chosen.map(|layout| layout.own), Some(own));
            }
            for device in devices() {
                let what = format!("{device:?} {dims:?} bare {bare} {own} states a unit");
                let run = || results(inputs(&device), selective_scan);
                let (got, again) = (run(), run());
                for ((got, again), expected) in got.iter().zip(&again).zip(&expected) {
                    assert_close(&what, got, expected, RTOL, ATOL);
                    assert_same_bits(&what, got, again);
                }
            }
            choose(Choice::default());
        }
    }
}

/// More cubes than an axis of the grid has: those that fill up the last row of cubes have no sequence, and
/// write nothing.
#[test]
fn cubes_beyond_the_last_sequence_write_nothing() {
    let dims = [65_537, 1, 4, 16];
    let run = |device: &Device, op: fn(Scan) -> (Tensor<3>, Tensor<3>)| {
        let (y, last) = op(scan_inputs(dims, device));
        [read(y), read(last)]
    };
    let expected = run(&cpu(), reference::selective_scan);
    for device in devices() {
        choose(Choice {
            forward: Some(Forward::Share(4)),
        });
        let got = run(&device, selective_scan);
        choose(Choice::default());
        for (got, expected) in got.iter().zip(&expected) {
            assert_close(&format!("{device:?}"), got, expected, RTOL, ATOL);
        }
    }
}

/// Numbers of 16 bits, which are read as words, give what the same numbers in f32 give, to rounding.
#[test]
fn shared_states_in_bf16_equal_f32() {
    let dims = [2, 90, 68, 16];
    for device in devices() {
        if !device.supports_dtype(DType::BF16) {
            continue;
        }
        let device = device.autodiff();
        let mut wide = scan_inputs(dims, &device);
        let rounded = |t: &Tensor<3>| t.clone().detach().cast(DType::BF16);
        let narrow = Scan {
            u: rounded(&wide.u),
            delta: rounded(&wide.delta),
            b: rounded(&wide.b),
            c: rounded(&wide.c),
            z: wide.z.as_ref().map(rounded),
            ..wide.clone()
        };
        let again = |t: &Tensor<3>| t.clone().cast(DType::F32);
        (wide.u, wide.delta) = (again(&narrow.u), again(&narrow.delta));
        (wide.b, wide.c) = (again(&narrow.b), again(&narrow.c));
        wide.z = narrow.z.as_ref().map(again);
        for own in [4, 2] {
            choose(Choice {
                forward: Some(Forward::Share(own)),
            });
            let expected = selective_scan(wide.clone());
            let got = selective_scan(narrow.clone());
            choose(Choice::default());
            let what = format!("{device:?} {own} states a unit");
            assert_close(&what, &read(got.0), &read(expected.0), 8e-3, 1e-3);
            assert_close(&what, &read(got.1), &read(expected.1), 1e-6, 1e-6);
        }
    }
}

/// The runtimes this build has.
fn cube_devices() -> Vec<CubeDevice> {
    [
        #[cfg(feature = "wgpu")]
        CubeDevice::wgpu(Default::default()),
        #[cfg(feature = "cuda")]
        CubeDevice::cuda(0),
    ]
    .into_iter()
    .map(|device| device.expect("a device"))
    .collect()
}

fn raw<const D: usize>(rng: &mut Rng, dims: [usize; D], device: &CubeDevice) -> CubeTensor {
    let values = rng.normals(dims.iter().product(), 1.0);
    CubeBackend::float_from_data(TensorData::new(values, dims), device)
}

fn values(tensor: &CubeTensor) -> Vec<f32> {
    into_data_sync(contiguous(tensor.clone()))
        .iter::<f32>()
        .collect()
}

type Inputs = ScanInputs<CubeTensor>;

/// Inputs whose z, B and C are columns of wider tensors.
fn inputs_with_columns([batch, length, inner, state]: [usize; 4], device: &CubeDevice) -> Inputs {
    let rng = &mut Rng::new(3);
    let rank = 64;
    let xz = raw(rng, [batch, length, 2 * inner], device);
    let dbc = raw(rng, [batch, length, rank + 2 * state], device);
    let rates = vec![-1.0f32; inner * state];
    ScanInputs {
        u: raw(rng, [batch, length, inner], device),
        delta: raw(rng, [batch, length, inner], device),
        a: CubeBackend::float_from_data(TensorData::new(rates, [inner, state]), device),
        b: columns(&dbc, rank, rank + state),
        c: columns(&dbc, rank + state, rank + 2 * state),
        d: Some(raw(rng, [inner], device)),
        z: Some(columns(&xz, inner, 2 * inner)),
        delta_bias: Some(raw(rng, [inner], device)),
        initial_state: Some(raw(rng, [batch, inner, state], device)),
        resets: None,
        delta_softplus: true,
    }
}

fn all_values(grads: &ScanGrads<CubeTensor>) -> Vec<Vec<f32>> {
    let ScanGrads {
        u,
        delta,
        a,
        b,
        c,
        d,
        z,
        delta_bias,
        y,
    } = grads;
    let optional = [d, z, delta_bias, y].into_iter().flatten();
    [u, delta, a, b, c]
        .into_iter()
        .chain(optional)
        .map(values)
        .collect()
}

/// Views in and views to write into give the bits of tensors of their own, touch nothing beside
/// them, and backward's outputs are forward's.
#[test]
fn columns_of_wider_tensors_equal_tensors_of_their_own() {
    for (device, dims) in cube_devices()
        .into_iter()
        .flat_map(|device| [[2, 70, 64, 16], [1, 300, 64, 5]].map(|dims| (device.clone(), dims)))
    {
        let [batch, length, inner, state] = dims;
        let views = inputs_with_columns(dims, &device);
        let mut own = views.clone();
        own.b = contiguous(own.b);
        own.c = contiguous(own.c);
        own.z = own.z.map(contiguous);
        let forward = CubeBackend::selective_scan(views.clone());
        let expected = CubeBackend::selective_scan(own.clone());
        assert_same_bits("y", &values(&forward.y), &values(&expected.y));

        let dy = raw(&mut Rng::new(9), [batch, length, inner], &device);
        let all = |y| ScanRequest {
            y,
            ..ScanRequest::none()
        };
        let expected =
            CubeBackend::selective_scan_backward(own, expected.saved, dy.clone(), all(true));
        let recomputed = expected.y.as_ref().expect("asked for");
        assert_same_bits("y again", &values(recomputed), &values(&forward.y));

        let dxz = raw(&mut Rng::new(4), [batch, length, 2 * inner], &device);
        let dbc = raw(&mut Rng::new(5), [batch, length, 64 + 2 * state], &device);
        let view =
            |of: &CubeTensor, from, to| shares_columns(of, from).then(|| columns(of, from, to));
        let wide = raw(&mut Rng::new(6), [batch, length, 2 * inner], &device);
        let rest = columns(&dxz, 0, inner);
        let before = values(&rest);
        let got = CubeBackend::selective_scan_backward(
            views,
            forward.saved,
            dy,
            ScanRequest {
                z: view(&dxz, inner, 2 * inner),
                b: view(&dbc, 64, 64 + state),
                c: view(&dbc, 64 + state, 64 + 2 * state),
                y: true,
                y_into: Some(columns(&wide, 0, inner)),
            },
        );
        for (i, (got, expected)) in all_values(&got)
            .iter()
            .zip(all_values(&expected))
            .enumerate()
        {
            assert_same_bits(&format!("gradient {i}"), got, &expected);
        }
        assert_same_bits("beside the view", &values(&rest), &before);
        if shares_columns(&dxz, inner) {
            let written = values(&columns(&dxz, inner, 2 * inner));
            let expected = values(expected.z.as_ref().expect("there is a gate"));
            assert_same_bits("the view", &written, &expected);
        }
    }
}

/// Where rows of 16-bit activations are aligned they are copied to shared memory ahead of their use:
/// that gives the bits of plain loads, which gates in rows of another width need.
#[test]
fn activations_copied_ahead_have_the_same_bits() {
    for (device, dims) in cube_devices()
        .into_iter()
        .flat_map(|device| [[2, 301, 72, 16], [1, 67, 520, 5]].map(|dims| (device.clone(), dims)))
    {
        let narrow = |tensor: CubeTensor| CubeBackend::float_cast(tensor, FloatDType::BF16);
        let [batch, length, inner, _] = dims;
        let mut inputs = inputs_with_columns(dims, &device);
        if !DeviceTraits::of(&inputs.u).ptx {
            continue;
        }
        let wide = narrow(raw(
            &mut Rng::new(5),
            [batch, length, 2 * inner + 4],
            &device,
        ));
        inputs.u = narrow(inputs.u);
        inputs.delta = narrow(inputs.delta);
        (inputs.b, inputs.c) = (narrow(inputs.b), narrow(inputs.c));
        inputs.z = Some(columns(&wide, inner, 2 * inner));
        let dy = narrow(raw(&mut Rng::new(9), [batch, length, inner], &device));
        let saved = CubeBackend::selective_scan(inputs.clone()).saved;
        let backward = |inputs: &Inputs| {
            let request = ScanRequest::none();
            let (saved, dy) = (saved.clone(), dy.clone());
            CubeBackend::selective_scan_backward(inputs.clone(), saved, dy, request)
        };
        let loaded = backward(&inputs);
        inputs.z = inputs.z.map(contiguous);
        let copied = backward(&inputs);
        for (i, (copied, loaded)) in all_values(&copied)
            .iter()
            .zip(all_values(&loaded))
            .enumerate()
        {
            assert_same_bits(&format!("{device:?} {dims:?} {i}"), copied, &loaded);
        }
    }
}

/// Where nothing else holds delta and dy, gradients take their place, with the same bits.
#[test]
fn gradients_in_the_place_of_inputs_have_the_same_bits() {
    for (device, dims) in cube_devices().into_iter().flat_map(|device| {
        [
            [2, 70, 64, 16],
            [1, 301, 37, 16],
            [3, 33, 5, 1],
            [1, 41, 66, 9],
        ]
        .map(|dims| (device.clone(), dims))
    }) {
        let [batch, length, inner, _] = dims;
        let fresh = || {
            let dy = raw(&mut Rng::new(9), [batch, length, inner], &device);
            (inputs_with_columns(dims, &device), dy)
        };
        let (inputs, dy) = fresh();
        let saved = CubeBackend::selective_scan(inputs.clone()).saved;
        let request = ScanRequest::none();
        let held = (inputs.clone(), dy.clone());
        let expected = CubeBackend::selective_scan_backward(inputs, saved.clone(), dy, request);
        let (inputs, dy) = fresh();
        assert!(inputs.delta.can_mut() && dy.can_mut());
        let request = ScanRequest::none();
        let got = CubeBackend::selective_scan_backward(inputs, saved, dy, request);
        for (i, (got, expected)) in all_values(&got)
            .iter()
            .zip(all_values(&expected))
            .enumerate()
        {
            assert_same_bits(&format!("{device:?} {dims:?} {i}"), got, &expected);
        }
        let (inputs, dy) = fresh();
        assert_same_bits("delta", &values(&held.0.delta), &values(&inputs.delta));
        assert_same_bits("dy", &values(&held.1), &values(&dy));
    }
}

/// The ways of forward through time.
const WAYS: [Forward; 4] = [
    Forward::Cut,
    Forward::Walk,
    Forward::Share(4),
    Forward::Share(2),
];

/// Whichever way forward goes through time, its results differ by rounding only, are the same in
/// every run, and backward's outputs have its very bits, but for those of two states a unit.
#[test]
fn all_ways_through_time_agree() {
    let cases = [
        [2, 70, 64, 16],
        [1, 301, 37, 16],
        [3, 100, 5, 1],
        [1, 95, 19, 5],
        [2, 130, 11, 33],
        [1, 64, 9, 64],
        [1, 3, 40, 16],
        [2, 97, 36, 16],
        [1, 320, 32, 16],
    ];
    for (device, dims) in cube_devices()
        .into_iter()
        .flat_map(|device| cases.map(|dims| (device.clone(), dims)))
    {
        let [batch, length, inner, _] = dims;
        let dy = raw(&mut Rng::new(9), [batch, length, inner], &device);
        let mut inputs = inputs_with_columns(dims, &device);
        for (gated, cleared) in [(true, true), (false, true), (true, false)] {
            let flags = TensorData::new(Rng::new(2).flags(batch * length, 0.05), [batch, length]);
            inputs.resets = cleared.then(|| CubeBackend::float_from_data(flags, &device));
            inputs.z = inputs.z.filter(|_| gated);
            let mut expected: Option<[Vec<f32>; 3]> = None;
            for way in WAYS {
                let what = format!("{device:?} {dims:?} {way:?} {gated} {cleared}");
                choose(Choice { forward: Some(way) });
                let first = CubeBackend::selective_scan(inputs.clone());
                let [got, again] = [first.clone(), CubeBackend::selective_scan(inputs.clone())]
                    .map(|out| [out.y, out.last_state, out.saved].map(|t| values(&t)));
                let expected = expected.get_or_insert_with(|| got.clone());
                for ((got, again), expected) in got.iter().zip(&again).zip(expected.iter()) {
                    assert_same_bits(&what, got, again);
                    assert_close(&what, got, expected, 1e-4, 1e-4);
                }
                let request = ScanRequest {
                    y: true,
                    ..ScanRequest::none()
                };
                let (inputs, dy) = (inputs.clone(), dy.clone());
                let back = CubeBackend::selective_scan_backward(inputs, first.saved, dy, request);
                let y = back.y.expect("asked for");
                let what = format!("{what} y again");
                match way {
                    Forward::Share(2) => {
                        assert_close(&what, &values(&y), &got[0], 1e-5, 1e-5);
                    }
                    _ => assert_same_bits(&what, &values(&y), &got[0]),
                }
            }
            if !gated {
                inputs.z = inputs_with_columns(dims, &device).z;
            }
        }
    }
    choose(Choice::default());
}
