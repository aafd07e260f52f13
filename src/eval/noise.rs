//! Text made worse on purpose: how much a model suffers from typing errors.
//!
//! The kinds are those of ByT5 (Xue et al. 2022, arXiv:2105.13626, section 5.6) in the form that
//! MambaByte's Table 6 uses them. A character is one of Unicode; a byte that is part of none counts
//! as one.

use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

/// A kind of noise, with the probability that it befalls a character.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(tag = "noise", content = "probability", rename_all = "kebab-case")]
pub enum Noise {
    /// A character is left out.
    Drop(f64),
    /// One to three copies of a character follow it.
    Repeat(f64),
    /// Every character in upper case, with a space before and behind it.
    Antspeak,
    /// A character is put into upper case.
    Uppercase(f64),
    /// Every character in upper or lower case, as a coin falls.
    RandomCase,
    /// Two characters beside each other change places.
    Swap(f64),
}

impl Noise {
    /// Those of Table 6 of the paper (arXiv 2401.13660).
    pub const TABLE: [Self; 10] = [
        Self::Drop(0.05),
        Self::Drop(0.3),
        Self::Repeat(0.05),
        Self::Repeat(0.3),
        Self::Antspeak,
        Self::Uppercase(0.05),
        Self::Uppercase(0.3),
        Self::RandomCase,
        Self::Swap(0.05),
        Self::Swap(0.3),
    ];

    /// Its name and its probability, if it has one.
    pub fn describe(&self) -> (&'static str, Option<f64>) {
        match self {
            Self::Drop(p) => ("drop", Some(*p)),
            Self::Repeat(p) => ("repeat", Some(*p)),
            Self::Antspeak => ("antspeak", None),
            Self::Uppercase(p) => ("uppercase", Some(*p)),
            Self::RandomCase => ("random case", None),
            Self::Swap(p) => ("swap", Some(*p)),
        }
    }

    /// The text with noise. `stream` is a number for the text: the same seed and stream give the
    /// same noise, whatever other texts there are.
    pub fn apply(&self, text: &[u8], seed: u64, stream: u64) -> Vec<u8> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        let mut befalls = |p: f64| rng.random::<f64>() < p;
        let characters = characters(text);
        let mut out = Vec::with_capacity(text.len() * 2);
        match *self {
            Self::Drop(p) => {
                for it in characters.iter().filter(|_| !befalls(p)) {
                    out.extend_from_slice(it);
                }
            }
            Self::Repeat(p) => {
                for it in characters {
                    out.extend_from_slice(it);
                    if befalls(p) {
                        // One, two or three with the same probability.
                        let copies = 1 + usize::from(befalls(2.0 / 3.0));
                        let copies = copies + usize::from(copies == 2 && befalls(0.5));
                        out.extend(it.repeat(copies));
                    }
                }
            }
            Self::Antspeak => {
                for it in characters {
                    out.push(b' ');
                    out.extend(cased(it, true));
                    out.push(b' ');
                }
            }
            Self::Uppercase(p) => {
                for it in characters {
                    match befalls(p) {
                        true => out.extend(cased(it, true)),
                        false => out.extend_from_slice(it),
                    }
                }
            }
            Self::RandomCase => {
                for it in characters {
                    out.extend(cased(it, befalls(0.5)));
                }
            }
            Self::Swap(p) => {
                let mut rest = characters.as_slice();
                while let [first, second, behind @ ..] = rest {
                    if befalls(p) {
                        out.extend_from_slice(second);
                        out.extend_from_slice(first);
                        rest = behind;
                    } else {
                        out.extend_from_slice(first);
                        rest = &rest[1..];
                    }
                }
                out.extend(rest.concat());
            }
        }
        out
    }
}

/// The characters of a text, each as its bytes.
fn characters(text: &[u8]) -> Vec<&[u8]> {
    let mut all = Vec::with_capacity(text.len());
    for chunk in text.utf8_chunks() {
        let valid = chunk.valid();
        let ends = valid.char_indices().skip(1).map(|(at, _)| at);
        let mut start = 0;
        for end in ends.chain((!valid.is_empty()).then_some(valid.len())) {
            all.push(&valid.as_bytes()[start..end]);
            start = end;
        }
        all.extend(chunk.invalid().chunks(1));
    }
    all
}

/// A character in upper or lower case; what has none stays as it is.
fn cased(character: &[u8], upper: bool) -> Vec<u8> {
    match (str::from_utf8(character), upper) {
        (Ok(text), true) => text.to_uppercase().into_bytes(),
        (Ok(text), false) => text.to_lowercase().into_bytes(),
        (Err(_), _) => character.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn noised(noise: Noise, text: &str) -> String {
        String::from_utf8(noise.apply(text.as_bytes(), 1, 0)).expect("text stays text")
    }

    #[test]
    fn certain_noise_is_known() {
        for (noise, text) in [
            (Noise::Drop(1.0), ""),
            (Noise::Drop(0.0), "aß\u{1f600}c"),
            (Noise::Antspeak, " A  SS  \u{1f600}  C "),
            (Noise::Uppercase(1.0), "ASS\u{1f600}C"),
            (Noise::Uppercase(0.0), "aß\u{1f600}c"),
            (Noise::Swap(1.0), "ßac\u{1f600}"),
            (Noise::Swap(0.0), "aß\u{1f600}c"),
            (Noise::Repeat(0.0), "aß\u{1f600}c"),
        ] {
            assert_eq!(noised(noise, "aß\u{1f600}c"), text, "{noise:?}");
        }
        assert_eq!(noised(Noise::Swap(1.0), "abc"), "bac");
    }

    #[test]
    fn shares_are_as_asked() {
        let text = "abcdefghij".repeat(2000);
        let length = |noise| noised(noise, &text).len() as f64 / text.len() as f64;
        assert!((length(Noise::Drop(0.3)) - 0.7).abs() < 0.02);
        assert!((length(Noise::Repeat(0.3)) - (1.0 + 0.3 * 2.0)).abs() < 0.03);
        assert_eq!(length(Noise::Antspeak), 3.0);
        let upper = |noise| {
            let text = noised(noise, &text);
            text.chars().filter(char::is_ascii_uppercase).count() as f64 / text.len() as f64
        };
        assert!((upper(Noise::Uppercase(0.05)) - 0.05).abs() < 0.01);
        assert!((upper(Noise::RandomCase) - 0.5).abs() < 0.02);
        let moved = noised(Noise::Swap(0.05), &text);
        let moved = moved
            .bytes()
            .zip(text.bytes())
            .filter(|(a, b)| a != b)
            .count();
        // Two characters a swap, and a swap takes the turn of both.
        let share = moved as f64 / text.len() as f64;
        assert!((share - 2.0 * 0.05 / 1.05).abs() < 0.01, "{share}");
    }

    #[test]
    fn a_seed_repeats_and_texts_differ() {
        let text = "some text to make worse".repeat(20);
        for noise in Noise::TABLE {
            let apply = |seed, stream| noise.apply(text.as_bytes(), seed, stream);
            assert_eq!(apply(1, 2), apply(1, 2));
            if noise != Noise::Antspeak {
                assert_ne!(apply(1, 2), apply(2, 2), "{noise:?}");
                assert_ne!(apply(1, 2), apply(1, 3), "{noise:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_survive(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert_eq!(characters(&bytes).concat(), bytes.clone());
            for noise in Noise::TABLE {
                let out = noise.apply(&bytes, 5, 0);
                if let Noise::Swap(_) = noise {
                    let sorted = |mut bytes: Vec<u8>| { bytes.sort_unstable(); bytes };
                    prop_assert_eq!(sorted(out), sorted(bytes.clone()));
                }
            }
        }
    }
}
