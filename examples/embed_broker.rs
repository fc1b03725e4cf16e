//! A broker inside a program of your own, and a client of it in the same process.
//!
//! Run with `cargo run --example embed_broker`. It needs no model: it uses the do-nothing VAE.

use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{Client, Input};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::tensor::{DType, Dims, TensorMeta};

fn main() -> Result<(), luna_broker::Error> {
    let config = BrokerConfig { bench_models: true, ..BrokerConfig::default() };
    // `.address(path)` would let other processes in as well.
    let broker = Arc::new(Broker::builder().config(config).start()?);

    let serving = Arc::clone(&broker);
    let client = Client::over(ClientConfig::default(), move || serving.connect_local())?;
    for rung in client.session().rungs {
        println!("{}: {}, because {}", rung.device, rung.rung, rung.reason);
    }

    let vae = client.vae("builtin:hand-off")?;
    let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, 4, 64, 64]));
    let latent: Vec<u8> = (0..4 * 64 * 64).flat_map(|at| (at as f32).to_ne_bytes()).collect();
    let image = vae.decode(Input::new(meta, &latent)?)?;
    println!("image {} {}", image.meta().shape, image.meta().dtype);

    let values = image.floats()?;
    assert_eq!(image.meta().shape, Dims::of([1, 512, 512, 3]));
    // The do-nothing model leaves the latent's first elements where its documentation says.
    assert_eq!(values[5 * (values.len() / 16)], 5.0);
    drop(values);

    println!("{} session, {} requests answered", broker.status().sessions.len(), broker.status().requests);
    broker.shut_down();
    Ok(())
}
