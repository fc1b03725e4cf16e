use super::super::{ModelError, StoredTensor};
use super::{Conv, Norm, Reader};

/// A tiny autoencoder (TAESD and its relatives); halves that the file does not hold are absent.
#[derive(Debug)]
pub(crate) struct Tiny<T> {
    pub(crate) encoder: Option<Vec<Step<T>>>,
    pub(crate) decoder: Option<Vec<Step<T>>>,
}

/// One layer of a half.
#[derive(Debug)]
pub(crate) enum Step<T> {
    /// Stride 1, same size.
    Conv(Conv<T>),
    /// Stride 2: halves each side.
    Halve(Conv<T>),
    /// Residual block.
    Block(TinyBlock<T>),
    /// `3 · tanh(x / 3)`.
    Clamp,
    /// max(x, 0).
    Relu,
    /// Doubles each side by repetition.
    Double,
}

/// Three convolutions and a residual path, with a pooled path before them in the newest family.
#[derive(Debug)]
pub(crate) struct TinyBlock<T> {
    pub(crate) pool: Option<Pool<T>>,
    pub(crate) convs: [Conv<T>; 3],
    pub(crate) skip: Option<Conv<T>>,
}

/// The pooled path: widened, normalised in [`Pool::GROUPS`], cut off at zero, narrowed, added to the block's input.
#[derive(Debug)]
pub(crate) struct Pool<T> {
    pub(crate) widen: Conv<T>,
    pub(crate) norm: Norm<T>,
    pub(crate) narrow: Conv<T>,
}

impl<T> Tiny<T> {
    pub(crate) fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Tiny<U>, E> {
        let mut half = |steps: &Option<Vec<Step<T>>>| {
            steps.as_ref().map(|steps| steps.iter().map(|step| step.try_map(f)).collect()).transpose()
        };
        Ok(Tiny { encoder: half(&self.encoder)?, decoder: half(&self.decoder)? })
    }
}

impl<T> Step<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Step<U>, E> {
        Ok(match self {
            Self::Conv(conv) => Step::Conv(conv.try_map(f)?),
            Self::Halve(conv) => Step::Halve(conv.try_map(f)?),
            Self::Block(block) => Step::Block(block.try_map(f)?),
            Self::Clamp => Step::Clamp,
            Self::Relu => Step::Relu,
            Self::Double => Step::Double,
        })
    }
}

impl<T> TinyBlock<T> {
    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<TinyBlock<U>, E> {
        let pool = self.pool.as_ref().map(|pool| pool.try_map(f)).transpose()?;
        let [first, second, third] = &self.convs;
        Ok(TinyBlock {
            pool,
            convs: [first.try_map(f)?, second.try_map(f)?, third.try_map(f)?],
            skip: self.skip.as_ref().map(|conv| conv.try_map(f)).transpose()?,
        })
    }
}

impl<T> Pool<T> {
    /// Groups of the normalisation.
    pub(crate) const GROUPS: u64 = 4;

    fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Pool<U>, E> {
        Ok(Pool { widen: self.widen.try_map(f)?, norm: self.norm.try_map(f)?, narrow: self.narrow.try_map(f)? })
    }
}

/// Where the layers of one half are: what their names start with, and what is added to their number.
struct Place {
    root: String,
    shift: usize,
}

impl Place {
    fn stem(&self, at: usize) -> String {
        format!("{}{}", self.root, at - self.shift)
    }
}

impl Tiny<StoredTensor> {
    /// The tiny autoencoder under `prefix`, or `None` where there is none.
    pub(crate) fn read(reader: &mut Reader<'_>, prefix: &str) -> Result<Option<Self>, ModelError> {
        let encoder = places(prefix, "encoder", 0)
            .into_iter()
            .find(|place| reader.has(&place.stem(0)) && reader.has(&format!("{}.conv.0", place.stem(1))));
        let decoder = places(prefix, "decoder", 1)
            .into_iter()
            .find(|place| reader.has(&place.stem(1)) && reader.has(&format!("{}.conv.0", place.stem(3))));
        if encoder.is_none() && decoder.is_none() {
            return Ok(None);
        }
        let roots: Vec<String> = [&encoder, &decoder].into_iter().flatten().map(|place| place.root.clone()).collect();
        let tiny = Self {
            encoder: encoder.map(|place| Half::new(reader, place).encoder()).transpose()?,
            decoder: decoder.map(|place| Half::new(reader, place).decoder()).transpose()?,
        };
        for name in [Self::SCALE, Self::SHIFT] {
            reader.ignore(&format!("{prefix}{name}"));
        }
        match reader.left_over(&roots) {
            Some(name) => Err(reader.unsupported(format!("a tiny autoencoder with {name} (the f32 one of taesana?)"))),
            None => tiny.check(reader).map(|()| Some(tiny)),
        }
    }

    /// Name of the tensor that holds the latent's scale.
    pub(crate) const SCALE: &'static str = "vae_scale";
    /// Name of the tensor that holds the latent's shift.
    pub(crate) const SHIFT: &'static str = "vae_shift";

    /// Channels of the latent.
    pub(crate) fn latent_channels(&self) -> u64 {
        let convs = |steps: &Option<Vec<Step<StoredTensor>>>| -> Vec<(u64, u64)> {
            steps.iter().flatten().filter_map(Step::channels).collect()
        };
        match (convs(&self.decoder).first(), convs(&self.encoder).last()) {
            (Some(&(inner, _)), _) => inner,
            (None, Some(&(_, out))) => out,
            (None, None) => 0,
        }
    }

    fn check(&self, reader: &Reader<'_>) -> Result<(), ModelError> {
        let encoded = self.encoder.iter().flatten().filter_map(Step::channels).next_back();
        if encoded.is_some_and(|(_, out)| out != self.latent_channels()) {
            return Err(reader.unsupported("an encoder and a decoder with different latents"));
        }
        Ok(())
    }

    /// Pixels per latent element in each direction: both halves have three changes of resolution.
    pub(crate) const RATIO: u64 = 8;

    /// Most elements alive at once, per pixel of the image.
    pub(crate) fn elements_per_pixel(steps: &[Step<StoredTensor>]) -> u64 {
        // At full resolution a block holds its input, the result so far and the one being computed; the pooled
        // path is four times as wide but has a sixty-fourth of the positions.
        let widest = steps.iter().filter_map(Step::channels).map(|(inner, out)| inner.max(out)).max().unwrap_or(0);
        3 * widest + 3
    }
}

impl Step<StoredTensor> {
    /// Channels in and out, for a step with weights.
    fn channels(&self) -> Option<(u64, u64)> {
        match self {
            Self::Conv(conv) | Self::Halve(conv) => Some((conv.channels_in(), conv.channels_out())),
            Self::Block(TinyBlock { convs: [first, _, last], .. }) => Some((first.channels_in(), last.channels_out())),
            Self::Clamp | Self::Relu | Self::Double => None,
        }
    }
}

/// Where a half can be, most explicit names first.
fn places(prefix: &str, half: &str, shift: usize) -> Vec<Place> {
    let mut places = vec![
        Place { root: format!("{prefix}taesd_{half}."), shift: 0 },
        Place { root: format!("{prefix}{half}.layers."), shift },
        Place { root: format!("{prefix}{half}."), shift: 0 },
    ];
    // A file of its own for one half has bare numbers.
    if prefix.is_empty() {
        places.push(Place { root: String::new(), shift: 0 });
    }
    places
}

/// Reads the layers of one half in order, keeping track of the channels.
struct Half<'r, 'f> {
    reader: &'r mut Reader<'f>,
    place: Place,
    steps: Vec<Step<StoredTensor>>,
    channels: Option<u64>,
}

impl<'r, 'f> Half<'r, 'f> {
    fn new(reader: &'r mut Reader<'f>, place: Place) -> Self {
        Self { reader, place, steps: Vec::new(), channels: None }
    }

    fn encoder(mut self) -> Result<Vec<Step<StoredTensor>>, ModelError> {
        self.channels = Some(3);
        self.conv(0)?;
        self.block(1)?;
        for at in [2, 6, 10] {
            let conv = self.read(at)?;
            self.steps.push(Step::Halve(conv));
            for at in at + 1..=at + 3 {
                self.block(at)?;
            }
        }
        self.conv(14)?;
        Ok(self.steps)
    }

    fn decoder(mut self) -> Result<Vec<Step<StoredTensor>>, ModelError> {
        self.steps.push(Step::Clamp);
        self.conv(1)?;
        self.steps.push(Step::Relu);
        for at in [3, 8, 13] {
            for at in at..at + 3 {
                self.block(at)?;
            }
            self.steps.push(Step::Double);
            self.conv(at + 4)?;
        }
        self.block(18)?;
        self.conv(19)?;
        match self.channels {
            Some(3) => Ok(self.steps),
            _ => Err(self.reader.unsupported("an image of other than 3 channels")),
        }
    }

    fn conv(&mut self, at: usize) -> Result<(), ModelError> {
        let conv = self.read(at)?;
        self.steps.push(Step::Conv(conv));
        Ok(())
    }

    fn read(&mut self, at: usize) -> Result<Conv<StoredTensor>, ModelError> {
        let conv = self.reader.conv(&self.place.stem(at), self.channels, 3)?;
        self.channels = Some(conv.channels_out());
        Ok(conv)
    }

    fn block(&mut self, at: usize) -> Result<(), ModelError> {
        let stem = self.place.stem(at);
        let channels = self.channels.unwrap_or(0);
        let pool = match self.reader.has(&format!("{stem}.pool.0")) {
            true => Some(self.pool(&stem, channels)?),
            false => None,
        };
        let first = self.reader.conv(&format!("{stem}.conv.0"), Some(channels), 3)?;
        let second = self.reader.conv(&format!("{stem}.conv.2"), Some(first.channels_out()), 3)?;
        let third = self.reader.conv(&format!("{stem}.conv.4"), Some(second.channels_out()), 3)?;
        let skip = format!("{stem}.skip");
        let skip = match self.reader.has(&skip) {
            true => Some(self.reader.conv(&skip, Some(channels), 1)?),
            false => None,
        };
        let residual = skip.as_ref().map_or(channels, Conv::<StoredTensor>::channels_out);
        if residual != third.channels_out() {
            return Err(self.reader.unsupported(format!("a residual of {residual} channels in {stem}")));
        }
        self.channels = Some(residual);
        self.steps.push(Step::Block(TinyBlock { pool, convs: [first, second, third], skip }));
        Ok(())
    }

    fn pool(&mut self, stem: &str, channels: u64) -> Result<Pool<StoredTensor>, ModelError> {
        let widen = self.reader.conv(&format!("{stem}.pool.0"), Some(channels), 1)?;
        let norm = self.reader.norm(&format!("{stem}.pool.1"), widen.channels_out(), Pool::<StoredTensor>::GROUPS)?;
        let narrow = self.reader.conv(&format!("{stem}.pool.3"), Some(widen.channels_out()), 1)?;
        match narrow.channels_out() == channels {
            true => Ok(Pool { widen, norm, narrow }),
            false => Err(self.reader.unsupported(format!("a change of channels in {stem}.pool"))),
        }
    }
}
