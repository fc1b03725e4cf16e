//! A small AutoencoderKL of arbitrary weights, both halves of it: two levels, attention in the middle, a quarter of the
//! pixels. Every norm and bias is drawn too: the usual start values would hide a layer that is left out.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::TensorView;

/// Channels of the two levels.
const WIDTHS: [usize; 2] = [32, 64];
/// Channels of the latent.
pub const LATENT: usize = 4;
/// Pixels per latent element in each direction.
pub const RATIO: u64 = 2;

/// Writes the file.
pub fn write(path: &Path) {
    let mut weights = Weights { state: 0x2545_f491_4f6c_dd1d, tensors: BTreeMap::new() };
    let [narrow, wide] = WIDTHS;
    weights.conv("encoder.conv_in", narrow, 3, 3);
    weights.block("encoder.down.0.block.0", narrow, narrow);
    weights.conv("encoder.down.0.downsample.conv", narrow, narrow, 3);
    weights.block("encoder.down.1.block.0", wide, narrow);
    weights.middle("encoder.mid", wide);
    weights.norm("encoder.norm_out", wide);
    weights.conv("encoder.conv_out", 2 * LATENT, wide, 3);
    weights.conv("quant_conv", 2 * LATENT, 2 * LATENT, 1);

    weights.conv("post_quant_conv", LATENT, LATENT, 1);
    weights.conv("decoder.conv_in", wide, LATENT, 3);
    weights.middle("decoder.mid", wide);
    weights.block("decoder.up.1.block.0", wide, wide);
    weights.conv("decoder.up.1.upsample.conv", wide, wide, 3);
    weights.block("decoder.up.0.block.0", narrow, wide);
    weights.norm("decoder.norm_out", narrow);
    weights.conv("decoder.conv_out", 3, narrow, 3);

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
    fn middle(&mut self, root: &str, width: usize) {
        self.block(&format!("{root}.block_1"), width, width);
        self.norm(&format!("{root}.attn_1.norm"), width);
        for layer in ["q", "k", "v", "proj_out"] {
            self.conv(&format!("{root}.attn_1.{layer}"), width, width, 1);
        }
        self.block(&format!("{root}.block_2"), width, width);
    }

    fn block(&mut self, root: &str, out: usize, inner: usize) {
        self.norm(&format!("{root}.norm1"), inner);
        self.conv(&format!("{root}.conv1"), out, inner, 3);
        self.norm(&format!("{root}.norm2"), out);
        self.conv(&format!("{root}.conv2"), out, out, 3);
        if out != inner {
            self.conv(&format!("{root}.nin_shortcut"), out, inner, 1);
        }
    }

    fn conv(&mut self, stem: &str, out: usize, inner: usize, kernel: usize) {
        // Numbers between -1 and 1 vary by a third: this keeps the size of activations from layer to layer.
        let scale = (3.0 / (inner * kernel * kernel) as f32).sqrt();
        self.add(format!("{stem}.weight"), vec![out, inner, kernel, kernel], 0.0, scale);
        self.add(format!("{stem}.bias"), vec![out], 0.0, 0.1);
    }

    fn norm(&mut self, stem: &str, width: usize) {
        self.add(format!("{stem}.weight"), vec![width], 1.0, 0.2);
        self.add(format!("{stem}.bias"), vec![width], 0.0, 0.1);
    }

    fn add(&mut self, name: String, shape: Vec<usize>, middle: f32, scale: f32) {
        let count: usize = shape.iter().product();
        let bytes = (0..count).flat_map(|_| (middle + self.next() * scale).to_le_bytes()).collect();
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
