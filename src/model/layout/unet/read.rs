use super::super::super::{ModelError, StoredTensor};
use super::Names;
use super::reader::Reader;
use super::size::Skip;
use super::tree::{
    Attention, Block, FeedForward, Input, Layer, Middle, Output, ResBlock, Transformer, TransformerBlock, Unet,
};

/// Channels of a head where the projections are linear layers.
const HEAD_CHANNELS: u64 = 64;
/// Heads where the projections are convolutions, as in the first models.
const EARLY_HEADS: u64 = 8;

impl Unet<StoredTensor> {
    /// Reads the tree, whatever its sizes: levels, blocks per level and attention per block are as the file has them,
    /// on the way up independently of the way down, which distilled models have less of.
    ///
    /// Heads cannot be read from shapes. Every published model with linear projections has 64 channels per head, every
    /// one with convolutions has 8 heads.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] naming what is missing, misshapen or unknown.
    pub(crate) fn read(names: &Names<'_>) -> Result<Self, ModelError> {
        let mut walk = Walk { reader: Reader::new(names), embed: 0, context: None, channels: 0, level: 0 };
        let unet = walk.unet()?;
        if walk.context.is_none() {
            return Err(walk.reader.unsupported("a UNet without attention to a context"));
        }
        Ok(Self { stems: walk.reader.finish()?, ..unet })
    }
}

/// Where the reading is: what the last layer gave.
struct Walk<'a> {
    reader: Reader<'a>,
    /// Width of the embedding of timestep and vector.
    embed: u64,
    /// Width of the context, from the first layer that takes it.
    context: Option<u64>,
    channels: u64,
    level: usize,
}

impl Walk<'_> {
    fn unet(&mut self) -> Result<Unet<StoredTensor>, ModelError> {
        let conv_in = self.reader.conv("input_blocks.0.0", None, None, 3)?;
        let time_embed = self.embedding("time_embed.0", "time_embed.2", Some(conv_in.rows()), None)?;
        let [_, last] = &time_embed;
        self.embed = last.rows();
        let label_embed = match self.reader.below("label_emb") {
            true => Some(self.embedding("label_emb.0.0", "label_emb.0.2", None, Some(self.embed))?),
            false => None,
        };
        self.channels = conv_in.rows();
        let mut skips = vec![self.skip()];
        let mut inputs = Vec::new();
        for at in (1..).take_while(|at| self.reader.below(&format!("input_blocks.{at}"))).collect::<Vec<usize>>() {
            inputs.push(self.input(&format!("input_blocks.{at}"))?);
            skips.push(self.skip());
        }
        if !matches!(inputs.first(), Some(Input::Block(_))) {
            return Err(self.reader.unsupported("a UNet that does not start with a residual block"));
        }
        let middle = self.reader.below("middle_block").then(|| self.middle()).transpose()?;
        let mut outputs = Vec::new();
        for at in (0..).take_while(|at| self.reader.below(&format!("output_blocks.{at}"))).collect::<Vec<usize>>() {
            let skip = skips.pop().filter(|skip| skip.level == self.level);
            let skip = skip.ok_or_else(|| {
                self.reader.unsupported(format!("output_blocks.{at}, which no input block at its resolution answers"))
            })?;
            outputs.push(self.output(&format!("output_blocks.{at}"), skip)?);
        }
        if let Some(at) = skips.len().checked_sub(1) {
            return Err(self.reader.unsupported(format!("input_blocks.{at}, which no output block answers")));
        }
        let norm_out = self.reader.group_norm("out.0", self.channels)?;
        let conv_out = self.reader.conv("out.2", None, Some(self.channels), 3)?;
        let stems = Vec::new();
        Ok(Unet { stems, time_embed, label_embed, conv_in, inputs, middle, outputs, norm_out, conv_out })
    }

    fn skip(&self) -> Skip {
        Skip { channels: self.channels, level: self.level }
    }

    fn embedding(
        &mut self,
        first: &str,
        second: &str,
        inner: Option<u64>,
        out: Option<u64>,
    ) -> Result<[Layer<StoredTensor>; 2], ModelError> {
        let first = self.reader.linear(first, None, inner)?;
        let second = self.reader.linear(second, out, Some(first.rows()))?;
        Ok([first, second])
    }

    fn input(&mut self, root: &str) -> Result<Input<StoredTensor>, ModelError> {
        let down = format!("{root}.0.op");
        if !self.reader.has(&down) {
            return self.block(root, self.channels).map(Input::Block);
        }
        let layer = self.reader.conv(&down, None, Some(self.channels), 3)?;
        self.channels = layer.rows();
        self.level += 1;
        Ok(Input::Down(layer))
    }

    fn middle(&mut self) -> Result<Middle<StoredTensor>, ModelError> {
        let first = self.res("middle_block.0", self.channels)?;
        let rest = match self.reader.below("middle_block.1") {
            true => Some((self.transformer("middle_block.1")?, self.res("middle_block.2", self.channels)?)),
            false => None,
        };
        Ok(Middle { first, rest })
    }

    fn output(&mut self, root: &str, skip: Skip) -> Result<Output<StoredTensor>, ModelError> {
        let block = self.block(root, self.channels.saturating_add(skip.channels))?;
        let up = format!("{root}.{}.conv", 1 + usize::from(block.transformer.is_some()));
        if !self.reader.has(&up) {
            return Ok(Output { block, up: None });
        }
        let layer = self.reader.conv(&up, None, Some(self.channels), 3)?;
        self.channels = layer.rows();
        self.level = self
            .level
            .checked_sub(1)
            .ok_or_else(|| self.reader.unsupported(format!("{up}, which would grow beyond the latent")))?;
        Ok(Output { block, up: Some(layer) })
    }

    fn block(&mut self, root: &str, channels: u64) -> Result<Block<StoredTensor>, ModelError> {
        let res = self.res(&format!("{root}.0"), channels)?;
        let stem = format!("{root}.1");
        let attends = self.reader.below(&stem) && !self.reader.has(&format!("{stem}.conv"));
        let transformer = attends.then(|| self.transformer(&stem)).transpose()?;
        Ok(Block { res, transformer })
    }

    fn res(&mut self, root: &str, channels: u64) -> Result<ResBlock<StoredTensor>, ModelError> {
        let norm1 = self.reader.group_norm(&format!("{root}.in_layers.0"), channels)?;
        let conv1 = self.reader.conv(&format!("{root}.in_layers.2"), None, Some(channels), 3)?;
        let inner = conv1.rows();
        let embed = self.reader.linear(&format!("{root}.emb_layers.1"), Some(inner), Some(self.embed))?;
        let norm2 = self.reader.group_norm(&format!("{root}.out_layers.0"), inner)?;
        let conv2 = self.reader.conv(&format!("{root}.out_layers.3"), None, Some(inner), 3)?;
        self.channels = conv2.rows();
        let stem = format!("{root}.skip_connection");
        let shortcut = match self.reader.has(&stem) {
            true => Some(self.reader.conv(&stem, Some(self.channels), Some(channels), 1)?),
            false if self.channels == channels => None,
            false => return Err(self.reader.unsupported(format!("a change of channels without {stem}"))),
        };
        Ok(ResBlock { norm1, conv1, embed, norm2, conv2, shortcut })
    }

    fn transformer(&mut self, root: &str) -> Result<Transformer<StoredTensor>, ModelError> {
        let channels = self.channels;
        let norm = self.reader.group_norm(&format!("{root}.norm"), channels)?;
        let linear = self.reader.rank(&format!("{root}.proj_in")) == 2;
        let heads = if linear { channels / HEAD_CHANNELS } else { EARLY_HEADS };
        if heads == 0 || !channels.is_multiple_of(heads) || (linear && !channels.is_multiple_of(HEAD_CHANNELS)) {
            return Err(self.reader.unsupported(format!("attention over {channels} channels, in {root}")));
        }
        let proj_in = self.projection(&format!("{root}.proj_in"), linear)?;
        let mut blocks = Vec::new();
        for at in
            (0..).take_while(|at| self.reader.below(&format!("{root}.transformer_blocks.{at}"))).collect::<Vec<u64>>()
        {
            blocks.push(self.transformer_block(&format!("{root}.transformer_blocks.{at}"))?);
        }
        let proj_out = self.projection(&format!("{root}.proj_out"), linear)?;
        Ok(Transformer { norm, proj_in, blocks, proj_out, heads, linear })
    }

    fn projection(&mut self, stem: &str, linear: bool) -> Result<Layer<StoredTensor>, ModelError> {
        let channels = Some(self.channels);
        match linear {
            true => self.reader.linear(stem, channels, channels),
            false => self.reader.conv(stem, channels, channels, 1),
        }
    }

    fn transformer_block(&mut self, root: &str) -> Result<TransformerBlock<StoredTensor>, ModelError> {
        let channels = self.channels;
        let norm1 = self.reader.layer_norm(&format!("{root}.norm1"), channels)?;
        let own = self.attention(&format!("{root}.attn1"), Some(channels))?;
        let norm2 = self.reader.layer_norm(&format!("{root}.norm2"), channels)?;
        let cross = self.attention(&format!("{root}.attn2"), self.context)?;
        self.context = Some(cross.key.columns());
        let norm3 = self.reader.layer_norm(&format!("{root}.norm3"), channels)?;
        let widen = self.reader.linear(&format!("{root}.ff.net.0.proj"), None, Some(channels))?;
        if !widen.rows().is_multiple_of(2) {
            return Err(self.reader.unsupported(format!("an odd width of {root}.ff.net.0.proj")));
        }
        let narrow = self.reader.linear(&format!("{root}.ff.net.2"), Some(channels), Some(widen.rows() / 2))?;
        let feed_forward = FeedForward { widen, narrow };
        Ok(TransformerBlock { norm1, own, norm2, cross, norm3, feed_forward })
    }

    fn attention(&mut self, root: &str, source: Option<u64>) -> Result<Attention<StoredTensor>, ModelError> {
        let channels = self.channels;
        let query = self.reader.unbiased(&format!("{root}.to_q"), channels, Some(channels))?;
        let key = self.reader.unbiased(&format!("{root}.to_k"), channels, source)?;
        let value = self.reader.unbiased(&format!("{root}.to_v"), channels, Some(key.columns()))?;
        let out = self.reader.linear(&format!("{root}.to_out.0"), Some(channels), Some(channels))?;
        Ok(Attention { query, key, value, out })
    }
}
