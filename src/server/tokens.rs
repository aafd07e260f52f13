//! Bytes as tokens in JSON.

/// A byte as a token: itself where it is a character on its own, else as in `bytes:\xe2`, OpenAI's
/// way with tokens that are not text.
pub(super) fn token(byte: u8) -> String {
    match byte.is_ascii() {
        true => char::from(byte).to_string(),
        false => format!("bytes:\\x{byte:02x}"),
    }
}

/// For each byte the place, counted in characters, of the character it belongs to in the text that
/// shows `bytes`.
pub(super) fn text_offsets(bytes: &[u8]) -> Vec<usize> {
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

    proptest! {
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
