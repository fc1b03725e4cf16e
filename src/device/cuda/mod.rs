//! Memory of NVIDIA GPUs, shared between processes: allocations by legacy IPC handles or as descriptors of the
//! virtual memory interface, and order between the streams of two processes.
//!
//! libcuda is opened at run time; where there is none, everything here answers with [`DeviceError::NoDriver`].
//! Whatever makes a driver call makes the GPU's primary context current for the call and restores the one before:
//! other libraries live on the same threads.
//!
//! [`DeviceError::NoDriver`]: super::DeviceError::NoDriver

mod api;
mod context;
mod device;
mod driver;
mod event;
mod fence;
mod ipc;
mod pinned;
mod range;
mod region;
mod stream;
mod vmm;

pub use super::StreamRef;
pub use device::{CudaDevice, CudaSharing, CudaWeights};
pub use driver::{Driver, Gpu};
pub use fence::{Fence, FenceHandle};
pub use pinned::Pinned;
pub use stream::{CopyWay, CudaStream};
