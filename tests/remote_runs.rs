//! Sampling runs and adapters of UNets that the broker runs for its clients.
#![cfg(feature = "torch")]

#[path = "remote_runs/adapters.rs"]
mod adapters;
#[path = "remote_runs/cache.rs"]
mod cache;
#[path = "remote_runs/crew.rs"]
mod crew;
#[cfg(all(feature = "cli", target_os = "linux"))]
#[path = "remote_runs/folders.rs"]
mod folders;
#[cfg(all(feature = "cli", target_os = "linux"))]
#[path = "remote_runs/memory.rs"]
mod memory;
#[cfg(all(feature = "cli", target_os = "linux"))]
#[path = "support/process.rs"]
mod process;
#[path = "remote_runs/steps.rs"]
mod steps;
mod support;
#[cfg(target_os = "linux")]
#[path = "remote_runs/turns.rs"]
mod turns;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use luna_broker::client::{Client, Input, Tensor, Unet};
use luna_broker::config::BrokerConfig;
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse, StepInput, UnetInput};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use safetensors::SafeTensors;

/// Largest difference that differently ordered sums explain, for results of a size around one.
const TOLERANCE: f32 = 2e-5;
/// The same between weights merged in float64 and what is done here.
const MERGED: f32 = 3e-5;

/// Layers this small take longer to be shared out among threads than to be computed.
fn config() -> BrokerConfig {
    BrokerConfig { threads: 1, ..support::config() }
}

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(PathBuf::from);
    let folder = folder.filter(|folder| folder.join("lora").is_dir() && folder.join("unet").is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to a folder filled by `make golden`");
    }
    folder
}

/// A generated model with its one input and what the reference made of it, with adapters and without.
struct Scene {
    folder: PathBuf,
    name: &'static str,
    tensors: BTreeMap<String, (TensorMeta, Vec<u8>)>,
}

impl Scene {
    fn of(name: &'static str) -> Option<Self> {
        let folder = golden()?.join("lora");
        let bytes = std::fs::read(folder.join(format!("{name}.io.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let one = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            (name, (TensorMeta::contiguous(DType::F32, Dims::new(&shape).unwrap()), view.data().to_vec()))
        };
        Some(Self { tensors: tensors.tensors().into_iter().map(one).collect(), folder, name })
    }

    fn model(&self) -> String {
        let file = if self.name == "sd15" { "sd15.checkpoint" } else { "sdxl.bare" };
        self.folder.with_file_name("unet").join(format!("{file}.safetensors")).to_string_lossy().into_owned()
    }

    fn unet(&self, client: &Client) -> Unet {
        client.unet(&self.model()).unwrap()
    }

    fn file(&self, adapter: &str) -> PathBuf {
        self.folder.join(format!("{}.{adapter}.safetensors", self.name))
    }

    fn uses(&self, adapter: &str, strength: f64) -> AdapterUse {
        AdapterUse { name: self.file(adapter).to_string_lossy().into_owned(), strength }
    }

    /// A stack as the generator writes it: `lora@0.8+set@1`.
    fn stack(&self, stack: &str, mode: AdapterMode) -> AdapterStack {
        let parts = stack.split('+').map(|part| part.split_once('@').unwrap());
        let adapters = parts.map(|(name, strength)| self.uses(name, strength.parse().unwrap())).collect();
        AdapterStack { adapters, mode }
    }

    /// The stacks that the reference ran, with its results.
    fn results(&self) -> Vec<(&str, Vec<f32>)> {
        let of = |(name, (_, bytes)): (&'_ String, &(TensorMeta, Vec<u8>))| {
            let name = name.strip_suffix(".out").filter(|name| name.contains('@'))?;
            Some((name.to_owned(), floats(bytes)))
        };
        let all: Vec<_> = self.tensors.iter().filter_map(of).collect();
        all.into_iter()
            .map(|(name, out)| {
                let (key, _) = self.tensors.get_key_value(&format!("{name}.out")).unwrap();
                (key.strip_suffix(".out").unwrap(), out)
            })
            .collect()
    }

    fn find(&self, name: &str) -> Option<Input<'_>> {
        self.tensors.get(&format!("plain.{name}")).map(|(meta, bytes)| Input::new(*meta, bytes).unwrap())
    }

    fn input(&self) -> UnetInput<Input<'_>> {
        let of = |name: &str| self.find(name).unwrap();
        let (x, timesteps, context) = (of("x"), of("timesteps"), of("context"));
        UnetInput { x, timesteps, context, y: self.find("y"), control: None }
    }

    fn step(&self) -> StepInput<Input<'_>> {
        self.input().into()
    }

    fn plain(&self) -> Vec<f32> {
        floats(&self.tensors["plain.out"].1)
    }
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn values(tensor: &Tensor) -> Vec<f32> {
    floats(tensor.bytes().unwrap())
}

fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(left, right)| (left - right).abs())
        .fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}

/// A tensor of numbers.
fn made(shape: &[u64], value: impl Fn(usize) -> f32) -> (TensorMeta, Vec<u8>) {
    let meta = TensorMeta::contiguous(DType::F32, Dims::new(shape).unwrap());
    let bytes = (0..meta.size_bytes().unwrap() / 4).flat_map(|at| value(at).to_le_bytes()).collect();
    (meta, bytes)
}

fn given((meta, bytes): &(TensorMeta, Vec<u8>)) -> Input<'_> {
    Input::new(*meta, bytes).unwrap()
}

/// A copy of a file under another name.
fn copied(from: &Path, folder: &Path, name: &str) -> PathBuf {
    let target = folder.join(name);
    std::fs::copy(from, &target).unwrap();
    target
}
