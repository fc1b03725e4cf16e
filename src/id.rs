//! Identifiers. Each is its own type, so that one cannot be passed where another is due.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    )*};
}

ids! {
    /// One life of a broker: random at start, so that nothing of an earlier life is mistaken for this one's.
    Epoch(u64);
    /// One negotiated peer, unique within an epoch.
    SessionId(u64);
    /// One request, chosen by the client, unique among the session's requests in flight.
    RequestId(u64);
    /// One loaded or known model, unique within an epoch.
    ModelId(u64);
    /// One region managed by a slot allocator, unique within an epoch.
    ArenaId(u32);
    /// One place in an arena's slot table; reused under a new [`Generation`].
    SlotId(u32);
    /// One set of weights in the broker's memory, unique within an epoch.
    WeightSetId(u64);
    /// One session's hold on a set of weights, unique within an epoch.
    AttachmentId(u64);
    /// Memory that a client is filling with tensors to publish, unique within an epoch.
    DraftId(u64);
    /// One place in a lane that a client holds, unique within an epoch.
    PermitId(u64);
    /// One sampling run, unique within a session.
    RunId(u64);
    /// Counts the uses of a slot: a reference with an old one is stale.
    Generation(u32);
}

/// The right to one slot, for one use of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LeaseRef {
    /// The arena.
    pub arena: ArenaId,
    /// The slot in it.
    pub slot: SlotId,
    /// Which use of the slot.
    pub generation: Generation,
}

/// The 16-byte identity of a GPU, the same in every process whatever ordinal it has there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GpuUuid(pub [u8; 16]);

impl fmt::Display for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let b = &self.0;
        write!(f, "GPU-")?;
        for (at, byte) in b.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                write!(f, "-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for GpuUuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What tensors contain, in 32 bytes: the same for the same keys, element types, shapes and values.
///
/// Where people read, it is written in hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentDigest(pub [u8; 32]);

impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for ContentDigest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for ContentDigest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return <[u8; 32]>::deserialize(deserializer).map(Self);
        }
        let text = String::deserialize(deserializer)?;
        let refused = || serde::de::Error::custom("a digest is 64 hexadecimal digits");
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() {
            return Err(refused());
        }
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| refused())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| refused())?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpu_uuid_prints_as_the_driver_tools_print_it() {
        let uuid = GpuUuid([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 255]);
        assert_eq!(uuid.to_string(), "GPU-00010203-0405-0607-0809-0a0b0c0d0eff");
    }
}
