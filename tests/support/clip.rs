//! Generated text encoders with inputs and the reference's results.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::client::{Client, Clip, ClipOutput};
use luna_broker::service::{Chunk, ClipKind, ClipPrompt, Token, WeightedToken};
use safetensors::SafeTensors;

/// Largest difference that differently ordered sums explain.
pub const TOLERANCE: f32 = 1e-5;
/// Positions of a chunk.
pub const LENGTH: usize = 77;

/// The generated files, or `None` with a word about how to get them.
pub fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| PathBuf::from(folder).join("clip"));
    let folder = folder.filter(|folder| folder.join("words.io.safetensors").is_file());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to FOLDER after `python tests/golden/make_clip.py FOLDER/clip`");
    }
    folder
}

/// Full path of a generated file.
pub fn path(folder: &Path, name: &str) -> String {
    folder.join(format!("{name}.safetensors")).to_string_lossy().into_owned()
}

/// The text encoders in generated files.
pub fn encoders(client: &Client, folder: &Path, names: &[&str]) -> Clip {
    let paths: Vec<String> = names.iter().map(|name| path(folder, name)).collect();
    client.clip(&paths).unwrap_or_else(|error| panic!("{names:?}: {error}"))
}

/// Inputs and expected results.
pub struct Cases(Vec<u8>);

impl Cases {
    pub fn of(folder: &Path, name: &str) -> Self {
        Self(std::fs::read(folder.join(format!("{name}.io.safetensors"))).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        tensors.tensor(name).unwrap_or_else(|_| panic!("no {name}")).data().to_vec()
    }

    pub fn floats(&self, name: &str) -> Vec<f32> {
        floats(&self.bytes(name))
    }

    pub fn integers(&self, name: &str) -> Vec<usize> {
        self.bytes(name).as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as usize).collect()
    }

    pub fn chunks(&self, name: &str) -> Vec<Chunk> {
        let plain = |id: &usize| WeightedToken { token: Token::Id(*id as u32), weight: 1.0 };
        self.integers(name).chunks_exact(LENGTH).map(|chunk| chunk.iter().map(plain).collect()).collect()
    }

    /// The tokens `name` for one encoder.
    pub fn prompt(&self, kind: ClipKind, name: &str) -> ClipPrompt {
        ClipPrompt { kind, chunks: self.chunks(name) }
    }

    /// The long prompt with its weights.
    pub fn weighted(&self, kind: ClipKind) -> ClipPrompt {
        let mut prompt = self.prompt(kind, "long");
        for (at, weight) in prompt.chunks.iter_mut().flatten().zip(self.floats("weights")) {
            at.weight = weight;
        }
        prompt
    }

    /// The short prompt with rows in it.
    pub fn with_rows(&self, kind: ClipKind) -> ClipPrompt {
        let mut prompt = self.prompt(kind, "short");
        let (rows, places) = (self.floats("rows"), self.integers("places"));
        for (row, place) in rows.chunks_exact(rows.len() / places.len()).zip(places) {
            prompt.chunks[0][place].token = Token::Vector(Arc::from(row));
        }
        prompt
    }
}

pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

/// The numbers of both results.
#[derive(Debug, PartialEq)]
pub struct Numbers {
    pub cond: Vec<f32>,
    pub pooled: Vec<f32>,
}

pub fn numbers(output: &ClipOutput) -> Numbers {
    let [cond, pooled] = [&output.cond, &output.pooled].map(|tensor| floats(tensor.bytes().unwrap()));
    let shape = |tensor: &luna_broker::client::Tensor| tensor.meta().shape.as_slice().to_vec();
    assert!(shape(&output.cond).len() == 3 && shape(&output.pooled).len() == 2);
    assert!(shape(&output.cond)[0] == 1 && shape(&output.pooled)[0] == 1);
    Numbers { cond, pooled }
}

pub fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter()
        .zip(right)
        .map(|(left, right)| (left - right).abs())
        .fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}
