//! The calling side: typed calls, imported memory, leases, reconnection.

mod brokers;
mod clip;
mod compute;
mod connect;
#[cfg(all(feature = "cuda", unix))]
mod gpu;
#[cfg(not(all(feature = "cuda", unix)))]
#[path = "no_gpu.rs"]
mod gpu;
mod input;
mod janitor;
mod leases;
mod link;
mod memory;
mod open_gpu;
mod opener;
mod options;
mod router;
mod run;
mod session;
mod tensor;
mod unet;
mod vae;
mod weights;

pub use brokers::{Addresses, Brokers};
pub use clip::{Clip, ClipOutput};
pub use connect::{Client, address_from_environment, gpu_named, synchronize_default_stream};
pub use input::Input;
pub use options::{CallOptions, ResultPlace, Unshared};
pub use run::Run;
pub use session::SessionInfo;
pub use tensor::Tensor;
pub use unet::{Unet, UnetOutput};
pub use vae::{Vae, VaeOutput};
pub use weights::{AttachOptions, Permit, Published, Weights};
