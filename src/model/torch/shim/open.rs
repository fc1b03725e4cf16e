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
    // Global, because the shim's symbols are found in it and in what it brings along.
    keep(&half, RTLD_NOW | RTLD_GLOBAL, &half.display().to_string())?;
    let library = open_shim()?;
    let name = "luna_torch_shim";
    let refused =
        |cause: libloading::Error| CudaUnavailable::Library { library: "the CUDA shim".into(), cause: words(&cause) };
    // SAFETY: the shim defines this function with exactly this signature, and it only returns an address.
    let entry = unsafe { library.get::<unsafe extern "C" fn() -> *const Table>(name) }.map_err(refused)?;
    // SAFETY: as above; the table is a constant of a library that is never closed, so the reference stays valid.
    // Version and size come first in every version of it, and `checked` looks at nothing else before they fit.
    let table = unsafe { entry().as_ref() };
    let table = table
        .ok_or_else(|| CudaUnavailable::Library { library: "the CUDA shim".into(), cause: "it is empty".into() })?;
    let shim = checked(table)?;
    std::mem::forget(library);
    Ok(shim)
}

/// The folder of the libtorch that this process runs with.
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    // The path is the last column; it starts with the only slash of a line.
    let paths = maps.lines().filter_map(|line| line.find('/').map(|start| Path::new(&line[start..])));
    paths.into_iter().find(|path| path.ends_with(CPU_HALF)).and_then(Path::parent).map(Path::to_owned)
}

/// Opens a library for as long as the process lives.
fn keep(path: &Path, flags: i32, shown: &str) -> Result<(), CudaUnavailable> {
    std::mem::forget(open_library(path, flags, shown)?);
    Ok(())
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

/// Opens the embedded code from memory that cannot be changed, or where that is refused from a file that nobody else
/// can open and that has no name once it is open.
fn open_shim() -> Result<Library, CudaUnavailable> {
    let shown = "the CUDA shim";
    let refused = |cause: io::Error| CudaUnavailable::Library { library: shown.to_owned(), cause: cause.to_string() };
    let from_memory = in_memory(CODE).map_err(refused).and_then(|memory| {
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        open_library(Path::new(&path), RTLD_NOW | RTLD_LOCAL, shown)
    });
    from_memory.or_else(|error| {
        tracing::debug!(%error, "the CUDA shim is opened from a temporary file instead of from memory");
        let mut file = tempfile::Builder::new().prefix("luna-broker-").suffix(".so").tempfile().map_err(refused)?;
        file.write_all(CODE).and_then(|()| file.flush()).map_err(refused)?;
        open_library(file.path(), RTLD_NOW | RTLD_LOCAL, shown)
    })
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
