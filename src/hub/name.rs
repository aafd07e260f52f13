//! How a checkpoint on the hub is written.

use std::fmt;
use std::path::Path;

use crate::error::{Error, Result};

/// `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// `OWNER/NAME`.
    pub repository: String,
    /// Branch, tag or commit; `main` if none was given.
    pub revision: String,
}

impl Name {
    /// The name that stands where a path could, if it is one; every other path is a path.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] where something else follows `hf:`.
    pub fn of(path: &Path) -> Option<Result<Self>> {
        let text = path.to_str()?.strip_prefix("hf:")?;
        Some(Self::parse(text).ok_or_else(|| {
            Error::Usage {
                message: format!("`hf:{text}` is not a name on Hugging Face"),
                hint: "write hf:OWNER/NAME or hf:OWNER/NAME@REVISION, as in \
                   hf:JunxiongWang/MambaByte_PG19_972M"
                    .to_owned(),
            }
        }))
    }

    fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = repository.split_once('/')?;
        // They become parts of addresses and of paths in the cache.
        let good = is_part(owner)
            && is_part(name)
            && revision.split('/').all(is_part)
            // The cache writes a slash like this.
            && !repository.contains("--");
        good.then(|| Self {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Whether the revision can mean one thing only: a whole commit hash.
    pub fn is_pinned(&self) -> bool {
        is_commit(&self.revision)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hf:{}", self.repository)?;
        match self.revision.as_str() {
            "main" => Ok(()),
            revision => write!(f, "@{revision}"),
        }
    }
}

/// Whether `text` can be one part of a path, here and in an address.
pub(super) fn is_part(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty()
        && text.len() <= 128
        && text.chars().all(plain)
        && !text.starts_with('.')
        && !text.contains("..")
}

/// Whether `text` is a whole commit hash.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_lower_hex(text)
}

/// Whether `text` consists of lower-case hexadecimal digits.
pub(super) fn is_lower_hex(text: &str) -> bool {
    text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> Option<Result<Name>> {
        Name::of(Path::new(text))
    }

    #[test]
    fn names_have_an_owner_and_may_have_a_revision() {
        let main = name("hf:state-spaces/mamba-130m")
            .expect("a name")
            .expect("a good one");
        assert_eq!(main.repository, "state-spaces/mamba-130m");
        assert_eq!(main.revision, "main");
        assert_eq!(main.to_string(), "hf:state-spaces/mamba-130m");
        assert!(!main.is_pinned());
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let pinned = name(&format!("hf:a/b@{commit}"))
            .expect("a name")
            .expect("a good one");
        assert!(pinned.is_pinned());
        assert_eq!(pinned.to_string(), format!("hf:a/b@{commit}"));
        let branch = name("hf:a/b@refs/pr/1")
            .expect("a name")
            .expect("a good one");
        assert_eq!(branch.revision, "refs/pr/1");
    }

    #[test]
    fn paths_are_not_names() {
        for path in ["checkpoints/run", "hf", "./hf:a/b", ""] {
            assert!(name(path).is_none(), "{path}");
        }
    }

    #[test]
    fn what_would_leave_the_cache_or_change_the_address_is_refused() {
        for text in [
            "hf:",
            "hf:gpt2",
            "hf:a/b/c",
            "hf:../b",
            "hf:a/..",
            "hf:/b",
            "hf:a/",
            "hf:a/b@",
            "hf:a/b@..",
            "hf:a/b@x/../../y",
            "hf:a/b@/etc",
            "hf:a/b?x=1",
            "hf:a/b@main#x",
            "hf:a/b@m%2e",
            "hf:a b/c",
            "hf:a--b/c",
            "hf:a/.b",
        ] {
            let refused = name(text).expect("something behind `hf:`");
            assert!(matches!(refused, Err(Error::Usage { .. })), "{text}");
        }
    }
}
