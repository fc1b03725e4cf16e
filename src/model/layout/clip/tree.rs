use super::super::Norm;

/// A text encoder.
#[derive(Debug)]
pub(crate) struct Clip<T> {
    /// One row per token, `[vocabulary, width]`.
    pub(crate) tokens: T,
    /// One row per position, `[positions, width]`.
    pub(crate) positions: T,
    /// In the order in which they run.
    pub(crate) blocks: Vec<Block<T>>,
    pub(crate) norm_out: Norm<T>,
    pub(crate) projection: Option<Projection<T>>,
}

/// Attention and two linear layers, each behind a normalisation and beside a residual path.
#[derive(Debug)]
pub(crate) struct Block<T> {
    pub(crate) norm1: Norm<T>,
    pub(crate) qkv: Qkv<T>,
    pub(crate) out: Linear<T>,
    pub(crate) norm2: Norm<T>,
    pub(crate) fc1: Linear<T>,
    pub(crate) fc2: Linear<T>,
}

/// Query, key and value: three layers, or one whose rows are all three.
#[derive(Debug)]
pub(crate) enum Qkv<T> {
    Split(Box<[Linear<T>; 3]>),
    Fused(Linear<T>),
}

/// A linear layer with the names that adapters address it by.
#[derive(Debug)]
pub(crate) struct Linear<T> {
    /// `[out, in]`.
    pub(crate) weight: T,
    pub(crate) bias: Option<T>,
    /// transformers' names without an ending, such as `text_model.encoder.layers.0.mlp.fc1`: each stands for an equal
    /// share of the rows, in this order.
    pub(crate) stems: Vec<String>,
}

/// What the pooled row is multiplied with.
#[derive(Debug)]
pub(crate) struct Projection<T> {
    pub(crate) layer: Linear<T>,
    /// Whether the weight is stored as `[in, out]`.
    pub(crate) transposed: bool,
}

impl<T> Clip<T> {
    /// Every linear layer, in the order in which they run.
    pub(crate) fn each_linear<'a>(&'a self, f: &mut impl FnMut(&'a Linear<T>)) {
        for Block { qkv, out, fc1, fc2, .. } in &self.blocks {
            match qkv {
                Qkv::Split(layers) => layers.iter().for_each(&mut *f),
                Qkv::Fused(layer) => f(layer),
            }
            [out, fc1, fc2].into_iter().for_each(&mut *f);
        }
        self.projection.iter().for_each(|projection| f(&projection.layer));
    }

    pub(crate) fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Clip<U>, E> {
        Ok(Clip {
            tokens: f(&self.tokens)?,
            positions: f(&self.positions)?,
            blocks: self.blocks.iter().map(|block| block.try_map(f)).collect::<Result<_, _>>()?,
            norm_out: self.norm_out.try_map(f)?,
            projection: self.projection.as_ref().map(|projection| projection.try_map(f)).transpose()?,
        })
    }
}

impl<T> Block<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Block<U>, E> {
        Ok(Block {
            norm1: self.norm1.try_map(f)?,
            qkv: self.qkv.try_map(f)?,
            out: self.out.try_map(f)?,
            norm2: self.norm2.try_map(f)?,
            fc1: self.fc1.try_map(f)?,
            fc2: self.fc2.try_map(f)?,
        })
    }
}

impl<T> Qkv<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Qkv<U>, E> {
        Ok(match self {
            Self::Split(layers) => {
                let [query, key, value] = layers.as_ref();
                Qkv::Split(Box::new([query.try_map(f)?, key.try_map(f)?, value.try_map(f)?]))
            }
            Self::Fused(layer) => Qkv::Fused(layer.try_map(f)?),
        })
    }
}

impl<T> Linear<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Linear<U>, E> {
        Ok(Linear { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()?, stems: self.stems.clone() })
    }
}

impl<T> Projection<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Projection<U>, E> {
        Ok(Projection { layer: self.layer.try_map(f)?, transposed: self.transposed })
    }
}
