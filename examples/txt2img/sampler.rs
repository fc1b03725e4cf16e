//! From noise to a latent: the noise levels of Stable Diffusion, guidance by a prompt, and two samplers.
//!
//! Nothing here knows of a broker: a model is a closure. Samplers work on latents to which noise of the size sigma was
//! added; a UNet gets them scaled to the variance that it was trained on.

use std::str::FromStr;

use luna_broker::protocol::UnetReport;

const TRAINED_STEPS: u32 = 1000;
const BETA_FIRST: f64 = 0.00085;
const BETA_LAST: f64 = 0.012;
/// What is left of a picture where a model was trained to start from nothing but noise: 2⁻²⁴. Nothing at all would be a
/// sigma without end.
const LEAST_SIGNAL: f64 = 1.0 / 16_777_216.0;

/// One step of a sampler: where it stands, and how much noise is to be left after it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Step {
    pub(crate) timestep: u32,
    pub(crate) sigma: f64,
    pub(crate) next_sigma: f64,
}

/// `count` steps, evenly spaced from pure noise on, which is where every model of the family can start.
///
/// # Errors
/// For no steps, and for more than models are trained with.
pub(crate) fn schedule(count: u32, model: &UnetReport) -> Result<Vec<Step>, String> {
    if !(1..=TRAINED_STEPS).contains(&count) {
        return Err(format!("{count} steps: between 1 and {TRAINED_STEPS} are possible"));
    }
    let sigmas = trained_sigmas(model);
    let spacing = f64::from(TRAINED_STEPS) / f64::from(count);
    let timestep = |at: u32| (f64::from(TRAINED_STEPS) - f64::from(at) * spacing).round_ties_even() as u32 - 1;
    let sigma = |at: u32| if at < count { sigmas[timestep(at) as usize] } else { 0.0 };
    Ok((0..count).map(|at| Step { timestep: timestep(at), sigma: sigma(at), next_sigma: sigma(at + 1) }).collect())
}

/// Standard deviation of the noise per timestep, beside a picture of variance one.
fn trained_sigmas(model: &UnetReport) -> Vec<f64> {
    let (first, last) = (BETA_FIRST.sqrt(), BETA_LAST.sqrt());
    let beta = |at: u32| (first + (last - first) * f64::from(at) / f64::from(TRAINED_STEPS - 1)).powi(2);
    let mut signals: Vec<f64> = (0..TRAINED_STEPS)
        .scan(1.0, |left, at| {
            *left *= 1.0 - beta(at);
            Some(*left)
        })
        .collect();
    if model.zero_terminal_snr {
        let (most, least) = (signals[0].sqrt(), signals[signals.len() - 1].sqrt());
        for signal in &mut signals {
            *signal = ((signal.sqrt() - least) * most / (most - least)).powi(2).max(LEAST_SIGNAL);
        }
    }
    signals.iter().map(|signal| ((1.0 - signal) / signal).sqrt()).collect()
}

/// What sampling starts from, for noise of variance one.
pub(crate) fn noisy(noise: &[f32], steps: &[Step]) -> Vec<f32> {
    let scale = steps.first().map_or(1.0, Step::scale);
    noise.iter().map(|value| value * scale as f32).collect()
}

impl Step {
    /// Standard deviation of a picture of variance one with this step's noise.
    fn scale(&self) -> f64 {
        self.sigma.hypot(1.0)
    }
}

/// How a model's answers for a prompt to be led away from and one to be led towards become one answer.
///
/// Both go through the model in one call, as its first and second half of rows.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guidance {
    prediction: Prediction,
    strength: f32,
}

#[derive(Debug, Clone, Copy)]
enum Prediction {
    /// The noise.
    Eps,
    /// Noise and picture mixed.
    V,
}

impl Guidance {
    /// # Errors
    /// For a model whose output is neither the noise nor the velocity.
    pub(crate) fn new(model: &UnetReport, strength: f32) -> Result<Self, String> {
        let prediction = match model.prediction.as_str() {
            "eps" => Prediction::Eps,
            "v" => Prediction::V,
            other => return Err(format!("a model that predicts {other:?}: only eps and v are sampled here")),
        };
        Ok(Self { prediction, strength })
    }

    /// Rows for the model: the latent for either prompt.
    pub(crate) fn rows(&self, x: &[f32], step: &Step) -> Vec<f32> {
        let scale = step.scale() as f32;
        x.iter().chain(x).map(|value| value / scale).collect()
    }

    /// What the model takes for the picture under the noise in `x`, by its output for both prompts.
    pub(crate) fn denoised(&self, x: &[f32], step: &Step, output: &[f32]) -> Vec<f32> {
        let (away, towards) = output.split_at(output.len() / 2);
        let (signal, noise) = match self.prediction {
            Prediction::Eps => (1.0, step.sigma),
            Prediction::V => (step.scale().powi(-2), step.sigma / step.scale()),
        };
        let led = away.iter().zip(towards).map(|(away, towards)| away + self.strength * (towards - away));
        x.iter().zip(led).map(|(x, led)| x * signal as f32 - led * noise as f32).collect()
    }
}

/// A way from noise to a latent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sampler {
    Euler,
    /// DPM-Solver++ of second order, which takes the trend since the step before into account.
    Dpmpp2m,
}

impl FromStr for Sampler {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "euler" => Ok(Self::Euler),
            "dpmpp_2m" => Ok(Self::Dpmpp2m),
            other => Err(format!("no sampler is called {other:?}, but euler and dpmpp_2m")),
        }
    }
}

impl Sampler {
    /// The latent that comes of `x`, by what `denoise` takes for the picture under the noise.
    ///
    /// # Errors
    /// Those of `denoise`.
    pub(crate) fn run<E>(
        self,
        mut x: Vec<f32>,
        steps: &[Step],
        mut denoise: impl FnMut(&[f32], &Step) -> Result<Vec<f32>, E>,
    ) -> Result<Vec<f32>, E> {
        let mut before: Option<(Vec<f32>, f64)> = None;
        for step in steps {
            let denoised = denoise(&x, step)?;
            let kept = (step.next_sigma / step.sigma) as f32;
            let length = (step.sigma / step.next_sigma).ln();
            let ahead = match (self, &before) {
                (Self::Dpmpp2m, Some((earlier, earlier_length))) if length.is_finite() => {
                    let trend = (length / earlier_length / 2.0) as f32;
                    denoised.iter().zip(earlier).map(|(now, earlier)| now + (now - earlier) * trend).collect()
                }
                _ => denoised.clone(),
            };
            for (x, ahead) in x.iter_mut().zip(&ahead) {
                *x = *x * kept + ahead * (1.0 - kept);
            }
            before = Some((denoised, length));
        }
        Ok(x)
    }
}
