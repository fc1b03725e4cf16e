//! The core of sharing weights, against implementations that are too simple to be wrong.

mod cast;
mod changes;
mod content;
mod files;
mod filling;
mod layout;

use std::sync::Arc;

use files::{Entry, Folder};

use super::{Loaded, WeightPlan, load};
use crate::device::{Device, HostDevice, Region};
use crate::id::ContentDigest;
use crate::model::{ModelError, ModelFile};
use crate::tensor::{CastRule, DType, Dims, TensorMeta};

/// Names, types and shapes that are not like each other, and more than one chunk.
fn assorted() -> Vec<Entry> {
    vec![
        Entry::filled("unet.large.weight", DType::F16, &[3, 700, 512]),
        Entry::filled("unet.odd.weight", DType::F16, &[37]),
        Entry::filled("unet.byte.weight", DType::F8E4M3Fn, &[5, 7]),
        Entry::filled("unet.other.weight", DType::F8E5M2, &[1_111_111]),
        Entry::filled("clip.ids", DType::I64, &[1, 77]),
        Entry::filled("clip.mask", DType::Bool, &[3]),
        Entry::filled("clip.logit_scale", DType::F32, &[]),
        Entry::filled("clip.none", DType::F32, &[0, 4]),
        Entry::filled("vae.weight", DType::Bf16, &[64, 3, 3, 3]),
        Entry::filled("vae.double", DType::F64, &[11]),
    ]
}

/// Halves of everything but the VAE, which is wanted whole.
fn mixed_rule() -> CastRule {
    CastRule::all(DType::F16).with("vae.", Some(DType::F32)).with("unet.byte", None)
}

fn quietly(file: &ModelFile, plan: &WeightPlan, region: &Arc<dyn Region>) -> Result<Loaded, ModelError> {
    load(file, plan, region, &|_, _| {}, &|| false)
}

fn host(plan: &WeightPlan) -> Arc<dyn Region> {
    HostDevice::default().allocate(usize::try_from(plan.size_bytes).unwrap()).unwrap()
}

fn contents(region: &Arc<dyn Region>) -> Vec<u8> {
    let mut bytes = vec![0; region.size_bytes()];
    region.copy_out(0, &mut bytes).unwrap();
    bytes
}

fn meta(dtype: DType, shape: &[u64]) -> TensorMeta {
    TensorMeta::contiguous(dtype, Dims::new(shape).unwrap())
}

fn digest(entries: &[Entry]) -> ContentDigest {
    let tensors = entries.iter().map(|entry| (&*entry.key, entry.dtype, &*entry.shape, &*entry.bytes));
    crate::tensor::digest_tensors(tensors)
}
