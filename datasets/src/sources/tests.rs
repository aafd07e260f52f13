use std::collections::HashSet;
use std::fs;
use std::path::Path;

use super::cargo::crate_name;
use super::pg19::parse_id;
use super::*;

fn write(root: &Path, name: &str, bytes: &[u8]) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

fn names(source: &dyn Source, split: Split) -> Vec<String> {
    let entries = source.entries(split).unwrap();
    entries.into_iter().map(|entry| entry.name).collect()
}

fn contents(source: &dyn Source, split: Split) -> Vec<Vec<u8>> {
    let entries = source.entries(split).unwrap();
    let read = |entry| source.read(entry).unwrap().bytes;
    entries.iter().map(read).collect()
}

#[test]
fn pg19_lists_books_by_number_and_keeps_every_byte() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train/100.txt", b"hundred\r\n");
    write(dir.path(), "train/20.txt", b"\r\ntwenty \xff\r\n");
    write(dir.path(), "train/3.txt", b"");
    write(dir.path(), "train/20.txt.part", b"leftover");
    write(
        dir.path(),
        "metadata.csv",
        b"20,A, B,1850,http://x/20\n100,C,1900,u\n",
    );
    let source = Pg19::new(dir.path());
    assert_eq!(names(&source, Split::Train), ["3", "20", "100"]);
    let expected: [&[u8]; 3] = [b"", b"\r\ntwenty \xff\r\n", b"hundred\r\n"];
    assert_eq!(contents(&source, Split::Train), expected);
    let total: u64 = source
        .entries(Split::Train)
        .unwrap()
        .iter()
        .map(|e| e.bytes)
        .sum();
    assert_eq!(total, 12 + 9);

    let books = source.metadata().unwrap();
    assert_eq!(books[0].title, "A, B");
    assert_eq!((books[1].id, books[1].year.as_str()), (100, "1900"));
}

#[test]
fn pg19_says_what_is_missing_and_what_does_not_belong() {
    let dir = tempfile::tempdir().unwrap();
    let source = Pg19::new(dir.path());
    let message = source.entries(Split::Test).unwrap_err().to_string();
    let place = dir.path().join("test").display().to_string();
    assert!(
        message.contains(&place) && message.contains("{id}.txt"),
        "{message}"
    );

    write(dir.path(), "test/notes.txt", b"x");
    let message = source.entries(Split::Test).unwrap_err().to_string();
    assert!(message.contains("notes.txt"), "{message}");
    write(dir.path(), "metadata.csv", b"1,t,1900,u\nnonsense\n");
    let message = source.metadata().unwrap_err().to_string();
    assert!(
        message.contains("line 2") && message.contains("nonsense"),
        "{message}"
    );
}

#[test]
fn ids_are_digits_only() {
    assert_eq!(parse_id("860"), Some(860));
    for bad in ["", "01", "+1", "-1", "1/2", "..", "1234567890", "٣"] {
        assert_eq!(parse_id(bad), None, "{bad}");
    }
}

#[test]
fn a_document_that_changed_length_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "train/1.txt", b"0123456789");
    let source = Pg19::new(dir.path());
    let entry = source.entries(Split::Train).unwrap().remove(0);
    write(dir.path(), "train/1.txt", b"0123");
    let message = source.read(&entry).unwrap_err().to_string();
    assert!(message.contains("got 4 bytes, expected 10"), "{message}");
}

#[test]
fn held_out_keys_depend_on_themselves_alone() {
    let held_out = HeldOut::each(0.1);
    let keys: Vec<String> = (0..2000).map(|i| format!("file-{i}")).collect();
    let all = held_out.assign(&keys);
    let count = |split| all.iter().filter(|s| **s == split).count();
    assert!((140..260).contains(&count(Split::Test)));
    assert!((140..260).contains(&count(Split::Validation)));
    assert_eq!(held_out.assign(&keys[..1000]), all[..1000]);
    assert!(HeldOut::each(0.5).validate().is_err());
    assert!(HeldOut::each(f64::NAN).validate().is_err());
    assert!(HeldOut::each(-0.1).validate().is_err());
}

#[test]
fn small_sets_still_have_every_split() {
    for n in 3..20 {
        let keys: Vec<String> = (0..n).map(|i| format!("{i}")).collect();
        let splits: HashSet<Split> = HeldOut::each(0.02).assign(&keys).into_iter().collect();
        assert_eq!(splits.len(), 3, "{n} keys");
        let crowded = HeldOut::each(0.49).assign(&keys);
        assert!(crowded.contains(&Split::Train), "{n} keys");
    }
}

#[test]
fn keys_that_only_stand_in_are_counted() {
    let keys: Vec<String> = (0..2000).map(|i| format!("file-{i}")).collect();
    let held_out = HeldOut::each(0.1);
    assert_eq!(held_out.stand_ins(&keys), 0);
    for n in 3..20 {
        let splits = held_out.assign(&keys[..n]);
        let among_all = held_out.assign(&keys);
        let moved = splits
            .iter()
            .zip(&among_all)
            .filter(|(a, b)| a != b)
            .count();
        assert_eq!(held_out.stand_ins(&keys[..n]), moved, "{n} keys");
    }
    assert!(held_out.stand_ins(&keys[..3]) > 0);

    let dir = tempfile::tempdir().unwrap();
    let source = TextFolder::new(dir.path(), TextOptions::default()).unwrap();
    for (files, expected) in [(2, 0), (3, 2)] {
        for i in 0..files {
            write(dir.path(), &format!("{i}.txt"), b"text");
        }
        assert_eq!(source.stand_ins().unwrap(), expected, "{files} files");
    }
}

#[test]
fn text_folder_covers_each_file_once() {
    let dir = tempfile::tempdir().unwrap();
    for i in 0..60 {
        write(
            dir.path(),
            &format!("sub{}/f{i}.txt", i % 3),
            format!("text {i}").as_bytes(),
        );
    }
    write(dir.path(), "a.md", b"other");
    write(dir.path(), "empty.txt", b"");
    write(dir.path(), ".git/config.txt", b"hidden");
    let options = TextOptions {
        extensions: vec!["TXT".to_owned()],
        ..TextOptions::default()
    };
    let source = TextFolder::new(dir.path(), options).unwrap();
    let mut all = Vec::new();
    for split in Split::ALL {
        let names = names(&source, split);
        assert!(names.is_sorted());
        all.extend(names);
    }
    assert_eq!(all.len(), 60);
    assert_eq!(all.iter().collect::<HashSet<_>>().len(), 60);
    assert!(all.contains(&"sub1/f1.txt".to_owned()));
}

#[test]
fn a_single_file_is_cut_by_position_between_lines() {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..1000).map(|i| format!("line {i} é\n")).collect();
    write(dir.path(), "book.txt", text.as_bytes());
    for path in [dir.path().join("book.txt"), dir.path().to_path_buf()] {
        let source = TextFolder::new(path, TextOptions::default()).unwrap();
        let parts: Vec<Vec<u8>> = Split::ALL
            .into_iter()
            .flat_map(|split| contents(&source, split))
            .collect();
        assert_eq!(parts.concat(), text.as_bytes());
        assert_eq!(parts.len(), 3);
        assert!(parts.iter().all(|part| part.ends_with(b"\n")));
        let share = parts[2].len() as f64 / text.len() as f64;
        assert!((0.04..0.06).contains(&share), "{share}");
    }
}

#[test]
fn a_file_without_lines_is_cut_between_characters() {
    let dir = tempfile::tempdir().unwrap();
    let text = "é".repeat(5001);
    write(dir.path(), "x", text.as_bytes());
    let source = TextFolder::new(dir.path(), TextOptions::default()).unwrap();
    let mut joined = String::new();
    for split in Split::ALL {
        let parts = contents(&source, split);
        joined += std::str::from_utf8(&parts[0]).unwrap();
    }
    assert_eq!(joined, text);
}

#[test]
fn no_text_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let source = TextFolder::new(dir.path(), TextOptions::default()).unwrap();
    let message = source.entries(Split::Train).unwrap_err().to_string();
    assert!(
        message.contains(&dir.path().display().to_string()),
        "{message}"
    );
    let missing = TextFolder::new(dir.path().join("no"), TextOptions::default()).unwrap();
    assert!(matches!(
        missing.entries(Split::Train),
        Err(DataError::Io { .. })
    ));
}

#[test]
fn crate_names_leave_the_version() {
    for (folder, name) in [
        ("serde-1.0.228", "serde"),
        ("burn-dataset-0.22.1", "burn-dataset"),
        ("base64-0.22.0-rc.1", "base64"),
        ("x-86-1.2.3+build-4.5", "x-86"),
        ("odd", "odd"),
    ] {
        assert_eq!(crate_name(folder), name);
    }
}

fn registry() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("registry/src/index-1");
    for i in 0..40 {
        let body = format!("fn f{i}() {{}}\n").repeat(10);
        write(
            &root,
            &format!("krate{i}-1.0.{i}/src/lib.rs"),
            body.as_bytes(),
        );
        write(
            &root,
            &format!("krate{i}-2.0.0/src/lib.rs"),
            body.as_bytes(),
        );
        let more = format!("{body}// two");
        write(
            &root,
            &format!("krate{i}-2.0.0/src/two.rs"),
            more.as_bytes(),
        );
    }
    write(&root, "krate1-2.0.0/src/empty.rs", b"");
    write(&root, "krate1-2.0.0/src/latin.rs", b"// \xe9");
    write(&root, "krate1-2.0.0/src/big.rs", &vec![b'/'; 5000]);
    write(&root, "krate1-2.0.0/README.md", b"not rust");
    dir
}

#[test]
fn cargo_sources_hold_out_whole_crates_and_drop_duplicates() {
    let dir = registry();
    let options = CargoOptions {
        cargo_home: Some(dir.path().to_path_buf()),
        held_out: HeldOut::each(0.1),
        max_file_bytes: 4000,
        max_bytes: None,
    };
    let source = CargoSources::scan(&options).unwrap();
    let report = source.report();
    assert_eq!(
        (report.crates, report.taken, report.duplicates),
        (40, 80, 40)
    );
    assert_eq!((report.empty, report.not_utf8, report.too_long), (1, 1, 1));
    let mut crates: Vec<HashSet<String>> = Vec::new();
    for split in Split::ALL {
        let names = names(&source, split);
        assert!(names.is_sorted() && !names.is_empty());
        let of_split = names
            .iter()
            .map(|n| n.split('-').next().unwrap().to_owned());
        crates.push(of_split.collect());
    }
    assert_eq!(crates.iter().map(HashSet::len).sum::<usize>(), 40);
    assert!(crates[0].is_disjoint(&crates[1]) && crates[0].is_disjoint(&crates[2]));
}

#[test]
fn a_cap_takes_a_spread_of_crates() {
    let dir = registry();
    let options = CargoOptions {
        cargo_home: Some(dir.path().to_path_buf()),
        max_bytes: Some(2000),
        ..CargoOptions::default()
    };
    let source = CargoSources::scan(&options).unwrap();
    for split in Split::ALL {
        let entries = source.entries(split).unwrap();
        let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
        assert!(total <= 2000 && total > 100, "{split}: {total}");
    }
    let again = CargoSources::scan(&options).unwrap();
    assert_eq!(names(&source, Split::Train), names(&again, Split::Train));
}

#[test]
fn no_crates_is_a_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    let options = CargoOptions {
        cargo_home: Some(dir.path().to_path_buf()),
        ..CargoOptions::default()
    };
    let message = CargoSources::scan(&options).unwrap_err().to_string();
    assert!(
        message.contains("registry") && message.contains("cargo fetch"),
        "{message}"
    );
}

#[test]
fn the_sources_on_this_machine_can_be_used() {
    let options = CargoOptions {
        max_bytes: Some(1 << 20),
        ..CargoOptions::default()
    };
    let source = match CargoSources::scan(&options) {
        Ok(source) => source,
        Err(error) => {
            eprintln!("SKIPPED: the_sources_on_this_machine_can_be_used: {error}");
            return;
        }
    };
    let entries = source.entries(Split::Train).unwrap();
    let total: u64 = entries.iter().map(|entry| entry.bytes).sum();
    assert!(total <= 1 << 20);
    let crates: HashSet<&str> = entries
        .iter()
        .map(|entry| crate_name(entry.name.split('/').next().unwrap()))
        .collect();
    assert!(crates.len() > 1, "{crates:?}");
    let document = source.read(&entries[0]).unwrap();
    assert!(std::str::from_utf8(&document.bytes).is_ok());
}
