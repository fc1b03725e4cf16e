//! What steps of a full-size UNet cost, each figure beside its baseline in the same run: loading, adapters, the block cache,
//! requests together, and that the broker and not this process runs them.
//!
//! `cargo bench --bench unet_steps [-- ROUNDS [WHAT …]]` or `make bench`; WHAT is any of ready, lora, cache, batch, remote.
//! Weights are random and take 5.2 GB in the temporary folder. `LUNA_BROKER_BIN` names the broker where it is not the one
//! built along.

#[path = "unet_steps/made.rs"]
mod made;
#[path = "unet_steps/parts.rs"]
mod parts;
#[path = "unet_steps/scene.rs"]
mod scene;
#[path = "../tests/support/unet.rs"]
mod unet;

use std::env;

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let arguments: Vec<String> = env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let rounds = arguments.iter().find_map(|argument| argument.parse().ok()).unwrap_or(20);
    let named: Vec<&String> = arguments.iter().filter(|argument| argument.parse::<usize>().is_err()).collect();
    let wanted = |what: &str| named.is_empty() || named.iter().any(|name| *name == what);
    let folder = tempfile::tempdir()?;
    let model = made::model(folder.path(), "sd15", &unet::Numbers::SD15, made::Stored::F32)?;
    let threads = luna_broker::model::torch::threads();
    println!("UNet of Stable Diffusion 1.5 (860 M parameters, random), float32, CPU, {threads} threads; medians");
    if wanted("ready") {
        parts::ready(folder.path(), &model)?;
    }
    let mut scene = scene::Scene::load(&model)?;
    if wanted("lora") {
        parts::lora(&mut scene, folder.path(), rounds)?;
    }
    if wanted("cache") {
        parts::cache("SD1.5, latent 32 x 32", &mut scene, rounds, 0.10)?;
        // A quarter of the channels: the share of the first block is that of the depths.
        let numbers = unet::Numbers { base: 128, ..unet::Numbers::SDXL };
        let deep = made::model(folder.path(), "deep", &numbers, made::Stored::F32)?;
        parts::cache("SDXL's depths, 128 channels, latent 32 x 32", &mut scene::Scene::load(&deep)?, rounds, 0.03)?;
    }
    if wanted("batch") {
        parts::batch(&mut scene, rounds.min(5))?;
    }
    if wanted("remote") {
        parts::remote(&mut scene, &model, folder.path(), rounds)?;
    }
    Ok(())
}
