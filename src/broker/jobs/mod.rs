//! What lanes are given: calls with their memory, and models to load and to forget.

mod clip;
mod finished;
mod models;
mod prepare;
mod refusal;
mod unet;
mod vae;

pub(super) use clip::{ClipCallJob, ClipExecutor, ClipOutput, ClipWork, length as clip_length};
pub(super) use models::{ModelJob, ModelTask, Shared};
pub(super) use prepare::PrepareJob;
pub(super) use unet::{UnetCallJob, UnetExecutor, UnetOperand, UnetWork};
pub(super) use vae::{Unfinished, VaeCallJob, VaeExecutor, VaeWork};
