use super::sizes::{MATMUL_WORKSPACE, Sizes};
use super::*;

const GIB: u64 = 1 << 30;

/// D 16, E 32, N 16, R 1, V 256, 2 layers, 2 · 64 positions, on the CPU.
const SMALL: [&str; 5] = [
    "model.dim=16",
    "model.depth=2",
    "train.batch=2",
    "train.length=64",
    "device.kind=cpu",
];

const LARGE: [&str; 2] = ["model.preset=mambabyte_353m", "device.kind=cuda"];

fn config(settings: &[&[&str]]) -> Config {
    let settings: Vec<String> = settings.concat().iter().map(|&it| it.to_owned()).collect();
    Config::parse("config", "train.steps = 1000\ndata.path = \"x\"", &settings).expect("valid")
}

#[test]
fn a_small_model_takes_what_a_hand_calculates() {
    let config = config(&[&SMALL]);
    // A layer: 32 norm, 1024 + 160 + 1056 + 64 + 512 + 32 + 512 mixer. The rest: 2 · 4096 + 32.
    let parameters = 2 * 3392 + 8224;
    // 128 positions of 16 + 33 numbers and a statistic; 2 · 2 chunks of 32 · 16 states.
    let kept = 128 * (49 * 4 + 4) + 4 * 2 * 2 * 512;
    let projected = 4 * 128 * 64;
    let inputs = 128 * 12;
    let streams = 3 * 8192 + 128 * (16 * 4 + 4);
    let head = Estimate {
        moment: Moment::Head,
        weights: 4 * parameters,
        gradients: 0,
        optimizer: 8 * parameters,
        activations: 2 * (kept + projected) + inputs + streams,
        workspace: 2 * 4 * 128 * 256,
        pages: 0,
        context: 0,
    };
    assert_eq!(estimate_with(&config, 0), head);
    assert_eq!(head.total(), 610_176);
    assert_eq!(estimate_with(&config, 2).total(), 610_176 - 2 * projected);
}

#[test]
fn every_moment_of_a_small_model_is_what_a_hand_calculates() {
    let sizes = Sizes::new(&config(&[&SMALL]));
    // Six buffers of 32 numbers a position, one of 33, one of 64; a gradient of the stream.
    let inside = 4 * 128 * (6 * 32 + 33 + 64) + 8192;
    let last = sizes.in_layer(1, 0);
    assert_eq!(last.workspace, inside);
    // The last layer, the final norm and the head.
    assert_eq!(last.gradients, 4 * (3392 + 32 + 4096));
    assert_eq!(last.total(), 500_992);
    let first = sizes.in_layer(0, 0);
    assert_eq!(first.gradients, last.gradients + 4 * 3392);
    assert_eq!(last.activations - first.activations, 33_792 + 32_768);
    // A recomputed layer does not keep its projection, and has it back inside.
    let rebuilt = sizes.in_layer(1, 2);
    assert_eq!(rebuilt.workspace, inside + 32_768);
    assert_eq!(rebuilt.activations, last.activations - 2 * 32_768);
    let update = sizes.at_update();
    assert_eq!(update.gradients, 4 * 15_008);
    assert_eq!(update.activations, 128 * 12);
    assert_eq!(update.workspace, 0);
}

#[test]
fn the_paper_s_model_in_16_bits_takes_what_a_hand_calculates() {
    let sizes = Sizes::with(&config(&[&LARGE]), 2, true);
    // Chunks of 128 positions: 64 of them, of 2048 · 16 states.
    let kept = 8192 * (2 * (1024 + 64 + 32) + 4) + 4 * 64 * 2048 * 16;
    assert_eq!(sizes.kept, kept);
    assert_eq!(sizes.projected, 128 << 19);
    // 2048 norm, 1024 · 4096, 2048 · (4 + 1), 2048 · 96, (64 + 1) · 2048, 2048 · 16, 2048,
    // 2048 · 1024.
    assert_eq!(sizes.layer_parameters, 6_668_288);
    // A chunk: 32 states, sums of 32 cubes, ends. All 64 of them fit 640 MiB.
    let (states, sums, ends) = (32 * 2048 * 16, 128 * 32 * 32, 17 * 2048);
    assert!((640 << 20) / (4 * (states + sums)) >= 64);
    let inside = 2 * 8192 * (3 * 2048 + 1024 + 96 + 4096)
        + 4 * 8192 * 1024
        + 64 * 4 * (states + sums + ends)
        + 2 * (1024 * 4096 + 2048 * 96 + 64 * 2048 + 2048 * 1024);
    assert_eq!(sizes.inside, inside);
    assert_eq!(sizes.logits, 8192 * 256 * (4 + 4 + 2));
    let peak = sizes.peak(53);
    let cut = peak.gradients + peak.activations + peak.workspace - MATMUL_WORKSPACE;
    let (page, reserved) = sizes.pages(53).expect("a GPU has pages");
    assert_eq!(cut + peak.pages, reserved);
    assert_eq!(reserved % page, 0);
    assert!(peak.pages < cut / 2, "{} of {cut} lost", peak.pages);
    assert_eq!(peak.context, CUDA_CONTEXT);
}

#[test]
fn accumulation_and_carried_states_have_their_price() {
    let plain = Sizes::new(&config(&[&SMALL]));
    let more = Sizes::new(&config(&[&SMALL, &["train.accumulation=3"]]));
    assert_eq!((plain.accumulated, more.accumulated), (0, 4 * 15_008));
    assert_eq!(more.at_update().gradients, 8 * 15_008);
    let contiguous = ["train.mode=contiguous", "train.accumulation=3"];
    let carried = Sizes::new(&config(&[&SMALL, &contiguous]));
    // Four times two sequences, two layers, 32 channels of 16 states and 3 inputs.
    assert_eq!(carried.inputs - plain.inputs, 4 * 2 * (4 * 2 * 32 * 19));
}

/// Embedding and head of 4096 numbers each are in 8 bits, with 16 scales a moment; nothing else
/// of the small model has so many.
#[test]
fn moments_in_8_bits_take_two_bytes_and_their_scales() {
    let fp32 = Sizes::new(&config(&[&SMALL]));
    assert_eq!(fp32.moments, 8 * 15_008);
    let int8 = Sizes::new(&config(&[&SMALL, &["optimizer.state=int8"]]));
    assert_eq!(
        int8.moments,
        8 * (15_008 - 8192) + 2 * (2 * 4096 + 2 * 4 * 16)
    );
    assert_eq!(int8.peak(0).optimizer, int8.moments);
    let large = Sizes::new(&config(&[&LARGE, &["optimizer.state=int8"]]));
    let per_number = large.moments as f64 / large.parameters as f64;
    assert!(
        (per_number - (2.0 + 8.0 / 256.0)).abs() < 0.02,
        "{per_number}"
    );
}

/// Five layers in groups of two: 0 and 1, 2 and 3, 4.
#[test]
fn groups_keep_their_streams_and_the_inside_of_one() {
    let five = ["model.depth=5", "train.accumulation=2"];
    let plain = Sizes::new(&config(&[&SMALL, &five]));
    let groups = Sizes::new(&config(&[&SMALL, &five, &["train.checkpoint_every=2"]]));
    let (stream, layer) = (8192, plain.kept + plain.projected);
    let kept = |sizes: &Sizes, layer| sizes.in_layer(layer, 0).activations - sizes.inputs;
    assert_eq!(kept(&plain, 4), 5 * layer);
    // One stream for the gradient at the end of a group, but for the last one.
    assert_eq!(kept(&groups, 0), layer + 2 * stream);
    assert_eq!(kept(&groups, 1), 2 * layer + 2 * stream);
    assert_eq!(kept(&groups, 2), layer + 3 * stream);
    assert_eq!(kept(&groups, 3), 2 * layer + 3 * stream);
    assert_eq!(kept(&groups, 4), layer + 3 * stream);
    // Layers 0 to 2 recomputed: one of the second group is not.
    let second = groups.in_layer(3, 3).activations - groups.inputs;
    assert_eq!(second, 2 * layer - groups.projected + 3 * stream);
    let (head, plain_head) = (groups.at_head(0), plain.at_head(0));
    assert_eq!(
        plain_head.activations - head.activations,
        4 * layer - 3 * stream
    );
    // The sum of an earlier micro-batch, and of this one only the group's and the tail.
    let gradients = groups.in_layer(2, 0).gradients;
    assert_eq!(gradients, groups.accumulated + 4 * (2 * 3392 + 32 + 4096));
    assert_eq!(groups.at_update().gradients, groups.accumulated);
}

#[test]
fn auto_recomputes_as_few_layers_as_fit() {
    let config = config(&[&LARGE]);
    let total = |layers| estimate_with(&config, layers).total();
    let most = total(0);
    let least = (0..=53).map(total).min().expect("some");
    assert!(least < most);
    assert_eq!(fewest_recomputed(&config, most), Some(0));
    assert!(fewest_recomputed(&config, least).is_some_and(|layers| layers > 20));
    assert_eq!(fewest_recomputed(&config, least - 1), None);
    for layers in [1, 20, 52] {
        let fewest = fewest_recomputed(&config, total(layers)).expect("it fits");
        assert!(fewest <= layers);
        assert!(total(fewest) <= total(layers));
        // Totals go by whole pages: several numbers of layers may have the same.
        assert!(
            fewest == 0 || total(fewest - 1) > total(layers),
            "{fewest} of {layers}"
        );
    }
}

#[test]
fn the_ends_are_the_greatest_of_all_layers() {
    for settings in [
        &SMALL[..],
        &LARGE[..],
        // Gradients of a layer outweigh what it keeps.
        &["model.preset=mambabyte_972m", "train.length=64"][..],
        &["model.preset=mambabyte_353m", "train.checkpoint_every=7"][..],
    ] {
        let sizes = Sizes::new(&config(&[settings]));
        let depth = sizes.depth;
        for recomputed in [0, 1, depth / 2, depth - 1, depth] {
            let all = (0..depth).map(|layer| sizes.in_layer(layer, recomputed));
            let all: Vec<_> = all
                .chain([sizes.at_update(), sizes.at_head(recomputed)])
                .collect();
            let peak = sizes.tensors(recomputed as usize);
            assert_eq!(Some(peak.total()), all.iter().map(Estimate::total).max());
        }
    }
}

#[test]
fn settling_puts_a_number_in_the_place_of_auto_only() {
    let settled = |limit: Option<u64>, recompute: &str| {
        let setting = format!("train.recompute={recompute}");
        let mut config = config(&[&SMALL, &[setting.as_str()]]);
        settle(&mut config, limit);
        config.train.recompute
    };
    assert_eq!(settled(None, "auto"), Recompute::None);
    // With a fiftieth to spare: 610176 of 622700.
    assert_eq!(settled(Some(622_700), "auto"), Recompute::None);
    assert_eq!(settled(Some(622_600), "auto"), Recompute::First(1));
    assert_eq!(settled(Some(589_200), "auto"), Recompute::First(1));
    assert_eq!(settled(Some(589_100), "auto"), Recompute::All);
    assert_eq!(settled(Some(1000), "auto"), Recompute::All);
    assert_eq!(settled(Some(1000), "none"), Recompute::None);
    assert_eq!(settled(Some(1000), "1"), Recompute::First(1));
}

#[test]
fn the_largest_batch_fits_and_the_next_one_does_not() {
    for recompute in ["auto", "none", "all"] {
        let setting = format!("train.recompute={recompute}");
        let mut config = config(&[&LARGE, &[setting.as_str()]]);
        let limit = 48 * GIB;
        let batch = largest_batch(&config, limit).expect("one fits");
        let fits = |config: &Config| match config.train.recompute {
            Recompute::Auto => fewest_recomputed(config, limit).is_some(),
            _ => estimate(config).total() <= limit,
        };
        config.train.batch = batch;
        assert!(fits(&config), "{recompute}: {batch}");
        config.train.batch = batch + 1;
        assert!(!fits(&config), "{recompute}: {batch}");
        assert_eq!(largest_batch(&config, GIB), None);
    }
}

#[test]
fn a_run_is_refused_only_far_above_the_limit() {
    let config = config(&[&SMALL, &["train.recompute=none"]]);
    assert_eq!(excess(&config, 610_176), None);
    assert_eq!(excess(&config, 610_176 * 10 / 11 + 100), None);
    let reason = excess(&config, 610_176 * 10 / 11 - 100).expect("too much");
    assert!(reason.contains("about 595.9 KiB"), "{reason}");
    assert_eq!(excess(&config, u64::MAX), None);
}

#[test]
fn sizes_are_readable() {
    assert_eq!(size(24 * GIB), "24.00 GiB");
    assert_eq!(size(384 << 20), "384.0 MiB");
    assert_eq!(size(1 << 19), "512.0 KiB");
    assert_eq!(size(0), "0.0 KiB");
}
