use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Mamba, MambaBlock, MambaLm, Norm, ResidualBlock, State};
use crate::config::{self, DtInit, DtRank, MambaConfig};

fn device() -> Device {
    Device::flex()
}

fn tiny() -> MambaConfig {
    MambaConfig {
        d_state: 4,
        ..MambaConfig::new(12, 3)
    }
}

fn bytes(rows: usize, length: usize) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..rows * length).map(|i| (i * 37 % 256) as i32).collect();
    Tensor::from_data(TensorData::new(values, [rows, length]), &device())
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[track_caller]
fn assert_close(what: &str, a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * (1.0 + b.abs()),
            "{what}[{i}]: {a} and {b}"
        );
    }
}

/// Every parameter's path and shape.
fn tree(model: &MambaLm) -> Vec<(String, Vec<usize>)> {
    #[derive(Default)]
    struct Tree {
        path: Vec<String>,
        found: Vec<(String, Vec<usize>)>,
    }
    impl ModuleVisitor for Tree {
        fn enter_module(&mut self, name: &str, _container: &str) {
            self.path.push(name.to_owned());
        }
        fn exit_module(&mut self, _name: &str, _container: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.found
                .push((self.path.join("."), param.val().dims().to_vec()));
        }
    }
    let mut tree = Tree::default();
    model.visit(&mut tree);
    tree.found
}

#[test]
fn the_parameter_table_is_that_of_the_model() {
    for config in [
        tiny(),
        MambaConfig {
            norm: config::Norm::Rms,
            bias: true,
            conv_bias: false,
            tie_embeddings: true,
            final_norm: false,
            vocab_size: 257,
            pad_vocab_size_multiple: 8,
            ..tiny()
        },
    ] {
        let model = config.init_lm(1, &device());
        let mut found = tree(&model);
        let mut table: Vec<_> = config
            .parameter_table()
            .into_iter()
            .map(|spec| (spec.name, spec.shape))
            .collect();
        found.sort();
        table.sort();
        assert_eq!(found, table);
        assert_eq!(model.num_params() as u64, config.num_params());
    }
}

/// The example of the well-known Python ports.
#[test]
fn the_stack_maps_vectors_to_vectors() {
    let config = MambaConfig {
        dt_rank: DtRank::Fixed(2),
        d_state: 2,
        expand_factor: 2,
        d_conv: 3,
        dt_init: DtInit::Random,
        ..MambaConfig::new(4, 3)
    };
    let stack: Mamba = config.init(0, &device());
    let x = Tensor::random(
        [2, 3, 4],
        burn::tensor::Distribution::Normal(0.0, 1.0),
        &device(),
    );
    let (y, state) = stack.forward(x, None, None);
    assert_eq!(y.dims(), [2, 3, 4]);
    assert_eq!(state.layers.len(), 3);
    assert_eq!(state.layers[0].h.dims(), [2, 8, 2]);
    assert_eq!(state.layers[0].window.dims(), [2, 8, 2]);
}

#[test]
fn a_block_is_usable_alone_and_has_three_times_expand_times_d_squared_parameters() {
    let config = MambaConfig::new(64, 1);
    let block = MambaBlock::new(&config, 0, &device());
    let x = Tensor::ones([1, 5, 64], &device());
    assert_eq!(block.forward(x, None, None).0.dims(), [1, 5, 64]);
    let ratio = block.num_params() as f64 / (3.0 * 2.0 * 64.0 * 64.0);
    assert!((1.0..1.35).contains(&ratio), "{ratio}");
}

#[test]
fn stepping_equals_the_forward_pass() {
    let config = tiny();
    let model = config.init_lm(3, &device());
    for length in [1, 2, 3, 4, 5, 9, 40] {
        let input = bytes(2, length);
        let (logits, after) = model.forward(input.clone(), None, None);
        let mut state = State::zeros(&config, 2, &device());
        for t in 0..length {
            let byte = input.clone().slice([0..2, t..t + 1]).reshape([2]);
            let (stepped, next) = model.step(byte, state);
            state = next;
            let expected = logits.clone().slice([0..2, t..t + 1, 0..256]);
            assert_close(
                &format!("L {length} position {t}"),
                &values(stepped),
                &values(expected),
                1e-4,
            );
        }
        for (a, b) in state.layers.into_iter().zip(after.layers) {
            assert_close("h", &values(a.h), &values(b.h), 1e-4);
            assert_close("window", &values(a.window), &values(b.window), 1e-5);
        }
    }
}

#[test]
fn a_frozen_model_gives_the_same_bits() {
    let model = tiny().init_lm(2, &device());
    let run = |model: &MambaLm| values(model.forward(bytes(1, 8), None, None).0);
    assert_eq!(run(&model), run(&model.clone().frozen()));
}

#[test]
fn pieces_with_carried_state_equal_the_whole() {
    let config = tiny();
    let model = config.init_lm(4, &device());
    let input = bytes(2, 50);
    let (whole, _) = model.forward(input.clone(), None, None);
    for cut in [1, 2, 3, 4, 25, 49] {
        let (first, state) = model.forward(input.clone().slice([0..2, 0..cut]), None, None);
        let (second, _) = model.forward(input.clone().slice([0..2, cut..50]), Some(state), None);
        let joined = Tensor::cat(vec![first, second], 1);
        assert_close(
            &format!("cut at {cut}"),
            &values(joined),
            &values(whole.clone()),
            1e-4,
        );
    }
}

#[test]
fn packed_documents_equal_separate_documents() {
    let model = tiny().init_lm(5, &device());
    let input = bytes(1, 30);
    let mut flags = vec![0.0f32; 30];
    (flags[0], flags[7]) = (1.0, 1.0);
    let resets = Tensor::from_data(TensorData::new(flags, [1, 30]), &device());
    let (packed, _) = model.forward(input.clone(), None, Some(resets));
    let (second, _) = model.forward(input.slice([0..1, 7..30]), None, None);
    let part = packed.slice([0..1, 7..30, 0..256]);
    assert_close("second document", &values(part), &values(second), 1e-5);
}

#[test]
fn all_paths_give_the_same_numbers() {
    let input = bytes(2, 23);
    let run = |config: MambaConfig| {
        values(
            config
                .init_lm(6, &device())
                .forward(input.clone(), None, None)
                .0,
        )
    };
    let fused = run(tiny());
    for (pscan, use_fast_path, fused_add_norm) in [
        (false, true, true),
        (true, false, true),
        (false, false, true),
        (true, true, false),
    ] {
        let other = run(MambaConfig {
            pscan,
            use_fast_path,
            fused_add_norm,
            ..tiny()
        });
        assert_close(
            &format!("pscan {pscan}, fast {use_fast_path}, fused norm {fused_add_norm}"),
            &other,
            &fused,
            1e-4,
        );
    }
}

#[test]
fn rms_norm_tied_head_and_padding_work_together() {
    let config = MambaConfig {
        norm: config::Norm::Rms,
        tie_embeddings: true,
        vocab_size: 257,
        pad_vocab_size_multiple: 16,
        ..tiny()
    };
    let model = config.init_lm(7, &device());
    assert_eq!(model.embedding.weight.dims(), [272, 12]);
    let (logits, _) = model.forward(bytes(1, 6), None, None);
    assert_eq!(logits.dims(), [1, 6, 257]);
}

#[test]
fn last_positions_alone_equal_those_of_all() {
    let model = tiny().init_lm(8, &device());
    let (all, _) = model.forward(bytes(2, 9), None, None);
    let (last, _) = model.forward_last(bytes(2, 9), None, 2);
    let expected = all.slice([0..2, 7..9, 0..256]);
    assert_close("last", &values(last), &values(expected), 1e-6);
}

#[test]
fn a_residual_block_adds_its_mixer_to_its_input() {
    let config = tiny();
    let block = ResidualBlock::new(&config, 9, &device());
    let x = Tensor::random(
        [2, 5, 12],
        burn::tensor::Distribution::Normal(0.0, 1.0),
        &device(),
    );
    let (y, _) = block.forward(x.clone(), None, None);
    let normalised = block.norm.forward(x.clone());
    let expected = x + block.mixer.forward(normalised, None, None).0;
    assert_close("block", &values(y), &values(expected), 1e-6);
}

/// Statistics of the initial parameters, section by section of the reference recipe.
#[test]
fn initial_parameters_follow_the_recipe() {
    let config = MambaConfig::new(256, 4);
    let model = config.init_lm(10, &device());
    let mixer = &model.backbone.layers[2].mixer;
    let (inner, rank) = (512.0f32, 16.0f32);
    let extent = |t: Tensor<2>| {
        let v = values(t);
        let deviation = (v.iter().map(|x| x * x).sum::<f32>() / v.len() as f32).sqrt();
        (v.iter().fold(0f32, |m, x| m.max(x.abs())), deviation)
    };
    // A uniform distribution of bound b has deviation b / √3.
    for (name, tensor, bound) in [
        ("in_proj", &mixer.in_proj.weight, 1.0 / 256f32.sqrt()),
        ("x_proj", &mixer.x_proj.weight, 1.0 / inner.sqrt()),
        ("dt_proj", &mixer.dt_proj.weight, 1.0 / rank.sqrt()),
        ("out_proj", &mixer.out_proj.weight, 0.5 / inner.sqrt()),
        ("conv1d", &mixer.conv1d.weight, 0.5),
    ] {
        let (most, deviation) = extent(tensor.val());
        assert!(
            most <= bound && most > 0.95 * bound,
            "{name}: {most} of {bound}"
        );
        let expected = bound / 3f32.sqrt();
        assert!(
            (deviation / expected - 1.0).abs() < 0.05,
            "{name}: {deviation}, {expected}"
        );
    }
    let (_, deviation) = extent(model.embedding.weight.val());
    assert!(
        (deviation / 0.02 - 1.0).abs() < 0.05,
        "embedding: {deviation}"
    );
    let a_log = values(mixer.a_log.val());
    assert_close(
        "a_log",
        &a_log[16..20],
        &[0.0, 2f32.ln(), 3f32.ln(), 4f32.ln()],
        1e-6,
    );
    assert!(values(mixer.d.val()).iter().all(|d| *d == 1.0));
    let bias = mixer.dt_proj.bias.as_ref().expect("bias").val();
    let steps: Vec<f32> = values(bias).iter().map(|b| b.exp().ln_1p()).collect();
    assert!(steps.iter().all(|s| (0.99e-3..=0.101).contains(s)));
    // Log-uniform between 1e-3 and 1e-1: the median is 1e-2.
    let below = steps.iter().filter(|s| **s < 1e-2).count() as f32 / steps.len() as f32;
    assert!((below - 0.5).abs() < 0.08, "{below}");
}

#[test]
fn constant_dt_init_is_constant() {
    let config = MambaConfig {
        dt_init: DtInit::Constant,
        dt_scale: 2.0,
        ..tiny()
    };
    let block = MambaBlock::new(&config, 0, &device());
    assert!(values(block.dt_proj.weight.val()).iter().all(|w| *w == 2.0));
}

#[test]
fn a_seed_gives_the_same_model() {
    let run = |seed| {
        values(
            tiny()
                .init_lm(seed, &device())
                .forward(bytes(1, 5), None, None)
                .0,
        )
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn norms_stand_alone() {
    let x = Tensor::<3>::from_floats([[[1.0, 2.0, -3.0, 4.0]]], &device());
    let mut rms = Norm::rms(4, 1e-5, true, &device());
    let root = (30.0f32 / 4.0 + 1e-5).sqrt();
    let expected = [1.0, 2.0, -3.0, 4.0].map(|x| x / root);
    assert_close("RMSNorm", &values(rms.forward(x.clone())), &expected, 1e-6);
    rms.bias = Some(Param::from_tensor(Tensor::from_floats(
        [1.0, 0.0, -1.0, 0.5],
        &device(),
    )));
    let shifted = [0, 1, 2, 3].map(|i| expected[i] + [1.0, 0.0, -1.0, 0.5][i]);
    assert_close(
        "with a bias",
        &values(rms.forward(x.clone())),
        &shifted,
        1e-6,
    );
    assert!(Norm::rms(4, 1e-5, false, &device()).bias.is_none());

    let layer = Norm::layer(4, 1e-5, &device());
    let deviation = (6.5f32 + 1e-5).sqrt();
    let expected = [0.0, 1.0, -4.0, 3.0].map(|x| x / deviation);
    assert_close("LayerNorm", &values(layer.forward(x)), &expected, 1e-6);
}
