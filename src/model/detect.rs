use half::{bf16, f16};

use super::executor::TINY_FAMILY;
use super::layout::{Kl, KlDecoder, KlEncoder, Reader, Tiny};
use super::{ModelError, ModelFile, StoredDType, StoredTensor, VaeFacts};

/// What a VAE's tensors are called under, in a checkpoint and in a file of its own.
const PREFIXES: [&str; 3] = ["first_stage_model.", "vae.", ""];
/// Bytes of the element type computed in.
const COMPUTED_BYTES: u64 = 4;
/// Head-room over the activations alone, in percent: convolutions need scratch and reordered weights of their own.
/// Measured peaks on a CPU lie at 130 to 140.
const HEAD_ROOM_PERCENT: u64 = 150;
/// Scale and shift of the tiny autoencoders whose files do not carry them: part of the file's name, latent
/// channels, scale, shift. The first that fits is taken.
const KNOWN_SCALES: [(&str, u64, f64, f64); 4] = [
    ("taesdxl", 4, 0.13025, 0.0),
    ("taesd3", 16, 1.5305, 0.0609),
    ("taef1", 16, 0.3611, 0.1159),
    ("taesd", 4, 0.18215, 0.0),
];

/// The tree of a recognised VAE.
#[derive(Debug)]
pub(super) enum VaeLayout {
    /// AutoencoderKL.
    Kl(Box<Kl<StoredTensor>>),
    /// TAESD and its relatives.
    Tiny(
        Tiny<StoredTensor>,
        #[cfg_attr(not(feature = "torch"), expect(dead_code, reason = "only running needs it"))] Scale,
    ),
}

/// How a tiny autoencoder's own latent relates to the raw one: raw = own / scale + shift.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    pub(super) scale: f64,
    pub(super) shift: f64,
}

/// Recognises the VAE in `file` by names and shapes alone; no weight is read.
///
/// # Errors
/// [`ModelError::MissingPart`] where there is none, [`ModelError::Unsupported`] for one of another make,
/// [`ModelError::Malformed`] for a scale that is not a number.
pub fn vae_facts(file: &ModelFile) -> Result<VaeFacts, ModelError> {
    let layout = vae_layout(file)?;
    let mut elements = 0u64;
    layout.each(|stored| elements = elements.saturating_add(stored.elements()))?;
    let needs = layout.elements_per_pixel();
    let bytes_per_pixel = |elements: u64| (elements * COMPUTED_BYTES * HEAD_ROOM_PERCENT).div_ceil(100);
    Ok(VaeFacts {
        path: file.path().to_owned(),
        family: layout.family(),
        latent_channels: layout.latent_channels(),
        ratio: layout.ratio(),
        can_decode: needs.decode.is_some(),
        can_encode: needs.encode.is_some(),
        weight_bytes: elements.saturating_mul(COMPUTED_BYTES),
        decode_bytes_per_pixel: needs.decode.map_or(0, bytes_per_pixel),
        encode_bytes_per_pixel: needs.encode.map_or(0, bytes_per_pixel),
        runs_inline: false,
    })
}

/// Most elements alive at once, per pixel, in each direction that is there.
struct Needs {
    decode: Option<u64>,
    encode: Option<u64>,
}

impl VaeLayout {
    /// Calls `visit` on every tensor.
    pub(super) fn each(&self, mut visit: impl FnMut(&StoredTensor)) -> Result<(), ModelError> {
        let mut visit = |stored: &StoredTensor| {
            visit(stored);
            Ok::<(), ModelError>(())
        };
        match self {
            Self::Kl(kl) => kl.try_map(&mut visit).map(drop),
            Self::Tiny(tiny, _) => tiny.try_map(&mut visit).map(drop),
        }
    }

    fn family(&self) -> &'static str {
        match self {
            Self::Kl(_) => "autoencoder-kl",
            Self::Tiny(..) => TINY_FAMILY,
        }
    }

    fn latent_channels(&self) -> u64 {
        match self {
            Self::Kl(kl) => kl.latent_channels(),
            Self::Tiny(tiny, _) => tiny.latent_channels(),
        }
    }

    fn ratio(&self) -> u64 {
        match self {
            Self::Kl(kl) => kl.ratio(),
            Self::Tiny(..) => Tiny::RATIO,
        }
    }

    fn elements_per_pixel(&self) -> Needs {
        match self {
            Self::Kl(kl) => Needs {
                decode: kl.decoder.as_ref().map(KlDecoder::elements_per_pixel),
                encode: kl.encoder.as_ref().map(KlEncoder::elements_per_pixel),
            },
            Self::Tiny(tiny, _) => Needs {
                decode: tiny.decoder.as_deref().map(Tiny::elements_per_pixel),
                encode: tiny.encoder.as_deref().map(Tiny::elements_per_pixel),
            },
        }
    }
}

/// The tree of the VAE in `file`.
pub(super) fn vae_layout(file: &ModelFile) -> Result<VaeLayout, ModelError> {
    let mut reader = Reader::new(file, "an autoencoder");
    let named_sana = file_name(file).contains("taesana");
    for prefix in PREFIXES {
        if let Some(kl) = Kl::read(&mut reader, prefix)? {
            return Ok(VaeLayout::Kl(Box::new(kl)));
        }
        if let Some(tiny) = Tiny::read(&mut reader, prefix)? {
            if named_sana {
                return Err(reader.unsupported("the f32 tiny autoencoder taesana"));
            }
            let scale = scale(file, prefix, tiny.latent_channels())?;
            return Ok(VaeLayout::Tiny(tiny, scale));
        }
    }
    Err(ModelError::MissingPart { path: file.path().to_owned(), part: "VAE", found: file.summary() })
}

fn file_name(file: &ModelFile) -> String {
    file.path().file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default()
}

/// From the file's tensors, else from its name, else none.
fn scale(file: &ModelFile, prefix: &str, latent_channels: u64) -> Result<Scale, ModelError> {
    let stored = |name: &str| {
        let found = file.tensor(&format!("{prefix}{name}")).or_else(|| file.tensor(name));
        found.map(|stored| scalar(file, name, stored)).transpose()
    };
    let (scale, shift) = (stored(Tiny::SCALE)?, stored(Tiny::SHIFT)?);
    if scale.is_some() || shift.is_some() {
        let scale = Scale { scale: scale.unwrap_or(1.0), shift: shift.unwrap_or(0.0) };
        if scale.scale == 0.0 {
            return Err(malformed(file, "vae_scale is zero"));
        }
        return Ok(scale);
    }
    let name = file_name(file);
    let known = KNOWN_SCALES.iter().find(|(part, channels, ..)| *channels == latent_channels && name.contains(part));
    Ok(known.map_or(Scale { scale: 1.0, shift: 0.0 }, |&(_, _, scale, shift)| Scale { scale, shift }))
}

/// The one finite number in `stored`.
fn scalar(file: &ModelFile, name: &str, stored: &StoredTensor) -> Result<f64, ModelError> {
    // Read and not mapped: whoever describes a file must survive one that is rewritten meanwhile.
    let mut bytes = [0; size_of::<f64>()];
    let bytes = bytes.get_mut(..stored.bytes.len()).unwrap_or_default();
    file.read_exact_at(stored.bytes.start as u64, bytes)?;
    let value = match (stored.dtype, &*bytes) {
        (StoredDType::F32, &[a, b, c, d]) => f64::from(f32::from_le_bytes([a, b, c, d])),
        (StoredDType::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f64(),
        (StoredDType::BF16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f64(),
        (StoredDType::F64, &[a, b, c, d, e, f, g, h]) => f64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => return Err(malformed(file, &format!("{name} is not one floating-point number"))),
    };
    match value.is_finite() {
        true => Ok(value),
        false => Err(malformed(file, &format!("{name} is {value}"))),
    }
}

fn malformed(file: &ModelFile, reason: &str) -> ModelError {
    ModelError::Malformed { path: file.path().to_owned(), reason: reason.to_owned() }
}
