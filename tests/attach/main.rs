//! Weights that exist once: clients that attach, publish, write and die, in processes of their own.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[path = "../support/process.rs"]
mod process;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/scene.rs"]
mod scene;
#[path = "../support/mod.rs"]
mod support;

mod budget;
mod changed;
mod draft;
mod file;
mod footprint;
mod force;
mod forked;
mod kinds;
mod large;
mod leases;
mod obey;
mod permits;
mod publishing;
mod restart;
mod rungs;
mod sharing;
mod variants;

#[test]
#[ignore = "the client process of other tests"]
fn client_process() {
    obey::run();
}
