use half::{bf16, f16};

use super::layout::unet::{Names, Unet};
use super::unet::{Prediction, UnetFacts, UnetVariant};
use super::{ModelError, ModelFile, StoredDType, StoredTensor};

/// The one tensor of SD2 whose values tell what it was trained to predict, and the spread from which on it is v.
const SD2_TELLTALE: (&str, f64) = ("output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09);
/// Channels of a latent that has nothing beside it, in models before SD3.
const LATENT_CHANNELS: u64 = 4;

/// Families by sizes: name, model channels, context, linear projections, vector, attention depth of each residual block
/// on the way down. The first that fits is taken; depths are not looked at where none are given.
const FAMILIES: [(&str, Sizes); 10] = [
    ("sd15", Sizes { channels: 320, context: 768, linear: false, vector: None, depths: None }),
    ("sd2", Sizes { channels: 320, context: 1024, linear: true, vector: None, depths: None }),
    ("sd2-unclip", Sizes { channels: 320, context: 1024, linear: true, vector: Some(1536), depths: None }),
    ("sd2-unclip", Sizes { channels: 320, context: 1024, linear: true, vector: Some(2048), depths: None }),
    ("sdxl", Sizes::xl(&[0, 0, 2, 2, 10, 10])),
    ("ssd-1b", Sizes::xl(&[0, 0, 2, 2, 4, 4])),
    ("vega", Sizes::xl(&[0, 0, 1, 1, 2, 2])),
    ("koala", Sizes::xl(&[0, 2, 5])),
    ("koala", Sizes::xl(&[0, 2, 6])),
    (
        "sdxl-refiner",
        Sizes {
            channels: 384,
            context: 1280,
            linear: true,
            vector: Some(2560),
            depths: Some(&[0, 0, 4, 4, 4, 4, 0, 0]),
        },
    ),
];

/// What tells a family.
struct Sizes {
    channels: u64,
    context: u64,
    linear: bool,
    vector: Option<u64>,
    depths: Option<&'static [usize]>,
}

impl Sizes {
    const fn xl(depths: &'static [usize]) -> Self {
        Self { channels: 320, context: 2048, linear: true, vector: Some(2816), depths: Some(depths) }
    }
}

/// Recognises the UNet in `file` by names and shapes; of the data, only one small tensor of SD2 is read.
///
/// # Errors
/// [`ModelError::MissingPart`] where there is none, [`ModelError::Unsupported`] for one that is incomplete or of another
/// make.
pub fn unet_facts(file: &ModelFile) -> Result<UnetFacts, ModelError> {
    facts(file, &unet_layout(file)?)
}

/// The tree of the UNet in `file`.
pub(super) fn unet_layout(file: &ModelFile) -> Result<Unet<StoredTensor>, ModelError> {
    Unet::read(&Names::of(file)?)
}

/// What is known of the UNet whose tree is `unet`.
pub(super) fn facts(file: &ModelFile, unet: &Unet<StoredTensor>) -> Result<UnetFacts, ModelError> {
    let family = family(unet);
    let in_channels = unet.conv_in.columns();
    let out_channels = unet.conv_out.rows();
    let (prediction, zero_terminal_snr) = prediction(file, unet, family)?;
    let skips = unet.skips();
    let (mut weight_elements, mut reordered_elements) = (0u64, 0u64);
    unet.each(|layer| {
        if layer.weight.shape.len() == 4 {
            reordered_elements = reordered_elements.max(layer.weight.elements());
        }
        for stored in std::iter::once(&layer.weight).chain(&layer.bias) {
            weight_elements = weight_elements.saturating_add(stored.elements());
        }
    });
    Ok(UnetFacts {
        path: file.path().to_owned(),
        family,
        variant: variant(in_channels, out_channels),
        prediction,
        zero_terminal_snr,
        in_channels,
        out_channels,
        model_channels: unet.conv_in.rows(),
        context_width: unet.context_width(),
        vector_width: unet.vector_width(),
        levels: 1 + skips.iter().map(|skip| skip.level as u64).max().unwrap_or(0),
        skips,
        weight_elements,
        elements_per_position: unet.elements_per_position(),
        reordered_elements,
    })
}

fn family(unet: &Unet<StoredTensor>) -> &'static str {
    let depths = unet.input_depths();
    let known = FAMILIES.iter().find(|(_, sizes)| {
        sizes.channels == unet.conv_in.rows()
            && sizes.context == unet.context_width()
            && sizes.linear == unet.is_linear()
            && sizes.vector == unet.vector_width()
            && sizes.depths.is_none_or(|wanted| wanted == depths)
    });
    known.map_or("generic", |(family, _)| family)
}

fn variant(in_channels: u64, out_channels: u64) -> UnetVariant {
    match in_channels {
        same if same == out_channels => UnetVariant::Plain,
        9 => UnetVariant::Inpaint,
        8 => UnetVariant::Instruct,
        _ => UnetVariant::Other,
    }
}

/// What the output means, and whether the model was trained to start from pure noise. Models since SDXL say so by
/// tensors that nothing computes with.
fn prediction(file: &ModelFile, unet: &Unet<StoredTensor>, family: &str) -> Result<(Prediction, bool), ModelError> {
    let marked = |marker: &str| Names::has_marker(file, marker);
    Ok(match family {
        "sd15" | "sdxl-refiner" => (Prediction::Eps, false),
        "sd2" | "sd2-unclip" => (sd2_prediction(file, unet)?, false),
        _ if marked("edm_mean") && marked("edm_std") => (Prediction::Edm, false),
        _ if marked("edm_vpred.sigma_max") => (Prediction::VEdm, false),
        _ if marked("v_pred") => (Prediction::V, marked("ztsnr")),
        _ => (Prediction::Eps, false),
    })
}

/// Both kinds of SD2 have the same shapes; training left one tensor with another spread in each.
fn sd2_prediction(file: &ModelFile, unet: &Unet<StoredTensor>) -> Result<Prediction, ModelError> {
    let (telltale, spread) = SD2_TELLTALE;
    if unet.conv_in.columns() != LATENT_CHANNELS {
        return Ok(Prediction::Eps);
    }
    let (stem, _) = telltale.rsplit_once('.').unwrap_or((telltale, ""));
    let mut found = None;
    unet.each(|layer| {
        if unet.stems.get(layer.id.0).is_some_and(|own| own == stem) {
            found = layer.bias.clone();
        }
    });
    let Some(stored) = found else { return Ok(Prediction::Eps) };
    let values = numbers(file, &stored)?;
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    Ok(if variance.sqrt() > spread { Prediction::V } else { Prediction::Eps })
}

/// The values of a tensor of floating-point numbers.
fn numbers(file: &ModelFile, stored: &StoredTensor) -> Result<Vec<f64>, ModelError> {
    let bytes = file.read(stored)?;
    Ok(match stored.dtype {
        StoredDType::F16 => bytes.as_chunks().0.iter().map(|&value| f16::from_le_bytes(value).to_f64()).collect(),
        StoredDType::BF16 => bytes.as_chunks().0.iter().map(|&value| bf16::from_le_bytes(value).to_f64()).collect(),
        StoredDType::F32 => bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value).into()).collect(),
        StoredDType::F64 => bytes.as_chunks().0.iter().map(|&value| f64::from_le_bytes(value)).collect(),
        other => {
            let what = format!("element type {other}");
            return Err(ModelError::Unsupported { path: file.path().to_owned(), what });
        }
    })
}
