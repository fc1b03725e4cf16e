//! Messages to bytes and back.

use std::fmt;

use serde::de::{DeserializeOwned, Visitor};
use serde::{Deserializer, Serialize};

use crate::error::{Error, ErrorKind};

/// The longest encoded message. A `status` of a broker with a thousand sessions is about 300 KiB; everything else
/// is under 10 KiB.
pub const MAX_MESSAGE_BYTES: usize = 1 << 20;

/// Deeper nesting than any message has; a decoder that recursed as deep as a peer likes would run out of stack.
const MAX_DEPTH: usize = 32;

/// Why a message could not be encoded or decoded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The message is longer than a frame may be.
    #[error("a message of {length} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")]
    TooLong {
        /// Length of the message.
        length: usize,
    },
    /// A table has more entries than tables have.
    #[error("a table of {count} tensors; {} are the most", super::MAX_TABLE_ENTRIES)]
    TooMany {
        /// Entries of the table.
        count: usize,
    },
    /// The bytes are not a message of this protocol version.
    #[error("not a message of this protocol: {0}")]
    Malformed(#[from] rmp_serde::decode::Error),
    /// Bytes follow the message.
    #[error("bytes follow the message")]
    Trailing,
    /// A value cannot be represented.
    #[error("the message cannot be encoded: {0}")]
    Unencodable(#[from] rmp_serde::encode::Error),
}

/// Appends `message` to `bytes`, structures as lists of their fields: both sides have agreed on the version, and
/// names would be most of what is written, compared and skipped in each call.
///
/// # Errors
/// [`CodecError::TooLong`]; `bytes` is left as it was.
pub fn encode<M: Serialize>(message: &M, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
    append(bytes, |bytes| message.serialize(&mut rmp_serde::Serializer::new(bytes)))
}

/// As [`encode`], of any length.
pub(super) fn append_all<M: Serialize>(message: &M, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
    Ok(message.serialize(&mut rmp_serde::Serializer::new(bytes))?)
}

/// As [`encode`], with field names: for what is said before a version is agreed on. A peer of another version
/// understands the fields it knows. [`decode`] takes both.
///
/// # Errors
/// As [`encode`].
pub fn encode_named<M: Serialize>(message: &M, bytes: &mut Vec<u8>) -> Result<(), CodecError> {
    append(bytes, |bytes| message.serialize(&mut rmp_serde::Serializer::new(bytes).with_struct_map()))
}

fn append(
    bytes: &mut Vec<u8>,
    write: impl FnOnce(&mut Vec<u8>) -> Result<(), rmp_serde::encode::Error>,
) -> Result<(), CodecError> {
    let start = bytes.len();
    let written = write(bytes);
    let length = bytes.len() - start;
    if let Err(error) = written {
        bytes.truncate(start);
        return Err(error.into());
    }
    if length > MAX_MESSAGE_BYTES {
        bytes.truncate(start);
        return Err(CodecError::TooLong { length });
    }
    Ok(())
}

/// The message that fills `bytes`.
///
/// # Errors
/// [`CodecError::TooLong`], [`CodecError::Malformed`], [`CodecError::Trailing`]. Never panics, and allocates no more
/// than a small multiple of `bytes.len()`.
pub fn decode<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, CodecError> {
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(CodecError::TooLong { length: bytes.len() });
    }
    decode_all(bytes)
}

/// As [`decode`], of any length.
pub(super) fn decode_all<M: DeserializeOwned>(bytes: &[u8]) -> Result<M, CodecError> {
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(bytes);
    deserializer.set_max_depth(MAX_DEPTH);
    let message = M::deserialize(&mut deserializer)?;
    // The library does not tell how much it read: only the end gives no further marker.
    match deserializer.deserialize_any(Nothing) {
        Err(rmp_serde::decode::Error::InvalidMarkerRead(_)) => Ok(message),
        Ok(()) | Err(_) => Err(CodecError::Trailing),
    }
}

/// Takes no value of any kind.
struct Nothing;

impl Visitor<'_> for Nothing {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the end of the message")
    }
}

impl From<CodecError> for Error {
    fn from(error: CodecError) -> Self {
        Self::caused(ErrorKind::Protocol, "", error)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::{ArenaId, Epoch, Generation, GpuUuid, LeaseRef, RequestId, SlotId};
    use crate::protocol::*;
    use crate::service::{Tiling, VaeCall, VaeOperation};
    use crate::tensor::{DType, Dims, TensorMeta};

    fn request(id: u64, name: &str, extents: &[u64]) -> ClientMessage {
        let shape = Dims::new(extents).unwrap();
        let lease = LeaseRef { arena: ArenaId(1), slot: SlotId(2), generation: Generation(3) };
        ClientMessage::Request(Request {
            id: RequestId(id),
            timeout_ms: Some(7),
            releases: vec![Release { lease, sequence: id }],
            operation: Operation::Vae(VaeRequest {
                model: name.to_owned(),
                call: VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto },
                input: TensorSource::Leased(Descriptor {
                    epoch: Epoch(u64::MAX),
                    lease,
                    offset: 4096,
                    sequence: 9,
                    meta: TensorMeta { dtype: DType::F16, shape, strides: shape },
                }),
                result: SlotPlace::Gpu(GpuTarget { gpu: GpuUuid([7; 16]), opening: 3 }),
            }),
        })
    }

    proptest! {
        #[test]
        fn a_message_survives_the_round_trip(id: u64, name in ".{0,80}", extents in prop::collection::vec(any::<u64>(), 0..=8)) {
            let message = request(id, &name, &extents);
            let mut bytes = Vec::new();
            encode(&message, &mut bytes).unwrap();
            prop_assert_eq!(decode::<ClientMessage>(&bytes).unwrap(), message.clone());
            bytes.clear();
            encode_named(&message, &mut bytes).unwrap();
            prop_assert_eq!(decode::<ClientMessage>(&bytes).unwrap(), message);
        }

        #[test]
        fn arbitrary_bytes_are_an_error_or_a_message_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _: Result<ClientMessage, _> = decode(&bytes);
            let _: Result<ServerMessage, _> = decode(&bytes);
        }

        #[test]
        fn a_damaged_message_is_an_error_or_a_message_but_never_a_panic(at in 0usize..200, with: u8) {
            let mut bytes = Vec::new();
            encode(&request(5, "model", &[1, 4, 8, 8]), &mut bytes).unwrap();
            let at = at % bytes.len();
            bytes[at] = with;
            let _: Result<ClientMessage, _> = decode(&bytes);
        }
    }

    #[test]
    fn nesting_without_end_is_refused() {
        let bytes = vec![0x91; 100_000];
        assert!(matches!(decode::<ClientMessage>(&bytes), Err(CodecError::Malformed(_))));
    }

    #[test]
    fn a_claimed_length_does_not_become_an_allocation() {
        // An array that claims four billion leases in a message of a few bytes.
        let mut bytes = Vec::new();
        bytes.extend([0x81, 0xa7]);
        bytes.extend(b"Release");
        bytes.extend([0xdd, 0xff, 0xff, 0xff, 0xff]);
        assert!(matches!(decode::<ClientMessage>(&bytes), Err(CodecError::Malformed(_))));
    }

    #[test]
    fn bytes_behind_a_message_are_refused() {
        let mut bytes = Vec::new();
        encode(&ClientMessage::Goodbye, &mut bytes).unwrap();
        for trailing in [0xc0, 0xc1, 0x91] {
            bytes.push(trailing);
            assert!(matches!(decode::<ClientMessage>(&bytes), Err(CodecError::Trailing)), "{trailing:#x}");
            bytes.pop();
        }
    }

    #[test]
    fn a_message_beyond_the_limit_is_not_encoded() {
        let mut bytes = vec![1];
        let message = ClientMessage::Request(Request {
            id: RequestId(0),
            timeout_ms: None,
            releases: Vec::new(),
            operation: Operation::Load { service: None, model: "m".repeat(MAX_MESSAGE_BYTES) },
        });
        assert!(matches!(encode(&message, &mut bytes), Err(CodecError::TooLong { .. })));
        assert_eq!(bytes, [1]);
    }

    #[test]
    fn named_fields_of_a_newer_peer_are_skipped() {
        #[derive(serde::Serialize)]
        struct Newer {
            lease: LeaseRef,
            invented: Vec<u32>,
        }
        let lease = LeaseRef { arena: ArenaId(1), slot: SlotId(2), generation: Generation(3) };
        let mut bytes = Vec::new();
        encode_named(&Newer { lease, invented: vec![1, 2] }, &mut bytes).unwrap();
        #[derive(serde::Deserialize)]
        struct Older {
            lease: LeaseRef,
        }
        assert_eq!(decode::<Older>(&bytes).unwrap().lease, lease);
    }
}
