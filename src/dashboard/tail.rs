//! A growing file, line by line, in bounded memory.

use std::fs::{File, Metadata};
use std::io::{self, BufRead as _, BufReader, ErrorKind, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

/// Longest line that is looked at, in bytes: a sample of the largest size, every byte escaped.
const LONGEST_LINE: u64 = 8 << 20;

/// Bytes read from the file at once.
const BUFFER: usize = 256 << 10;

/// What one reading came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many lines were there, and there may be more.
    More(usize),
    /// So many lines were there, and now it waits for the writer.
    UpToDate(usize),
    /// The file is another one, or shorter than before: the next reading begins at its start.
    Replaced,
    /// The file is not there any more.
    Gone,
}

/// A place in a file that grows.
///
/// Only lines with their newline count: a half-written one is read when it is whole. A line above
/// the limit is passed over without being held.
pub(super) struct Tail {
    path: PathBuf,
    file: Option<(BufReader<File>, Identity)>,
    /// Where the first line not yet given begins.
    offset: u64,
    /// Inside a line that is too long.
    skipping: bool,
    line: Vec<u8>,
}

impl Tail {
    pub(super) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            offset: 0,
            skipping: false,
            line: Vec::new(),
        }
    }

    /// Bytes given so far, and bytes of the file.
    pub(super) fn progress(&self) -> (u64, u64) {
        let total = std::fs::metadata(&self.path).map_or(0, |it| it.len());
        (self.offset, total.max(self.offset))
    }

    /// Gives the lines of about the next `budget` bytes to `each`.
    pub(super) fn read(&mut self, budget: u64, mut each: impl FnMut(&[u8])) -> io::Result<Outcome> {
        let metadata = match std::fs::metadata(&self.path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Outcome::Gone),
            Err(error) => return Err(error),
        };
        let identity = Identity::of(&metadata);
        let other = matches!(&self.file, Some((_, open)) if *open != identity);
        if other || metadata.len() < self.offset {
            *self = Self::new(&self.path);
            return Ok(Outcome::Replaced);
        }
        if metadata.len() == self.offset {
            return Ok(Outcome::UpToDate(0));
        }
        if self.file.is_none() {
            let file = File::open(&self.path)?;
            self.file = Some((BufReader::with_capacity(BUFFER, file), identity));
        }
        let Some((reader, _)) = &mut self.file else {
            return Ok(Outcome::UpToDate(0));
        };
        // Also drops what is buffered: the end of the file may have grown since.
        reader.seek(SeekFrom::Start(self.offset))?;
        let until = self.offset.saturating_add(budget);
        let mut count = 0;
        while self.offset < until {
            if self.skipping {
                let passed = reader.by_ref().take(budget).skip_until(b'\n')? as u64;
                // Whether a newline was the last of these bytes cannot be seen from their number.
                let ended = passed > 0 && {
                    let mut last = [0];
                    reader.seek(SeekFrom::Start(self.offset + passed - 1))?;
                    reader.read_exact(&mut last)?;
                    last == *b"\n"
                };
                self.offset += passed;
                self.skipping = !ended;
                if passed == 0 {
                    return Ok(Outcome::UpToDate(count));
                }
                continue;
            }
            self.line.clear();
            let read = reader
                .by_ref()
                .take(LONGEST_LINE)
                .read_until(b'\n', &mut self.line)? as u64;
            if self.line.last() == Some(&b'\n') {
                self.offset += read;
                count += 1;
                each(&self.line[..self.line.len() - 1]);
            } else if read == LONGEST_LINE {
                self.offset += read;
                self.skipping = true;
                self.line = Vec::new();
            } else {
                return Ok(Outcome::UpToDate(count));
            }
        }
        Ok(Outcome::More(count))
    }
}

/// Which file a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity(u64, u64);

impl Identity {
    #[cfg(unix)]
    fn of(metadata: &Metadata) -> Self {
        use std::os::unix::fs::MetadataExt as _;
        Self(metadata.dev(), metadata.ino())
    }

    /// Where files have no numbers, only a shorter file tells.
    #[cfg(not(unix))]
    fn of(_metadata: &Metadata) -> Self {
        Self(0, 0)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;

    use super::*;

    fn all(tail: &mut Tail) -> (Vec<String>, Outcome) {
        let mut lines = Vec::new();
        loop {
            let outcome = tail
                .read(1 << 20, |line| {
                    lines.push(String::from_utf8_lossy(line).into_owned());
                })
                .expect("readable");
            if !matches!(outcome, Outcome::More(_)) {
                return (lines, outcome);
            }
        }
    }

    #[test]
    fn a_half_written_line_is_given_when_it_is_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, "one\ntw").expect("written");
        let mut tail = Tail::new(&path);
        assert_eq!(
            all(&mut tail),
            (vec!["one".to_owned()], Outcome::UpToDate(1))
        );
        let mut file = File::options().append(true).open(&path).expect("there");
        file.write_all(b"o\nthree\n").expect("written");
        assert_eq!(all(&mut tail).0, ["two", "three"]);
        assert_eq!(all(&mut tail), (vec![], Outcome::UpToDate(0)));
    }

    #[test]
    fn another_file_begins_anew_and_a_missing_one_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        fs::write(&path, "one\ntwo\n").expect("written");
        let mut tail = Tail::new(&path);
        assert_eq!(all(&mut tail).0.len(), 2);
        fs::write(&path, "x\n").expect("written");
        assert_eq!(all(&mut tail), (vec![], Outcome::Replaced));
        assert_eq!(all(&mut tail).0, ["x"]);
        fs::remove_file(&path).expect("removed");
        assert_eq!(all(&mut tail), (vec![], Outcome::Gone));
    }

    #[test]
    fn a_line_above_the_limit_is_passed_over() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a");
        let mut text = b"one\n".to_vec();
        text.extend(std::iter::repeat_n(b'x', 2 * LONGEST_LINE as usize + 3));
        text.extend(b"\ntwo\n");
        fs::write(&path, text).expect("written");
        let mut tail = Tail::new(&path);
        assert_eq!(all(&mut tail).0, ["one", "two"]);
        assert!(tail.line.capacity() < 1 << 20, "{}", tail.line.capacity());
    }
}
