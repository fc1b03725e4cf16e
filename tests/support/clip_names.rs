//! Names and shapes of CLIP text encoders as their files have them.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

/// Names with their shapes.
pub type Names = Vec<(String, Vec<usize>)>;

/// The numbers that tell an encoder.
#[derive(Clone, Copy)]
pub struct Size {
    pub vocabulary: usize,
    pub width: usize,
    pub layers: usize,
    pub ff: usize,
}

pub const L: Size = Size { vocabulary: 49408, width: 768, layers: 12, ff: 3072 };
pub const H: Size = Size { vocabulary: 49408, width: 1024, layers: 24, ff: 4096 };
pub const G: Size = Size { vocabulary: 49408, width: 1280, layers: 32, ff: 5120 };

pub fn named(prefix: &str, names: &[(&str, Vec<usize>)]) -> Names {
    names.iter().map(|(name, shape)| (format!("{prefix}{name}"), shape.clone())).collect()
}

/// An encoder under the names of transformers.
pub fn transformers(prefix: &str, size: Size) -> Names {
    let Size { vocabulary, width, layers, ff } = size;
    let mut all = named(
        prefix,
        &[
            ("embeddings.token_embedding.weight", vec![vocabulary, width]),
            ("embeddings.position_embedding.weight", vec![77, width]),
            ("final_layer_norm.weight", vec![width]),
            ("final_layer_norm.bias", vec![width]),
        ],
    );
    for at in 0..layers {
        let layers: [(&str, Vec<usize>); 8] = [
            ("layer_norm1", vec![width]),
            ("self_attn.q_proj", vec![width, width]),
            ("self_attn.k_proj", vec![width, width]),
            ("self_attn.v_proj", vec![width, width]),
            ("self_attn.out_proj", vec![width, width]),
            ("layer_norm2", vec![width]),
            ("mlp.fc1", vec![ff, width]),
            ("mlp.fc2", vec![width, ff]),
        ];
        for (layer, shape) in layers {
            let stem = format!("{prefix}encoder.layers.{at}.{layer}");
            all.push((format!("{stem}.bias"), shape[..1].to_vec()));
            all.push((format!("{stem}.weight"), shape));
        }
    }
    all
}

/// The same under OpenCLIP's, with its projection.
pub fn open_clip(prefix: &str, size: Size) -> Names {
    let Size { vocabulary, width, layers, ff } = size;
    let mut all = named(
        prefix,
        &[
            ("token_embedding.weight", vec![vocabulary, width]),
            ("positional_embedding", vec![77, width]),
            ("ln_final.weight", vec![width]),
            ("ln_final.bias", vec![width]),
            ("text_projection", vec![width, width]),
            ("logit_scale", vec![]),
        ],
    );
    for at in 0..layers {
        let block = format!("{prefix}transformer.resblocks.{at}.");
        all.extend(named(
            &block,
            &[
                ("ln_1.weight", vec![width]),
                ("ln_1.bias", vec![width]),
                ("attn.in_proj_weight", vec![3 * width, width]),
                ("attn.in_proj_bias", vec![3 * width]),
                ("attn.out_proj.weight", vec![width, width]),
                ("attn.out_proj.bias", vec![width]),
                ("ln_2.weight", vec![width]),
                ("ln_2.bias", vec![width]),
                ("mlp.c_fc.weight", vec![ff, width]),
                ("mlp.c_fc.bias", vec![ff]),
                ("mlp.c_proj.weight", vec![width, ff]),
                ("mlp.c_proj.bias", vec![width]),
            ],
        ));
    }
    all
}
