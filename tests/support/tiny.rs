//! A small VAE of arbitrary weights, and work of any length for it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;

use luna_broker::client::Input;
use luna_broker::tensor::{DType, Dims, TensorMeta};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

const BLOCKS: [usize; 10] = [3, 4, 5, 8, 9, 10, 13, 14, 15, 18];
const DOUBLINGS: [usize; 3] = [7, 12, 17];

/// Writes a decoder of the TAESD layout, `width` channels wide.
pub fn write(path: &Path, width: usize) {
    let mut weights = Weights { state: 0x9e37_79b9_7f4a_7c15, tensors: BTreeMap::new() };
    weights.layer("1", width, 4, true);
    for block in BLOCKS {
        for conv in [0, 2, 4] {
            weights.layer(&format!("{block}.conv.{conv}"), width, width, true);
        }
    }
    for doubling in DOUBLINGS {
        weights.layer(&doubling.to_string(), width, width, false);
    }
    weights.add("taesd_decoder.19.weight".to_owned(), vec![3, width, 3, 3], 0.2 / (width as f32).sqrt());
    // The middle of a picture's range, so that little of it is cut off.
    weights.tensors.insert("taesd_decoder.19.bias".to_owned(), (vec![3], 0.5f32.to_le_bytes().repeat(3)));
    let views = weights.tensors.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("the shape is that of the bytes"))
    });
    safetensors::serialize_to_file(views, None, path).expect("the file can be written");
}

struct Weights {
    state: u64,
    tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Weights {
    fn layer(&mut self, at: &str, out: usize, inner: usize, biased: bool) {
        // Small enough that a dozen layers neither vanish nor saturate the picture.
        let scale = (2.0 / (inner * 9) as f32).sqrt() * 0.5;
        self.add(format!("taesd_decoder.{at}.weight"), vec![out, inner, 3, 3], scale);
        if biased {
            self.add(format!("taesd_decoder.{at}.bias"), vec![out], 0.3);
        }
    }

    fn add(&mut self, name: String, shape: Vec<usize>, scale: f32) {
        let count: usize = shape.iter().product();
        let bytes = (0..count).flat_map(|_| (self.next() * scale).to_le_bytes()).collect();
        self.tensors.insert(name, (shape, bytes));
    }

    /// The next of a fixed sequence of numbers between -1 and 1.
    fn next(&mut self) -> f32 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// `samples` times the same latent `[4, side, side]`, described without repeating it.
pub struct Batch {
    pub meta: TensorMeta,
    pub bytes: Vec<u8>,
}

impl Batch {
    pub fn new(samples: u64, side: u64, seed: u64) -> Self {
        let strides = Dims::of([0, side * side, side, 1]);
        let meta = TensorMeta::strided(DType::F32, Dims::of([samples, 4, side, side]), strides).expect("small");
        let value = |at: u64| (((at * 7 + seed * 13) % 29) as f32 - 14.0) / 10.0;
        let bytes = (0..4 * side * side).flat_map(|at| value(at).to_ne_bytes()).collect();
        Self { meta, bytes }
    }

    /// Minutes of work on any machine, and a point every few milliseconds at which it can be stopped.
    pub fn endless() -> Self {
        Self::new(1024, 24, 1)
    }

    pub fn input(&self) -> Input<'_> {
        Input::new(self.meta, &self.bytes).expect("the bytes fit the description")
    }
}

/// A number that tells one result from any other.
pub fn digest(bytes: &[u8]) -> u64 {
    use std::hash::{DefaultHasher, Hasher};
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}
