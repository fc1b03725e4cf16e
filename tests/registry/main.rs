//! What models are found by which names, how long they are kept, and what else can be run.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[cfg(feature = "torch")]
#[path = "../support/clip.rs"]
mod clip;
#[path = "../support/clip_names.rs"]
mod clip_names;
#[cfg(feature = "cuda")]
#[path = "../support/cuda.rs"]
mod cuda;
#[path = "../support/process.rs"]
mod process;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/tiny.rs"]
mod tiny;
#[path = "../support/unet.rs"]
mod unet;

#[cfg(feature = "torch")]
mod eviction;
mod folders;
#[cfg(feature = "torch")]
mod golden;
#[cfg(feature = "torch")]
mod peft;
#[cfg(feature = "torch")]
mod published;
#[cfg(feature = "torch")]
mod published_parts;
mod registered;
mod services;
