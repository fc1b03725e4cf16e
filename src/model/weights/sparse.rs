use std::ops::Range;

use crate::model::ModelFile;

/// What the file holds from some byte on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Run {
    /// So many bytes that must be read. Some may still be in a hole.
    Data(u64),
    /// So many bytes that are known to be zero because nothing is stored for them.
    Hole(u64),
}

/// Answers where the holes of a file are, remembering the last answer: it is asked chunk by chunk, in order.
#[derive(Debug)]
pub(super) struct Runs<'a> {
    file: &'a ModelFile,
    is_sparse: bool,
    known: Range<u64>,
    known_is_hole: bool,
}

impl<'a> Runs<'a> {
    pub(super) fn new(file: &'a ModelFile) -> Self {
        Self { file, is_sparse: system::is_sparse(file), known: 0..0, known_is_hole: false }
    }

    /// What the file holds at `at`, cut off at `end`, which lies behind it.
    pub(super) fn at(&mut self, at: u64, end: u64) -> Run {
        let all = end.saturating_sub(at);
        if !self.is_sparse {
            return Run::Data(all);
        }
        if !self.known.contains(&at) {
            let (is_hole, until) = system::run(self.file, at);
            self.known = at..until;
            self.known_is_hole = is_hole;
        }
        let length = self.known.end.saturating_sub(at).min(all);
        if self.known_is_hole { Run::Hole(length) } else { Run::Data(length) }
    }
}

#[cfg(target_os = "linux")]
mod system {
    use rustix::fs::{SeekFrom, fstat, seek};
    use rustix::io::Errno;

    use crate::model::ModelFile;

    /// Bytes in a block of `st_blocks`, whatever the file system's own are.
    const BLOCK_BYTES: u64 = 512;

    /// Whether fewer bytes are stored than the file has. A compressed file is none the wiser for it, only asked about.
    pub(super) fn is_sparse(file: &ModelFile) -> bool {
        let stored = file.file().and_then(|file| fstat(file).ok()).map(|stat| stat.st_blocks.cast_unsigned());
        stored.is_some_and(|blocks| blocks.saturating_mul(BLOCK_BYTES) < file.size_bytes())
    }

    /// Whether a hole is at `at`, and where that ends. A file system that cannot tell has data everywhere.
    pub(super) fn run(file: &ModelFile, at: u64) -> (bool, u64) {
        let Some(file) = file.file() else { return (false, u64::MAX) };
        // Moves the file's cursor, which nothing else uses.
        match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data > at => (true, data),
            Ok(_) => (false, seek(file, SeekFrom::Hole(at)).ok().filter(|&hole| hole > at).unwrap_or(u64::MAX)),
            // No data from here to the end. A file that has been shortened answers the same: the size tells them apart.
            Err(Errno::NXIO) => {
                let size_bytes = fstat(file).map_or(0, |stat| stat.st_size.cast_unsigned());
                (at < size_bytes, if at < size_bytes { size_bytes } else { u64::MAX })
            }
            Err(_) => (false, u64::MAX),
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod system {
    use crate::model::ModelFile;

    pub(super) fn is_sparse(_: &ModelFile) -> bool {
        false
    }

    pub(super) fn run(_: &ModelFile, _: u64) -> (bool, u64) {
        (false, u64::MAX)
    }
}
