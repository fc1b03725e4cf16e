//! The substitute CUDA driver for child processes of a test.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::env;
use std::ffi::{CString, OsString, c_char, c_int, c_void};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

const LIBRARY: &str = "libluna_substitute_cuda.so";

/// Whether tests play on the machine's own driver instead: where `LUNA_BROKER_REAL_CUDA` is 1.
pub fn is_real() -> bool {
    env::var_os("LUNA_BROKER_REAL_CUDA").is_some_and(|value| value == "1")
}

/// One run: processes started with its environment find the substitute as their CUDA driver and see each other's
/// memory. What it needs on disk is gone with the value.
pub struct SubstituteCuda {
    folder: tempfile::TempDir,
}

impl SubstituteCuda {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let names = folder.path().join("driver");
        fs::create_dir(&names).expect("the temporary folder is empty");
        let library = library();
        // Programs ask for either name, and one that is missing here would be found elsewhere.
        for name in ["libcuda.so", "libcuda.so.1"] {
            symlink(&library, names.join(name)).expect("the temporary folder takes links");
        }
        Self { folder }
    }

    /// What a child process needs: `command.envs(cuda.environment())`. Faults are set beside it, as `SUBSTITUTE_CUDA_…`.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut search = self.folder.path().join("driver").into_os_string();
        if let Some(others) = env::var_os("LD_LIBRARY_PATH") {
            search.push(":");
            search.push(others);
        }
        vec![
            ("LD_LIBRARY_PATH", search),
            ("SUBSTITUTE_CUDA_RUN", self.run().into_os_string()),
            ("SUBSTITUTE_CUDA_LEAKS", self.folder.path().join("live").into_os_string()),
        ]
    }

    /// The folder of shared memory, empty once all processes have ended well.
    pub fn run(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// What a process that ended by itself still held, by kind: all zero if nothing leaked.
    pub fn leaks(&self, process: u32) -> BTreeMap<String, u64> {
        let path = self.folder.path().join(format!("live.{process}"));
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("process {process} left no account of its memory ({error}): it was killed, or never called cuInit")
        });
        let entry = |line: &str| {
            let (name, count) = line.split_once(' ')?;
            Some((name.to_owned(), count.parse().ok()?))
        };
        text.lines().map(|line| entry(line).unwrap_or_else(|| panic!("{line:?} is no count"))).collect()
    }
}

/// Cargo puts the library beside the test, because it belongs to a dependency.
fn library() -> PathBuf {
    let test = env::current_exe().expect("a test knows its own path");
    let folders = test.ancestors().skip(1).take(2).flat_map(|folder| [folder.to_owned(), folder.join("deps")]);
    let places: Vec<PathBuf> = folders.map(|folder| folder.join(LIBRARY)).collect();
    places.iter().find(|path| path.exists()).cloned().unwrap_or_else(|| {
        panic!(
            "{LIBRARY} is in none of {places:?}: build the tests with cargo on Linux, which builds it as a dependency"
        )
    })
}

unsafe extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// A function of this process's driver, for what the library under test has no business to tell.
pub fn driver_function(name: &str) -> *mut c_void {
    let name = CString::new(name).unwrap();
    // SAFETY: the name ends in a NUL; the driver is loaded already, so that its constructors do not run again.
    let library = unsafe { dlopen(c"libcuda.so".as_ptr(), 2) };
    assert!(!library.is_null());
    // SAFETY: an open library and a name that ends in a NUL.
    let function = unsafe { dlsym(library, name.as_ptr()) };
    assert!(!function.is_null(), "{name:?}");
    function
}

/// All counters that a function of the substitute's gives of this process.
pub fn counters<const N: usize>(name: &str) -> [u64; N] {
    // SAFETY: the substitute's functions that give counters have this signature.
    let function: extern "C" fn(*mut u64, usize) -> usize = unsafe { std::mem::transmute(driver_function(name)) };
    let mut counts = [0; N];
    assert_eq!(function(counts.as_mut_ptr(), N), N);
    counts
}

/// Host memory whose pages are locked for the substitute driver in this process: regions.
pub fn registered() -> u64 {
    let [_, _, registered, ..] = counters::<11>("substituteCudaLive");
    registered
}

/// Everything that the substitute driver has given to this process and not got back.
pub fn live() -> u64 {
    counters::<11>("substituteCudaLive").iter().sum()
}

/// Has the substitute driver refuse the next so many mappings of this process.
pub fn refuse_maps(calls: u64) {
    // SAFETY: the substitute's function has this signature.
    let function: extern "C" fn(u64) = unsafe { std::mem::transmute(driver_function("substituteCudaRefuseMaps")) };
    function(calls);
}

/// Bytes that copies of this process took between host memory and a GPU's, on the substitute driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transit {
    pub locked: u64,
    pub pageable: u64,
}

impl Transit {
    pub fn so_far() -> Self {
        let [locked, pageable] = counters("substituteCudaTransit");
        Self { locked, pageable }
    }

    pub fn since(self, before: Self) -> Self {
        Self { locked: self.locked - before.locked, pageable: self.pageable - before.pageable }
    }
}
