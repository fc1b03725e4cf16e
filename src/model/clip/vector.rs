/// Numbers that one size becomes.
const SIZE_WIDTH: u16 = 256;
/// Longest period of the waves that a size becomes.
const LONGEST: f32 = 10_000.0;

/// Speeds for which torch's exponential, with which models are run, does not give the nearest number.
const ROUNDED_UP: [u16; 2] = [12, 106];

/// Sizes that SDXL is conditioned on, in pixels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SdxlSizes {
    /// The base model.
    Base {
        /// Rows and columns of the picture that the training picture was made of.
        original: [f32; 2],
        /// Rows cut off at the top and columns at the left.
        crop: [f32; 2],
        /// Rows and columns of the picture asked for.
        target: [f32; 2],
    },
    /// The refiner.
    Refiner {
        /// Rows and columns of the picture that the training picture was made of.
        original: [f32; 2],
        /// Rows cut off at the top and columns at the left.
        crop: [f32; 2],
        /// How much people like it: 6 for what is wanted, 2.5 for what is not.
        aesthetic: f32,
    },
}

impl SdxlSizes {
    /// In the order in which the model takes them.
    fn values(self) -> Vec<f32> {
        match self {
            Self::Base { original, crop, target } => [original, crop, target].concat(),
            Self::Refiner { original, crop, aesthetic } => [&original[..], &crop[..], &[aesthetic]].concat(),
        }
    }
}

/// The vector that SDXL takes beside the prompt: the pooled row of CLIP-G, then each size as waves. 2816 numbers for
/// the base model, 2560 for the refiner, both with 1280 pooled ones. Computed in float32.
#[must_use]
pub fn sdxl_vector(pooled: &[f32], sizes: SdxlSizes) -> Vec<f32> {
    pooled.iter().copied().chain(sizes.values().into_iter().flat_map(waves)).collect()
}

/// Cosines, then sines, of a value at 128 speeds.
fn waves(value: f32) -> impl Iterator<Item = f32> {
    let half = SIZE_WIDTH / 2;
    let angles = move || (0..half).map(move |at| value * speed(at, half));
    angles().map(f32::cos).chain(angles().map(f32::sin))
}

/// Rounded at each step as the reference does: the smallest difference in a speed is a large one in the angle of a size.
fn speed(at: u16, half: u16) -> f32 {
    let exponent = f32::from(at) * -LONGEST.ln() / f32::from(half);
    let nearest = f64::from(exponent).exp() as f32;
    if ROUNDED_UP.contains(&at) { nearest.next_up() } else { nearest }
}
