use std::path::Path;

use safetensors::tensor::Metadata;

use super::ModelError;

/// Bytes before the header: its length as a little-endian 64-bit integer.
const LENGTH_BYTES: usize = 8;
/// Enough of a file to tell what else it is than safetensors.
const BEGINNING_BYTES: usize = 64;
/// What safetensors allows a header; the longest take a hundredth of it.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest piece of a file's own text that is repeated in a message.
const MAX_QUOTED_CHARS: usize = 120;
/// Endings under which pickle checkpoints are published.
const PICKLE_ENDINGS: [&str; 5] = ["ckpt", "pt", "pth", "bin", "pkl"];

/// What a file holds, as its header says.
#[derive(Debug)]
pub(super) struct Header {
    /// Names, element types, shapes and places of the tensors; they follow each other from 0 on without a gap.
    pub(super) metadata: Metadata,
    /// Byte of the file at which the tensors begin.
    pub(super) data_start: usize,
}

/// Reads and checks the header of the file at `path`, which has `size_bytes`. `read` fills a slice with what the file holds
/// from some byte on, and fails where the file has become shorter.
///
/// # Errors
/// [`ModelError::Pickle`], [`ModelError::Malformed`], and those of `read`.
pub(super) fn read_header(
    path: &Path,
    size_bytes: u64,
    read: impl Fn(u64, &mut [u8]) -> Result<(), ModelError>,
) -> Result<Header, ModelError> {
    let mut beginning = [0; BEGINNING_BYTES];
    let known = usize::try_from(size_bytes).unwrap_or(usize::MAX).min(BEGINNING_BYTES);
    let beginning = beginning.get_mut(..known).unwrap_or_default();
    read(0, beginning)?;
    let refused = |reason: String| refuse(path, beginning, reason);
    let Some(length) = beginning.first_chunk::<LENGTH_BYTES>() else {
        return Err(refused(format!("{size_bytes} bytes are too few for a header")));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(refused("header too large".to_owned()));
    }
    let data_start = LENGTH_BYTES as u64 + length;
    if data_start > size_bytes {
        return Err(refused("the header is longer than the file".to_owned()));
    }
    let mut text = vec![0; length as usize];
    read(LENGTH_BYTES as u64, &mut text)?;
    let metadata = parse(&text).map_err(|reason| refused(shorten(&reason)))?;
    if (metadata.data_len() as u64).checked_add(data_start) != Some(size_bytes) {
        let reason = "the tensors do not end where the file ends; it is truncated or has bytes appended";
        return Err(refused(reason.to_owned()));
    }
    Ok(Header { metadata, data_start: data_start as usize })
}

/// The header's content. That tensors neither overlap nor leave gaps, and are as long as their shapes say, is checked by
/// the library as it takes them over.
fn parse(text: &[u8]) -> Result<Metadata, String> {
    let text = std::str::from_utf8(text).map_err(|error| format!("invalid UTF-8 in header: {error}"))?;
    serde_json::from_str(text).map_err(|error| match error.line() {
        // Valid JSON that the library would not take: no place in the text is to blame.
        0 => error.to_string(),
        _ => format!("invalid JSON in header: {error}"),
    })
}

/// The error for bytes that are not safetensors: a pickle is named as one, whatever it is called.
fn refuse(path: &Path, beginning: &[u8], reason: String) -> ModelError {
    let zipped = beginning.starts_with(b"PK\x03\x04");
    let pickled = matches!(beginning, [0x80, 2..=5, ..]);
    let named = path
        .extension()
        .and_then(|ending| ending.to_str())
        .is_some_and(|ending| PICKLE_ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known)));
    if zipped || pickled || named {
        return ModelError::Pickle { path: path.to_owned() };
    }
    let reason = match beginning.starts_with(b"version https://git-lfs") {
        true => "it is a Git LFS pointer, not the file it points to".to_owned(),
        false => reason,
    };
    ModelError::Malformed { path: path.to_owned(), reason }
}

/// `text` up to a length that is fit for a message.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// A tensor's name fit for a message: quoted, escaped, shortened.
pub(in crate::model) fn quote(name: &str) -> String {
    format!("{:?}", shorten(name))
}
