use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::model::ModelFile;
use crate::tensor::DType;

/// One tensor to be written to a file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    pub(super) bytes: Vec<u8>,
}

impl Entry {
    /// Bytes that depend on the key and never repeat in step with a chunk.
    pub(super) fn filled(key: &str, dtype: DType, shape: &[u64]) -> Self {
        let length = shape.iter().product::<u64>() as usize * dtype.size_bytes();
        let mut state = key.bytes().fold(17u32, |state, byte| state.wrapping_mul(31).wrapping_add(u32::from(byte)));
        let bytes = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        });
        Self { key: key.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.take(length).collect() }
    }
}

/// The name a header has for an element type.
pub(super) fn header_name(dtype: DType) -> &'static str {
    match dtype {
        DType::Bool => "BOOL",
        DType::U8 => "U8",
        DType::I8 => "I8",
        DType::U16 => "U16",
        DType::I16 => "I16",
        DType::U32 => "U32",
        DType::I32 => "I32",
        DType::U64 => "U64",
        DType::I64 => "I64",
        DType::F8E4M3Fn => "F8_E4M3",
        DType::F8E5M2 => "F8_E5M2",
        DType::F16 => "F16",
        DType::Bf16 => "BF16",
        DType::F32 => "F32",
        DType::F64 => "F64",
    }
}

/// The header of a file whose tensors lie in the order given, `padding` spaces longer than it must be.
fn header<'a>(tensors: impl Iterator<Item = (&'a str, &'a str, &'a [u64], u64)>, padding: usize) -> Vec<u8> {
    let mut end = 0;
    let entries: Vec<String> = tensors
        .map(|(key, dtype, shape, length)| {
            let start = end;
            end += length;
            format!(r#"{key:?}:{{"dtype":"{dtype}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#)
        })
        .collect();
    let text = format!("{{{}}}{}", entries.join(","), " ".repeat(padding));
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    bytes
}

/// A temporary folder of model files.
pub(super) struct Folder(TempDir);

impl Folder {
    pub(super) fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(super) fn write(&self, name: &str, entries: &[Entry], padding: usize) -> ModelFile {
        let described = entries
            .iter()
            .map(|entry| (&*entry.key, header_name(entry.dtype), &*entry.shape, entry.bytes.len() as u64));
        let mut bytes = header(described, padding);
        entries.iter().for_each(|entry| bytes.extend(&entry.bytes));
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        ModelFile::open(&path).unwrap()
    }

    /// A file of tensors that are given without their bytes: one large hole.
    pub(super) fn write_hole(&self, name: &str, tensors: &[(&str, &str, &[u64], u64)], padding: usize) -> PathBuf {
        let header = header(tensors.iter().copied(), padding);
        let path = self.path(name);
        let mut file = File::create(&path).unwrap();
        file.write_all(&header).unwrap();
        let data: u64 = tensors.iter().map(|&(.., length)| length).sum();
        file.set_len(header.len() as u64 + data).unwrap();
        path
    }
}

/// Cuts the file at `path` off, as a download that starts again does.
pub(super) fn shorten(path: &Path, size_bytes: u64) {
    File::options().write(true).open(path).unwrap().set_len(size_bytes).unwrap();
}
