//! The 64 bytes of an interprocess handle.

use std::process;

use crate::abi::Bytes64;
use crate::code::{INVALID_VALUE, Result};
use crate::faults::faults;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Sort {
    Memory,
    Event,
}

impl Sort {
    fn magic(self) -> u32 {
        u32::from_le_bytes(match self {
            Self::Memory => *b"LSM1",
            Self::Event => *b"LSE1",
        })
    }
}

/// What a handle says. An event uses only its maker, its number and its GPU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Handle {
    pub(crate) process: u32,
    pub(crate) namespace: u32,
    /// Of the shared file.
    pub(crate) number: u64,
    pub(crate) file_bytes: u64,
    /// Where in the file the allocation lies, and its size.
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    /// Different for every allocation of a process, even at one address.
    pub(crate) generation: u64,
    /// The first half of its UUID.
    pub(crate) gpu: [u8; 8],
}

impl Handle {
    /// Filled in with who makes it.
    pub(crate) fn own(gpu: &[u8; 16]) -> Self {
        let mut half = [0; 8];
        half.copy_from_slice(&gpu[..8]);
        Self { process: process::id(), namespace: faults().namespace, gpu: half, ..Self::default() }
    }

    pub(crate) fn is_own(&self) -> bool {
        self.process == process::id() && self.namespace == faults().namespace
    }

    pub(crate) fn encode(&self, sort: Sort) -> Bytes64 {
        let mut bytes = [0; 64];
        let words = [self.number, self.file_bytes, self.offset, self.bytes, self.generation];
        bytes[..4].copy_from_slice(&sort.magic().to_le_bytes());
        bytes[4..8].copy_from_slice(&self.process.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.namespace.to_le_bytes());
        for (place, word) in bytes[16..56].chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes[56..].copy_from_slice(&self.gpu);
        Bytes64(bytes)
    }

    pub(crate) fn decode(Bytes64(bytes): &Bytes64, sort: Sort) -> Result<Self> {
        let half = |at: usize| bytes[at..at + 4].iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(*byte));
        let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 4)) << 32;
        if half(0) != sort.magic() {
            return Err(INVALID_VALUE);
        }
        let mut gpu = [0; 8];
        gpu.copy_from_slice(&bytes[56..]);
        Ok(Self {
            process: half(4),
            namespace: half(8),
            number: word(16),
            file_bytes: word(24),
            offset: word(32),
            bytes: word(40),
            generation: word(48),
            gpu,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handle_says_the_same_after_its_bytes() {
        let handle = Handle {
            process: 1,
            namespace: 2,
            number: 1 << 40,
            file_bytes: 4,
            offset: 5,
            bytes: 6,
            generation: u64::MAX,
            gpu: [7; 8],
        };
        assert_eq!(Handle::decode(&handle.encode(Sort::Memory), Sort::Memory), Ok(handle));
        assert_eq!(Handle::decode(&handle.encode(Sort::Memory), Sort::Event), Err(INVALID_VALUE));
    }
}
