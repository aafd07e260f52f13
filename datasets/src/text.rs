//! Bytes to text and back.
//!
//! A byte-level model may emit anything, and windows cut characters in half; decoding therefore
//! never fails: what is not UTF-8 becomes U+FFFD.

use std::str;

/// The text of bytes; cut or invalid sequences become U+FFFD.
pub fn lossy_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Turns a stream of bytes into text as it arrives.
///
/// A character that is still incomplete is held back (at most 3 bytes) until its other bytes
/// have come. All that [`push`](Self::push) and [`finish`](Self::finish) return, joined, is
/// exactly [`lossy_text`] of all bytes.
#[derive(Clone, Debug, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// An empty stream.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes bytes; returns the text that is now certain.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    let Some(invalid) = error.error_len() else {
                        rest = after;
                        break;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    rest = &after[invalid..];
                }
            }
        }
        let held = rest.len();
        self.pending.drain(..self.pending.len() - held);
        text
    }

    /// Ends the stream; returns what was held back, as U+FFFD. The stream is empty afterwards.
    pub fn finish(&mut self) -> String {
        let text = lossy_text(&self.pending);
        self.pending.clear();
        text
    }

    /// Bytes held back (0 to 3).
    pub fn held(&self) -> usize {
        self.pending.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn holds_back_incomplete_characters() {
        let mut stream = Utf8Stream::new();
        assert_eq!(stream.push(&[b'a', 0xe2, 0x82]), "a");
        assert_eq!(stream.held(), 2);
        assert_eq!(stream.push(&[0xac, b'b']), "€b");
        assert_eq!(stream.push(&[0xf0, 0x9f]), "");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn invalid_bytes_do_not_block() {
        let mut stream = Utf8Stream::new();
        assert_eq!(stream.push(&[0xff, b'x', 0xc3]), "\u{fffd}x");
        assert_eq!(stream.push(b"y"), "\u{fffd}y");
    }

    proptest! {
        #[test]
        fn any_cutting_gives_the_lossy_text(
            chunks in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..6),
                    "\\PC{0,3}".prop_map(String::into_bytes),
                ],
                0..20,
            ),
            step in 1usize..5,
        ) {
            let all = chunks.concat();
            let mut stream = Utf8Stream::new();
            let mut text = String::new();
            for chunk in all.chunks(step) {
                text += &stream.push(chunk);
                prop_assert!(stream.held() <= 3);
            }
            text += &stream.finish();
            prop_assert_eq!(text, lossy_text(&all));
        }
    }
}
