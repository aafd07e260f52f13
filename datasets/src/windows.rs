//! Windows for evaluation: every byte of a split is predicted exactly once, in order.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::shards::Shards;

/// What a byte's context may reach back to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EvalScope {
    /// The beginning of its document; each document's first byte has no context.
    #[default]
    Documents,
    /// The beginning of the split; only the split's first byte has no context.
    Stream,
}

/// A run of bytes to predict.
///
/// The model reads `inputs()` and predicts the byte after each. A window that does not begin
/// a segment continues the one before it: its context is all of the segment so far, for a model
/// that carries its state over. The first byte of a segment is no byte's successor: a window
/// that [`begins`](Self::begins) has one target more than it has inputs, and what the first
/// target costs is the evaluation's choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EvalWindow {
    /// Stream position of the first byte to predict.
    pub start: u64,
    /// Number of bytes to predict, at least 1.
    pub len: usize,
    /// Whether this window begins a segment: its first byte has no context, state is cleared.
    pub begins: bool,
    /// The document this window lies in; none when the scope is the stream.
    pub document: Option<u64>,
}

impl EvalWindow {
    /// Stream positions of the bytes to predict.
    pub fn targets(&self) -> Range<u64> {
        self.start..self.start + self.len as u64
    }

    /// Stream positions of the bytes to read: each is one before its target. Empty for a window
    /// that begins a segment and has one byte.
    pub fn inputs(&self) -> Range<u64> {
        let end = self.start + self.len as u64 - 1;
        if self.begins {
            self.start..end
        } else {
            self.start - 1..end
        }
    }
}

/// The evaluation windows of a split, in stream order.
///
/// Their targets cover each byte of the split once. A segment (a document or the stream) is cut
/// into windows of `length` bytes; its last one may be shorter. Empty documents have none.
#[derive(Clone, Debug)]
pub struct SequentialWindows<'a> {
    shards: &'a Shards,
    length: u64,
    scope: EvalScope,
    /// Number of the next segment.
    segment: u64,
    /// What is left of the current one, and whether anything of it has been given out.
    left: Range<u64>,
    begins: bool,
}

impl<'a> SequentialWindows<'a> {
    /// Windows of at most `length` targets.
    ///
    /// # Errors
    ///
    /// [`DataError::Config`] for a length of 0.
    pub fn new(shards: &'a Shards, length: usize, scope: EvalScope) -> Result<Self> {
        if length == 0 {
            return Err(DataError::Config {
                setting: "evaluation window length",
                got: "0".to_owned(),
                expected: "at least 1".to_owned(),
            });
        }
        Ok(Self {
            shards,
            length: length as u64,
            scope,
            segment: 0,
            left: 0..0,
            begins: false,
        })
    }

    /// Goes on to the next segment; false after the last.
    fn next_segment(&mut self) -> bool {
        let extent = match self.scope {
            EvalScope::Documents => self.shards.document_extent(self.segment),
            EvalScope::Stream => (self.segment == 0).then(|| (0, self.shards.byte_count())),
        };
        let Some((start, bytes)) = extent else {
            return false;
        };
        self.left = start..start + bytes;
        self.begins = true;
        self.segment += 1;
        true
    }
}

impl Iterator for SequentialWindows<'_> {
    type Item = EvalWindow;

    fn next(&mut self) -> Option<EvalWindow> {
        while self.left.is_empty() {
            if !self.next_segment() {
                return None;
            }
        }
        let start = self.left.start;
        let end = start.saturating_add(self.length).min(self.left.end);
        let window = EvalWindow {
            start,
            len: (end - start) as usize,
            begins: self.begins,
            document: (self.scope == EvalScope::Documents).then(|| self.segment - 1),
        };
        self.left.start = end;
        self.begins = false;
        Some(window)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::sampling::tests::shards_of;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_byte_is_a_target_once(
            lengths in prop::collection::vec(0usize..40, 1..10), length in 1usize..20,
        ) {
            let (_root, shards, whole) = shards_of(&lengths);
            let filled = lengths.iter().filter(|len| **len > 0).count();
            for (scope, segments) in [
                (EvalScope::Documents, filled),
                (EvalScope::Stream, filled.min(1)),
            ] {
                let windows: Vec<_> =
                    SequentialWindows::new(&shards, length, scope).unwrap().collect();
                let mut position = 0;
                for window in &windows {
                    prop_assert_eq!(window.start, position);
                    prop_assert!((1..=length).contains(&window.len));
                    position += window.len as u64;
                    let inputs = window.inputs();
                    let missing = u64::from(window.begins);
                    prop_assert_eq!(inputs.end - inputs.start, window.len as u64 - missing);
                    if let Some(document) = window.document {
                        let info = shards.document(document).unwrap();
                        prop_assert_eq!(window.begins, window.start == info.start);
                        prop_assert!(inputs.start >= info.start);
                        prop_assert!(window.targets().end <= info.start + info.bytes);
                    }
                }
                prop_assert_eq!(position, whole.len() as u64);
                prop_assert_eq!(windows.iter().filter(|w| w.begins).count(), segments);
            }
        }
    }

    #[test]
    fn a_length_of_zero_is_an_error() {
        let (_root, shards, _) = shards_of(&[3]);
        assert!(SequentialWindows::new(&shards, 0, EvalScope::Stream).is_err());
    }
}
