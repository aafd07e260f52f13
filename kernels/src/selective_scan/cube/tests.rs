use burn::tensor::{Device, Tensor};

use super::plan::{Chunks, SUB, ScanShape, adjoint, adjoint_shared_bytes, segment_chunks, sweep};
use crate::cube::{DeviceTraits, SHARED_BYTES};
use crate::selective_scan::{Scan, reference, selective_scan};
use crate::testing::{ATOL, RTOL, Rng, assert_close, cpu, devices, read, tensor};

/// Devices that differ in what plans depend on.
fn kinds_of_device() -> impl Iterator<Item = DeviceTraits> {
    [(1, 256), (8, 1024), (16, 512), (32, 1024), (64, 1024)]
        .into_iter()
        .map(|(plane, max_units)| DeviceTraits {
            ptx: false,
            plane,
            max_units,
            busy_units: 132 * 1024,
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
            for most in [128, 1024] {
                let config = sweep(&shape, &chunks, &device, true, SUB, most);
                let what = format!("{device:?} {shape:?} {config:?}");
                assert!(config.states() >= shape.state, "{what}");
                assert!(config.lanes <= device.plane, "{what}");
                assert!(config.units <= device.max_units.min(most), "{what}");
                assert!(config.units.is_multiple_of(device.plane), "{what}");
                assert!(config.tile.is_multiple_of(SUB), "{what}");
                assert!(chunks.size.is_multiple_of(config.tile), "{what}");
                assert!(
                    2 * 4 * config.tile * config.states() <= SHARED_BYTES,
                    "{what}"
                );
            }
            let config = adjoint(&shape, &chunks, &device, true);
            let what = format!("{device:?} {shape:?} {config:?}");
            assert!(config.states() >= shape.state, "{what}");
            assert!(config.lanes <= device.plane, "{what}");
            assert!(config.per_unit <= config.lanes, "{what}");
            assert!(config.units.is_multiple_of(device.plane), "{what}");
            assert!(chunks.size.is_multiple_of(config.tile), "{what}");
            assert!(adjoint_shared_bytes(&config) <= SHARED_BYTES, "{what}");
            let segment = segment_chunks(&shape, &chunks, &config);
            assert!(segment >= 1 && segment <= chunks.count, "{what}");
        }
    }
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
/// then starts.
#[test]
fn a_pass_without_cutting_time_equals_reference() {
    let dims = [4, 70, 2053, 3];
    let run = |scan: Scan, op: fn(Scan) -> (Tensor<3>, Tensor<3>)| {
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
    };
    let expected = run(scan_inputs(dims, &cpu()), reference::selective_scan);
    for device in devices() {
        let got = run(scan_inputs(dims, &device), selective_scan);
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_close(&format!("{device:?} result {i}"), got, expected, RTOL, ATOL);
        }
    }
}
