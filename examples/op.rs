//! The selective scan on its own: one call, no model.
//!
//! ```text
//! cargo run --release --example op
//! ```

use burn::tensor::{Device, Distribution, Tensor};
use mambabyte_kernels::selective_scan::{Scan, selective_scan};

fn main() {
    // B sequences of L positions, E channels, N states a channel.
    let [b, l, e, n] = [2, 10, 4, 3];
    let device = Device::default().autodiff();
    device.seed(0);
    let random =
        |width| Tensor::<3>::random([b, l, width], Distribution::Normal(0.0, 1.0), &device);
    let (u, delta) = (random(e).require_grad(), random(e));
    let (input, output) = (random(n), random(n));
    // States forget at the rates 1, 2 and 3.
    let rates = Tensor::<2>::from_floats([[-1.0, -2.0, -3.0]], &device).expand([e, n]);
    let scan = Scan::new(u.clone(), delta, rates, input, output);

    let (y, state) = selective_scan(scan.clone());
    println!("y {:?}, last state {:?}", y.dims(), state.dims());

    // Cut anywhere and carry the state: the result is that of the whole.
    let piece = |from: usize, to: usize, initial_state| Scan {
        u: scan.u.clone().slice([0..b, from..to]),
        delta: scan.delta.clone().slice([0..b, from..to]),
        b: scan.b.clone().slice([0..b, from..to]),
        c: scan.c.clone().slice([0..b, from..to]),
        initial_state,
        ..scan.clone()
    };
    let (first, carried) = selective_scan(piece(0, 4, None));
    let (second, _) = selective_scan(piece(4, l, Some(carried)));
    let joined = Tensor::cat(vec![first, second], 1);
    let difference = (joined - y.clone()).abs().max().into_scalar::<f32>();
    println!("largest difference between two pieces and the whole: {difference:e}");

    // Gradients are hand-written kernels behind Burn's autodiff.
    let grads = y.sum().backward();
    let gradient = u.grad(&grads).expect("the sum depends on u");
    println!("gradient of the sum with respect to u at the first position:");
    println!("{}", gradient.slice([0..1, 0..1]));
}
