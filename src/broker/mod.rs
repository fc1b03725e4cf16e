//! The serving side: sessions, their memory and the lanes, over listeners and devices.

mod clock;
mod incoming;
mod jobs;
mod loader;
mod memory;
mod outbox;
mod registry;
mod responder;
mod server;
mod session;
mod state;
mod status;

pub use server::{Broker, BrokerBuilder};
