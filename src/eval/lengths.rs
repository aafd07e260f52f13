//! Length extrapolation: what longer contexts are worth, and whether a model bears them.

use mambabyte_datasets::DocumentInfo;

use super::corpus::Corpus;
use super::evaluate::cut;
use crate::error::{Error, Result};

/// The documents of a corpus that are long enough, cut so that windows of every length cover the same
/// bytes.
pub struct LongDocuments<'a> {
    corpus: &'a dyn Corpus,
    documents: Vec<DocumentInfo>,
}

impl<'a> LongDocuments<'a> {
    /// Documents of at least `longest` bytes, each cut to a multiple of it, until there are
    /// `max_bytes`.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] where there is none, and as [`Corpus::read`].
    ///
    /// # Panics
    ///
    /// If `longest` is 0.
    pub fn new(corpus: &'a dyn Corpus, longest: u64, max_bytes: Option<u64>) -> Result<Self> {
        let mut left = max_bytes.unwrap_or(u64::MAX);
        let mut documents = Vec::new();
        let mut most = 0;
        for mut document in corpus.documents() {
            most = most.max(document.bytes);
            let bytes = document.bytes.min(left) / longest * longest;
            if bytes > 0 {
                cut(corpus, &mut document, bytes)?;
                left -= bytes;
                documents.push(document);
            }
        }
        match documents.is_empty() {
            true => Err(Error::Usage {
                message: format!(
                    "no document has {longest} bytes: the longest has {most}{}",
                    max_bytes.map_or(String::new(), |it| format!(", and --max-bytes is {it}"))
                ),
                hint: "lower --to, or measure on longer documents".to_owned(),
            }),
            false => Ok(Self { corpus, documents }),
        }
    }
}

impl Corpus for LongDocuments<'_> {
    fn documents(&self) -> Vec<DocumentInfo> {
        self.documents.clone()
    }

    fn read(&self, start: u64, out: &mut [u8]) -> Result<()> {
        self.corpus.read(start, out)
    }
}

/// `from`, twice that, and so on up to `to`.
///
/// # Errors
///
/// [`Error::Usage`] where that does not end at `to`.
pub fn doubling(from: usize, to: usize) -> Result<Vec<usize>> {
    // Zero, doubled, would come to nothing for ever.
    let first = (from > 0).then_some(from);
    let lengths = std::iter::successors(first, |length| length.checked_mul(2));
    let lengths: Vec<usize> = lengths.take_while(|length| *length <= to).collect();
    match lengths.last() {
        Some(last) if *last == to => Ok(lengths),
        _ => Err(Error::Usage {
            message: format!("{from}, doubled again and again, does not come to {to}"),
            hint: "choose --to as --from times a power of two".to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use mambabyte_datasets::Document;

    use super::*;
    use crate::eval::{Context, Texts};

    #[test]
    fn every_length_covers_the_same_bytes() {
        let document = |length: usize| Document {
            name: length.to_string(),
            bytes: (0..length).map(|i| (i % 251) as u8).collect(),
        };
        let texts = Texts::new([document(70), document(30), document(32), document(100)]);
        let long = LongDocuments::new(&texts, 32, None).expect("three are long enough");
        let kept: Vec<_> = long
            .documents()
            .iter()
            .map(|it| (it.start, it.bytes))
            .collect();
        assert_eq!(kept, [(0, 64), (100, 32), (132, 96)]);
        let mut byte = [0];
        long.read(132 + 95, &mut byte).expect("there");
        assert_eq!(byte, [95]);
        for length in doubling(8, 32).expect("powers of two") {
            let windows = Context::Windows { length }.segments(96).count();
            assert_eq!(windows, 96 / length);
        }
        let limited = LongDocuments::new(&texts, 32, Some(100)).expect("long enough");
        let bytes: u64 = limited.documents().iter().map(|it| it.bytes).sum();
        assert_eq!(bytes, 96);
        for (longest, limit) in [(101, None), (32, Some(31))] {
            let error = LongDocuments::new(&texts, longest, limit)
                .err()
                .expect("none is");
            assert!(error.to_string().contains("100"), "{error}");
        }
    }

    #[test]
    fn lengths_double() {
        assert_eq!(doubling(8, 64).expect("doubles"), [8, 16, 32, 64]);
        assert_eq!(doubling(8, 8).expect("one"), [8]);
        assert!(doubling(8, 60).is_err() && doubling(8, 4).is_err() && doubling(0, 8).is_err());
    }
}
