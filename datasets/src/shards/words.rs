//! Counting words as `wc -w` and Python's `bytes.split()` do.

/// Whether a byte separates words: space, `\t`, `\n`, `\v`, `\f` or `\r`.
fn separates(byte: u8) -> bool {
    // Unlike `u8::is_ascii_whitespace`, this includes the vertical tab.
    matches!(byte, b' ' | b'\t'..=b'\r')
}

/// Counts the words of a document that arrives in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub struct WordCounter {
    words: u64,
    in_word: bool,
}

impl WordCounter {
    /// Takes in the next piece.
    pub fn push(&mut self, bytes: &[u8]) {
        let mut in_word = self.in_word;
        let mut words = 0u64;
        for byte in bytes {
            let now = !separates(*byte);
            words += u64::from(now & !in_word);
            in_word = now;
        }
        self.words += words;
        self.in_word = in_word;
    }

    /// Words so far, the last one as it is.
    pub fn words(self) -> u64 {
        self.words
    }
}

/// Words in `bytes`: runs of bytes other than ASCII whitespace, as `wc -w` in the C locale and
/// Python's `len(bytes.split())` count them.
pub fn count_words(bytes: &[u8]) -> u64 {
    let mut counter = WordCounter::default();
    counter.push(bytes);
    counter.words()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_runs() {
        assert_eq!(count_words(b""), 0);
        assert_eq!(count_words(b" \r\n\x0b\x0c\t"), 0);
        assert_eq!(count_words(b"one\x0btwo\x1cstill two\r\n"), 3);
    }

    proptest! {
        #[test]
        fn pieces_count_as_the_whole(bytes in prop::collection::vec(
            prop_oneof![Just(b' '), Just(0x0b), Just(b'a'), any::<u8>()], 0..200), cut in 0usize..200,
        ) {
            let cut = cut.min(bytes.len());
            let mut counter = WordCounter::default();
            counter.push(&bytes[..cut]);
            counter.push(&bytes[cut..]);
            let runs = bytes.split(|b| b" \t\n\r\x0b\x0c".contains(b));
            let expected = runs.filter(|run| !run.is_empty()).count() as u64;
            prop_assert_eq!(counter.words(), expected);
        }
    }
}
