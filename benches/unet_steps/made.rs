//! Files of random weights and adapters.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use half::f16;
use luna_broker::model::torch::TorchUnet;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::AnyError;
use super::unet::Numbers;

/// Random numbers that all tensors are cut from, from another place each.
const POOL: usize = 1 << 20;

/// The element type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    F32,
    F16,
}

/// About normal, around 0: the sum of twelve numbers from 0 to 1, less six.
fn pool() -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..POOL).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Writes a UNet whose activations stay of a size around one.
pub(super) fn model(folder: &Path, name: &str, numbers: &Numbers, stored: Stored) -> Result<PathBuf, AnyError> {
    let path = folder.join(format!("{name}.safetensors"));
    let (code, width) = if stored == Stored::F32 { ("F32", 4) } else { ("F16", 2) };
    let entries = numbers.entries();
    let (mut header, mut at) = (serde_json::Map::new(), 0);
    for (key, shape) in &entries {
        let end = at + shape.iter().product::<usize>() * width;
        header.insert(key.clone(), serde_json::json!({"dtype": code, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::with_capacity(1 << 22, File::create(&path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let pool = pool();
    let mut bytes = Vec::new();
    // The header's order is that of its keys.
    let mut entries = entries;
    entries.sort();
    let sorted: Vec<_> = entries;
    for (number, (key, shape)) in sorted.iter().enumerate() {
        let fan_in: usize = shape.iter().skip(1).product();
        let (scale, shift) = match shape.len() {
            1 if key.ends_with("weight") => (0.05, 1.0),
            1 => (0.02, 0.0),
            _ => (1.0 / (fan_in as f32).sqrt(), 0.0),
        };
        let mut left = shape.iter().product::<usize>();
        let mut from = number * 7919 % POOL;
        while left > 0 {
            let part = pool.get(from..).map_or(&pool[..], |rest| &rest[..rest.len().min(left)]);
            bytes.clear();
            for value in part {
                let value = value * scale + shift;
                match stored {
                    Stored::F32 => bytes.extend(value.to_le_bytes()),
                    Stored::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                }
            }
            file.write_all(&bytes)?;
            left -= part.len();
            from = 0;
        }
    }
    file.into_inner().map_err(|error| error.into_error())?;
    Ok(path)
}

/// Writes an adapter of rank 16 for every linear layer of attention, as kohya's trainer names them.
pub(super) fn lora(folder: &Path, name: &str, unet: &TorchUnet, seed: usize) -> Result<PathBuf, AnyError> {
    const RANK: usize = 16;
    let pool = pool();
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for (id, stem) in unet.layers() {
        let is_meant = stem.contains(".attn1.") || stem.contains(".attn2.");
        let (Some((weight, _)), true) = (unet.weights(id), is_meant) else { continue };
        let [out, inner] = <[i64; 2]>::try_from(weight.size()).map_err(|_| "attention of matrices")?;
        let layer = format!("lora_unet_{}", stem.replace('.', "_"));
        for (part, shape, scale) in [
            ("lora_down", [RANK, inner as usize], 1.0 / (inner as f32).sqrt()),
            ("lora_up", [out as usize, RANK], 0.1 / (RANK as f32).sqrt()),
        ] {
            let start = (tensors.len() + seed) * 7919 % POOL;
            let values = pool.iter().cycle().skip(start).take(shape[0] * shape[1]);
            let bytes = values.flat_map(|value| (value * scale).to_le_bytes()).collect();
            tensors.push((format!("{layer}.{part}.weight"), shape.to_vec(), bytes));
        }
    }
    let views = tensors
        .iter()
        .map(|(name, shape, bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views = views.collect::<Result<Vec<_>, AnyError>>()?;
    let path = folder.join(format!("{name}.safetensors"));
    safetensors::serialize_to_file(views, None, &path)?;
    Ok(path)
}
