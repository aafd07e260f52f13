//! State dicts as `torch.save` writes them, for programs that load nothing else.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use super::safetensors::Outgoing;
use crate::error::{Error, Result};

/// Data of tensors begin at multiples of this, as PyTorch aligns them.
const ALIGNMENT: u64 = 64;

/// Writes a state dict, holding one tensor in memory at a time.
pub(super) fn write(path: &Path, tensors: &[Outgoing<'_>]) -> Result<()> {
    let file = File::create(path).map_err(Error::io("write", path))?;
    let mut zip = ZipWriter::new(BufWriter::new(file), u64::from(u32::MAX));
    let failed = || Error::io("write", path);
    let entry = |name: &str| format!("pytorch_model/{name}");
    zip.add(&entry("data.pkl"), &state_dict(tensors))
        .and_then(|()| zip.add(&entry("byteorder"), b"little"))
        .map_err(failed())?;
    for (i, tensor) in tensors.iter().enumerate() {
        let values = (tensor.values)()?;
        zip.add(&entry(&format!("data/{i}")), bytemuck::cast_slice(&values))
            .map_err(failed())?;
    }
    zip.add(&entry("version"), b"3\n")
        .and_then(|()| zip.finish())
        .and_then(|file| file.into_inner().map_err(|e| e.into_error()))
        .and_then(|file| file.sync_all())
        .map_err(failed())
}

/// The pickle: an `OrderedDict` of names and tensors, each with a storage of its own.
fn state_dict(tensors: &[Outgoing<'_>]) -> Vec<u8> {
    const DICT: &[u8] = b"ccollections\nOrderedDict\n)R";
    let mut out = vec![0x80, 2];
    out.extend(DICT);
    out.push(b'(');
    for (i, tensor) in tensors.iter().enumerate() {
        let count: usize = tensor.shape.iter().product();
        text(&mut out, &tensor.name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        integer(&mut out, count);
        out.extend(b"tQ");
        integer(&mut out, 0);
        out.push(b'(');
        for length in &tensor.shape {
            integer(&mut out, *length);
        }
        out.extend(b"t(");
        for dimension in 0..tensor.shape.len() {
            integer(&mut out, tensor.shape[dimension + 1..].iter().product());
        }
        // Without gradients and hooks.
        out.extend(b"t\x89");
        out.extend(DICT);
        out.extend(b"tR");
    }
    out.extend(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, number: usize) {
    match i32::try_from(number) {
        Ok(number) => {
            out.push(b'J');
            out.extend(number.to_le_bytes());
        }
        Err(_) => {
            out.extend([0x8a, 8]);
            out.extend((number as u64).to_le_bytes());
        }
    }
}

/// What the directory says of an entry.
struct Entry {
    name: String,
    crc: u32,
    length: u64,
    offset: u64,
}

/// A zip file of entries that are stored as they are.
struct ZipWriter<W> {
    out: W,
    offset: u64,
    entries: Vec<Entry>,
    /// Numbers from here on stand in the wider fields of zip64.
    limit: u64,
}

impl<W: Write> ZipWriter<W> {
    fn new(out: W, limit: u64) -> Self {
        Self {
            out,
            offset: 0,
            entries: Vec::new(),
            limit,
        }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.offset += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    /// A number in 32 bits, or all ones where the wider field has it.
    fn narrow(&self, number: u64) -> [u8; 4] {
        let number = match number < self.limit {
            true => number as u32,
            false => u32::MAX,
        };
        number.to_le_bytes()
    }

    fn add(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let entry = Entry {
            name: name.to_owned(),
            crc: crc32fast::hash(content),
            length: content.len() as u64,
            offset: self.offset,
        };
        let mut extra = Vec::new();
        if entry.length >= self.limit {
            // Size as it is and size as stored.
            extra.extend([1, 0, 16, 0]);
            extra.extend(entry.length.to_le_bytes());
            extra.extend(entry.length.to_le_bytes());
        }
        // A field that means nothing moves the content to its place.
        let content_at = self.offset + 30 + name.len() as u64 + extra.len() as u64 + 4;
        let padding = content_at.next_multiple_of(ALIGNMENT) - content_at;
        extra.extend(*b"FB");
        extra.extend((padding as u16).to_le_bytes());
        extra.resize(extra.len() + padding as usize, b'Z');
        let mut header = b"PK\x03\x04".to_vec();
        header.extend(self.common(&entry));
        header.extend((extra.len() as u16).to_le_bytes());
        header.extend(name.as_bytes());
        header.extend(extra);
        self.put(&header)?;
        self.put(content)?;
        self.entries.push(entry);
        Ok(())
    }

    /// The fields that an entry has at its place and in the directory alike.
    fn common(&self, entry: &Entry) -> Vec<u8> {
        // Version needed, flags, method (stored), time and date (1 January 1980).
        let mut fields = vec![45, 0, 0, 0, 0, 0, 0, 0, 33, 0];
        fields.extend(entry.crc.to_le_bytes());
        fields.extend(self.narrow(entry.length));
        fields.extend(self.narrow(entry.length));
        fields.extend((entry.name.len() as u16).to_le_bytes());
        fields
    }

    /// Writes the directory.
    fn finish(mut self) -> io::Result<W> {
        let start = self.offset;
        for entry in std::mem::take(&mut self.entries) {
            let wide: Vec<u64> = [entry.length, entry.length, entry.offset]
                .into_iter()
                .filter(|number| *number >= self.limit)
                .collect();
            let mut extra = Vec::new();
            if !wide.is_empty() {
                extra.extend([1, 0, 8 * wide.len() as u8, 0]);
                extra.extend(wide.iter().flat_map(|number| number.to_le_bytes()));
            }
            let mut header = b"PK\x01\x02\x2d\x00".to_vec();
            header.extend(self.common(&entry));
            header.extend((extra.len() as u16).to_le_bytes());
            // No comment, first disk, no attributes.
            header.extend([0; 10]);
            header.extend(self.narrow(entry.offset));
            header.extend(entry.name.as_bytes());
            header.extend(extra);
            self.put(&header)?;
            self.entries.push(entry);
        }
        let (length, count) = (self.offset - start, self.entries.len() as u64);
        let wide = start.max(length) >= self.limit || count >= u64::from(u16::MAX);
        if wide {
            let end64 = self.offset;
            let mut record = b"PK\x06\x06".to_vec();
            record.extend(44u64.to_le_bytes());
            record.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            for number in [count, count, length, start] {
                record.extend(number.to_le_bytes());
            }
            record.extend(b"PK\x06\x07\0\0\0\0");
            record.extend(end64.to_le_bytes());
            record.extend(1u32.to_le_bytes());
            self.put(&record)?;
        }
        let mut record = b"PK\x05\x06\0\0\0\0".to_vec();
        let count = u16::try_from(count).unwrap_or(u16::MAX).to_le_bytes();
        record.extend([count, count].concat());
        match wide {
            true => record.extend([0xff; 8]),
            false => {
                record.extend((length as u32).to_le_bytes());
                record.extend((start as u32).to_le_bytes());
            }
        }
        record.extend([0, 0]);
        self.put(&record)?;
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::file::RandomAccess;
    use super::super::zip::Zip;
    use super::*;

    fn archive(limit: u64) -> Vec<u8> {
        let mut zip = ZipWriter::new(Vec::new(), limit);
        for i in 0..20usize {
            zip.add(&format!("folder/{i}"), &vec![i as u8; 13 * i])
                .expect("memory takes it");
        }
        zip.finish().expect("memory takes it")
    }

    #[test]
    fn what_is_written_is_read_with_fields_of_either_width() {
        for limit in [u64::from(u32::MAX), 1000, 100, 0] {
            let bytes = archive(limit);
            let file = bytes.as_slice();
            let zip = Zip::open(&file).unwrap_or_else(|e| panic!("limit {limit}: {e}"));
            assert_eq!(zip.names().count(), 20);
            for i in 0..20usize {
                let place = zip.find(&file, &format!("folder/{i}")).expect("an entry");
                assert_eq!(place.offset % ALIGNMENT, 0, "entry {i}");
                let content = RandomAccess::read(&file, place.offset, place.length);
                assert_eq!(
                    content,
                    Ok(vec![i as u8; 13 * i]),
                    "entry {i}, limit {limit}"
                );
            }
        }
    }
}
