use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use burn_dataset::Dataset;
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

use super::*;
use crate::document::{Document, Split};
use crate::error::DataError;
use crate::progress::Silent;
use crate::sources::{DocumentEntry, InMemory, Pg19, Source};

pub(crate) fn documents(contents: &[Vec<u8>]) -> Vec<Document> {
    let document = |(index, bytes): (usize, &Vec<u8>)| Document {
        name: format!("é{index}"),
        bytes: bytes.clone(),
    };
    contents.iter().enumerate().map(document).collect()
}

/// Prepares a train split of these documents and returns its folder.
fn prepared(root: &Path, contents: &[Vec<u8>], max_shard_bytes: u64) -> PathBuf {
    let source = InMemory::new().with(Split::Train, documents(contents));
    let options = PrepareOptions {
        splits: vec![Split::Train],
        max_shard_bytes,
        overwrite: true,
        ..PrepareOptions::default()
    };
    prepare(&source, root, &options, &Silent).unwrap();
    root.join("train")
}

fn arbitrary_contents() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn round_trip(
        contents in arbitrary_contents(),
        max_shard_bytes in 1u64..200,
        cuts in prop::collection::vec(0u64..1000, 8),
    ) {
        let root = tempfile::tempdir().unwrap();
        let shards = Shards::open(prepared(root.path(), &contents, max_shard_bytes)).unwrap();
        let whole = contents.concat();
        prop_assert_eq!(shards.byte_count(), whole.len() as u64);
        prop_assert_eq!(shards.document_count(), contents.len() as u64);
        let words: u64 = contents.iter().map(|bytes| count_words(bytes)).sum();
        prop_assert_eq!(shards.word_count(), words);

        let mut start = 0;
        for (index, (info, bytes)) in shards.documents().zip(&contents).enumerate() {
            prop_assert_eq!(&info.name, &format!("é{index}"));
            prop_assert_eq!((info.start, info.bytes), (start, bytes.len() as u64));
            prop_assert_eq!(&shards.get(index).unwrap().bytes, bytes);
            start += info.bytes;
        }
        for pair in cuts.chunks(2) {
            let (a, b) = (pair[0].min(shards.byte_count()), pair[1].min(shards.byte_count()));
            let (a, b) = (a.min(b), a.max(b));
            let mut read = vec![0; (b - a) as usize];
            shards.read(a, &mut read).unwrap();
            prop_assert_eq!(&read, &whole[a as usize..b as usize]);
            let mut position = 0;
            let mut expected = Vec::new();
            for bytes in &contents {
                if !bytes.is_empty() && (a..b).contains(&position) {
                    expected.push(position);
                }
                position += bytes.len() as u64;
            }
            let starts: Vec<u64> = shards.document_starts_in(a..b).collect();
            prop_assert_eq!(starts, expected);
        }
        let report = shards.verify(&Silent).unwrap();
        prop_assert_eq!(report.bytes, shards.byte_count());
        prop_assert!(shards.read(shards.byte_count(), &mut [0]).is_err());
        prop_assert!(shards.read(u64::MAX, &mut [0]).is_err());
    }

    #[test]
    fn damaged_headers_never_panic(
        contents in arbitrary_contents(),
        at in 0usize..160,
        value in any::<u64>(),
    ) {
        let root = tempfile::tempdir().unwrap();
        let dir = prepared(root.path(), &contents, 1 << 20);
        let file = dir.join("shard-00000.mbs");
        let mut bytes = fs::read(&file).unwrap();
        let at = at.min(bytes.len() - 8);
        prop_assume!(bytes[at..at + 8] != value.to_le_bytes());
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let result = Shards::open(&dir).and_then(|shards| shards.verify(&Silent));
        prop_assert!(result.is_err());
    }
}

proptest! {
    /// Headers that contradict themselves but have a right checksum.
    #[test]
    fn inconsistent_indexes_are_found_or_harmless(
        contents in arbitrary_contents(),
        slot in 0usize..60,
        value in prop_oneof![0u64..300, any::<u64>()],
    ) {
        let root = tempfile::tempdir().unwrap();
        let dir = prepared(root.path(), &contents, 1 << 20);
        let file = dir.join("shard-00000.mbs");
        let mut bytes = fs::read(&file).unwrap();
        let header = bytes.len() - contents.concat().len();
        let at = 16 + (slot * 8) % (header - 24);
        prop_assume!(bytes[at..at + 8] != value.to_le_bytes());
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let hash = xxh3_64(&bytes[..header - 8]);
        bytes[header - 8..header].copy_from_slice(&hash.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        // What no rule contradicts (names, words that still sum up) may open, but only safely.
        if let Ok(shards) = Shards::open(&dir) {
            for index in 0..contents.len() {
                prop_assert!(shards.get(index).is_ok());
            }
            let _ = shards.verify(&Silent);
        }
    }
}

#[test]
fn each_rule_of_the_index_is_checked() {
    let root = tempfile::tempdir().unwrap();
    let contents = vec![b"one two".to_vec(), b"three".to_vec()];
    let dir = prepared(root.path(), &contents, 1 << 20);
    let file = dir.join("shard-00000.mbs");
    let good = fs::read(&file).unwrap();
    let header = good.len() - 12;
    let record = format::FIXED + format::RECORD;
    for (at, value, problem) in [
        (12, 1 | 200 << 32, "flags"),
        (40, 9, "words"),
        (48, 0, "block length"),
        (56, 7, "number of blocks"),
        (64, 1, "header length"),
        (record, 6, "start of a document"),
        (record + 8, 4, "documents' lengths"),
        (record + 16, 5, "documents' words"),
        (record + 24, 4, "end of a name"),
        (record + 24, u64::MAX, "end of a name"),
        (record + 24, 3, "end of the last name"),
        (record + 32, 0xff, "name table"),
    ] {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
        let hash = xxh3_64(&bytes[..header - 8]);
        bytes[header - 8..header].copy_from_slice(&hash.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let message = Shards::open(&dir).unwrap_err().to_string();
        assert!(message.contains(problem), "{at}: {message}");
    }
}

#[test]
fn prepare_excludes_other_processes() {
    let root = tempfile::tempdir().unwrap();
    let lock = fs::File::create(root.path().join(".prepare.lock")).unwrap();
    lock.lock().unwrap();
    let source = InMemory::new().with(Split::Train, documents(&small()));
    let options = PrepareOptions {
        splits: vec![Split::Train],
        ..PrepareOptions::default()
    };
    let error = prepare(&source, root.path(), &options, &Silent).unwrap_err();
    assert!(matches!(error, DataError::Locked { .. }), "{error}");
    drop(lock);
    prepare(&source, root.path(), &options, &Silent).unwrap();
}

/// One long document of a repeated byte, made while it is read.
struct Endless(u64);

impl Source for Endless {
    fn describe(&self) -> String {
        "a repeated byte".to_owned()
    }
    fn entries(&self, _: Split) -> crate::Result<Vec<DocumentEntry>> {
        Ok(vec![DocumentEntry {
            name: "x".to_owned(),
            path: PathBuf::from("x"),
            start: 0,
            bytes: self.0,
        }])
    }
    fn open(&self, entry: &DocumentEntry) -> crate::Result<Box<dyn Read + '_>> {
        Ok(Box::new(std::io::repeat(b'x').take(entry.bytes)))
    }
}

/// A file that is cut short while it is read is an error with its name, not a signal.
#[test]
fn a_shard_that_is_cut_short_while_it_is_open_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let options = PrepareOptions {
        splits: vec![Split::Train],
        ..PrepareOptions::default()
    };
    let bytes = 9 << 20;
    prepare(&Endless(bytes), root.path(), &options, &Silent).unwrap();
    let dir = root.path().join("train");
    let shards = Shards::open(&dir).unwrap();
    let mut buffer = vec![0; 1000];
    shards.read(bytes - 1000, &mut buffer).unwrap();
    let file = dir.join("shard-00000.mbs");
    let whole = fs::metadata(&file).unwrap().len();
    let cut = fs::OpenOptions::new().write(true).open(&file).unwrap();
    cut.set_len(whole / 2).unwrap();
    shards.read(0, &mut buffer).unwrap();
    for error in [
        shards.read(bytes - 1000, &mut buffer).unwrap_err(),
        shards.verify(&Silent).unwrap_err(),
    ] {
        let DataError::ShardLength { got, expected, .. } = error else {
            panic!("{error}");
        };
        assert_eq!((got, expected), (whole / 2, whole));
    }
}

/// A file that is deleted while it is read stays readable.
#[test]
#[cfg(unix)]
fn a_deleted_split_can_be_read_to_its_end() {
    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 100);
    let shards = Shards::open(&dir).unwrap();
    fs::remove_dir_all(&dir).unwrap();
    let mut text = vec![0; shards.byte_count() as usize];
    shards.read(0, &mut text).unwrap();
    assert_eq!(text, small().concat());
    shards.verify(&Silent).unwrap();
    assert!(Shards::open(&dir).is_err());
}

fn small() -> Vec<Vec<u8>> {
    vec![b"one two\r\n".to_vec(), Vec::new(), b"three".to_vec()]
}

#[test]
fn every_flipped_bit_pattern_is_detected() {
    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 1 << 20);
    let file = dir.join("shard-00000.mbs");
    let good = fs::read(&file).unwrap();
    for at in 0..good.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            fs::write(&file, bytes).unwrap();
            let error = Shards::open(&dir)
                .and_then(|shards| shards.verify(&Silent))
                .expect_err(&format!("byte {at} flipped by {flip:#x}"));
            assert!(error.to_string().contains("shard-00000.mbs"), "{error}");
        }
    }
}

#[test]
fn every_truncation_and_growth_is_an_error() {
    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 1 << 20);
    let file = dir.join("shard-00000.mbs");
    let good = fs::read(&file).unwrap();
    for len in 0..good.len() {
        fs::write(&file, &good[..len]).unwrap();
        let error = Shards::open(&dir).expect_err(&format!("cut to {len}"));
        let named = matches!(
            error,
            DataError::ShardLength { .. } | DataError::NotAShard { .. }
        );
        assert!(named, "cut to {len}: {error}");
    }
    let mut longer = good.clone();
    longer.push(0);
    fs::write(&file, longer).unwrap();
    assert!(matches!(
        Shards::open(&dir),
        Err(DataError::ShardLength { .. })
    ));
}

#[test]
fn damaged_data_is_named_with_its_offset() {
    let root = tempfile::tempdir().unwrap();
    let block = format::BLOCK as usize;
    let contents = vec![vec![b'x'; block + 100], vec![b'y'; block]];
    let dir = prepared(root.path(), &contents, 1 << 30);
    let file = dir.join("shard-00000.mbs");
    let mut bytes = fs::read(&file).unwrap();
    let data_at = bytes.len() - (2 * block + 100);
    bytes[data_at + block + 7] ^= 1;
    fs::write(&file, bytes).unwrap();

    let message = Shards::open(&dir)
        .unwrap()
        .verify(&Silent)
        .unwrap_err()
        .to_string();
    assert!(message.contains(&file.display().to_string()), "{message}");
    assert!(
        message.contains(&format!("byte {}", data_at + block)),
        "{message}"
    );

    let options = OpenOptions {
        check_on_read: true,
    };
    let shards = Shards::open_with(&dir, options).unwrap();
    let mut buffer = vec![0; 10];
    shards.read(0, &mut buffer).unwrap();
    shards.read((2 * block) as u64, &mut buffer).unwrap();
    assert!(shards.read(block as u64 - 5, &mut buffer).is_err());
    assert!(shards.read((2 * block - 11) as u64, &mut buffer).is_err());
}

#[test]
fn foreign_and_other_versions_are_told_apart() {
    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 1 << 20);
    let file = dir.join("shard-00000.mbs");
    let mut bytes = fs::read(&file).unwrap();
    bytes[8] = 9;
    fs::write(&file, &bytes).unwrap();
    let message = Shards::open(&dir).unwrap_err().to_string();
    assert!(
        message.contains("got format 9, this program reads 1"),
        "{message}"
    );
    assert!(message.contains("mambabyte data prepare"), "{message}");
    fs::write(&file, b"PK\x03\x04 something else entirely").unwrap();
    assert!(matches!(
        Shards::open(&dir),
        Err(DataError::NotAShard { .. })
    ));
    fs::remove_file(&file).unwrap();
    assert!(matches!(Shards::open(&dir), Err(DataError::NoData { .. })));
}

#[test]
fn missing_and_swapped_shards_are_errors() {
    let root = tempfile::tempdir().unwrap();
    let contents = vec![b"aaaa".to_vec(), b"bbbb".to_vec(), b"cccc".to_vec()];
    let dir = prepared(root.path(), &contents, 4);
    assert_eq!(Shards::open(&dir).unwrap().info().shards.len(), 3);
    let (first, last) = (dir.join("shard-00000.mbs"), dir.join("shard-00002.mbs"));
    let bytes = fs::read(&last).unwrap();
    fs::remove_file(&last).unwrap();
    let message = Shards::open(&dir).unwrap_err().to_string();
    assert!(message.contains("shard 1 of 3"), "{message}");
    fs::write(&last, fs::read(&first).unwrap()).unwrap();
    assert!(matches!(
        Shards::open(&dir),
        Err(DataError::ShardSet { .. })
    ));
    fs::write(&last, bytes).unwrap();
    Shards::open(&dir).unwrap();
}

#[test]
fn identity_follows_the_content() {
    let root = tempfile::tempdir().unwrap();
    let identity = |contents: &[Vec<u8>]| {
        let dir = prepared(root.path(), contents, 1 << 20);
        Shards::open(dir).unwrap().identity().to_owned()
    };
    let first = identity(&small());
    assert_eq!(first.len(), 32);
    assert_eq!(identity(&small()), first);
    let mut other = small();
    other[2][0] ^= 1;
    assert_ne!(identity(&other), first);
    other = vec![b"one two\r\nthree".to_vec()];
    assert_ne!(identity(&other), first);
}

#[test]
fn prepare_refuses_to_overwrite_and_leaves_no_rubbish() {
    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 1 << 20);
    let source = InMemory::new().with(Split::Train, documents(&[b"new".to_vec()]));
    let mut options = PrepareOptions {
        splits: vec![Split::Train],
        ..PrepareOptions::default()
    };
    let error = prepare(&source, root.path(), &options, &Silent).unwrap_err();
    assert!(
        matches!(error, DataError::SplitExists { files: 1, .. }),
        "{error}"
    );
    assert_eq!(Shards::open(&dir).unwrap().byte_count(), 14);

    // A crash's leftovers do not disturb.
    fs::create_dir_all(root.path().join(".train.partial/x")).unwrap();
    fs::create_dir_all(root.path().join(".train.old/x")).unwrap();
    options.overwrite = true;
    let summary = prepare(&source, root.path(), &options, &Silent).unwrap();
    assert_eq!((summary.splits[0].bytes, summary.splits[0].words), (3, 1));
    let names: Vec<_> = fs::read_dir(root.path()).unwrap().collect();
    assert_eq!(names.len(), 2, "the split and the lock file: {names:?}");
}

#[test]
fn prepare_checks_all_splits_before_writing_any() {
    let root = tempfile::tempdir().unwrap();
    let source = InMemory::new().with(Split::Train, documents(&small()));
    let options = PrepareOptions::default();
    let error = prepare(&source, root.path(), &options, &Silent).unwrap_err();
    assert!(matches!(error, DataError::NoData { .. }), "{error}");
    assert!(!root.path().join("train").exists());
    let twice = PrepareOptions {
        splits: vec![Split::Train, Split::Train],
        ..PrepareOptions::default()
    };
    assert!(prepare(&source, root.path(), &twice, &Silent).is_err());
}

#[test]
fn a_failing_source_leaves_the_old_split() {
    let books = tempfile::tempdir().unwrap();
    fs::create_dir(books.path().join("train")).unwrap();
    fs::write(books.path().join("train/1.txt"), b"good").unwrap();

    /// Lists one byte more than there is.
    struct Lying(Pg19);
    impl Source for Lying {
        fn describe(&self) -> String {
            self.0.describe()
        }
        fn entries(&self, split: Split) -> crate::Result<Vec<DocumentEntry>> {
            let mut entries = self.0.entries(split)?;
            entries[0].bytes += 1;
            Ok(entries)
        }
    }

    let root = tempfile::tempdir().unwrap();
    let dir = prepared(root.path(), &small(), 1 << 20);
    let options = PrepareOptions {
        splits: vec![Split::Train],
        overwrite: true,
        ..PrepareOptions::default()
    };
    let source = Lying(Pg19::new(books.path()));
    let error = prepare(&source, root.path(), &options, &Silent).unwrap_err();
    assert!(
        matches!(
            error,
            DataError::DocumentChanged {
                got: 4,
                expected: 5,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(Shards::open(&dir).unwrap().byte_count(), 14);
    assert!(!root.path().join(".train.partial").exists());
}

#[test]
fn a_cap_cuts_the_document_across_it() {
    let root = tempfile::tempdir().unwrap();
    let source = InMemory::new().with(Split::Train, documents(&[vec![b'a'; 10], vec![b'b'; 10]]));
    for (cap, documents) in [(5, 1), (10, 1), (11, 2), (20, 2), (99, 2)] {
        let options = PrepareOptions {
            splits: vec![Split::Train],
            max_bytes: Some(cap),
            max_shard_bytes: 10,
            overwrite: true,
        };
        let summary = prepare(&source, root.path(), &options, &Silent).unwrap();
        let got = (summary.splits[0].bytes, summary.splits[0].documents);
        assert_eq!(got, (cap.min(20), documents));
    }
}

#[test]
fn real_books_have_the_published_counts() {
    let Some(dir) = std::env::var_os("MAMBABYTE_PG19").map(PathBuf::from) else {
        eprintln!(
            "SKIPPED: real_books_have_the_published_counts: set MAMBABYTE_PG19 to a PG-19 copy"
        );
        return;
    };
    let source = Pg19::new(&dir);
    let root = tempfile::tempdir().unwrap();
    let options = PrepareOptions {
        splits: vec![Split::Validation, Split::Test],
        ..PrepareOptions::default()
    };
    let summary = prepare(&source, root.path(), &options, &Silent).unwrap();
    for split in &summary.splits {
        let entries = source.entries(split.split).unwrap();
        let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        assert_eq!(split.bytes, total);
        // By the number of books: a subset with known counts, or the whole of PG-19. Counts of
        // words in the whole test split differ between publications.
        let (bytes, words) = match (split.split, split.documents) {
            (Split::Validation, 9) => (1_804_262, Some(309_916)),
            (Split::Test, 10) => (2_480_498, Some(426_642)),
            (Split::Validation, 50) => (17_733_002, Some(3_007_061)),
            (Split::Test, 100) => (41_289_101, None),
            (split, books) => {
                eprintln!("SKIPPED: no published counts for {split} with {books} books");
                continue;
            }
        };
        assert_eq!(split.bytes, bytes);
        assert_eq!(split.words, words.unwrap_or(split.words));
    }
    let metadata = source.metadata().unwrap();
    for info in Shards::open(root.path().join("test")).unwrap().documents() {
        assert!(metadata.iter().any(|book| book.id.to_string() == info.name));
    }
}
