//! A stack of Mamba blocks from vectors to vectors, with the names of the well-known Python ports.
//!
//! ```text
//! cargo run --release --example block
//! ```

use burn::tensor::{Device, Distribution, Tensor};
use mambabyte::config::DtRank;
use mambabyte::{Mamba, MambaBlock, MambaConfig, State};

fn main() {
    let device = Device::default();
    let config = MambaConfig {
        dt_rank: DtRank::Fixed(2),
        d_state: 2,
        expand_factor: 2,
        d_conv: 3,
        // The ports end with the last block; a norm after it is this project's default.
        final_norm: false,
        ..MambaConfig::new(4, 3)
    };
    config.validate().expect("every size is within its range");

    // Two sequences of three vectors of width four.
    device.seed(0);
    let x = Tensor::<3>::random([2, 3, 4], Distribution::Normal(0.0, 1.0), &device);
    let model: Mamba = config.init(42, &device);
    let (y, _) = model.forward(x.clone(), None, None);
    println!("{:?} to {:?}\n{y}", x.dims(), y.dims());

    // A single mixer, without norm and residual.
    let block = MambaBlock::new(&MambaConfig::new(16, 1), 42, &device);
    let input = Tensor::<3>::random([2, 64, 16], Distribution::Normal(0.0, 1.0), &device);
    let (output, _) = block.forward(input.clone(), None, None);
    println!("one block: {:?} to {:?}", input.dims(), output.dims());

    // One position at a time, in constant memory: the same numbers.
    let mut state = State::zeros(&config, 2, &device);
    for t in 0..3 {
        let x_t = x.clone().slice([0..2, t..t + 1]).reshape([2, 4]);
        let (y_t, next) = model.step(x_t, state);
        state = next;
        let expected = y.clone().slice([0..2, t..t + 1]).reshape([2, 4]);
        let difference = (y_t - expected).abs().max().into_scalar::<f32>();
        println!("position {t}: step and forward differ by {difference:e} at most");
    }
}
