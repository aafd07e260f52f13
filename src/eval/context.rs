//! What a byte is predicted from: a document cut into segments that are each read from zero memory.

use std::ops::Range;

use serde::Serialize;

/// How far back a byte's context may reach. It never reaches beyond the byte's document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "mode", rename_all = "lowercase")]
pub enum Context {
    /// Windows of `length` bytes one after the other, each read from zero memory.
    Windows {
        /// Bytes of a window, L, at least 1.
        length: usize,
    },
    /// Windows of `length` bytes that overlap: each ends `stride` bytes after the one before it,
    /// and those bytes alone are scored, with a context of at least `length - stride + 1`.
    Sliding {
        /// Bytes of a window, at least `stride`.
        length: usize,
        /// Bytes scored in a window, at least 1.
        stride: usize,
    },
    /// All of the document so far: one state is carried from its first byte to its last.
    Carried,
}

/// A run of bytes read from zero memory. Positions count from the document's first byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Bytes to read; each predicts the one after it.
    pub inputs: Range<u64>,
    /// Bytes whose prediction counts, all in `inputs.start + 1..=inputs.end`.
    pub scored: Range<u64>,
}

impl Context {
    /// The segments of a document of `bytes` bytes. Together they score every byte but the first,
    /// which nothing predicts, exactly once and in order.
    ///
    /// # Panics
    ///
    /// If a window has no bytes, or a stride is not within one.
    pub fn segments(self, bytes: u64) -> impl Iterator<Item = Segment> {
        let (length, stride) = match self {
            Self::Windows { length } => (length as u64, length as u64),
            Self::Sliding { length, stride } => (length as u64, stride as u64),
            Self::Carried => (bytes, bytes),
        };
        assert!(
            bytes == 0 || (1..=length).contains(&stride),
            "a window of {length}, a stride of {stride}"
        );
        let mut next = 0;
        std::iter::from_fn(move || {
            // The first window scores all its bytes, those after it what is new in them.
            let (from, new) = match next {
                0 => (1, length.max(2)),
                from => (from, stride),
            };
            if from >= bytes {
                return None;
            }
            let to = match next {
                0 => new.min(bytes),
                _ => from.saturating_add(new).min(bytes),
            };
            next = to;
            Some(Segment {
                inputs: from.saturating_sub(length - stride + 1)..to - 1,
                scored: from..to,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_byte_but_the_first_is_scored_once(
            bytes in 0u64..200, length in 1usize..40, stride in 1usize..40,
        ) {
            let stride = stride.min(length);
            for context in [
                Context::Windows { length },
                Context::Sliding { length, stride },
                Context::Carried,
            ] {
                let mut position = 1;
                for segment in context.segments(bytes) {
                    prop_assert_eq!(segment.scored.start, position);
                    prop_assert!(segment.scored.end > position);
                    prop_assert_eq!(segment.inputs.end, segment.scored.end - 1);
                    prop_assert!(segment.inputs.start < segment.scored.start);
                    position = segment.scored.end;
                    let read = segment.inputs.end - segment.inputs.start;
                    match context {
                        Context::Carried => prop_assert_eq!(segment.inputs.start, 0),
                        _ => prop_assert!(read <= length as u64),
                    }
                    if let Context::Sliding { length, stride } = context
                        && segment.inputs.start > 0
                    {
                        let context = segment.scored.start - segment.inputs.start;
                        prop_assert_eq!(context, (length - stride + 1) as u64);
                    }
                }
                prop_assert_eq!(position.max(bytes.min(1)), bytes.max(1));
            }
        }
    }

    #[test]
    fn windows_of_a_document_of_ten() {
        let cut = |context: Context| -> Vec<_> {
            let pair = |it: Segment| (it.inputs, it.scored);
            context.segments(10).map(pair).collect()
        };
        assert_eq!(
            cut(Context::Windows { length: 4 }),
            [(0..3, 1..4), (3..7, 4..8), (7..9, 8..10)]
        );
        let sliding = Context::Sliding {
            length: 4,
            stride: 2,
        };
        assert_eq!(
            cut(sliding),
            [(0..3, 1..4), (1..5, 4..6), (3..7, 6..8), (5..9, 8..10)]
        );
        assert_eq!(cut(Context::Carried), [(0..9, 1..10)]);
    }
}
