use super::super::super::{ModelError, StoredTensor};
use super::super::Reader;
use super::names::{Naming, Root};
use super::{Block, Clip, Linear, Projection, Qkv};

/// Most blocks that are looked for; far beyond any published model.
const MAX_BLOCKS: usize = 128;
/// Name under which adapters address the projection.
const PROJECTION: &str = "text_projection";

impl Clip<StoredTensor> {
    /// The text encoder at `root`.
    pub(crate) fn read(reader: &mut Reader<'_>, root: &Root) -> Result<Self, ModelError> {
        let tokens = reader.tensor(&root.tokens())?;
        let (vocabulary, width) = match *tokens.shape.as_slice() {
            [rows, columns] if rows > 0 && columns > 0 => (rows, columns),
            _ => return Err(reader.misshapen(&root.tokens(), &tokens, "[vocabulary, width]")),
        };
        let positions = reader.tensor(&root.positions())?;
        match *positions.shape.as_slice() {
            [rows, columns] if rows > 0 && columns == width => {}
            _ => return Err(reader.misshapen(&root.positions(), &positions, &format!("[positions, {width}]"))),
        }
        reader.ignore(&root.position_ids());
        let present = (0..MAX_BLOCKS).take_while(|&at| reader.has(&root.norm1(&root.block(at)))).count();
        if present == 0 {
            return Err(reader.unsupported(format!("{} of {vocabulary} tokens without a block", reader.what())));
        }
        let blocks = (0..present).map(|at| Block::read(reader, root, at, width)).collect::<Result<_, _>>()?;
        let norm_out = reader.layer_norm(&root.norm_out(), width)?;
        let projection = Projection::read(reader, root, width)?;
        match reader.left_over(&root.territory()) {
            Some(name) => Err(reader.unsupported(format!("{} with {name}", reader.what()))),
            None => Ok(Self { tokens, positions, blocks, norm_out, projection }),
        }
    }

    /// Numbers per row.
    pub(crate) fn width(&self) -> u64 {
        extent(&self.tokens, 1)
    }

    /// Rows of the table of tokens.
    pub(crate) fn vocabulary(&self) -> u64 {
        extent(&self.tokens, 0)
    }

    /// Positions that a prompt has at most.
    pub(crate) fn length(&self) -> u64 {
        extent(&self.positions, 0)
    }
}

impl Block<StoredTensor> {
    fn read(reader: &mut Reader<'_>, root: &Root, at: usize, width: usize) -> Result<Self, ModelError> {
        let block = root.block(at);
        let stem = |name: &str| format!("text_model.encoder.layers.{at}.{name}");
        let norm1 = reader.layer_norm(&root.norm1(&block), width)?;
        let qkv_stems = ["q_proj", "k_proj", "v_proj"].map(|name| stem(&format!("self_attn.{name}")));
        let qkv = match root.naming {
            Naming::OpenClip => {
                let names = [format!("{block}.attn.in_proj_weight"), format!("{block}.attn.in_proj_bias")];
                Qkv::Fused(Linear::read(reader, names, [3 * width, width], qkv_stems.to_vec())?)
            }
            Naming::Transformers => {
                let [query, key, value] =
                    ["q_proj", "k_proj", "v_proj"].map(|name| format!("{block}.self_attn.{name}"));
                let [query_stem, key_stem, value_stem] = qkv_stems;
                let mut read = |layer: String, stem| Linear::usual(reader, &layer, [width, width], stem);
                Qkv::Split(Box::new([read(query, query_stem)?, read(key, key_stem)?, read(value, value_stem)?]))
            }
        };
        let out = Linear::usual(reader, &root.out(&block), [width, width], stem("self_attn.out_proj"))?;
        let norm2 = reader.layer_norm(&root.norm2(&block), width)?;
        let fc1 = root.fc1(&block);
        let inner = match *reader.tensor(&format!("{fc1}.weight"))?.shape.as_slice() {
            [rows, _] if rows > 0 => rows,
            _ => 4 * width,
        };
        let fc1 = Linear::usual(reader, &fc1, [inner, width], stem("mlp.fc1"))?;
        let fc2 = Linear::usual(reader, &root.fc2(&block), [width, inner], stem("mlp.fc2"))?;
        Ok(Self { norm1, qkv, out, norm2, fc1, fc2 })
    }
}

impl Linear<StoredTensor> {
    /// A layer whose weight and bias have the usual endings.
    fn usual(reader: &mut Reader<'_>, layer: &str, shape: [usize; 2], stem: String) -> Result<Self, ModelError> {
        Self::read(reader, [format!("{layer}.weight"), format!("{layer}.bias")], shape, vec![stem])
    }

    /// A layer of `shape` `[out, in]` whose weight and bias have these names.
    fn read(
        reader: &mut Reader<'_>,
        [weight, bias]: [String; 2],
        shape: [usize; 2],
        stems: Vec<String>,
    ) -> Result<Self, ModelError> {
        let [out, _] = shape;
        let (weight, bias) = (reader.exact(&weight, &shape)?, reader.exact(&bias, &[out])?);
        Ok(Self { weight, bias: Some(bias), stems })
    }
}

impl Projection<StoredTensor> {
    /// Stored as a linear layer or, in OpenCLIP's own files, as a matrix the other way round.
    fn read(reader: &mut Reader<'_>, root: &Root, width: usize) -> Result<Option<Self>, ModelError> {
        let names =
            [(format!("{}{PROJECTION}.weight", root.outer), false), (format!("{}{PROJECTION}", root.outer), true)];
        let Some((name, transposed)) = names.into_iter().find(|(name, _)| reader.has_tensor(name)) else {
            return Ok(None);
        };
        let weight = reader.tensor(&name)?;
        match (weight.shape.as_slice(), transposed) {
            (&[out, inner], false) | (&[inner, out], true) if inner == width && out > 0 => {}
            _ => return Err(reader.misshapen(&name, &weight, &format!("a matrix for rows of {width}"))),
        }
        let layer = Linear { weight, bias: None, stems: vec![PROJECTION.to_owned()] };
        Ok(Some(Self { layer, transposed }))
    }

    /// Numbers that come out.
    pub(crate) fn width(&self) -> u64 {
        extent(&self.layer.weight, usize::from(self.transposed))
    }
}

/// An extent of a tensor whose rank was checked when it was read.
fn extent(stored: &StoredTensor, dim: usize) -> u64 {
    stored.shape.get(dim).map_or(0, |&extent| extent as u64)
}
