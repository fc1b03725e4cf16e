use super::super::{ModelError, StoredTensor};
use super::{Conv, Norm, Reader};

/// Groups of every normalisation.
const GROUPS: u64 = 32;
/// Most levels and blocks per level that are looked for; far beyond any published model.
const MAX_REPEATS: usize = 16;

/// An AutoencoderKL; halves that the file does not hold are absent.
#[derive(Debug)]
pub(crate) struct Kl<T> {
    pub(crate) encoder: Option<KlEncoder<T>>,
    pub(crate) decoder: Option<KlDecoder<T>>,
}

/// Image to moments. Levels in the order in which they run.
#[derive(Debug)]
pub(crate) struct KlEncoder<T> {
    pub(crate) conv_in: Conv<T>,
    pub(crate) levels: Vec<Level<T>>,
    pub(crate) middle: Middle<T>,
    pub(crate) norm_out: Norm<T>,
    pub(crate) conv_out: Conv<T>,
    pub(crate) quant: Option<Conv<T>>,
}

/// Latent to image. Levels in the order in which they run: smallest resolution first.
#[derive(Debug)]
pub(crate) struct KlDecoder<T> {
    pub(crate) post_quant: Option<Conv<T>>,
    pub(crate) conv_in: Conv<T>,
    pub(crate) middle: Middle<T>,
    pub(crate) levels: Vec<Level<T>>,
    pub(crate) norm_out: Norm<T>,
    pub(crate) conv_out: Conv<T>,
}

/// Blocks at one resolution, then the change to the next one.
#[derive(Debug)]
pub(crate) struct Level<T> {
    pub(crate) blocks: Vec<ResBlock<T>>,
    pub(crate) resample: Option<Conv<T>>,
}

/// The blocks at the lowest resolution.
#[derive(Debug)]
pub(crate) struct Middle<T> {
    pub(crate) first: ResBlock<T>,
    pub(crate) attention: Option<Attention<T>>,
    pub(crate) second: ResBlock<T>,
}

/// Two convolutions and a residual path, which has a convolution of its own where channels change.
#[derive(Debug)]
pub(crate) struct ResBlock<T> {
    pub(crate) norm1: Norm<T>,
    pub(crate) conv1: Conv<T>,
    pub(crate) norm2: Norm<T>,
    pub(crate) conv2: Conv<T>,
    pub(crate) shortcut: Option<Conv<T>>,
}

/// Single-head attention over all positions.
#[derive(Debug)]
pub(crate) struct Attention<T> {
    pub(crate) norm: Norm<T>,
    pub(crate) query: Conv<T>,
    pub(crate) key: Conv<T>,
    pub(crate) value: Conv<T>,
    pub(crate) out: Conv<T>,
}

impl<T> Kl<T> {
    pub(crate) fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Kl<U>, E> {
        Ok(Kl {
            encoder: self.encoder.as_ref().map(|encoder| encoder.try_map(f)).transpose()?,
            decoder: self.decoder.as_ref().map(|decoder| decoder.try_map(f)).transpose()?,
        })
    }
}

impl<T> KlEncoder<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<KlEncoder<U>, E> {
        Ok(KlEncoder {
            conv_in: self.conv_in.try_map(f)?,
            levels: self.levels.iter().map(|level| level.try_map(f)).collect::<Result<_, _>>()?,
            middle: self.middle.try_map(f)?,
            norm_out: self.norm_out.try_map(f)?,
            conv_out: self.conv_out.try_map(f)?,
            quant: self.quant.as_ref().map(|conv| conv.try_map(f)).transpose()?,
        })
    }
}

impl<T> KlDecoder<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<KlDecoder<U>, E> {
        Ok(KlDecoder {
            post_quant: self.post_quant.as_ref().map(|conv| conv.try_map(f)).transpose()?,
            conv_in: self.conv_in.try_map(f)?,
            middle: self.middle.try_map(f)?,
            levels: self.levels.iter().map(|level| level.try_map(f)).collect::<Result<_, _>>()?,
            norm_out: self.norm_out.try_map(f)?,
            conv_out: self.conv_out.try_map(f)?,
        })
    }
}

impl<T> Level<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Level<U>, E> {
        Ok(Level {
            blocks: self.blocks.iter().map(|block| block.try_map(f)).collect::<Result<_, _>>()?,
            resample: self.resample.as_ref().map(|conv| conv.try_map(f)).transpose()?,
        })
    }
}

impl<T> Middle<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Middle<U>, E> {
        Ok(Middle {
            first: self.first.try_map(f)?,
            attention: self.attention.as_ref().map(|attention| attention.try_map(f)).transpose()?,
            second: self.second.try_map(f)?,
        })
    }
}

impl<T> ResBlock<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<ResBlock<U>, E> {
        Ok(ResBlock {
            norm1: self.norm1.try_map(f)?,
            conv1: self.conv1.try_map(f)?,
            norm2: self.norm2.try_map(f)?,
            conv2: self.conv2.try_map(f)?,
            shortcut: self.shortcut.as_ref().map(|conv| conv.try_map(f)).transpose()?,
        })
    }
}

impl<T> Attention<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Attention<U>, E> {
        Ok(Attention {
            norm: self.norm.try_map(f)?,
            query: self.query.try_map(f)?,
            key: self.key.try_map(f)?,
            value: self.value.try_map(f)?,
            out: self.out.try_map(f)?,
        })
    }
}

impl Kl<StoredTensor> {
    /// The autoencoder under `prefix`, or `None` where there is none.
    pub(crate) fn read(reader: &mut Reader<'_>, prefix: &str) -> Result<Option<Self>, ModelError> {
        let (encoder, decoder) = (format!("{prefix}encoder"), format!("{prefix}decoder"));
        let (encodes, decodes) = (reader.has(&format!("{encoder}.conv_in")), reader.has(&format!("{decoder}.conv_in")));
        if !encodes && !decodes {
            return Ok(None);
        }
        if let Some(name) = reader.left_over(&[format!("{prefix}quantize."), format!("{prefix}bn.")]) {
            return Err(reader.unsupported(format!("an autoencoder with {name}")));
        }
        let scheme = Scheme::of(reader, prefix)?;
        let kl = Self {
            encoder: encodes.then(|| KlEncoder::read(reader, scheme, prefix, &encoder)).transpose()?,
            decoder: decodes.then(|| KlDecoder::read(reader, scheme, prefix, &decoder)).transpose()?,
        };
        match reader.left_over(&[format!("{encoder}."), format!("{decoder}.")]) {
            Some(name) => Err(reader.unsupported(format!("an autoencoder with {name}"))),
            None => kl.check(reader).map(|()| Some(kl)),
        }
    }

    /// Channels of the latent.
    pub(crate) fn latent_channels(&self) -> u64 {
        match (&self.decoder, &self.encoder) {
            (Some(decoder), _) => decoder.post_quant.as_ref().unwrap_or(&decoder.conv_in).channels_in(),
            (None, Some(encoder)) => encoder.moments() / 2,
            (None, None) => 0,
        }
    }

    /// Pixels per latent element in each direction.
    pub(crate) fn ratio(&self) -> u64 {
        match (&self.decoder, &self.encoder) {
            (Some(decoder), _) => ratio(&decoder.levels),
            (None, Some(encoder)) => ratio(&encoder.levels),
            (None, None) => 1,
        }
    }

    /// The two halves must be two halves of the same thing.
    fn check(&self, reader: &Reader<'_>) -> Result<(), ModelError> {
        if let Some(encoder) = &self.encoder
            && (encoder.moments() != 2 * self.latent_channels() || ratio(&encoder.levels) != self.ratio())
        {
            return Err(reader.unsupported("an encoder that does not give mean and variance for its decoder"));
        }
        Ok(())
    }
}

impl KlEncoder<StoredTensor> {
    fn read(reader: &mut Reader<'_>, scheme: Scheme, prefix: &str, root: &str) -> Result<Self, ModelError> {
        let conv_in = reader.conv(&format!("{root}.conv_in"), Some(3), 3)?;
        let mut channels = conv_in.channels_out();
        let mut levels = Vec::new();
        for at in 0..count(reader, |at| scheme.block(root, at, 0) + ".norm1") {
            let level = Level::read(
                reader,
                scheme,
                channels,
                |block| scheme.block(root, at, block),
                || scheme.resample(root, at),
            )?;
            channels = level.channels_out(channels);
            levels.push(level);
        }
        let middle = Middle::read(reader, scheme, root, channels)?;
        let norm_out = reader.norm(&format!("{root}.{}", scheme.norm_out()), channels, GROUPS)?;
        let conv_out = reader.conv(&format!("{root}.conv_out"), Some(channels), 3)?;
        let quant = format!("{prefix}quant_conv");
        let quant = match reader.has(&quant) {
            true => Some(reader.conv(&quant, Some(conv_out.channels_out()), 1)?),
            false => None,
        };
        Ok(Self { conv_in, levels, middle, norm_out, conv_out, quant })
    }

    /// Channels of mean and log variance together.
    fn moments(&self) -> u64 {
        self.quant.as_ref().unwrap_or(&self.conv_out).channels_out()
    }

    /// Most elements alive at once, per pixel.
    pub(crate) fn elements_per_pixel(&self) -> u64 {
        let image = 3;
        image + busiest(&self.levels, 1, self.conv_in.channels_out(), |area| area * 4)
    }
}

impl KlDecoder<StoredTensor> {
    fn read(reader: &mut Reader<'_>, scheme: Scheme, prefix: &str, root: &str) -> Result<Self, ModelError> {
        let post_quant = format!("{prefix}post_quant_conv");
        let post_quant = match reader.has(&post_quant) {
            true => Some(reader.conv(&post_quant, None, 1)?),
            false => None,
        };
        let conv_in =
            reader.conv(&format!("{root}.conv_in"), post_quant.as_ref().map(Conv::<StoredTensor>::channels_out), 3)?;
        let mut channels = conv_in.channels_out();
        let middle = Middle::read(reader, scheme, root, channels)?;
        let mut levels = Vec::new();
        let total = count(reader, |at| scheme.block(root, at, 0) + ".norm1");
        for at in (0..total).map(|run| scheme.decoder_level(run, total)) {
            let level = Level::read(
                reader,
                scheme,
                channels,
                |block| scheme.block(root, at, block),
                || scheme.resample(root, at),
            )?;
            channels = level.channels_out(channels);
            levels.push(level);
        }
        let norm_out = reader.norm(&format!("{root}.{}", scheme.norm_out()), channels, GROUPS)?;
        let conv_out = reader.conv(&format!("{root}.conv_out"), Some(channels), 3)?;
        if conv_out.channels_out() != 3 {
            return Err(reader.unsupported(format!("an image of {} channels", conv_out.channels_out())));
        }
        Ok(Self { post_quant, conv_in, middle, levels, norm_out, conv_out })
    }

    /// Most elements alive at once, per pixel of the image.
    pub(crate) fn elements_per_pixel(&self) -> u64 {
        let area = ratio(&self.levels).pow(2);
        busiest(&self.levels, area, self.conv_in.channels_out(), |area| area / 4)
    }
}

impl Level<StoredTensor> {
    fn read(
        reader: &mut Reader<'_>,
        scheme: Scheme,
        mut channels: u64,
        block: impl Fn(usize) -> String,
        resample: impl Fn() -> String,
    ) -> Result<Self, ModelError> {
        let mut blocks = Vec::new();
        for at in 0..count(reader, |at| block(at) + ".norm1") {
            let read = ResBlock::read(reader, scheme, &block(at), channels)?;
            channels = read.conv2.channels_out();
            blocks.push(read);
        }
        let stem = resample();
        let resample = match reader.has(&stem) {
            true => Some(reader.conv(&stem, Some(channels), 3)?),
            false => None,
        };
        Ok(Self { blocks, resample })
    }

    fn channels_out(&self, channels_in: u64) -> u64 {
        let blocks = self.blocks.last().map_or(channels_in, |block| block.conv2.channels_out());
        self.resample.as_ref().map_or(blocks, Conv::<StoredTensor>::channels_out)
    }
}

impl Middle<StoredTensor> {
    fn read(reader: &mut Reader<'_>, scheme: Scheme, root: &str, channels: u64) -> Result<Self, ModelError> {
        let first = ResBlock::read(reader, scheme, &scheme.middle(root, 0), channels)?;
        let stems = scheme.attention(root).into_iter().find(|stems| reader.has(&stems[1]));
        let attention = match stems {
            None => None,
            Some([norm, query, key, value, out]) => Some(Attention {
                norm: reader.norm(&norm, channels, GROUPS)?,
                query: reader.projection(&query, channels)?,
                key: reader.projection(&key, channels)?,
                value: reader.projection(&value, channels)?,
                out: reader.projection(&out, channels)?,
            }),
        };
        let second = ResBlock::read(reader, scheme, &scheme.middle(root, 1), channels)?;
        if first.conv2.channels_out() != channels || second.conv2.channels_out() != channels {
            return Err(reader.unsupported("a change of channels in the middle"));
        }
        Ok(Self { first, attention, second })
    }
}

impl ResBlock<StoredTensor> {
    fn read(reader: &mut Reader<'_>, scheme: Scheme, stem: &str, channels: u64) -> Result<Self, ModelError> {
        let norm1 = reader.norm(&format!("{stem}.norm1"), channels, GROUPS)?;
        let conv1 = reader.conv(&format!("{stem}.conv1"), Some(channels), 3)?;
        let inner = conv1.channels_out();
        let norm2 = reader.norm(&format!("{stem}.norm2"), inner, GROUPS)?;
        let conv2 = reader.conv(&format!("{stem}.conv2"), Some(inner), 3)?;
        let shortcut = format!("{stem}.{}", scheme.shortcut());
        let shortcut = match reader.has(&shortcut) {
            true => Some(reader.conv(&shortcut, Some(channels), 1)?),
            false => None,
        };
        let residual = shortcut.as_ref().map_or(channels, Conv::<StoredTensor>::channels_out);
        if residual != conv2.channels_out() {
            return Err(reader.unsupported(format!("a residual of {residual} channels in {stem}")));
        }
        Ok(Self { norm1, conv1, norm2, conv2, shortcut })
    }
}

/// How many of the layers that `stem` names are there, counted from 0 without a gap.
fn count(reader: &Reader<'_>, stem: impl Fn(usize) -> String) -> usize {
    (0..MAX_REPEATS).take_while(|&at| reader.has(&stem(at))).count()
}

fn ratio<T>(levels: &[Level<T>]) -> u64 {
    let doublings = levels.iter().filter(|level| level.resample.is_some()).count();
    1 << doublings
}

/// Most elements alive at once, per pixel: where a block holds its input twice (the residual and its normalised
/// copy) beside its first convolution's result. `area` is pixels per position, `next` what a resampling makes of it.
fn busiest(levels: &[Level<StoredTensor>], mut area: u64, mut channels: u64, next: impl Fn(u64) -> u64) -> u64 {
    let mut most = 0;
    for level in levels {
        for block in &level.blocks {
            let (inner, out) = (block.conv1.channels_out(), block.conv2.channels_out());
            let alive = (2 * channels + inner).max(channels + inner + out).max(2 * out + inner);
            most = most.max(alive.div_ceil(area.max(1)));
            channels = out;
        }
        if let Some(resample) = &level.resample {
            area = next(area);
            channels = resample.channels_out();
        }
    }
    most
}

/// How the layers are called.
#[derive(Debug, Clone, Copy)]
enum Scheme {
    /// As in single-file checkpoints; the decoder's levels are numbered from the largest resolution down.
    Ldm,
    /// As in diffusers folders; levels are numbered in the order in which they run.
    Diffusers,
}

impl Scheme {
    fn of(reader: &Reader<'_>, prefix: &str) -> Result<Self, ModelError> {
        for half in ["decoder", "encoder"] {
            let root = format!("{prefix}{half}");
            for scheme in [Self::Ldm, Self::Diffusers] {
                if reader.has(&(scheme.middle(&root, 0) + ".norm1")) {
                    return Ok(scheme);
                }
            }
        }
        Err(reader.unsupported("an autoencoder of an unknown layout"))
    }

    fn block(self, root: &str, level: usize, block: usize) -> String {
        let decodes = root.ends_with("decoder");
        match self {
            Self::Ldm if decodes => format!("{root}.up.{level}.block.{block}"),
            Self::Ldm => format!("{root}.down.{level}.block.{block}"),
            Self::Diffusers if decodes => format!("{root}.up_blocks.{level}.resnets.{block}"),
            Self::Diffusers => format!("{root}.down_blocks.{level}.resnets.{block}"),
        }
    }

    fn resample(self, root: &str, level: usize) -> String {
        let decodes = root.ends_with("decoder");
        match self {
            Self::Ldm if decodes => format!("{root}.up.{level}.upsample.conv"),
            Self::Ldm => format!("{root}.down.{level}.downsample.conv"),
            Self::Diffusers if decodes => format!("{root}.up_blocks.{level}.upsamplers.0.conv"),
            Self::Diffusers => format!("{root}.down_blocks.{level}.downsamplers.0.conv"),
        }
    }

    /// The number in names of the decoder's level that runs as number `run` of `total`.
    fn decoder_level(self, run: usize, total: usize) -> usize {
        match self {
            Self::Ldm => total - 1 - run,
            Self::Diffusers => run,
        }
    }

    fn middle(self, root: &str, at: usize) -> String {
        match self {
            Self::Ldm => format!("{root}.mid.block_{}", at + 1),
            Self::Diffusers => format!("{root}.mid_block.resnets.{at}"),
        }
    }

    /// Norm, query, key, value and output projection, under each of the names they have had.
    fn attention(self, root: &str) -> Vec<[String; 5]> {
        const LDM: &[[&str; 5]] = &[["norm", "q", "k", "v", "proj_out"]];
        const DIFFUSERS: &[[&str; 5]] =
            &[["group_norm", "to_q", "to_k", "to_v", "to_out.0"], ["group_norm", "query", "key", "value", "proj_attn"]];
        let (stem, names) = match self {
            Self::Ldm => (format!("{root}.mid.attn_1"), LDM),
            Self::Diffusers => (format!("{root}.mid_block.attentions.0"), DIFFUSERS),
        };
        names.iter().map(|names| names.map(|name| format!("{stem}.{name}"))).collect()
    }

    fn norm_out(self) -> &'static str {
        match self {
            Self::Ldm => "norm_out",
            Self::Diffusers => "conv_norm_out",
        }
    }

    fn shortcut(self) -> &'static str {
        match self {
            Self::Ldm => "nin_shortcut",
            Self::Diffusers => "conv_shortcut",
        }
    }
}
