//! One suite per seam, run on every implementation of it.

#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "../support/cuda.rs"]
mod cuda;
#[cfg(all(feature = "cuda", target_os = "linux"))]
#[path = "../support/roles.rs"]
mod roles;

mod device;
#[cfg(all(feature = "cuda", target_os = "linux"))]
mod device_cuda;
mod transport;
