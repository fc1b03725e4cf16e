//! Host memory that nobody can write to any more: what weights lie in.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::device::{DeviceError, Place, Region, RegionHandle};

fn os(call: &'static str) -> impl Fn(Errno) -> DeviceError {
    move |errno| DeviceError::Os { call, cause: errno.into() }
}

/// Memory that is being filled: its size is fixed, its content not yet.
#[derive(Debug)]
pub struct DraftRegion {
    map: MmapRaw,
    fd: OwnedFd,
}

impl DraftRegion {
    /// New zeroed memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    pub fn allocate(size_bytes: usize) -> Result<Arc<Self>, DeviceError> {
        let create = || -> io::Result<Self> {
            let fd = memfd_create("luna-broker-weights", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            ftruncate(&fd, size_bytes as u64)?;
            fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW)?;
            Self::map(fd, size_bytes)
        };
        let out_of_memory = |cause| DeviceError::OutOfMemory { what: "shared memory for weights", size_bytes, cause };
        Ok(Arc::new(create().map_err(out_of_memory)?))
    }

    /// The draft that another process allocated and asks this one to fill.
    ///
    /// # Errors
    /// [`DeviceError::NotSealed`], [`DeviceError::TooSmall`], [`DeviceError::Os`].
    pub fn import(fd: OwnedFd, size_bytes: usize) -> Result<Arc<Self>, DeviceError> {
        check(&fd, size_bytes, SealFlags::SHRINK)?;
        Ok(Arc::new(Self::map(fd, size_bytes).map_err(|cause| DeviceError::Os { call: "mmap", cause })?))
    }

    /// A child that is forked while this process fills the draft does not get the mapping: it would keep the draft from
    /// being sealed for as long as it lives.
    fn map(fd: OwnedFd, size_bytes: usize) -> io::Result<Self> {
        let map = MmapOptions::new().len(size_bytes).map_raw(&fd)?;
        map.advise(Advice::DontFork)?;
        Ok(Self { map, fd })
    }

    /// Ends the writing, everywhere and for good. The draft must be mapped nowhere else for writing: not in this
    /// process and not in one that it was handed to.
    ///
    /// # Errors
    /// [`DeviceError::StillMapped`] where it is.
    pub fn seal(self: Arc<Self>) -> Result<Arc<SealedRegion>, DeviceError> {
        let Self { map, fd } = Arc::into_inner(self).ok_or(DeviceError::StillMapped)?;
        let size_bytes = map.len();
        drop(map);
        match fcntl_add_seals(&fd, SealFlags::WRITE | SealFlags::SEAL) {
            Ok(()) => {}
            Err(Errno::BUSY) => return Err(DeviceError::StillMapped),
            Err(errno) => return Err(os("fcntl")(errno)),
        }
        SealedRegion::map(fd, size_bytes)
    }
}

// SAFETY: `map` is a shared mapping for reading and writing of `map.len()` bytes, which lives as long as the value; the
// seal against shrinking keeps every page of it there.
unsafe impl Region for DraftRegion {
    fn size_bytes(&self) -> usize {
        self.map.len()
    }

    fn address(&self) -> usize {
        self.map.as_ptr() as usize
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        let fd = self.fd.try_clone().map_err(|cause| DeviceError::Os { call: "dup", cause })?;
        Ok(RegionHandle::Fd(fd))
    }

    fn opened(&self) {}

    fn record(&self) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn wait(&self, _sequence: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// A private view of sealed memory. All views share its pages until one of them is written to: that page is then the
/// writer's own, and nobody else sees what was written.
#[derive(Debug)]
pub struct SealedRegion {
    address: *mut std::ffi::c_void,
    size_bytes: usize,
    fd: parking_lot::Mutex<OwnedFd>,
}

// SAFETY: the address is that of a mapping which the value owns, usable from any thread.
unsafe impl Send for SealedRegion {}
// SAFETY: as above; the mapping itself is changed by `replace` alone, which swaps pages of equal content in one step.
unsafe impl Sync for SealedRegion {}

impl SealedRegion {
    /// A view of the memory behind `fd`.
    ///
    /// # Errors
    /// [`DeviceError::NotSealed`] where somebody could still write to it or shrink it, [`DeviceError::TooSmall`],
    /// [`DeviceError::Os`].
    pub fn import(fd: OwnedFd, size_bytes: usize) -> Result<Arc<Self>, DeviceError> {
        check(&fd, size_bytes, SealFlags::SHRINK | SealFlags::WRITE)?;
        Self::map(fd, size_bytes)
    }

    fn map(fd: OwnedFd, size_bytes: usize) -> Result<Arc<Self>, DeviceError> {
        // SAFETY: the system chooses the address, so nothing is mapped over.
        let address = unsafe { map_private(std::ptr::null_mut(), size_bytes, MapFlags::empty(), fd.as_fd()) }?;
        Ok(Arc::new(Self { address, size_bytes, fd: parking_lot::Mutex::new(fd) }))
    }

    /// Puts other memory of equal content behind the same addresses: whoever holds some goes on as if nothing had
    /// happened. Pages that were written to are given up with the old memory.
    ///
    /// # Errors
    /// As [`SealedRegion::import`]; the view is as it was then.
    pub fn replace(&self, fd: OwnedFd) -> Result<(), DeviceError> {
        check(&fd, self.size_bytes, SealFlags::SHRINK | SealFlags::WRITE)?;
        let mut current = self.fd.lock();
        // SAFETY: exactly this value's own mapping is replaced, by one of the same size and access; the kernel does so in
        // one step, so that a reader finds the old pages or the new ones.
        unsafe { map_private(self.address, self.size_bytes, MapFlags::FIXED, fd.as_fd()) }?;
        *current = fd;
        Ok(())
    }

    /// What the system calls the memory: the same number in every process that maps it.
    ///
    /// # Errors
    /// [`DeviceError::Os`].
    pub fn inode(&self) -> Result<u64, DeviceError> {
        Ok(fstat(&*self.fd.lock()).map_err(os("fstat"))?.st_ino)
    }
}

impl SealedRegion {
    /// Bytes of the memory's pages that exist: all but those that nobody has ever written to.
    ///
    /// # Errors
    /// [`DeviceError::Os`].
    pub fn stored_bytes(&self) -> Result<u64, DeviceError> {
        /// Bytes in a block of `st_blocks`, whatever the file system's own are.
        const BLOCK_BYTES: u64 = 512;
        let stat = fstat(&*self.fd.lock()).map_err(os("fstat"))?;
        Ok(stat.st_blocks.cast_unsigned().saturating_mul(BLOCK_BYTES))
    }
}

/// That the memory behind a handle holds enough and has these seals.
fn check(fd: &OwnedFd, size_bytes: usize, needed: SealFlags) -> Result<(), DeviceError> {
    let seals = fcntl_get_seals(fd).map_err(|_| DeviceError::NotSealed)?;
    if !seals.contains(needed) {
        return Err(DeviceError::NotSealed);
    }
    let actual = usize::try_from(fstat(fd).map_err(os("fstat"))?.st_size).unwrap_or(0);
    if actual < size_bytes {
        return Err(DeviceError::TooSmall { announced: size_bytes, actual });
    }
    Ok(())
}

/// # Safety
/// With [`MapFlags::FIXED`], the `size_bytes` at `address` must be a mapping that the caller may replace.
unsafe fn map_private(
    address: *mut std::ffi::c_void,
    size_bytes: usize,
    more: MapFlags,
    fd: BorrowedFd<'_>,
) -> Result<*mut std::ffi::c_void, DeviceError> {
    // Only pages that are written to take memory: reserving for all of them would refuse sets larger than what is free.
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | more;
    // SAFETY: the caller's promise; without FIXED nothing existing is touched.
    unsafe { mmap(address, size_bytes, ProtFlags::READ | ProtFlags::WRITE, flags, fd, 0) }.map_err(os("mmap"))
}

impl Drop for SealedRegion {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; nobody holds an address in it without holding the value.
        if let Err(errno) = unsafe { munmap(self.address, self.size_bytes) } {
            tracing::error!(%errno, "weights could not be unmapped");
        }
    }
}

// SAFETY: `size_bytes` bytes at `address` are mapped for reading and writing until the value is dropped; `replace` leaves
// no moment in which they are not. The seals keep every page of the memory there.
unsafe impl Region for SealedRegion {
    fn size_bytes(&self) -> usize {
        self.size_bytes
    }

    fn address(&self) -> usize {
        self.address.expose_provenance()
    }

    fn place(&self) -> Place {
        Place::Host
    }

    fn export(&self) -> Result<RegionHandle, DeviceError> {
        let fd = self.fd.lock().try_clone().map_err(|cause| DeviceError::Os { call: "dup", cause })?;
        Ok(RegionHandle::Fd(fd))
    }

    fn opened(&self) {}

    fn record(&self) -> Result<u64, DeviceError> {
        Ok(0)
    }

    fn wait(&self, _sequence: u64) -> Result<(), DeviceError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd_of(region: &dyn Region) -> OwnedFd {
        match region.export().unwrap() {
            RegionHandle::Fd(fd) => fd,
            other => panic!("{other:?}"),
        }
    }

    fn sealed(content: &[u8], size_bytes: usize) -> Arc<SealedRegion> {
        let draft = DraftRegion::allocate(size_bytes).unwrap();
        draft.copy_in(0, content).unwrap();
        draft.seal().unwrap()
    }

    fn read<const N: usize>(region: &dyn Region) -> [u8; N] {
        let mut bytes = [0; N];
        region.copy_out(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn what_one_view_writes_no_other_sees() {
        let ours = sealed(b"weights", 1 << 16);
        let theirs = SealedRegion::import(fd_of(&*ours), 1 << 16).unwrap();
        theirs.copy_in(0, b"strayed").unwrap();
        assert_eq!(&read(&*theirs), b"strayed");
        assert_eq!(&read(&*ours), b"weights");
    }

    #[test]
    fn a_draft_that_a_peer_still_writes_to_cannot_be_sealed() {
        let ours = DraftRegion::allocate(1 << 16).unwrap();
        let theirs = DraftRegion::import(fd_of(&*ours), 1 << 16).unwrap();
        theirs.copy_in(0, b"theirs").unwrap();
        assert!(matches!(Arc::clone(&ours).seal(), Err(DeviceError::StillMapped)), "this process still holds it");
        let fd = fd_of(&*ours);
        assert!(matches!(ours.seal(), Err(DeviceError::StillMapped)), "the peer still maps it");
        drop(theirs);
        let ours = DraftRegion::import(fd.try_clone().unwrap(), 1 << 16).unwrap();
        assert_eq!(&read(&*ours.seal().unwrap()), b"theirs");
        assert!(matches!(DraftRegion::import(fd, 1 << 16), Err(DeviceError::Os { call: "mmap", .. })));
    }

    #[test]
    fn a_child_that_is_forked_while_a_draft_is_filled_does_not_keep_it_from_being_sealed() {
        let ours = DraftRegion::allocate(1 << 16).unwrap();
        let theirs = DraftRegion::import(fd_of(&*ours), 1 << 16).unwrap();
        // SAFETY: the child does nothing but wait for its end.
        let child = unsafe { libc::fork() };
        if child == 0 {
            loop {
                // SAFETY: touches no memory.
                unsafe { libc::pause() };
            }
        }
        theirs.copy_in(0, b"filled").unwrap();
        drop(theirs);
        let sealed = ours.seal();
        // SAFETY: the child was forked above, is ended here, and nobody else waits for it; where its end is not told, none
        // is asked for.
        unsafe {
            libc::kill(child, libc::SIGKILL);
            libc::waitpid(child, std::ptr::null_mut(), 0);
        }
        assert_eq!(&read(&*sealed.unwrap()), b"filled");
    }

    #[test]
    fn memory_that_could_change_or_shrink_is_not_taken() {
        let draft = DraftRegion::allocate(1 << 16).unwrap();
        assert!(matches!(SealedRegion::import(fd_of(&*draft), 1 << 16), Err(DeviceError::NotSealed)));
        let sealed = draft.seal().unwrap();
        let fd = fd_of(&*sealed);
        assert!(ftruncate(&fd, 0).is_err());
        assert!(matches!(SealedRegion::import(fd, 1 << 20), Err(DeviceError::TooSmall { .. })));
    }

    #[test]
    fn other_memory_takes_the_place_of_the_old_at_the_same_address() {
        let view = sealed(b"the same", 1 << 16);
        let (address, inode) = (view.address(), view.inode().unwrap());
        view.copy_in(0, b"a stray write").unwrap();
        let restarted = sealed(b"the same", 1 << 16);
        view.replace(fd_of(&*restarted)).unwrap();
        assert_eq!((view.address(), &read(&*view)), (address, b"the same"));
        assert_ne!(view.inode().unwrap(), inode);
        let smaller = sealed(b"", 1 << 12);
        assert!(matches!(view.replace(fd_of(&*smaller)), Err(DeviceError::TooSmall { .. })));
        assert_eq!(&read(&*view), b"the same");
    }
}
