use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use rustix::fs::{MemfdFlags, SealFlags};

use super::{Shim, Table, checked};
use crate::model::CudaUnavailable;

/// The compiled shim; empty where it could not be compiled.
static CODE: &[u8] = include_bytes!(env!("LUNA_BROKER_SHIM"));
/// Why it could not.
const MISSING: &str = env!("LUNA_BROKER_SHIM_MISSING");
/// The half of libtorch that every build with executors is linked to.
const CPU_HALF: &str = "libtorch_cpu.so";
/// The half that registers everything CUDA when it is opened.
const CUDA_HALF: &str = "libtorch_cuda.so";
/// What the shim is called in errors.
const SHIM: &str = "the CUDA shim";

/// The shim; opens it, and libtorch's CUDA half before it, the first time. Nothing of either is in the process
/// until then: the program's own needs are those of the CPU half.
pub(in super::super) fn shim() -> Result<&'static Shim, CudaUnavailable> {
    static OPEN: OnceLock<Result<Shim, CudaUnavailable>> = OnceLock::new();
    OPEN.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Shim, CudaUnavailable> {
    let half = libtorch_folder().ok_or(CudaUnavailable::NoLibtorch)?.join(CUDA_HALF);
    // The cheap answers first: opening the half takes seconds and a gigabyte of address space.
    if !half.is_file() {
        return Err(CudaUnavailable::NoCudaHalf { missing: half });
    }
    if CODE.is_empty() {
        return Err(CudaUnavailable::NoShim { reason: MISSING });
    }
    // Global, because the shim's symbols are found in it and in what it brings along. Open as long as the process.
    std::mem::forget(open_library(&half, RTLD_NOW | RTLD_GLOBAL, &half.display().to_string())?);
    let library = from_memory().or_else(|error| {
        tracing::debug!(%error, "the CUDA shim is opened from a temporary file instead of from memory");
        from_file()
    })?;
    let shim = entry(&library)?;
    std::mem::forget(library);
    Ok(shim)
}

/// What an open library offers, which must be kept open for as long as the process lives.
fn entry(library: &Library) -> Result<Shim, CudaUnavailable> {
    // SAFETY: the shim defines this function with exactly this signature, and it only returns an address.
    let entry = unsafe { library.get::<unsafe extern "C" fn() -> *const Table>("luna_torch_shim") }
        .map_err(|cause| refused(words(&cause)))?;
    // SAFETY: as above; the table is a constant of the library, so the reference stays valid as the caller promises.
    // Version and size come first in every version of it, and `checked` looks at nothing else before they fit.
    let table = unsafe { entry().as_ref() };
    checked(table.ok_or_else(|| refused("it offers nothing"))?)
}

/// The folder of the libtorch that this process runs with.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // The path is the last column; it starts with the only slash of a line.
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    paths.into_iter().find(|path| path.ends_with(CPU_HALF)).and_then(Path::parent).map(Path::to_owned)
}

fn open_library(path: &Path, flags: i32, shown: &str) -> Result<Library, CudaUnavailable> {
    // SAFETY: opening runs the library's initialisers. Both libraries that come here are made for being opened at
    // any time: libtorch's half registers kernels under the loader's lock, as it does for Python; the shim has none.
    unsafe { Library::open(Some(path), flags) }
        .map_err(|cause| CudaUnavailable::Library { library: shown.to_owned(), cause: words(&cause) })
}

/// The loader's own words where there are some.
fn words(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// Opens the embedded code from memory that cannot be changed.
fn from_memory() -> Result<Library, CudaUnavailable> {
    let memory = in_memory(CODE).map_err(refused)?;
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    open_library(Path::new(&path), RTLD_NOW | RTLD_LOCAL, SHIM)
}

/// Opens the embedded code, where memory is refused, from a file that nobody else can open and that has no name any
/// more on return.
fn from_file() -> Result<Library, CudaUnavailable> {
    let mut file = tempfile::Builder::new().prefix("luna-broker-").suffix(".so").tempfile().map_err(refused)?;
    file.write_all(CODE).map_err(refused)?;
    open_library(file.path(), RTLD_NOW | RTLD_LOCAL, SHIM)
}

fn refused(cause: impl ToString) -> CudaUnavailable {
    CudaUnavailable::Library { library: SHIM.to_owned(), cause: cause.to_string() }
}

/// Sealed memory that holds `code`.
fn in_memory(code: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Older kernels do not know that one can ask for executable memory; newer ones may be set to refuse it otherwise.
    let memory = rustix::fs::memfd_create("luna-broker-shim", flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create("luna-broker-shim", flags))?;
    let mut file = File::from(memory);
    file.write_all(code)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_opening_the_shim_give_the_same_interface() {
        match shim() {
            Ok(shim) => {
                for library in [from_memory(), from_file()] {
                    let library = library.unwrap_or_else(|error| panic!("{error}"));
                    assert_eq!(entry(&library).unwrap().version(), shim.version());
                    // The table that `entry` gave out points into it.
                    std::mem::forget(library);
                }
            }
            Err(why) => eprintln!("skipped: {why}"),
        }
    }

    #[test]
    fn what_is_no_library_is_an_error_with_the_loaders_words() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"not code").unwrap();
        let error = open_library(file.path(), RTLD_NOW | RTLD_LOCAL, "it").expect_err("it is not code");
        let CudaUnavailable::Library { library, cause } = &error else { panic!("{error}") };
        assert_eq!(library, "it");
        assert!(cause.contains("file too short") || cause.contains("ELF"), "{cause}");
    }
}
