//! The Rust sources that cargo has unpacked on this machine.
//!
//! Real text that every machine that built this program has:
//! `$CARGO_HOME/registry/src/{index}/{crate}-{version}/**/*.rs`.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use walkdir::WalkDir;
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::text::{relative_name, walk_error};
use super::{DocumentEntry, HeldOut, Source};
use crate::document::Split;
use crate::error::{DataError, Result};
use crate::fsutil;

/// Settings of [`CargoSources`].
#[derive(Clone, Debug, PartialEq)]
pub struct CargoOptions {
    /// Cargo's home; none means `$CARGO_HOME`, else `.cargo` in the user's home folder.
    pub cargo_home: Option<PathBuf>,
    /// Fractions of crates (by name) held out.
    pub held_out: HeldOut,
    /// Longest file taken, in bytes; longer ones are mostly tables and generated bindings.
    pub max_file_bytes: u64,
    /// Most bytes a split takes, at its crates in the order of a hash of their names.
    pub max_bytes: Option<u64>,
}

impl Default for CargoOptions {
    /// 2 % of crates for validation and for test each; files up to 1 MiB; no cap.
    fn default() -> Self {
        Self {
            cargo_home: None,
            held_out: HeldOut::each(0.02),
            max_file_bytes: 1 << 20,
            max_bytes: None,
        }
    }
}

/// What a scan left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CargoReport {
    /// Distinct crate names found.
    pub crates: usize,
    /// Crates that are not in the split that the hash of their name gives them, as there are few: with
    /// others that come later, they may go from a held-out split to training.
    pub stand_ins: usize,
    /// Files taken.
    pub taken: usize,
    /// Files with the content of another that was taken.
    pub duplicates: usize,
    /// Empty files.
    pub empty: usize,
    /// Files that are not UTF-8.
    pub not_utf8: usize,
    /// Files longer than allowed.
    pub too_long: usize,
    /// Files that would have passed the cap of their split.
    pub over_cap: usize,
}

/// Rust source files from cargo's registry, each one a document.
///
/// Whole crates are held out: a crate's name without its version decides the split, so versions
/// of one crate never lie on both sides. A file's content is taken once, and the held-out splits
/// choose first, so nothing in them is also trained on. Documents are ordered by path.
#[derive(Clone, Debug)]
pub struct CargoSources {
    root: PathBuf,
    entries: [Vec<DocumentEntry>; 3],
    report: CargoReport,
}

/// All versions of one crate: folder name and folder.
type Versions = Vec<(String, PathBuf)>;

impl CargoSources {
    /// Finds and reads all files once, to leave out duplicates and what is not text.
    ///
    /// Memory holds one file at a time and the list of files.
    ///
    /// # Errors
    ///
    /// [`DataError::NoData`] without unpacked crates, [`DataError::Config`] for impossible
    /// fractions or an unknown home folder, [`DataError::Io`] for unreadable files.
    pub fn scan(options: &CargoOptions) -> Result<Self> {
        options.held_out.validate()?;
        let root = cargo_home(options)?.join("registry").join("src");
        let crates = find_crates(&root)?;
        if crates.is_empty() {
            return Err(DataError::NoData {
                what: "unpacked crates, folders {index}/{crate}-{version},".to_owned(),
                place: root,
                hint: "run `cargo fetch` in any project, or set CARGO_HOME".to_owned(),
            });
        }
        let names: Vec<String> = crates.keys().cloned().collect();
        let splits = options.held_out.assign(&names);
        let mut scan = Scan {
            root: &root,
            options,
            seen: HashSet::new(),
            report: CargoReport {
                crates: crates.len(),
                stand_ins: options.held_out.stand_ins(&names),
                ..CargoReport::default()
            },
        };
        let mut entries: [Vec<DocumentEntry>; 3] = Default::default();
        for split in [Split::Test, Split::Validation, Split::Train] {
            let assigned = crates.iter().zip(&splits);
            let assigned = assigned.filter(|(_, assigned)| **assigned == split);
            entries[split as usize] = scan.split(assigned.map(|(named, _)| named).collect())?;
        }
        let report = scan.report;
        Ok(Self {
            root,
            entries,
            report,
        })
    }

    /// What the scan took and left out.
    pub fn report(&self) -> CargoReport {
        self.report
    }
}

impl Source for CargoSources {
    fn describe(&self) -> String {
        format!("Rust sources in {}", self.root.display())
    }

    /// The files of a split; named `{crate}-{version}/{path}`.
    fn entries(&self, split: Split) -> Result<Vec<DocumentEntry>> {
        let entries = &self.entries[split as usize];
        if entries.is_empty() {
            return Err(DataError::NoData {
                what: format!("Rust files (*.rs, UTF-8) of the crates in the {split} split"),
                place: self.root.clone(),
                hint: "raise the held-out fraction or the cap, or leave this split out".to_owned(),
            });
        }
        Ok(entries.clone())
    }
}

/// State of a scan over the splits.
struct Scan<'a> {
    root: &'a Path,
    options: &'a CargoOptions,
    seen: HashSet<u128>,
    report: CargoReport,
}

impl Scan<'_> {
    /// Takes the files of one split's crates until its cap.
    fn split(&mut self, mut crates: Vec<(&String, &Versions)>) -> Result<Vec<DocumentEntry>> {
        // A capped split is a spread over the alphabet, not all of the crates with 'a'.
        crates.sort_by_key(|(name, _)| (xxh3_64(name.as_bytes()), *name));
        let cap = self.options.max_bytes.unwrap_or(u64::MAX);
        let mut left = cap;
        let mut taken = Vec::new();
        for (_, versions) in crates {
            // The last files that would still fit are not worth a walk over all other crates.
            if left < cap.div_ceil(1000) {
                break;
            }
            for (_, folder) in versions {
                self.folder(folder, &mut left, &mut taken)?;
            }
        }
        self.report.taken += taken.len();
        taken.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| a.path.cmp(&b.path)));
        Ok(taken)
    }

    /// Takes the wanted files of one unpacked crate.
    fn folder(
        &mut self,
        folder: &Path,
        left: &mut u64,
        taken: &mut Vec<DocumentEntry>,
    ) -> Result<()> {
        for file in WalkDir::new(folder).sort_by_file_name() {
            let file = file.map_err(|error| walk_error(error, folder))?;
            let is_rust = file.path().extension().is_some_and(|e| e == "rs");
            if !file.file_type().is_file() || !is_rust {
                continue;
            }
            let metadata = file.metadata();
            let bytes = metadata.map_err(|error| walk_error(error, folder))?.len();
            if !self.admit(file.path(), bytes, *left)? {
                continue;
            }
            *left -= bytes;
            // Without the index folder, whose name depends on the registry's address.
            let name = relative_name(self.root, file.path());
            let name = name.split_once('/').map_or(&*name, |(_, rest)| rest);
            taken.push(DocumentEntry {
                name: name.to_owned(),
                path: file.into_path(),
                start: 0,
                bytes,
            });
        }
        Ok(())
    }

    /// Whether a file is wanted; counts why not.
    fn admit(&mut self, path: &Path, bytes: u64, left: u64) -> Result<bool> {
        let report = &mut self.report;
        let refused = if bytes == 0 {
            &mut report.empty
        } else if bytes > self.options.max_file_bytes {
            &mut report.too_long
        } else if bytes > left {
            &mut report.over_cap
        } else {
            let content = fs::read(path).map_err(DataError::io("read", path))?;
            if std::str::from_utf8(&content).is_err() {
                &mut report.not_utf8
            } else if !self.seen.insert(xxh3_128(&content)) {
                &mut report.duplicates
            } else {
                return Ok(true);
            }
        };
        *refused += 1;
        Ok(false)
    }
}

/// Where cargo keeps its files.
fn cargo_home(options: &CargoOptions) -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    options
        .cargo_home
        .clone()
        .or_else(|| set("CARGO_HOME").map(PathBuf::from))
        .or_else(|| std::env::home_dir().map(|home| home.join(".cargo")))
        .ok_or_else(|| DataError::Config {
            setting: "CARGO_HOME",
            got: "nothing, and no home folder".to_owned(),
            expected: "the folder that holds cargo's registry/".to_owned(),
        })
}

/// All unpacked crates under `registry/src`, by crate name.
fn find_crates(root: &Path) -> Result<BTreeMap<String, Versions>> {
    let mut crates: BTreeMap<String, Versions> = BTreeMap::new();
    for index in fsutil::list_dir(root)? {
        if !index.is_dir() {
            continue;
        }
        for folder in fsutil::list_dir(&index)? {
            if !folder.is_dir() {
                continue;
            }
            let full = folder.file_name().unwrap_or_default().to_string_lossy();
            let full = full.into_owned();
            let versions = crates.entry(crate_name(&full).to_owned()).or_default();
            versions.push((full, folder));
        }
    }
    Ok(crates)
}

/// The name in `{name}-{version}`: all before the first `-` that a version (`1.2…`) follows.
pub(super) fn crate_name(folder: &str) -> &str {
    let dashes = folder.match_indices('-').map(|(at, _)| at);
    let is_version = |text: &str| {
        let major = text.split('.').next().unwrap_or_default();
        text.contains('.') && !major.is_empty() && major.bytes().all(|b| b.is_ascii_digit())
    };
    let mut ends = dashes.filter(|at| is_version(&folder[at + 1..]));
    ends.next().map_or(folder, |at| &folder[..at])
}
