//! The hub's list of a repository's files at one commit.

use serde::Deserialize;

use super::name::{is_commit, is_lower_hex, is_part};

/// Longest list that is read.
pub(super) const MOST_BYTES: u64 = 16 << 20;

/// A file of the repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// Its SHA-256 where the hub stores it as a large file, else its hash as git has it: the name of
    /// its content in the cache.
    pub(super) blob: String,
}

impl RemoteFile {
    /// The hash of its content, which of small files is not listed.
    pub(super) fn sha256(&self) -> Option<&str> {
        sha256_in(&self.blob)
    }
}

/// The SHA-256 that a name in the cache's folder of contents is, if it is one.
pub(super) fn sha256_in(blob: &str) -> Option<&str> {
    (blob.len() == 64 && is_lower_hex(blob)).then_some(blob)
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listing {
    pub(super) commit: String,
    pub(super) files: Vec<RemoteFile>,
}

/// The hub's answer; other keys are not read.
#[derive(Deserialize)]
struct Answer {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Listing {
    /// Reads the answer to `/api/models/OWNER/NAME/revision/REVISION?blobs=true`.
    ///
    /// Files in folders and such with odd names are left out: no checkpoint has them, and every name
    /// becomes a path.
    pub(super) fn parse(json: &[u8]) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(json)
            .map_err(|e| format!("answered with what is no list of its files: {e}"))?;
        if !is_commit(&answer.sha) {
            return Err("answered without the hash of a commit".to_owned());
        }
        let files = answer
            .siblings
            .into_iter()
            .filter(|sibling| is_part(&sibling.rfilename))
            .map(remote_file)
            .collect::<Result<_, String>>()?;
        Ok(Self {
            commit: answer.sha,
            files,
        })
    }

    pub(super) fn find(&self, name: &str) -> Option<&RemoteFile> {
        self.files.iter().find(|file| file.name == name)
    }
}

fn remote_file(sibling: Sibling) -> Result<RemoteFile, String> {
    let name = sibling.rfilename;
    let known = match sibling.lfs {
        Some(lfs) => (lfs.sha256.len() == 64).then_some((lfs.size, lfs.sha256)),
        None => sibling
            .size
            .zip(sibling.blob_id.filter(|id| id.len() == 40)),
    };
    match known {
        Some((bytes, blob)) if is_lower_hex(&blob) => Ok(RemoteFile { name, bytes, blob }),
        _ => Err(format!("lists `{name}` without its length and hash")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    /// An answer with these files, given as JSON.
    fn answer(files: &str) -> Vec<u8> {
        format!(
            r#"{{"id": "a/b", "sha": "{COMMIT}", "private": false, "gated": false,
                 "siblings": [{files}], "tags": ["mamba"]}}"#
        )
        .into_bytes()
    }

    #[test]
    fn large_files_have_a_sha256_and_small_ones_git_s_hash() {
        let sha256 = "ab".repeat(32);
        let listing = Listing::parse(&answer(&format!(
            r#"{{"rfilename": "config.json", "size": 200, "blobId": "{COMMIT}"}},
               {{"rfilename": "pytorch_model.bin", "size": 3895935578, "blobId": "{COMMIT}",
                 "lfs": {{"sha256": "{sha256}", "size": 3895935578, "pointerSize": 135}}}}"#
        )))
        .expect("a list");
        assert_eq!(listing.commit, COMMIT);
        let config = listing.find("config.json").expect("listed");
        assert_eq!((config.bytes, config.sha256()), (200, None));
        let weights = listing.find("pytorch_model.bin").expect("listed");
        assert_eq!(weights.sha256(), Some(sha256.as_str()));
        assert_eq!(weights.bytes, 3_895_935_578);
    }

    #[test]
    fn names_that_lead_elsewhere_are_left_out() {
        let odd = [
            "../x",
            "/etc/passwd",
            "a/b.bin",
            ".gitattributes",
            "a b",
            "",
        ];
        let files: Vec<String> = odd
            .iter()
            .map(|name| format!(r#"{{"rfilename": "{name}", "size": 1, "blobId": "{COMMIT}"}}"#))
            .collect();
        let listing = Listing::parse(&answer(&files.join(","))).expect("a list");
        assert_eq!(listing.files, []);
    }

    #[test]
    fn hashes_that_are_none_are_refused() {
        let path = "../../../../x".repeat(5);
        for file in [
            r#"{"rfilename": "a"}"#.to_owned(),
            r#"{"rfilename": "a", "size": 1}"#.to_owned(),
            r#"{"rfilename": "a", "size": 1, "blobId": "../x"}"#.to_owned(),
            format!(
                r#"{{"rfilename": "a", "lfs": {{"sha256": "{}", "size": 1}}}}"#,
                &path[..64]
            ),
            format!(
                r#"{{"rfilename": "a", "size": 1, "blobId": "{}"}}"#,
                &path[..40]
            ),
        ] {
            let problem = Listing::parse(&answer(&file)).expect_err(&file);
            assert!(problem.contains("`a`"), "{problem}");
        }
        for json in ["", "[]", "{}", r#"{"sha": "main", "siblings": []}"#] {
            assert!(Listing::parse(json.as_bytes()).is_err(), "{json}");
        }
    }
}
