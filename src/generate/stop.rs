//! Stop strings in a stream of bytes.

use std::collections::VecDeque;

use super::request::Choice;

/// Lets bytes through that cannot be part of a stop string any more.
#[derive(Debug)]
pub(super) struct StopFilter {
    stops: Vec<Vec<u8>>,
    /// The last bytes: they may be the beginning of a stop string.
    held: VecDeque<Choice>,
}

impl StopFilter {
    pub fn new(stops: Vec<Vec<u8>>) -> Self {
        Self {
            stops,
            held: VecDeque::new(),
        }
    }

    /// Takes a byte. Those let through go to `out`; the number of a stop string means that it came,
    /// and that the text ends where it began. Of several, the one that begins first counts.
    pub fn push(&mut self, choice: Choice, out: &mut Vec<Choice>) -> Option<usize> {
        self.held.push_back(choice);
        let found = self
            .stops
            .iter()
            .enumerate()
            .filter(|(_, stop)| self.ends_with(stop))
            .max_by_key(|(index, stop)| (stop.len(), usize::MAX - index));
        if let Some((index, stop)) = found {
            let text = self.held.len() - stop.len();
            out.extend(self.held.drain(..text));
            self.held.clear();
            return Some(index);
        }
        let kept = self.beginning();
        let free = self.held.len() - kept;
        out.extend(self.held.drain(..free));
        None
    }

    /// The bytes still held back, at the end of the text.
    pub fn finish(&mut self, out: &mut Vec<Choice>) {
        out.extend(self.held.drain(..));
    }

    fn ends_with(&self, stop: &[u8]) -> bool {
        self.held.len() >= stop.len() && self.tail_is(stop.len(), stop)
    }

    /// Whether the last `count` bytes are the first of `stop`.
    fn tail_is(&self, count: usize, stop: &[u8]) -> bool {
        let tail = self.held.iter().skip(self.held.len() - count);
        tail.zip(stop).all(|(choice, byte)| choice.byte == *byte)
    }

    /// Length of the longest tail that begins a stop string.
    fn beginning(&self) -> usize {
        let longest = |stop: &Vec<u8>| {
            let most = self.held.len().min(stop.len() - 1);
            (0..=most).rev().find(|count| self.tail_is(*count, stop))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], text: &str) -> (String, Option<usize>, usize) {
        let mut filter = StopFilter::new(stops.iter().map(|s| s.as_bytes().to_vec()).collect());
        let mut out = Vec::new();
        let mut most_held = 0;
        let mut found = None;
        for byte in text.bytes() {
            let choice = Choice {
                byte,
                logprob: 0.0,
                top: byte,
                top_logprob: 0.0,
            };
            found = filter.push(choice, &mut out);
            most_held = most_held.max(filter.held.len());
            if found.is_some() {
                break;
            }
        }
        filter.finish(&mut out);
        let bytes = out.iter().map(|choice| choice.byte).collect();
        (String::from_utf8(bytes).expect("ASCII"), found, most_held)
    }

    #[test]
    fn a_text_ends_before_the_stop_string() {
        assert_eq!(run(&["END"], "abcENDx"), ("abc".into(), Some(0), 2));
        assert_eq!(run(&["END", "c"], "abcENDx"), ("ab".into(), Some(1), 0));
        assert_eq!(run(&["a"], "abc"), (String::new(), Some(0), 0));
    }

    #[test]
    fn nothing_is_lost_where_it_does_not_come() {
        assert_eq!(run(&["END"], "abENxEN"), ("abENxEN".into(), None, 2));
        assert_eq!(run(&[], "abc"), ("abc".into(), None, 0));
    }

    #[test]
    fn overlapping_beginnings_are_seen() {
        assert_eq!(run(&["aab"], "aaab"), ("a".into(), Some(0), 2));
        assert_eq!(run(&["abac", "bab"], "abab"), ("a".into(), Some(1), 3));
        // Both end at one byte: the one that begins first.
        assert_eq!(run(&["b", "ab"], "xab"), ("x".into(), Some(1), 1));
    }
}
