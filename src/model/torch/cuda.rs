//! A GPU to run models on: libtorch's CUDA half opened at run time, and a stream of one's own.

use std::fmt;
use std::marker::PhantomData;

use super::super::{Capability, CudaUnavailable, ModelError};
use super::shim::{self, Before, Devices, Shim, StreamNumbers};
use crate::device::StreamRef;

mod switches;

pub use switches::CudaSwitches;

/// The runtime's number for a driver that is too old, and for none at all.
const INSUFFICIENT_DRIVER: i32 = 35;
/// The runtime's number for a driver that shows no GPU.
const NO_DEVICE: i32 = 100;

/// One lane's way to a GPU: the device and a stream of its own. Whatever the lane runs is enqueued on that stream.
///
/// A clone names the same stream; a lane that is to run beside this one opens its own.
#[derive(Debug, Clone)]
pub struct TorchCuda {
    shim: &'static Shim,
    stream: StreamNumbers,
    facts: GpuFacts,
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuFacts {
    /// The product's name.
    pub name: String,
    /// What it can do.
    pub capability: Capability,
    /// All of its memory.
    pub total_bytes: u64,
}

/// What the tensor library holds of a GPU's memory, for the whole process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TorchMemory {
    /// Bytes of live tensors.
    pub allocated_bytes: u64,
    /// Bytes taken from the driver: those of live tensors and those kept for the next ones.
    pub reserved_bytes: u64,
    /// Most bytes of live tensors since the peaks were reset.
    pub peak_allocated_bytes: u64,
    /// Most bytes taken from the driver since the peaks were reset.
    pub peak_reserved_bytes: u64,
}

impl TorchCuda {
    /// Opens the GPU of that number in this process. The first call opens libtorch's CUDA half, which takes seconds and
    /// must come before anything computes in this process, on the CPU too: the tensor library looks for that half once.
    ///
    /// # Errors
    /// [`ModelError::Cuda`] with what is missing and what to do; nothing is changed for models on the CPU then.
    pub fn open(ordinal: i32) -> Result<Self, ModelError> {
        let shim = shim::shim()?;
        let (devices, words) = shim.devices()?;
        let device = || format!("cuda:{ordinal}");
        if let Some(why) = refusal(&devices, words, device()) {
            return Err(why.into());
        }
        if !(0..devices.count).contains(&ordinal) {
            return Err(CudaUnavailable::NoSuchDevice { device: device(), count: devices.count }.into());
        }
        if !shim.has_cuda_half()? {
            return Err(CudaUnavailable::TooLate.into());
        }
        let facts = shim.open(ordinal)?;
        let facts = GpuFacts {
            name: shim::until_zero(&facts.name),
            capability: Capability { major: facts.major, minor: facts.minor },
            total_bytes: facts.total_bytes,
        };
        let stream = shim.stream(ordinal)?;
        tracing::info!(gpu = facts.name, ordinal, capability = %facts.capability, "models run on a GPU");
        Ok(Self { shim, stream, facts })
    }

    /// The GPU's number in this process.
    #[must_use]
    pub fn ordinal(&self) -> i32 {
        self.stream.device
    }

    /// What the GPU is.
    #[must_use]
    pub fn facts(&self) -> &GpuFacts {
        &self.facts
    }

    /// The stream that everything of this lane is enqueued on; valid as long as the process. It does not order itself
    /// with the GPU's default stream.
    #[must_use]
    pub fn stream(&self) -> StreamRef {
        StreamRef(self.stream.raw)
    }

    /// Waits until the stream has run everything enqueued so far.
    ///
    /// # Errors
    /// [`ModelError::Executor`] where the GPU failed, also at work enqueued before.
    pub fn synchronize(&self) -> Result<(), ModelError> {
        self.shim.synchronize(&self.stream)
    }

    /// Gives the memory that the tensor library keeps for its next tensors back to the driver. Waits for the GPU.
    ///
    /// # Errors
    /// As [`TorchCuda::synchronize`].
    pub fn empty_cache(&self) -> Result<(), ModelError> {
        self.shim.empty_cache()
    }

    /// What the tensor library holds of this GPU's memory.
    ///
    /// # Errors
    /// [`ModelError::Executor`] where the library does not say.
    pub fn memory(&self) -> Result<TorchMemory, ModelError> {
        let memory = self.shim.memory(self.ordinal())?;
        Ok(TorchMemory {
            allocated_bytes: memory.allocated,
            reserved_bytes: memory.reserved,
            peak_allocated_bytes: memory.peak_allocated,
            peak_reserved_bytes: memory.peak_reserved,
        })
    }

    /// Lets the peaks of [`TorchCuda::memory`] start again from what is held now.
    ///
    /// # Errors
    /// As [`TorchCuda::memory`].
    pub fn reset_peak(&self) -> Result<(), ModelError> {
        self.shim.reset_peak(self.ordinal())
    }

    /// How kernels are chosen.
    ///
    /// # Errors
    /// As [`TorchCuda::memory`].
    pub fn switches(&self) -> Result<CudaSwitches, ModelError> {
        self.shim.switches().map(Into::into)
    }

    /// Changes how kernels are chosen: for the whole process, from the next operation on.
    ///
    /// # Errors
    /// As [`TorchCuda::memory`].
    pub fn set_switches(&self, switches: CudaSwitches) -> Result<(), ModelError> {
        self.shim.set_switches(&switches.into())
    }

    /// Makes device and stream current on this thread until the answer is dropped.
    pub(super) fn make_current(&self) -> Result<Current, ModelError> {
        let before = self.shim.make_current(&self.stream)?;
        Ok(Current { shim: self.shim, before, _this_thread: PhantomData })
    }
}

/// Version of the open shim's interface; opens it and libtorch's CUDA half where that has not happened. Needs no GPU.
///
/// # Errors
/// As [`TorchCuda::open`], for libraries that are missing.
pub fn shim_version() -> Result<u32, ModelError> {
    Ok(shim::shim()?.version())
}

/// While it lives, tensor operations of its thread go to one device and stream. Dropping it restores what was before.
#[derive(Debug)]
pub(super) struct Current {
    shim: &'static Shim,
    before: Before,
    /// What is current is a thread's own: this must be dropped where it was made.
    _this_thread: PhantomData<*const ()>,
}

impl Drop for Current {
    fn drop(&mut self) {
        if let Err(error) = self.shim.restore(&self.before) {
            tracing::error!(%error, "a thread stays on another stream than before");
        }
    }
}

/// Why no GPU can be used, by what counting them gave.
fn refusal(devices: &Devices, words: String, device: String) -> Option<CudaUnavailable> {
    match devices.code {
        0 if devices.count > 0 => None,
        INSUFFICIENT_DRIVER if devices.driver == 0 => Some(CudaUnavailable::NoDriver),
        INSUFFICIENT_DRIVER => {
            Some(CudaUnavailable::DriverTooOld { driver: version(devices.driver), needed: version(devices.runtime) })
        }
        0 | NO_DEVICE => Some(CudaUnavailable::NoSuchDevice { device, count: 0 }),
        code => Some(CudaUnavailable::Driver { code, cause: words }),
    }
}

/// A version as people write it; the runtime packs it into one number.
fn version(packed: i32) -> String {
    format!("{}.{}", packed / 1000, packed % 1000 / 10)
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tensor_library_finds_a_half_that_was_opened_before_it_looked() {
        // No test of this binary runs a network, so nothing has made the library look.
        match shim::shim() {
            Ok(shim) => assert!(shim.has_cuda_half().unwrap()),
            Err(why) => eprintln!("skipped: {why}"),
        }
    }

    #[test]
    fn switches_are_read_as_they_were_set() {
        let Ok(shim) = shim::shim() else { return eprintln!("skipped: there is no shim") };
        let found = CudaSwitches::from(shim.switches().unwrap());
        assert!(found.sdpa_flash && found.sdpa_memory_efficient && found.sdpa_math, "{found:?}");
        let wanted = CudaSwitches { cudnn_benchmark: true, tf32_convolution: false, sdpa_math: false, ..found };
        shim.set_switches(&wanted.into()).unwrap();
        assert_eq!(CudaSwitches::from(shim.switches().unwrap()), wanted);
        shim.set_switches(&found.into()).unwrap();
    }

    #[test]
    fn an_exception_in_the_library_comes_back_as_an_error() {
        let Ok(shim) = shim::shim() else { return eprintln!("skipped: there is no shim") };
        let error = shim.memory(99).expect_err("there is no such GPU");
        println!("{error}");
        assert!(matches!(&error, ModelError::Executor { what: "read memory statistics", cause } if !cause.is_empty()));
    }

    #[test]
    fn every_answer_of_the_runtime_has_its_own_explanation() {
        let explain = |count, code, driver| {
            let devices = Devices { count, code, driver, runtime: 13_000 };
            refusal(&devices, "system not yet initialized".to_owned(), "cuda:0".to_owned())
        };
        assert_eq!(explain(1, 0, 13_000), None);
        assert_eq!(explain(0, 35, 0), Some(CudaUnavailable::NoDriver));
        let too_old = CudaUnavailable::DriverTooOld { driver: "12.4".to_owned(), needed: "13.0".to_owned() };
        assert_eq!(explain(0, 35, 12_040), Some(too_old));
        let hidden = CudaUnavailable::NoSuchDevice { device: "cuda:0".to_owned(), count: 0 };
        assert_eq!(explain(0, 100, 13_000), Some(hidden.clone()));
        assert_eq!(explain(0, 0, 13_000), Some(hidden));
        let refused = CudaUnavailable::Driver { code: 802, cause: "system not yet initialized".to_owned() };
        assert_eq!(explain(0, 802, 13_000), Some(refused));
    }
}
