//! `manifest.json`: what a checkpoint consists of, and where training is.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::error::{Error, Result};
use crate::train::guard::GuardState;

/// The file whose presence makes a folder a checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// Version of the layout; another version is refused.
pub(super) const FORMAT: u32 = 1;

/// Longest manifest that is read, in bytes; one of ours has some kB.
const LONGEST: u64 = 4 << 20;

/// A file of a checkpoint, as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name in the folder.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// xxh3-128 of the content, in hexadecimal.
    pub xxh3: String,
}

/// The training data of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataIdentity {
    /// Hash over documents, their order and names.
    pub hash: String,
    /// Bytes of text.
    pub bytes: u64,
    /// Documents.
    pub documents: u64,
}

/// Where training is: what a checkpoint records besides tensors.
///
/// Batches, samples and initial weights are pure functions of `train.seed` and a step, so there is
/// no random generator whose state would have to be kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps done, those whose update was skipped included.
    pub step: u64,
    /// Steps whose update was skipped: AdamW's bias correction counts the others.
    #[serde(default)]
    pub skipped_updates: u64,
    /// Batches that rollbacks went past: step s learns from batch s - 1 + `skipped_batches`.
    #[serde(default)]
    pub skipped_batches: u64,
    /// Bytes learnt from.
    pub bytes_seen: u64,
    /// Identity of the training data (a hash); another corpus is refused on resume.
    pub data: Option<String>,
    /// Bytes of the training data.
    #[serde(default)]
    pub data_bytes: u64,
    /// Documents of the training data.
    #[serde(default)]
    pub data_documents: u64,
    /// Bits a byte of the newest validation, if there was one.
    pub valid_bpb: Option<f64>,
    /// Bytes of `metrics.jsonl` that belong to this state: what is behind them comes again.
    #[serde(default)]
    pub metrics_bytes: Option<u64>,
    /// What the guard against bad numbers remembers.
    #[serde(default)]
    pub guard: GuardState,
    /// Whether `checkpoint.every_steps` asked for it. Only those are rolled back to: which ones
    /// there are does not depend on when a run was interrupted.
    #[serde(default)]
    pub planned: bool,
}

impl Progress {
    /// Before the first step of a run on `data`.
    pub fn start(data: &DataIdentity) -> Self {
        Self {
            data: Some(data.hash.clone()),
            data_bytes: data.bytes,
            data_documents: data.documents,
            ..Self::default()
        }
    }

    /// Number of the batch that step `step` learns from.
    pub fn batch_of(&self, step: u64) -> u64 {
        (step - 1).saturating_add(self.skipped_batches)
    }

    /// Whether a run may go back to it: planned, and not between bad steps.
    pub fn is_good(&self) -> bool {
        self.planned && self.guard.in_a_row() == 0
    }

    /// Updates that were made.
    pub fn updates(&self) -> u64 {
        self.step.saturating_sub(self.skipped_updates)
    }
}

/// The last file of a checkpoint: what it consists of and where training is.
///
/// On disk, the first key is `xxh3`, a hash of the text without that line. Manifests of before there
/// was one begin with `format`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the layout.
    pub format: u32,
    /// Version of the program that wrote it.
    pub program: String,
    /// Where training is.
    #[serde(flatten)]
    pub progress: Progress,
    /// Where imported weights are from, with the commit: `hf:OWNER/NAME@COMMIT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// All other files.
    pub files: Vec<FileEntry>,
}

/// What stands before and behind the hash of a manifest's text.
const HASH: [&str; 2] = ["{\n  \"xxh3\": \"", "\",\n"];

impl Manifest {
    /// The text of the file.
    pub(super) fn to_text(&self) -> Result<String> {
        let text = serde_json::to_string_pretty(self).map_err(anyhow::Error::from)? + "\n";
        let rest = text.trim_start_matches("{\n");
        let [before, behind] = HASH;
        let hash = xxh3_128(rest.as_bytes());
        Ok(format!("{before}{hash:032x}{behind}{rest}"))
    }

    /// Reads the manifest of a checkpoint folder.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] where there is none, [`Error::Checkpoint`] for what is not one, one of another
    /// version, one that was altered, and one that names files outside its folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let damaged = |reason: String| Error::Checkpoint {
            path: path.clone(),
            reason,
            hint: "use another checkpoint of the run".to_owned(),
        };
        let bytes = fs::metadata(&path).map_err(Error::io("read", &path))?.len();
        if bytes > LONGEST {
            return Err(damaged(format!(
                "is not a manifest: it has {bytes} bytes, and none has more than {LONGEST}"
            )));
        }
        let text = fs::read(&path).map_err(Error::io("read", &path))?;
        Self::parse(&text).map_err(damaged)
    }

    /// Reads the text of a manifest; otherwise, what is wrong with it.
    fn parse(text: &[u8]) -> std::result::Result<Self, String> {
        let none = |e| format!("is not a manifest: {e}");
        // The version first: another layout need not have the same keys.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let Version { format } = serde_json::from_slice(text).map_err(none)?;
        if format != FORMAT {
            return Err(format!(
                "has format version {format}, and this program reads version {FORMAT}"
            ));
        }
        check_hash(text)?;
        let manifest: Self = serde_json::from_slice(text).map_err(none)?;
        let inside = |name: &str| !name.is_empty() && !name.contains(['/', '\\']) && name != "..";
        match manifest.files.iter().find(|file| !inside(&file.name)) {
            Some(file) => Err(format!(
                "names a file outside the checkpoint: {:?}",
                file.name
            )),
            None => Ok(manifest),
        }
    }
}

/// That the text is what was written.
fn check_hash(text: &[u8]) -> std::result::Result<(), String> {
    if text.starts_with(b"{\n  \"format\":") {
        return Ok(());
    }
    let [before, behind] = HASH.map(str::as_bytes);
    let hash = text
        .strip_prefix(before)
        .and_then(|it| it.split_at_checked(32));
    let Some((hash, rest)) = hash.and_then(|(hash, it)| Some((hash, it.strip_prefix(behind)?)))
    else {
        return Err("was altered: it does not begin with its hash".to_owned());
    };
    let expected = format!("{:032x}", xxh3_128(rest));
    match hash == expected.as_bytes() {
        true => Ok(()),
        false => Err("was altered: its hash is not that of its text".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            format: FORMAT,
            program: "1.2.3".to_owned(),
            progress: Progress {
                step: 20,
                skipped_updates: 2,
                skipped_batches: 7,
                bytes_seen: 2304,
                data: Some("ab".to_owned()),
                data_bytes: 3000,
                data_documents: 11,
                valid_bpb: Some(0.1 + 0.2),
                metrics_bytes: Some(17),
                guard: GuardState::default(),
                planned: true,
            },
            source: Some("hf:a/b@c".to_owned()),
            files: vec![FileEntry {
                name: "config.toml".to_owned(),
                bytes: 3,
                xxh3: "00".to_owned(),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let text = manifest().to_text().expect("written");
        assert_eq!(Manifest::parse(text.as_bytes()), Ok(manifest()));
    }

    #[test]
    fn those_of_before_there_was_a_hash_are_read() {
        let text = r#"{
  "format": 1,
  "program": "0.1.0",
  "step": 20,
  "bytes_seen": 2560,
  "data": "ab",
  "valid_bpb": null,
  "files": []
}
"#;
        let progress = Manifest::parse(text.as_bytes()).expect("read").progress;
        assert_eq!((progress.step, progress.updates()), (20, 20));
        assert_eq!(progress.batch_of(21), 20);
        assert!(!progress.is_good(), "nothing says that it was planned");
    }

    #[test]
    fn every_flipped_bit_is_found() {
        let text = manifest().to_text().expect("written").into_bytes();
        for at in 0..text.len() {
            for bit in 0..8 {
                let mut damaged = text.clone();
                damaged[at] ^= 1 << bit;
                assert!(Manifest::parse(&damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(Manifest::parse(&text[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn files_outside_the_folder_are_refused() {
        for name in ["../model.safetensors", "/etc/passwd", "..", "", "a\\b"] {
            let mut manifest = manifest();
            manifest.files[0].name = name.to_owned();
            let text = manifest.to_text().expect("written");
            let problem = Manifest::parse(text.as_bytes()).expect_err(name);
            assert!(problem.contains("outside"), "{problem}");
        }
    }

    #[test]
    fn skipped_steps_learn_and_update_nothing() {
        let progress = manifest().progress;
        assert_eq!(progress.updates(), 18);
        assert_eq!(progress.batch_of(21), 27);
    }
}
