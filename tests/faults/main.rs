//! Real brokers and clients in processes of their own, killed and crowded at every interesting moment.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[path = "../support/process.rs"]
mod process;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/scene.rs"]
mod scene;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "torch")]
#[path = "../support/tiny.rs"]
mod tiny;

mod broker;
mod clients;
#[cfg(feature = "torch")]
mod lane;
mod obey;
mod sockets;

use scene::Scene;

#[test]
#[ignore = "the client process of other tests"]
fn client_process() {
    obey::run();
}
