//! Weights that exist once: clients that attach, publish, write and die, in processes of their own.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[path = "../support/process.rs"]
mod process;
#[path = "../support/scene.rs"]
mod scene;
#[path = "../support/mod.rs"]
mod support;

mod file;
mod sharing;
