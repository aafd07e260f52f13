use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::document::{Document, Split};
use crate::progress::Silent;
use crate::shards::{PrepareOptions, prepare};
use crate::sources::InMemory;

/// Shards of documents with these lengths, in small files, and their bytes.
pub(crate) fn shards_of(lengths: &[usize]) -> (tempfile::TempDir, Arc<Shards>, Vec<u8>) {
    let root = tempfile::tempdir().unwrap();
    let mut counter = 0u64;
    let mut next = || {
        counter += 1;
        keyed(7, counter, 0) as u8
    };
    let documents: Vec<Document> = lengths
        .iter()
        .map(|&len| Document {
            name: String::new(),
            bytes: (0..len).map(|_| next()).collect(),
        })
        .collect();
    let whole = documents.iter().flat_map(|d| d.bytes.clone()).collect();
    let options = PrepareOptions {
        splits: vec![Split::Train],
        max_shard_bytes: 100,
        ..PrepareOptions::default()
    };
    let source = InMemory::new().with(Split::Train, documents);
    prepare(&source, root.path(), &options, &Silent).unwrap();
    let shards = Arc::new(Shards::open(root.path().join("train")).unwrap());
    (root, shards, whole)
}

fn lengths() -> impl Strategy<Value = Vec<usize>> {
    prop::collection::vec(0usize..60, 4..12)
}

fn config(batch: usize, length: usize, seed: u64, mode: SamplingMode) -> SamplerConfig {
    SamplerConfig {
        batch,
        length,
        seed,
        mode,
    }
}

const MODES: [SamplingMode; 2] = [SamplingMode::Independent, SamplingMode::Contiguous];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn permutation_is_a_bijection(n in 1u64..3000, seed: u64, epoch in 0u64..4) {
        let permutation = Permutation::new(n, seed, epoch);
        let mut seen = vec![false; n as usize];
        for index in 0..n {
            let value = permutation.apply(index);
            prop_assert!(value < n);
            prop_assert!(!std::mem::replace(&mut seen[value as usize], true));
        }
    }

    #[test]
    fn batches_are_windows_of_the_stream_with_resets_at_documents(
        lengths in lengths(), batch in 1usize..4, length in 1usize..9, seed: u64, step in 0u64..500,
    ) {
        let (_root, shards, whole) = shards_of(&lengths);
        prop_assume!(whole.len() > batch * length);
        let starts: HashSet<u64> = shards
            .documents()
            .filter(|document| document.bytes > 0)
            .map(|document| document.start)
            .collect();
        for mode in MODES {
            let sampler = Sampler::new(shards.clone(), config(batch, length, seed, mode)).unwrap();
            let made = sampler.batch(step).unwrap();
            for lane in 0..batch {
                let place = sampler.coordinates(step, lane);
                let at = place.offset as usize;
                let row = made.row(lane);
                prop_assert_eq!(&made.inputs[row.clone()], &whole[at..at + length]);
                prop_assert_eq!(&made.targets[row.clone()], &whole[at + 1..at + 1 + length]);
                for (t, reset) in made.resets[row].iter().enumerate() {
                    let continues = mode == SamplingMode::Contiguous && place.window > 0;
                    let expected = starts.contains(&((at + t) as u64)) || (t == 0 && !continues);
                    prop_assert_eq!(*reset, expected);
                }
            }
        }
    }

    #[test]
    fn no_window_repeats_in_an_epoch(
        lengths in lengths(), batch in 1usize..4, length in 1usize..9, seed: u64,
    ) {
        let (_root, shards, whole) = shards_of(&lengths);
        prop_assume!(whole.len() > batch * length);
        let mode = SamplingMode::Independent;
        let sampler = Sampler::new(shards, config(batch, length, seed, mode)).unwrap();
        let mut epochs = vec![Vec::new(); 3];
        for step in 0..sampler.windows * 3 / batch as u64 {
            for lane in 0..batch {
                let place = sampler.coordinates(step, lane);
                epochs[place.epoch as usize].push(place.offset);
            }
        }
        for offsets in &mut epochs[..2] {
            offsets.sort();
            prop_assert_eq!(offsets.len() as u64, sampler.windows);
            prop_assert!(offsets.windows(2).all(|pair| pair[1] == pair[0] + length as u64));
        }
        let left_out = whole.len() as u64 - sampler.windows * length as u64;
        prop_assert!(left_out < 2 * length as u64);
    }

    #[test]
    fn contiguous_lanes_tile_the_stream_and_continue(
        lengths in lengths(), batch in 1usize..4, length in 1usize..9, seed: u64,
    ) {
        let (_root, shards, whole) = shards_of(&lengths);
        prop_assume!(whole.len() > batch * length);
        let mode = SamplingMode::Contiguous;
        let sampler = Sampler::new(shards, config(batch, length, seed, mode)).unwrap();
        let steps = sampler.steps_per_epoch();
        for epoch in 0..3 {
            let mut offsets = Vec::new();
            for step in epoch * steps..(epoch + 1) * steps {
                for lane in 0..batch {
                    let place = sampler.coordinates(step, lane);
                    prop_assert_eq!(place.epoch, epoch);
                    if place.window > 0 {
                        let before = sampler.coordinates(step - 1, lane);
                        prop_assert_eq!(place.offset, before.offset + length as u64);
                    }
                    offsets.push(place.offset);
                }
            }
            offsets.sort();
            prop_assert!(offsets.windows(2).all(|pair| pair[1] == pair[0] + length as u64));
            prop_assert_eq!(offsets.len() as u64, steps * batch as u64);
            prop_assert!(offsets[offsets.len() - 1] + (length as u64) < whole.len() as u64);
        }
    }

    #[test]
    fn batches_depend_on_seed_and_step_alone(
        lengths in lengths(), seed: u64, steps in prop::collection::vec(0u64..1000, 1..6),
    ) {
        let (_root, shards, whole) = shards_of(&lengths);
        prop_assume!(whole.len() > 10);
        for mode in MODES {
            let config = config(2, 5, seed, mode);
            let one = Sampler::new(shards.clone(), config).unwrap();
            let two = Sampler::new(shards.clone(), config).unwrap();
            let forward: Vec<Batch> = steps.iter().map(|s| one.batch(*s).unwrap()).collect();
            let mut backward: Vec<Batch> =
                steps.iter().rev().map(|s| two.batch(*s).unwrap()).collect();
            backward.reverse();
            prop_assert_eq!(forward, backward);
        }
    }
}

#[test]
fn choices_are_fixed_across_versions() {
    let (_root, shards, _) = shards_of(&[5000]);
    let offsets = |mode| {
        let sampler = Sampler::new(shards.clone(), config(2, 16, 42, mode)).unwrap();
        let at = |step| [0, 1].map(|lane| sampler.coordinates(step, lane).offset);
        [at(0), at(1), at(1000)]
    };
    assert_eq!(offsets(SamplingMode::Independent), GOLDEN_INDEPENDENT);
    assert_eq!(offsets(SamplingMode::Contiguous), GOLDEN_CONTIGUOUS);
}

const GOLDEN_INDEPENDENT: [[u64; 2]; 3] = [[2789, 1973], [2853, 2693], [4000, 864]];
const GOLDEN_CONTIGUOUS: [[u64; 2]; 3] = [[2, 2498], [18, 2514], [3520, 1024]];

#[test]
fn seeds_and_epochs_change_the_order() {
    let (_root, shards, _) = shards_of(&[5000]);
    let order = |seed, epoch: u64| {
        let config = config(1, 16, seed, SamplingMode::Independent);
        let sampler = Sampler::new(shards.clone(), config).unwrap();
        let first = epoch * sampler.steps_per_epoch();
        let steps = first..first + 20;
        steps
            .map(|s| sampler.coordinates(s, 0).offset)
            .collect::<Vec<_>>()
    };
    assert_ne!(order(1, 0), order(2, 0));
    assert_ne!(order(1, 0), order(1, 1));
    let phases: HashSet<u64> = (0..20).map(|epoch| order(1, epoch)[0] % 16).collect();
    assert!(phases.len() > 5);
}

#[test]
fn the_smallest_split_makes_one_batch_and_a_smaller_one_is_an_error() {
    let (_root, shards, whole) = shards_of(&[13]);
    for mode in MODES {
        let sampler = Sampler::new(shards.clone(), config(3, 4, 1, mode)).unwrap();
        assert_eq!(sampler.steps_per_epoch(), 1);
        for step in [0, 1, 2, u64::MAX] {
            assert_eq!(sampler.batch(step).unwrap().inputs.len(), 12);
        }
        assert_eq!(
            Dataset::<Batch>::get(&sampler, 0).unwrap(),
            sampler.batch(0).unwrap()
        );
        let error = Sampler::new(shards.clone(), config(13, 1, 1, mode)).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("got 13 bytes, expected at least 14"),
            "{message}"
        );
        let huge = config(usize::MAX, usize::MAX, 1, mode);
        assert!(matches!(
            Sampler::new(shards.clone(), huge),
            Err(DataError::TooShort { .. })
        ));
        let none = config(0, 4, 1, mode);
        assert!(matches!(
            Sampler::new(shards.clone(), none),
            Err(DataError::Config { .. })
        ));
    }
    assert_eq!(whole.len(), 13);
}
