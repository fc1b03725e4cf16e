//! The calling side: typed calls, imported memory, leases, reconnection.

mod connect;
mod input;
mod janitor;
mod leases;
mod link;
mod memory;
mod router;
mod session;
mod tensor;
mod vae;

pub use connect::{CallOptions, Client, address_from_environment};
pub use input::Input;
pub use session::SessionInfo;
pub use tensor::Tensor;
pub use vae::{Vae, VaeOutput};
