//! Text encoders that the broker runs for its clients: results, rungs, what is refused, and what is left of a client that
//! goes.
#![cfg(feature = "torch")]

#[path = "../support/clip.rs"]
mod golden;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/mod.rs"]
mod support;

use luna_broker::config::BrokerConfig;

mod adapters;
mod lane;
mod models;
mod refusals;
mod results;

/// The models are so small that a second thread costs more than it does.
fn config() -> BrokerConfig {
    BrokerConfig { threads: 1, ..support::config() }
}
