//! Generated UNets with an input and the reference's results.
#![allow(unreachable_pub, reason = "what the tests beside it share")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use luna_broker::client::{CallOptions, Client, Input, Published, Tensor, Weights};
use luna_broker::model::ModelFile;
use luna_broker::service::UnetInput;
use luna_broker::tensor::{DType, Dims, TensorMeta};
use safetensors::SafeTensors;

/// What a generator made, or `None` with a word about how to get it.
pub fn folder(generator: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| Path::new(&folder).join(generator));
    let folder = folder.filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to what `make golden` makes; {generator} is not in it");
    }
    folder
}

/// Tensors of a file of cases.
pub struct Case(BTreeMap<String, (TensorMeta, Vec<u8>)>);

impl Case {
    pub fn of(folder: &Path, model: &str) -> Self {
        let bytes = std::fs::read(folder.join(format!("{model}.io.safetensors"))).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let floats = tensors.tensors().into_iter().filter(|(_, view)| view.dtype() == safetensors::Dtype::F32);
        let one = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            (name, (TensorMeta::contiguous(DType::F32, Dims::new(&shape).unwrap()), view.data().to_vec()))
        };
        Self(floats.map(one).collect())
    }

    pub fn input(&self) -> UnetInput<Input<'_>> {
        let find = |name: &str| {
            let (meta, bytes) = self.0.get(&format!("plain.{name}"))?;
            Some(Input::new(*meta, bytes).unwrap())
        };
        let of = |name: &str| find(name).unwrap();
        let (x, timesteps, context) = (of("x"), of("timesteps"), of("context"));
        UnetInput { x, timesteps, context, y: find("y"), control: None }
    }

    pub fn out(&self, name: &str) -> Vec<f32> {
        floats(&self.0[&format!("{name}.out")].1)
    }
}

pub fn values(tensor: &Tensor) -> Vec<f32> {
    floats(tensor.bytes().unwrap())
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// Publishes all tensors of a file as they are.
pub fn publish(client: &Client, name: &str, path: &Path) -> luna_broker::Result<Weights> {
    let file = ModelFile::open(path).unwrap();
    let tensors: Vec<Published<'_>> = file
        .tensors()
        .map(|(key, stored)| {
            let shape: Vec<u64> = stored.shape.iter().map(|&extent| extent as u64).collect();
            let meta = TensorMeta::contiguous(stored.element().unwrap(), Dims::new(&shape).unwrap());
            Published { key, meta, bytes: file.bytes(stored).unwrap() }
        })
        .collect();
    client.publish(name, &tensors, &CallOptions::default())
}
