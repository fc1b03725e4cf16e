//! Attaches a safetensors file, whose tensors then lie in memory once for every process that asks, and reads one of them.
//!
//! `cargo run --example attach -- MODEL.safetensors` asks the broker at `$LUNA_BROKER`, or this user's default one.
//! Without an argument it starts a broker of its own and writes a small file, so that it always runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{AttachOptions, Client, Weights};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::tensor::{CastRule, DType};
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let named = std::env::args().nth(1);
    let (client, path) = match &named {
        Some(path) => (Client::connect(None)?, PathBuf::from(path)),
        None => (private_client()?, small_file()?),
    };
    let name = path.to_string_lossy();
    let progress = |done, total| println!("{done} of {total} bytes");
    // Floating-point tensors as float32, whatever they are stored as; the broker converts them once for everybody.
    let options =
        AttachOptions { rule: CastRule::all(DType::F32), progress: Some(&progress), ..AttachOptions::default() };
    let weights = client.attach_with(&name, &options)?;
    println!("{}: {} tensors in {} bytes, {}", name, weights.len(), weights.size_bytes(), weights.content());

    let Some((key, meta)) = weights.metas().find(|(_, meta)| meta.dtype == DType::F32) else {
        return Err("no floating-point tensor".into());
    };
    let tensor = weights.tensor(key)?;
    let values: &[f32] = tensor.values()?;
    println!("{key}: {} of shape {}, largest {:?}", meta.dtype, meta.shape, values.iter().copied().reduce(f32::max));

    // What to ask before computing with them: that they were not unloaded meanwhile, and the broker is there.
    weights.check()?;
    if named.is_none() {
        assert_eq!(values, [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]);
        one_memory(&client, &weights, &name)?;
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// A second hold is on the same memory.
fn one_memory(client: &Client, weights: &Weights, name: &str) -> Result<(), luna_broker::Error> {
    let again =
        client.attach_with(name, &AttachOptions { rule: CastRule::all(DType::F32), ..AttachOptions::default() })?;
    assert_eq!(again.content(), weights.content());
    let status = client.status()?;
    let holders: Vec<u64> =
        status.weights.iter().flat_map(|set| &set.holders).map(|holder| holder.attachments).collect();
    assert_eq!((status.weights.len(), holders), (1, vec![2]));
    Ok(())
}

fn private_client() -> Result<Client, luna_broker::Error> {
    let broker = Arc::new(Broker::builder().config(BrokerConfig::default()).start()?);
    Client::over(ClientConfig::default(), move || broker.connect_local())
}

/// Six numbers in float16.
fn small_file() -> Result<PathBuf, Box<dyn std::error::Error>> {
    let path = std::env::temp_dir().join(format!("luna-broker-attach-{}.safetensors", std::process::id()));
    let bytes: Vec<u8> = (0..6).flat_map(|at| half::f16::from_f32(at as f32 + 0.5).to_le_bytes()).collect();
    let tensor = TensorView::new(Dtype::F16, vec![2, 3], &bytes)?;
    serialize_to_file([("weight", tensor)], None, Path::new(&path))?;
    Ok(path)
}
