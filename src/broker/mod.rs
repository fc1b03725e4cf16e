//! The serving side: sessions, their memory and the lanes, over listeners and devices.

mod adapters;
mod admission;
mod clock;
mod entry;
mod folders;
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
mod registered;
mod registry;
mod residents;
mod responder;
mod runs;
mod server;
mod session;
mod staging;
mod state;
mod status;
mod usage;
mod weights;

pub use server::{Broker, BrokerBuilder};
