//! A picture from a text by a broker's models: encode the prompts, sample a latent in one run, decode it.

use std::error::Error;

use luna_broker::client::{Client, Clip, Tensor, Unet, Vae};
use luna_broker::model::clip::{SdxlSizes, sdxl_vector};
use luna_broker::protocol::UnetReport;
use luna_broker::service::{AdapterStack, AdapterUse, BlockCache, RunReport, RunSettings, StepInput};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand_distr::{Distribution, StandardNormal};

use crate::numbers::Numbers;
use crate::sampler::{Guidance, Sampler, Step, noisy, schedule};

/// How large a latent is for the UNet, beside what the VAE makes of a picture.
const LATENT_SCALE: f32 = 0.18215;
const LATENT_SCALE_XL: f32 = 0.13025;
const FAMILIES_XL: [&str; 4] = ["sdxl", "ssd-1b", "vega", "koala"];

/// What to paint. Sides are in pixels.
#[derive(Debug, Clone)]
pub(crate) struct Order {
    pub(crate) prompt: String,
    /// What the picture is led away from.
    pub(crate) negative: String,
    pub(crate) width: u64,
    pub(crate) height: u64,
    pub(crate) steps: u32,
    pub(crate) guidance: f32,
    pub(crate) seed: u64,
    pub(crate) sampler: Sampler,
    pub(crate) loras: Vec<AdapterUse>,
    /// How much the first block may change from one step to the next for the others to be skipped; none skips nothing.
    pub(crate) fb_cache: Option<f64>,
}

/// Two encoded prompts as the rows of one call: the one to be led away from comes first.
#[derive(Debug)]
pub(crate) struct Prompts {
    pub(crate) context: Numbers,
    /// Where the model takes it.
    pub(crate) vectors: Option<Numbers>,
}

/// A painted picture.
#[derive(Debug)]
pub(crate) struct Picture {
    /// float32 `[1, height, width, 3]` in 0…1.
    pub(crate) image: Tensor,
    /// How the broker ran the steps.
    pub(crate) report: RunReport,
}

/// The parts of one checkpoint.
#[derive(Debug)]
pub(crate) struct Painter {
    clip: Clip,
    unet: Unet,
    vae: Vae,
    facts: UnetReport,
}

impl Painter {
    pub(crate) fn new(client: &Client, checkpoint: &str) -> Result<Self, Box<dyn Error>> {
        let (clip, unet, vae) = (client.clip(&[checkpoint])?, client.unet(checkpoint)?, client.vae(checkpoint)?);
        let facts = unet.info().unet.clone().ok_or("the broker does not say what the UNet takes")?;
        if facts.variant != "plain" {
            return Err(format!("{checkpoint} is for inpainting or instructions: it needs more than a text").into());
        }
        Ok(Self { clip, unet, vae, facts })
    }

    /// Paints one picture; `watch` is called with each step that is done.
    pub(crate) fn paint(&self, order: &Order, watch: impl FnMut()) -> Result<Picture, Box<dyn Error>> {
        let vae = self.vae.info();
        let ratio = vae.ratio.max(1);
        let (width, height) = ((order.width / ratio).max(1), (order.height / ratio).max(1));
        let shape = [1, vae.latent_channels, height, width];
        let noise: Vec<f32> = StandardNormal
            .sample_iter(SmallRng::seed_from_u64(order.seed))
            .take(shape.iter().product::<u64>() as usize)
            .collect();
        let size = [height * ratio, width * ratio];
        let prompts = self.encode(&order.negative, &order.prompt, size, &order.loras)?;
        let (latent, report) = self.sample(order, &Numbers::new(&shape, &noise), &prompts, watch)?;
        Ok(Picture { image: self.decode(&latent)?, report })
    }

    /// What the UNet takes of two texts, for a picture of that height and width.
    pub(crate) fn encode(
        &self,
        away: &str,
        towards: &str,
        size: [u64; 2],
        loras: &[AdapterUse],
    ) -> luna_broker::Result<Prompts> {
        let clip = self.clip.with_adapters(&AdapterStack { adapters: loras.to_vec(), ..AdapterStack::default() });
        let encoded = [clip.encode(away)?, clip.encode(towards)?];
        let [away, towards] = [Numbers::of(&encoded[0].cond)?, Numbers::of(&encoded[1].cond)?];
        let tokens = least_common_multiple(away.shape()[1], towards.shape()[1]);
        let context = Numbers::joined(&away.repeated(tokens), &towards.repeated(tokens));
        if self.facts.vector_width.is_none() {
            return Ok(Prompts { context, vectors: None });
        }
        let size = size.map(|side| side as f32);
        let sizes = SdxlSizes::Base { original: size, crop: [0.0; 2], target: size };
        let vector = |pooled: &Tensor| -> luna_broker::Result<Numbers> {
            let vector = sdxl_vector(&pooled.floats()?, sizes);
            Ok(Numbers::new(&[1, vector.len() as u64], &vector))
        };
        let vectors = Numbers::joined(&vector(&encoded[0].pooled)?, &vector(&encoded[1].pooled)?);
        Ok(Prompts { context, vectors: Some(vectors) })
    }

    /// The latent for the UNet that comes of `noise`.
    pub(crate) fn sample(
        &self,
        order: &Order,
        noise: &Numbers,
        prompts: &Prompts,
        mut watch: impl FnMut(),
    ) -> Result<(Numbers, RunReport), Box<dyn Error>> {
        let steps = schedule(order.steps, &self.facts)?;
        let guidance = Guidance::new(&self.facts, order.guidance)?;
        let run = self.unet.run(RunSettings {
            adapters: AdapterStack { adapters: order.loras.clone(), ..AdapterStack::default() },
            cache: order.fb_cache.map(BlockCache::new),
            sigmas: steps.iter().map(|step| step.sigma).chain([0.0]).collect(),
        })?;
        let shape = noise.shape();
        let rows_shape: Vec<u64> = std::iter::once(2).chain(shape.iter().copied().skip(1)).collect();
        let mut is_first = true;
        let denoise = |x: &[f32], step: &Step| -> luna_broker::Result<Vec<f32>> {
            let rows = Numbers::new(&rows_shape, &guidance.rows(x, step));
            let timesteps = Numbers::new(&[2], &[step.timestep as f32; 2]);
            // What is the same in every step crosses with the first.
            let constant = std::mem::take(&mut is_first).then_some(prompts);
            let input = StepInput {
                x: rows.input()?,
                timesteps: timesteps.input()?,
                context: constant.map(|prompts| prompts.context.input()).transpose()?,
                y: constant.and_then(|prompts| prompts.vectors.as_ref()).map(Numbers::input).transpose()?,
                control: None,
            };
            let output = run.step(&input, &[0, 1])?;
            watch();
            Ok(guidance.denoised(x, step, &output.floats()?))
        };
        let latent = order.sampler.run(noisy(&noise.floats(), &steps), &steps, denoise)?;
        Ok((Numbers::new(shape, &latent), run.report()))
    }

    /// The picture of a latent for the UNet.
    pub(crate) fn decode(&self, latent: &Numbers) -> luna_broker::Result<Tensor> {
        let family = self.unet.info().family.as_str();
        // Of sizes that are no family's, those with a vector are made like SDXL.
        let is_xl = FAMILIES_XL.contains(&family) || (family == "generic" && self.facts.vector_width.is_some());
        let scale = if is_xl { LATENT_SCALE_XL } else { LATENT_SCALE };
        let raw: Vec<f32> = latent.floats().iter().map(|value| value / scale).collect();
        self.vae.decode(Numbers::new(latent.shape(), &raw).input()?)
    }
}

fn least_common_multiple(left: u64, right: u64) -> u64 {
    let (mut divisor, mut rest) = (left, right);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    left / divisor.max(1) * right
}
