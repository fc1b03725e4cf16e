//! Decodes a latent with a VAE that a broker holds, and writes the image as a PPM.
//!
//! `cargo run --example decode -- VAE.safetensors` asks the broker at `$LUNA_BROKER`, or this user's default one.
//! Without an argument it starts a broker of its own with the do-nothing model, so that it always runs.

use std::io::Write;
use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{Client, Input, Tensor};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::tensor::{DType, Dims, TensorMeta};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let model = std::env::args().nth(1);
    let client = match &model {
        Some(_) => Client::connect(None)?,
        None => private_client()?,
    };
    let vae = client.vae(model.as_deref().unwrap_or("builtin:hand-off"))?;
    let info = vae.info();
    println!("{}: {}, {} latent channels", info.name, info.family, info.latent_channels);

    let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, info.latent_channels, 32, 48]));
    // Waves instead of noise, so that there is something to see.
    let latent: Vec<u8> = (0..meta.elements()?).flat_map(|at| (at as f32 / 20.0).sin().to_ne_bytes()).collect();
    let image = vae.decode(Input::new(meta, &latent)?)?;
    let [_, height, width, 3] = *image.meta().shape.as_slice() else { return Err("not an image".into()) };
    assert_eq!((height, width), (32 * info.ratio, 48 * info.ratio));

    let path = std::env::temp_dir().join(format!("luna-broker-decode-{}.ppm", std::process::id()));
    write_ppm(&path, &image, width, height)?;
    println!("{width} × {height} pixels in {}", path.display());
    assert!(std::fs::metadata(&path)?.len() > width * height * 3);
    if model.is_none() {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

fn private_client() -> Result<Client, luna_broker::Error> {
    let config = BrokerConfig { bench_models: true, ..BrokerConfig::default() };
    let broker = Arc::new(Broker::builder().config(config).start()?);
    Client::over(ClientConfig::default(), move || broker.connect_local())
}

fn write_ppm(
    path: &std::path::Path,
    image: &Tensor,
    width: u64,
    height: u64,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    write!(file, "P6\n{width} {height}\n255\n")?;
    let pixels: Vec<u8> = image.floats()?.iter().map(|value| (value.clamp(0.0, 1.0) * 255.0).round() as u8).collect();
    file.write_all(&pixels)?;
    Ok(())
}
