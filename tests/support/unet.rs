//! Names and shapes of UNets as single-file checkpoints have them, made from a few numbers; and files of such headers
//! whose data takes no space.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// A tensor's name and shape.
pub type Entry = (String, Vec<usize>);

/// What is between the ways down and up.
#[derive(Clone, Copy)]
pub enum Centre {
    /// Block, attention of that depth, block.
    Full(usize),
    /// One block.
    Single,
    Nothing,
}

/// The numbers that tell a UNet of the family.
#[derive(Clone)]
pub struct Numbers {
    pub input: usize,
    pub output: usize,
    pub base: usize,
    /// Per level, as a multiple of `base`.
    pub widths: &'static [usize],
    /// Blocks per level on the way down; one more on the way up.
    pub blocks: usize,
    /// Attention after each block on the way down, in order.
    pub down: &'static [usize],
    /// The same on the way up, in order.
    pub up: &'static [usize],
    pub centre: Centre,
    pub context: usize,
    pub matrices: bool,
    pub vector: Option<usize>,
}

const EARLY: Numbers = Numbers {
    input: 4,
    output: 4,
    base: 320,
    widths: &[1, 2, 4, 4],
    blocks: 2,
    down: &[1, 1, 1, 1, 1, 1, 0, 0],
    up: &[0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    centre: Centre::Full(1),
    context: 768,
    matrices: false,
    vector: None,
};

const XL: Numbers = Numbers {
    widths: &[1, 2, 4],
    down: &[0, 0, 2, 2, 10, 10],
    up: &[10, 10, 10, 2, 2, 2, 0, 0, 0],
    centre: Centre::Full(10),
    context: 2048,
    matrices: true,
    vector: Some(2816),
    ..EARLY
};

impl Numbers {
    pub const SD15: Self = EARLY;
    pub const SD2: Self = Self { context: 1024, matrices: true, ..EARLY };
    pub const SDXL: Self = XL;
    pub const SSD: Self =
        Self { down: &[0, 0, 2, 2, 4, 4], up: &[4, 4, 10, 2, 1, 1, 0, 0, 0], centre: Centre::Single, ..XL };
    pub const VEGA: Self =
        Self { down: &[0, 0, 1, 1, 2, 2], up: &[2, 2, 2, 1, 1, 1, 0, 0, 0], centre: Centre::Single, ..XL };
    pub const KOALA: Self =
        Self { blocks: 1, down: &[0, 2, 5], up: &[5, 5, 2, 2, 0, 0], centre: Centre::Nothing, ..XL };
    pub const KOALA_LARGE: Self =
        Self { blocks: 1, down: &[0, 2, 6], up: &[6, 6, 2, 2, 0, 0], centre: Centre::Full(6), ..XL };
    pub const REFINER: Self = Self {
        base: 384,
        widths: &[1, 2, 4, 4],
        down: &[0, 0, 4, 4, 4, 4, 0, 0],
        up: &[0, 0, 0, 4, 4, 4, 4, 4, 4, 0, 0, 0],
        centre: Centre::Full(4),
        context: 1280,
        vector: Some(2560),
        ..XL
    };
    /// No published model: two levels, everything there once.
    pub const SMALL: Self = Self {
        base: 64,
        widths: &[1, 2],
        blocks: 1,
        down: &[0, 1],
        up: &[2, 1, 0, 1],
        centre: Centre::Full(1),
        context: 24,
        vector: Some(16),
        ..XL
    };

    /// All tensors.
    pub fn entries(&self) -> Vec<Entry> {
        let mut list = List(Vec::new());
        let wide = 4 * self.base;
        list.both("time_embed.0", &[wide, self.base]);
        list.both("time_embed.2", &[wide, wide]);
        if let Some(vector) = self.vector {
            list.both("label_emb.0.0", &[wide, vector]);
            list.both("label_emb.0.2", &[wide, wide]);
        }
        list.both("input_blocks.0.0", &[self.base, self.input, 3, 3]);
        let (mut at, mut channels, mut kept, mut down) = (1, self.base, vec![self.base], self.down.iter());
        for (level, width) in self.widths.iter().map(|width| width * self.base).enumerate() {
            for _ in 0..self.blocks {
                self.res(&mut list, &format!("input_blocks.{at}.0"), channels, width);
                self.attention(&mut list, &format!("input_blocks.{at}.1"), width, *down.next().expect("a depth"));
                (at, channels) = (at + 1, width);
                kept.push(channels);
            }
            if level + 1 < self.widths.len() {
                list.both(&format!("input_blocks.{at}.0.op"), &[channels, channels, 3, 3]);
                at += 1;
                kept.push(channels);
            }
        }
        if !matches!(self.centre, Centre::Nothing) {
            self.res(&mut list, "middle_block.0", channels, channels);
        }
        if let Centre::Full(depth) = self.centre {
            self.attention(&mut list, "middle_block.1", channels, depth);
            self.res(&mut list, "middle_block.2", channels, channels);
        }
        let (mut at, mut up) = (0, self.up.iter());
        for (level, width) in self.widths.iter().map(|width| width * self.base).enumerate().rev() {
            for block in 0..=self.blocks {
                let depth = *up.next().expect("a depth");
                let skip = kept.pop().expect("as many blocks down as up");
                self.res(&mut list, &format!("output_blocks.{at}.0"), channels + skip, width);
                self.attention(&mut list, &format!("output_blocks.{at}.1"), width, depth);
                channels = width;
                if block == self.blocks && level > 0 {
                    let stem = format!("output_blocks.{at}.{}.conv", if depth > 0 { 2 } else { 1 });
                    list.both(&stem, &[channels, channels, 3, 3]);
                }
                at += 1;
            }
        }
        list.both("out.0", &[channels]);
        list.both("out.2", &[self.output, channels, 3, 3]);
        list.0
    }

    fn res(&self, list: &mut List, root: &str, inner: usize, out: usize) {
        list.both(&format!("{root}.in_layers.0"), &[inner]);
        list.both(&format!("{root}.in_layers.2"), &[out, inner, 3, 3]);
        list.both(&format!("{root}.emb_layers.1"), &[out, 4 * self.base]);
        list.both(&format!("{root}.out_layers.0"), &[out]);
        list.both(&format!("{root}.out_layers.3"), &[out, out, 3, 3]);
        if inner != out {
            list.both(&format!("{root}.skip_connection"), &[out, inner, 1, 1]);
        }
    }

    fn attention(&self, list: &mut List, root: &str, width: usize, depth: usize) {
        if depth == 0 {
            return;
        }
        let around: &[usize] = if self.matrices { &[width, width] } else { &[width, width, 1, 1] };
        list.both(&format!("{root}.norm"), &[width]);
        list.both(&format!("{root}.proj_in"), around);
        for block in 0..depth {
            let root = format!("{root}.transformer_blocks.{block}");
            for (name, source) in [("attn1", width), ("attn2", self.context)] {
                list.one(&format!("{root}.{name}.to_q"), &[width, width]);
                list.one(&format!("{root}.{name}.to_k"), &[width, source]);
                list.one(&format!("{root}.{name}.to_v"), &[width, source]);
                list.both(&format!("{root}.{name}.to_out.0"), &[width, width]);
            }
            list.both(&format!("{root}.ff.net.0.proj"), &[8 * width, width]);
            list.both(&format!("{root}.ff.net.2"), &[width, 4 * width]);
            for norm in ["norm1", "norm2", "norm3"] {
                list.both(&format!("{root}.{norm}"), &[width]);
            }
        }
        list.both(&format!("{root}.proj_out"), around);
    }
}

struct List(Vec<Entry>);

impl List {
    fn one(&mut self, stem: &str, shape: &[usize]) {
        self.0.push((format!("{stem}.weight"), shape.to_vec()));
    }

    fn both(&mut self, stem: &str, shape: &[usize]) {
        self.one(stem, shape);
        self.0.push((format!("{stem}.bias"), shape[..1].to_vec()));
    }
}

/// Writes a file of zeros that takes no space, except for `values` of one tensor. `dtype` has two bytes.
pub fn write_sparse(path: &Path, entries: &[Entry], dtype: &str, values: Option<(&str, &[u8])>) {
    let (mut at, mut place) = (0usize, None);
    let mut header = serde_json::Map::new();
    for (name, shape) in entries {
        let end = at + shape.iter().product::<usize>() * 2;
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]});
        assert!(header.insert(name.clone(), entry).is_none(), "{name} twice");
        if values.is_some_and(|(wanted, _)| wanted == name) {
            place = Some(at);
        }
        at = end;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(path).expect("the temporary folder is writable");
    file.write_all(&(header.len() as u64).to_le_bytes()).expect("it is writable");
    file.write_all(header.as_bytes()).expect("it is writable");
    let start = 8 + header.len();
    if let Some((name, bytes)) = values {
        let place = place.unwrap_or_else(|| panic!("no {name}"));
        file.seek(SeekFrom::Start((start + place) as u64)).expect("it can be sought");
        file.write_all(bytes).expect("it is writable");
    }
    file.set_len((start + at) as u64).expect("files with holes can be made");
}
