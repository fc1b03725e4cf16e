//! The serving side: sessions, their memory and the lanes, over listeners and devices.

mod admission;
mod clock;
#[cfg(all(feature = "cuda", unix))]
mod gpu;
#[cfg(not(all(feature = "cuda", unix)))]
#[path = "no_gpu.rs"]
mod gpu;
mod incoming;
mod jobs;
mod loader;
mod memories;
mod memory;
mod metrics;
mod open_gpu;
mod outbox;
mod permits;
mod pool;
mod prompts;
mod quarantine;
mod registry;
mod responder;
mod server;
mod session;
mod staging;
mod state;
mod status;
mod weights;

pub use server::{Broker, BrokerBuilder};
