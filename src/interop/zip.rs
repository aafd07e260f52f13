//! Reading zip files as `torch.save` writes them: every entry stored, none compressed.
//!
//! Only the directory at the end is read; entries are places in the file. A file of more than 4 GB
//! has the wider fields of zip64.

use std::collections::HashMap;

use super::file::RandomAccess;

/// Largest directory that is read; that of a 2.8B model has 60 kB.
const MOST_DIRECTORY: u64 = 64 << 20;

const LOCAL: u32 = 0x0403_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const END64_LOCATOR: u32 = 0x0706_4b50;

/// A file whose first bytes are these is a zip file.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// Where an entry's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// What the directory says of an entry.
#[derive(Clone, Copy, Debug)]
struct Entry {
    header: u64,
    length: u64,
    stored: bool,
}

/// The directory of a zip file.
#[derive(Debug)]
pub(super) struct Zip {
    entries: HashMap<String, Entry>,
}

impl Zip {
    /// Reads the directory.
    pub(super) fn open(file: &impl RandomAccess) -> Result<Self, String> {
        let (count, place) = find_directory(file)?;
        if place.length > MOST_DIRECTORY {
            return Err(format!(
                "its zip directory has {} bytes, more than {MOST_DIRECTORY}",
                place.length
            ));
        }
        let directory = file.read(place.offset, place.length)?;
        let mut entries = HashMap::new();
        let mut rest = directory.as_slice();
        for _ in 0..count {
            let (name, entry, next) = central_entry(rest)
                .ok_or("its zip directory ends early or has an entry that is none")?;
            if let Some(twice) = entries.insert(name, entry) {
                return Err(format!("its zip directory has an entry twice ({twice:?})"));
            }
            rest = next;
        }
        Ok(Self { entries })
    }

    /// The names of all entries.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Where the bytes of an entry are, inside the file.
    pub(super) fn find(&self, file: &impl RandomAccess, name: &str) -> Result<Extent, String> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| format!("has no entry `{name}`"))?;
        if !entry.stored {
            return Err(format!(
                "its entry `{name}` is compressed or encrypted, and `torch.save` stores entries as \
                 they are"
            ));
        }
        let header = file.read(entry.header, 30)?;
        if u32_at(&header, 0) != Some(LOCAL) {
            return Err(format!(
                "its entry `{name}` is not where the directory says"
            ));
        }
        // Name and extra field have other lengths here than in the directory: `torch.save` pads.
        let lengths = u16_at(&header, 26).zip(u16_at(&header, 28));
        let (name_length, extra) = lengths.unwrap_or_default();
        // A sum of a place inside the file and small numbers.
        let offset = entry.header + 30 + u64::from(name_length) + u64::from(extra);
        let end = offset.checked_add(entry.length);
        if end.is_none_or(|end| end > file.length()) {
            return Err(format!(
                "its entry `{name}` of {} bytes goes beyond the file's end: it is truncated",
                entry.length
            ));
        }
        Ok(Extent {
            offset,
            length: entry.length,
        })
    }
}

/// Number of entries and place of the directory.
fn find_directory(file: &impl RandomAccess) -> Result<(u64, Extent), String> {
    const END_SIZE: u64 = 22;
    const MOST_COMMENT: u64 = 65_535;
    let tail_length = file.length().min(END_SIZE + MOST_COMMENT);
    let tail_offset = file.length() - tail_length;
    let tail = file.read(tail_offset, tail_length)?;
    let missing = "has no zip directory at its end: it is truncated, or no zip file";
    let at = (0..(tail.len() + 1).saturating_sub(END_SIZE as usize))
        .rev()
        .find(|at| u32_at(&tail, *at) == Some(END))
        .ok_or(missing)?;
    let small = u16_at(&tail, at + 10)
        .zip(u32_at(&tail, at + 12))
        .zip(u32_at(&tail, at + 16));
    let ((count, length), offset) = small.ok_or(missing)?;
    // Fields that do not suffice are all ones; a longer record stands before.
    if count == u16::MAX || length == u32::MAX || offset == u32::MAX {
        return find_directory64(file, tail_offset + at as u64);
    }
    let place = Extent {
        offset: offset.into(),
        length: length.into(),
    };
    Ok((count.into(), place))
}

/// The same, of a zip64 file whose 32-bit record is at `end`.
fn find_directory64(file: &impl RandomAccess, end: u64) -> Result<(u64, Extent), String> {
    let broken = "has a zip64 directory that is not where it should be";
    let locator = file.read(end.checked_sub(20).ok_or(broken)?, 20)?;
    let record = match (u32_at(&locator, 0), u64_at(&locator, 8)) {
        (Some(END64_LOCATOR), Some(at)) => file.read(at, 56)?,
        _ => return Err(broken.to_owned()),
    };
    let fields = u64_at(&record, 32)
        .zip(u64_at(&record, 40))
        .zip(u64_at(&record, 48));
    match (u32_at(&record, 0), fields) {
        (Some(END64), Some(((count, length), offset))) => Ok((count, Extent { offset, length })),
        _ => Err(broken.to_owned()),
    }
}

/// The first entry of a directory: its name, what is said of it, and what follows.
fn central_entry(bytes: &[u8]) -> Option<(String, Entry, &[u8])> {
    if u32_at(bytes, 0)? != CENTRAL {
        return None;
    }
    let (flags, method) = (u16_at(bytes, 8)?, u16_at(bytes, 10)?);
    let (packed, length, header) = (u32_at(bytes, 20)?, u32_at(bytes, 24)?, u32_at(bytes, 42)?);
    let part = |at| u16_at(bytes, at).map(usize::from);
    let (name_length, extra_length, comment) = (part(28)?, part(30)?, part(32)?);
    let name_end = 46 + name_length;
    let name = bytes.get(46..name_end)?;
    let mut extra = wide_fields(bytes.get(name_end..name_end + extra_length)?);
    // Fields that do not suffice are all ones, and stand in the extra field in this order.
    let mut widen = |field: u32| match field {
        u32::MAX => {
            let wide = u64_at(extra, 0)?;
            extra = &extra[8..];
            Some(wide)
        }
        field => Some(field.into()),
    };
    let length = widen(length)?;
    let packed = widen(packed)?;
    let header = widen(header)?;
    let entry = Entry {
        header,
        length,
        stored: method == 0 && flags & 1 == 0 && packed == length,
    };
    let name = String::from_utf8_lossy(name).into_owned();
    Some((name, entry, bytes.get(name_end + extra_length + comment..)?))
}

/// The zip64 part of an extra field; nothing where it has none.
fn wide_fields(mut extra: &[u8]) -> &[u8] {
    while let Some((kind, length)) = u16_at(extra, 0).zip(u16_at(extra, 2)) {
        let end = 4 + usize::from(length);
        match extra.get(4..end) {
            Some(content) if kind == 1 => return content,
            Some(_) => extra = &extra[end..],
            None => break,
        }
    }
    &[]
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}
