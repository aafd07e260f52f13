//! Bytes as tokens in JSON, with their places and log-probabilities.

use mambabyte_datasets::text::Utf8Stream;
use serde::{Serialize, Serializer};

use crate::eval::{ByteLogProb, ByteScore};

/// A byte as a token: itself where it is a character on its own, else as in `bytes:\xe2`, OpenAI's
/// way with tokens that are not text.
fn token(byte: u8) -> String {
    match byte.is_ascii() {
        true => char::from(byte).to_string(),
        false => format!("bytes:\\x{byte:02x}"),
    }
}

/// For each byte the place, counted in characters, of the character it belongs to in the text that
/// shows `bytes`.
fn text_offsets(bytes: &[u8]) -> Vec<usize> {
    let mut offsets = Vec::with_capacity(bytes.len());
    let mut at = 0;
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            offsets.extend(std::iter::repeat_n(at, character.len_utf8()));
            at += 1;
        }
        if !chunk.invalid().is_empty() {
            // All of it is shown as one U+FFFD.
            offsets.extend(std::iter::repeat_n(at, chunk.invalid().len()));
            at += 1;
        }
    }
    offsets
}

/// A text that is shown in pieces, as [`Utf8Stream`] cuts it.
#[derive(Default)]
pub(super) struct ShownText {
    decoder: Utf8Stream,
    /// The bytes that the decoder holds back.
    held: Vec<u8>,
    /// Characters shown.
    characters: usize,
}

impl ShownText {
    /// Takes bytes. Returns the text that is now certain, and for each byte the place in the whole
    /// text of the character it belongs to.
    pub fn push(&mut self, bytes: &[u8]) -> (String, Vec<usize>) {
        let before = self.held.len();
        self.held.extend_from_slice(bytes);
        let offsets = text_offsets(&self.held).into_iter().skip(before);
        let offsets = offsets.map(|offset| self.characters + offset).collect();
        let text = self.decoder.push(bytes);
        self.characters += text.chars().count();
        self.held.drain(..self.held.len() - self.decoder.held());
        (text, offsets)
    }

    /// Ends the text; returns what was held back.
    pub fn finish(mut self) -> String {
        self.decoder.finish()
    }
}

/// `logprobs` of a text in an answer: one entry a byte. It becomes JSON without a copy of its own.
#[derive(Serialize)]
pub(super) struct LogProbs<'a> {
    #[serde(serialize_with = "as_tokens")]
    tokens: &'a [u8],
    #[serde(serialize_with = "as_log_probs")]
    token_logprobs: &'a [Option<ByteScore>],
    #[serde(serialize_with = "as_maps")]
    top_logprobs: (&'a [Option<ByteScore>], usize),
    text_offset: Vec<usize>,
}

impl<'a> LogProbs<'a> {
    /// The log-probabilities of a text's `bytes`, with the `top` likeliest at each.
    pub fn new(bytes: &'a [u8], scores: &'a [Option<ByteScore>], top: usize) -> Self {
        Self::at(text_offsets(bytes), bytes, scores, top)
    }

    /// As [`LogProbs::new`], of bytes of a text with their places there.
    pub fn at(
        text_offset: Vec<usize>,
        bytes: &'a [u8],
        scores: &'a [Option<ByteScore>],
        top: usize,
    ) -> Self {
        Self {
            tokens: bytes,
            token_logprobs: scores,
            top_logprobs: (scores, top),
            text_offset,
        }
    }
}

fn as_tokens<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(bytes.iter().map(|byte| token(*byte)))
}

/// Numbers in all their digits, so that the sum of a client is ours.
fn as_log_probs<S: Serializer>(scores: &[Option<ByteScore>], to: S) -> Result<S::Ok, S::Error> {
    let log_prob = |score: &ByteScore| f64::from(score.log_prob);
    to.collect_seq(scores.iter().map(|score| score.as_ref().map(log_prob)))
}

fn as_maps<S: Serializer>(
    (scores, top): &(&[Option<ByteScore>], usize),
    to: S,
) -> Result<S::Ok, S::Error> {
    to.collect_seq(scores.iter().map(|score| {
        let all = &score.as_ref()?.top;
        Some(Likeliest(&all[..all.len().min(*top)]))
    }))
}

/// The likeliest bytes at a place, from the likeliest down.
struct Likeliest<'a>(&'a [ByteLogProb]);

impl Serialize for Likeliest<'_> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let pair = |(byte, log_prob): &ByteLogProb| (token(*byte), f64::from(*log_prob));
        to.collect_map(self.0.iter().map(pair))
    }
}

#[cfg(test)]
mod tests {
    use mambabyte_datasets::text::lossy_text;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_are_all_different() {
        let mut tokens: Vec<String> = (0..=u8::MAX).map(token).collect();
        assert_eq!(tokens[b'a' as usize], "a");
        assert_eq!(tokens[0xe2], "bytes:\\xe2");
        tokens.sort_unstable();
        tokens.dedup();
        assert_eq!(tokens.len(), 256);
    }

    /// What becomes of bytes cut after every `step`.
    fn in_pieces(bytes: &[u8], step: usize) -> (String, Vec<usize>) {
        let mut shown = ShownText::default();
        let (mut text, mut offsets) = (String::new(), Vec::new());
        for piece in bytes.chunks(step) {
            let (new, places) = shown.push(piece);
            text += &new;
            offsets.extend(places);
        }
        (text + &shown.finish(), offsets)
    }

    #[test]
    fn places_are_counted_through_the_pieces() {
        let text = "a\u{20ac}b\u{1f600}c";
        for step in 1..text.len() {
            let (joined, offsets) = in_pieces(text.as_bytes(), step);
            assert_eq!(joined, text);
            assert_eq!(offsets, [0, 1, 1, 1, 2, 3, 3, 3, 3, 4], "{step}");
        }
    }

    proptest! {
        #[test]
        fn pieces_have_the_places_of_the_whole(bytes in prop::collection::vec(
            prop_oneof![any::<u8>(), Just(b'a'), Just(0xe2), Just(0x82), Just(0xac)], 0..40,
        ), step in 1usize..6) {
            prop_assert_eq!(in_pieces(&bytes, step), (lossy_text(&bytes), text_offsets(&bytes)));
        }

        #[test]
        fn offsets_point_into_the_text(bytes in prop::collection::vec(
            prop_oneof![any::<u8>(), Just(b'a'), Just(0xe2), Just(0x82), Just(0xac)], 0..40,
        )) {
            let offsets = text_offsets(&bytes);
            prop_assert_eq!(offsets.len(), bytes.len());
            let text: Vec<char> = lossy_text(&bytes).chars().collect();
            prop_assert_eq!(offsets.last().map_or(0, |last| last + 1), text.len());
            for (byte, at) in bytes.iter().zip(&offsets) {
                if byte.is_ascii() {
                    prop_assert_eq!(text[*at], char::from(*byte));
                } else {
                    prop_assert!(!text[*at].is_ascii());
                }
            }
        }
    }
}
