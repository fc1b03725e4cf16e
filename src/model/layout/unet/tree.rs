/// Which layer of a UNet: its place among the model's layers, in the order in which they are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerId(pub(in crate::model) usize);

/// A linear layer (weight `[out, in]`), a convolution (`[out, in, k, k]`) or a normalisation (`[channels]`).
///
/// All have an id, because adapters change any of them and name it by its stem.
#[derive(Debug)]
pub(crate) struct Layer<T> {
    pub(crate) id: LayerId,
    pub(crate) weight: T,
    pub(crate) bias: Option<T>,
}

/// A UNet. Blocks are in the order in which they run.
#[derive(Debug)]
pub(crate) struct Unet<T> {
    /// What each layer is called in a single-file checkpoint, without prefix, whatever the file calls it; by id.
    pub(crate) stems: Vec<String>,
    pub(crate) time_embed: [Layer<T>; 2],
    pub(crate) label_embed: Option<[Layer<T>; 2]>,
    pub(crate) conv_in: Layer<T>,
    /// `input_blocks.1` and on.
    pub(crate) inputs: Vec<Input<T>>,
    pub(crate) middle: Option<Middle<T>>,
    pub(crate) outputs: Vec<Output<T>>,
    pub(crate) norm_out: Layer<T>,
    pub(crate) conv_out: Layer<T>,
}

/// One step on the way down.
#[derive(Debug)]
pub(crate) enum Input<T> {
    Block(Block<T>),
    /// Halves each side, rounding up.
    Down(Layer<T>),
}

/// A residual block, and attention where the level has it.
#[derive(Debug)]
pub(crate) struct Block<T> {
    pub(crate) res: ResBlock<T>,
    pub(crate) transformer: Option<Transformer<T>>,
}

/// The blocks at the lowest resolution; distilled models keep only the first, or none.
#[derive(Debug)]
pub(crate) struct Middle<T> {
    pub(crate) first: ResBlock<T>,
    pub(crate) rest: Option<(Transformer<T>, ResBlock<T>)>,
}

/// One step on the way up.
#[derive(Debug)]
pub(crate) struct Output<T> {
    pub(crate) block: Block<T>,
    /// The convolution after sides have grown to those of the next skip.
    pub(crate) up: Option<Layer<T>>,
}

/// Two convolutions, the timestep between them, and a residual path with a convolution where channels change.
#[derive(Debug)]
pub(crate) struct ResBlock<T> {
    pub(crate) norm1: Layer<T>,
    pub(crate) conv1: Layer<T>,
    pub(crate) embed: Layer<T>,
    pub(crate) norm2: Layer<T>,
    pub(crate) conv2: Layer<T>,
    pub(crate) shortcut: Option<Layer<T>>,
}

/// Attention over all positions, wrapped in projections.
#[derive(Debug)]
pub(crate) struct Transformer<T> {
    pub(crate) norm: Layer<T>,
    pub(crate) proj_in: Layer<T>,
    pub(crate) blocks: Vec<TransformerBlock<T>>,
    pub(crate) proj_out: Layer<T>,
    /// Heads that channels are divided among. No file tells: see [`Unet::read`].
    pub(crate) heads: u64,
    /// Whether the projections are linear layers rather than convolutions.
    pub(crate) linear: bool,
}

/// Attention to itself, attention to the context, a feed-forward layer; each normalised before and added after.
#[derive(Debug)]
pub(crate) struct TransformerBlock<T> {
    pub(crate) norm1: Layer<T>,
    pub(crate) own: Attention<T>,
    pub(crate) norm2: Layer<T>,
    pub(crate) cross: Attention<T>,
    pub(crate) norm3: Layer<T>,
    pub(crate) feed_forward: FeedForward<T>,
}

/// The four projections of an attention.
#[derive(Debug)]
pub(crate) struct Attention<T> {
    pub(crate) query: Layer<T>,
    pub(crate) key: Layer<T>,
    pub(crate) value: Layer<T>,
    pub(crate) out: Layer<T>,
}

/// GEGLU: the first half of what `widen` gives, times the GELU of its second half, narrowed again.
#[derive(Debug)]
pub(crate) struct FeedForward<T> {
    pub(crate) widen: Layer<T>,
    pub(crate) narrow: Layer<T>,
}

impl<T> Unet<T> {
    /// The same tree with every layer replaced, in the order in which they run.
    pub(crate) fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Unet<U>, E> {
        Ok(Unet {
            stems: self.stems.clone(),
            time_embed: pair(&self.time_embed, f)?,
            label_embed: self.label_embed.as_ref().map(|layers| pair(layers, f)).transpose()?,
            conv_in: f(&self.conv_in)?,
            inputs: self.inputs.iter().map(|input| input.try_map(f)).collect::<Result<_, _>>()?,
            middle: self.middle.as_ref().map(|middle| middle.try_map(f)).transpose()?,
            outputs: self.outputs.iter().map(|output| output.try_map(f)).collect::<Result<_, _>>()?,
            norm_out: f(&self.norm_out)?,
            conv_out: f(&self.conv_out)?,
        })
    }

    /// Every layer of every transformer, in the order in which they run.
    pub(crate) fn transformers(&self) -> impl Iterator<Item = &Transformer<T>> {
        let down = self.inputs.iter().filter_map(|input| match input {
            Input::Block(block) => block.transformer.as_ref(),
            Input::Down(_) => None,
        });
        let middle = self.middle.iter().filter_map(|middle| middle.rest.as_ref().map(|(transformer, _)| transformer));
        let up = self.outputs.iter().filter_map(|output| output.block.transformer.as_ref());
        down.chain(middle).chain(up)
    }
}

fn pair<T, U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(
    layers: &[Layer<T>; 2],
    f: &mut F,
) -> Result<[Layer<U>; 2], E> {
    let [first, second] = layers;
    Ok([f(first)?, f(second)?])
}

impl<T> Input<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Input<U>, E> {
        Ok(match self {
            Self::Block(block) => Input::Block(block.try_map(f)?),
            Self::Down(layer) => Input::Down(f(layer)?),
        })
    }
}

impl<T> Block<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Block<U>, E> {
        Ok(Block {
            res: self.res.try_map(f)?,
            transformer: self.transformer.as_ref().map(|transformer| transformer.try_map(f)).transpose()?,
        })
    }
}

impl<T> Middle<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Middle<U>, E> {
        let first = self.first.try_map(f)?;
        let rest = match &self.rest {
            Some((transformer, second)) => Some((transformer.try_map(f)?, second.try_map(f)?)),
            None => None,
        };
        Ok(Middle { first, rest })
    }
}

impl<T> Output<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Output<U>, E> {
        Ok(Output { block: self.block.try_map(f)?, up: self.up.as_ref().map(f).transpose()? })
    }
}

impl<T> ResBlock<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<ResBlock<U>, E> {
        Ok(ResBlock {
            norm1: f(&self.norm1)?,
            conv1: f(&self.conv1)?,
            embed: f(&self.embed)?,
            norm2: f(&self.norm2)?,
            conv2: f(&self.conv2)?,
            shortcut: self.shortcut.as_ref().map(f).transpose()?,
        })
    }
}

impl<T> Transformer<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Transformer<U>, E> {
        Ok(Transformer {
            norm: f(&self.norm)?,
            proj_in: f(&self.proj_in)?,
            blocks: self.blocks.iter().map(|block| block.try_map(f)).collect::<Result<_, _>>()?,
            proj_out: f(&self.proj_out)?,
            heads: self.heads,
            linear: self.linear,
        })
    }
}

impl<T> TransformerBlock<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<TransformerBlock<U>, E> {
        Ok(TransformerBlock {
            norm1: f(&self.norm1)?,
            own: self.own.try_map(f)?,
            norm2: f(&self.norm2)?,
            cross: self.cross.try_map(f)?,
            norm3: f(&self.norm3)?,
            feed_forward: FeedForward { widen: f(&self.feed_forward.widen)?, narrow: f(&self.feed_forward.narrow)? },
        })
    }
}

impl<T> Attention<T> {
    fn try_map<U, E, F: FnMut(&Layer<T>) -> Result<Layer<U>, E>>(&self, f: &mut F) -> Result<Attention<U>, E> {
        Ok(Attention { query: f(&self.query)?, key: f(&self.key)?, value: f(&self.value)?, out: f(&self.out)? })
    }
}
