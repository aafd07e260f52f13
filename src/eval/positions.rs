//! Losses by how far into its document a byte lies.

use std::ops::Range;

use serde::Serialize;

use super::Score;

/// The first bin of the curve ends here; each one after it is twice as long as all before it.
const FIRST: u64 = 256;

/// Ends of the buckets of the report; the last has none. All are ends of bins.
const BUCKETS: [u64; 4] = [1 << 10, 8 << 10, 64 << 10, 512 << 10];

/// Scores of bytes by position, in bins that double.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Positions {
    bins: Vec<Score>,
}

/// What the bytes of some positions cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PositionScore {
    /// First position, counted from 0 in each document.
    pub from: u64,
    /// Position behind the last one; none for all that follow.
    pub to: Option<u64>,
    /// Bytes scored there.
    pub bytes: u64,
    /// Their mean loss in bits.
    pub bits_per_byte: f64,
}

/// Number of the bin that holds a position.
fn bin(position: u64) -> usize {
    (u64::BITS - (position / FIRST).leading_zeros()) as usize
}

/// Positions of a bin.
fn range(bin: usize) -> Range<u64> {
    match bin {
        0 => 0..FIRST,
        bin => FIRST << (bin - 1)..FIRST << bin,
    }
}

impl Positions {
    /// Adds the loss of one byte.
    pub(crate) fn add(&mut self, position: u64, nats: f64) {
        let bin = bin(position);
        if self.bins.len() <= bin {
            self.bins.resize(bin + 1, Score::default());
        }
        self.bins[bin].add(nats);
    }

    /// The curve: every bin with a byte in it.
    pub fn curve(&self) -> Vec<PositionScore> {
        let bins = self.bins.iter().enumerate();
        bins.filter(|(_, score)| score.bytes > 0)
            .map(|(bin, score)| PositionScore {
                from: range(bin).start,
                to: Some(range(bin).end),
                bytes: score.bytes,
                bits_per_byte: score.bits_per_byte(),
            })
            .collect()
    }

    /// The first 1 Ki bytes of every document, what follows up to 8 Ki, 64 Ki, 512 Ki, and the
    /// rest; without those in which there is no byte.
    pub fn buckets(&self) -> Vec<PositionScore> {
        let starts = std::iter::once(0).chain(BUCKETS);
        let ends = BUCKETS.into_iter().map(Some).chain([None]);
        starts
            .zip(ends)
            .filter_map(|(from, to)| {
                let inside = |bin: &usize| {
                    range(*bin).start >= from && to.is_none_or(|to| range(*bin).start < to)
                };
                let score: Score = (0..self.bins.len())
                    .filter(inside)
                    .map(|bin| self.bins[bin])
                    .sum();
                (score.bytes > 0).then(|| PositionScore {
                    from,
                    to,
                    bytes: score.bytes,
                    bits_per_byte: score.bits_per_byte(),
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_double_and_leave_nothing_out() {
        let mut end = 0;
        for i in 0..30 {
            let range = range(i);
            assert_eq!(range.start, end);
            assert_eq!((bin(range.start), bin(range.end - 1)), (i, i));
            end = range.end;
        }
        for end in BUCKETS {
            assert_eq!(range(bin(end)).start, end, "a bucket ends where a bin does");
        }
    }

    #[test]
    fn a_byte_is_in_one_bucket() {
        let mut positions = Positions::default();
        for (position, nats) in [(0, 1.0), (1023, 2.0), (1024, 4.0), (8191, 8.0), (8192, 3.0)] {
            positions.add(position, nats * std::f64::consts::LN_2);
        }
        positions.add(3 << 20, 0.0);
        let buckets: Vec<_> = positions
            .buckets()
            .into_iter()
            .map(|it| (it.from, it.to, it.bytes, it.bits_per_byte))
            .collect();
        assert_eq!(
            buckets,
            [
                (0, Some(1024), 2, 1.5),
                (1024, Some(8192), 2, 6.0),
                (8192, Some(65536), 1, 3.0),
                (524_288, None, 1, 0.0),
            ]
        );
        let curve = positions.curve();
        assert_eq!(curve.iter().map(|it| it.bytes).sum::<u64>(), 6);
        assert_eq!((curve[0].from, curve[0].to), (0, Some(256)));
    }
}
