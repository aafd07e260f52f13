//! Bits per byte, cross-entropies and word perplexity, each into the others.
//!
//! One loss is told in several units. With `nats` the mean loss of a byte, a corpus of so many
//! bytes, words and subword tokens has
//!
//! ```text
//! bits per byte            nats / ln 2
//! word perplexity          exp(nats · bytes / words)
//! subword cross-entropy    nats · bytes / subwords
//! ```
//!
//! so that models of bytes and of subwords can be compared on the same text (MambaByte's README;
//! arXiv 2401.13660, section 4).

use std::f64::consts::LN_2;

use mambabyte_datasets::Split;
use serde::Serialize;

/// How long a corpus is, in several units.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Counts {
    /// Bytes.
    pub bytes: u64,
    /// Words, as `wc -w` counts them.
    pub words: u64,
    /// Subword tokens, where a vocabulary is meant.
    pub subwords: Option<u64>,
}

impl Counts {
    /// PG-19 as MambaByte's authors count it: `wc -c`, `wc -w`, and the 32k subword vocabulary of
    /// their comparisons.
    pub fn pg19(split: Split) -> Self {
        let (bytes, words, subwords) = match split {
            Split::Train => (11_677_824_216, 1_973_048_393, 2_914_600_562),
            Split::Validation => (17_733_002, 3_007_061, 4_357_506),
            Split::Test => (41_289_101, 6_965_511, 10_282_006),
        };
        Self {
            bytes,
            words,
            subwords: Some(subwords),
        }
    }

    /// PG-19's words by the table its own authors publish, which perplexities in papers divide by
    /// (Rae et al. 2019, and the README of google-deepmind/pg19).
    pub fn pg19_published(split: Split) -> Self {
        let words = match split {
            Split::Train => 1_973_136_207,
            Split::Validation => 3_007_061,
            Split::Test => 6_966_499,
        };
        Self {
            words,
            ..Self::pg19(split)
        }
    }

    /// Words a byte: L_T / L_B of MambaByte's README with words as tokens.
    pub fn words_per_byte(&self) -> f64 {
        self.words as f64 / self.bytes as f64
    }

    /// Subword tokens a byte: L_T / L_B with subwords as tokens.
    pub fn subwords_per_byte(&self) -> Option<f64> {
        self.subwords
            .map(|subwords| subwords as f64 / self.bytes as f64)
    }
}

/// Word perplexity from the cross-entropy of a byte in nats; `words_per_byte` is L_T / L_B.
pub fn ppl_from_byte_ce(byte_ce: f64, words_per_byte: f64) -> f64 {
    (byte_ce / words_per_byte).exp()
}

/// Word perplexity from bits per byte.
pub fn ppl_from_bpb(bpb: f64, words_per_byte: f64) -> f64 {
    ppl_from_byte_ce(bpb * LN_2, words_per_byte)
}

/// Bits per byte and the cross-entropy of a byte in nats, from word perplexity.
pub fn bpb_from_ppl(ppl: f64, words_per_byte: f64) -> (f64, f64) {
    let byte_ce = ppl.ln() * words_per_byte;
    (byte_ce / LN_2, byte_ce)
}

/// Word perplexity from the cross-entropy of a subword token in nats.
pub fn ppl_from_subword_ce(subword_ce: f64, subwords_per_word: f64) -> f64 {
    (subword_ce * subwords_per_word).exp()
}

/// A loss, in the unit it is known in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Loss {
    /// Bits a byte.
    BitsPerByte(f64),
    /// Nats a byte.
    ByteCrossEntropy(f64),
    /// Perplexity a word.
    WordPerplexity(f64),
    /// Nats a subword token.
    SubwordCrossEntropy(f64),
}

/// The same loss in all units.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Losses {
    /// Bits a byte.
    pub bits_per_byte: f64,
    /// Nats a byte.
    pub byte_cross_entropy: f64,
    /// Perplexity a word.
    pub word_perplexity: f64,
    /// Nats a subword token; none where no subwords were counted.
    pub subword_cross_entropy: Option<f64>,
}

impl Loss {
    /// The loss in all units, for a corpus of `counts`. None where it is given by subwords and the
    /// corpus has no count of them.
    pub fn on(self, counts: &Counts) -> Option<Losses> {
        let words_per_byte = counts.words_per_byte();
        let byte_cross_entropy = match self {
            Self::BitsPerByte(bits) => bits * LN_2,
            Self::ByteCrossEntropy(nats) => nats,
            Self::WordPerplexity(ppl) => bpb_from_ppl(ppl, words_per_byte).1,
            Self::SubwordCrossEntropy(nats) => nats * counts.subwords_per_byte()?,
        };
        Some(Losses {
            bits_per_byte: byte_cross_entropy / LN_2,
            byte_cross_entropy,
            word_perplexity: ppl_from_byte_ce(byte_cross_entropy, words_per_byte),
            subword_cross_entropy: counts
                .subwords_per_byte()
                .map(|subwords| byte_cross_entropy / subwords),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Equal to as many digits as the example prints.
    #[track_caller]
    fn shows(value: f64, digits: usize, text: &str) {
        assert_eq!(format!("{value:.digits$}"), text);
    }

    /// The worked examples of MambaByte's README.
    #[test]
    fn the_readme_of_mambabyte() {
        let test = Counts::pg19(Split::Test);
        let byte_ce = 0.590_138_728_849_558_1;
        shows(ppl_from_byte_ce(byte_ce, test.words_per_byte()), 2, "33.05");
        shows(byte_ce / LN_2, 4, "0.8514");
        let subwords_per_word = 10_282_006.0 / 6_965_511.0;
        let subword_ce = 2.399_497_291_852_516;
        shows(
            ppl_from_subword_ce(subword_ce, subwords_per_word),
            2,
            "34.53",
        );
        let losses = Loss::SubwordCrossEntropy(subword_ce)
            .on(&test)
            .expect("counted");
        shows(losses.word_perplexity, 2, "34.53");
        // Table 3 of the paper: 39.6 on the validation books is 0.900 bits per byte.
        let validation = Counts::pg19(Split::Validation);
        shows(
            bpb_from_ppl(39.6, validation.words_per_byte()).0,
            3,
            "0.900",
        );
    }

    #[test]
    fn the_six_ratios() {
        for (split, words, subwords) in [
            (Split::Train, "0.1690", "0.2496"),
            (Split::Validation, "0.1696", "0.2457"),
            (Split::Test, "0.1687", "0.2490"),
        ] {
            let counts = Counts::pg19(split);
            shows(counts.words_per_byte(), 4, words);
            shows(counts.subwords_per_byte().expect("counted"), 4, subwords);
        }
    }

    #[test]
    fn every_unit_leads_back_to_the_others() {
        let counts = Counts::pg19(Split::Validation);
        let losses = Loss::BitsPerByte(1.25).on(&counts).expect("counted");
        let subword = losses.subword_cross_entropy.expect("counted");
        for loss in [
            Loss::ByteCrossEntropy(losses.byte_cross_entropy),
            Loss::WordPerplexity(losses.word_perplexity),
            Loss::SubwordCrossEntropy(subword),
        ] {
            let back = loss.on(&counts).expect("counted");
            assert!((back.bits_per_byte - 1.25).abs() < 1e-12, "{loss:?}");
        }
        let (bpb, byte_ce) = bpb_from_ppl(losses.word_perplexity, counts.words_per_byte());
        assert!((bpb - 1.25).abs() < 1e-12);
        assert!((byte_ce - losses.byte_cross_entropy).abs() < 1e-12);
        let without = Counts {
            subwords: None,
            ..counts
        };
        assert_eq!(Loss::SubwordCrossEntropy(1.0).on(&without), None);
    }
}
