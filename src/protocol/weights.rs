use serde::{Deserialize, Serialize};

use super::codec::{self, CodecError};
use super::gpu::GpuTarget;
use super::message::ArenaHandle;
use crate::id::{AttachmentId, ContentDigest, DraftId, WeightSetId};
use crate::tensor::{CastRule, DType, Dims, TensorMeta};

/// The longest table of tensors: as many as there may be, with long names.
pub const MAX_TABLE_BYTES: usize = 64 << 20;

/// Fifty times as many as the largest models have. An entry takes a few bytes in a table and some hundred once it is read:
/// the bytes alone are no bound of the memory.
pub const MAX_TABLE_ENTRIES: usize = 1 << 18;

/// A wish to map all tensors of a file, or of a published set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachRequest {
    /// Name or path.
    pub name: String,
    /// Element types wanted.
    pub rule: CastRule,
    /// The opening of the client's GPU in whose memory they are wanted; absent for host memory.
    pub gpu: Option<GpuTarget>,
    /// The attachment that this one is going to take the place of, even where it was taken by force. It ends when the
    /// client gives it back.
    pub replaces: Option<AttachmentId>,
}

/// A set of weights, handed over. The table of its tensors is in the bytes behind the frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedWeights {
    /// The session's hold on it.
    pub attachment: AttachmentId,
    /// The set.
    pub set: WeightSetId,
    /// What its tensors contain.
    pub content: ContentDigest,
    /// Bytes of its memory.
    pub size_bytes: u64,
    /// How to map it. Handed over anew with each attachment: what is mapped twice takes no memory twice.
    pub handle: ArenaHandle,
}

/// A wish to hand tensors to the broker for others. Their table is in the bytes behind the frame, offsets left at 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishRequest {
    /// The name under which others attach them.
    pub name: String,
    /// What they contain: a set that is there already is not sent again.
    pub content: ContentDigest,
}

/// Memory for the tensors of a set that is being published. The table with their places is in the bytes behind the
/// frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DraftOffer {
    /// What to call it in [`super::Operation::PublishFilled`].
    pub draft: DraftId,
    /// Bytes of the memory.
    pub size_bytes: u64,
    /// How to map it, for writing.
    pub handle: ArenaHandle,
}

/// One tensor of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WeightEntry {
    /// Its key.
    pub key: String,
    /// Element type.
    pub dtype: DType,
    /// Extents; elements lie in row-major order without gaps.
    pub shape: Dims,
    /// Bytes from the start of the set's memory to the first element.
    pub offset: u64,
}

impl WeightEntry {
    /// Element type, shape and strides.
    #[must_use]
    pub fn meta(&self) -> TensorMeta {
        TensorMeta::contiguous(self.dtype, self.shape)
    }
}

/// What `verify` found of one set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyReport {
    /// A name of the set.
    pub name: String,
    /// Where it lies.
    pub device: String,
    /// Bytes of its memory.
    pub bytes: u64,
    /// What it contained when it was loaded or published.
    pub expected: ContentDigest,
    /// What it contains now.
    pub found: ContentDigest,
}

/// The bytes of a table.
///
/// # Errors
/// [`CodecError::TooLong`], [`CodecError::TooMany`].
pub fn encode_table(entries: &[WeightEntry]) -> Result<Vec<u8>, CodecError> {
    check_count(entries.len())?;
    let mut bytes = Vec::new();
    codec::append_all(&entries, &mut bytes)?;
    if bytes.len() > MAX_TABLE_BYTES {
        return Err(CodecError::TooLong { length: bytes.len() });
    }
    Ok(bytes)
}

/// The table in `bytes`.
///
/// # Errors
/// As [`codec::decode`]; [`CodecError::TooMany`], before anything is read.
pub fn decode_table(bytes: &[u8]) -> Result<Vec<WeightEntry>, CodecError> {
    if bytes.len() > MAX_TABLE_BYTES {
        return Err(CodecError::TooLong { length: bytes.len() });
    }
    check_count(claimed_entries(bytes))?;
    codec::decode_all(bytes)
}

fn check_count(count: usize) -> Result<(), CodecError> {
    if count > MAX_TABLE_ENTRIES { Err(CodecError::TooMany { count }) } else { Ok(()) }
}

/// The entries that a table says it has; none for what is not a table, which the decoder finds.
fn claimed_entries(bytes: &[u8]) -> usize {
    match *bytes {
        [0xdc, high, low, ..] => usize::from(u16::from_be_bytes([high, low])),
        [0xdd, a, b, c, d, ..] => u32::from_be_bytes([a, b, c, d]) as usize,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_many_tensors_survives_the_round_trip() {
        let entry = |at: u64| WeightEntry {
            key: format!("model.diffusion_model.input_blocks.{at}.weight"),
            dtype: DType::F8E4M3Fn,
            shape: Dims::of([at, 3]),
            offset: at * 64,
        };
        let entries: Vec<_> = (0..50_000).map(entry).collect();
        let bytes = encode_table(&entries).unwrap();
        assert!(bytes.len() > codec::MAX_MESSAGE_BYTES, "{}", bytes.len());
        assert_eq!(decode_table(&bytes).unwrap(), entries);
        assert!(decode_table(&bytes[..bytes.len() - 1]).is_err());
        assert!(decode_table(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_table_of_too_many_tensors_is_not_read() {
        let entry = WeightEntry { key: String::new(), dtype: DType::U8, shape: Dims::of([1]), offset: 0 };
        let most = encode_table(&vec![entry.clone(); MAX_TABLE_ENTRIES]).unwrap();
        assert_eq!(decode_table(&most).unwrap().len(), MAX_TABLE_ENTRIES);
        let many = vec![entry; MAX_TABLE_ENTRIES + 1];
        assert!(matches!(encode_table(&many), Err(CodecError::TooMany { .. })));
        let mut bytes = Vec::new();
        codec::append_all(&many, &mut bytes).unwrap();
        assert!(matches!(decode_table(&bytes), Err(CodecError::TooMany { .. })));
    }

    #[test]
    fn a_claimed_length_does_not_become_an_allocation() {
        assert!(decode_table(&[0xdd, 0xff, 0xff, 0xff, 0xff]).is_err());
    }
}
