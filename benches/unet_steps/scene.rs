//! A UNet in this process, and steps of it on memory that is already warm.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::torch::{LoadOptions, Target, TorchUnet, load_unet};
use luna_broker::model::{
    Adapter, AdapterFile, ModelFile, ModelInput, ReadyStack, RunMemory, StepInput, Unet, UnetCall, WeightStorage,
};
use luna_broker::service::{AdapterMode, CacheStep};
use luna_broker::tensor::{DType, Dims, TensorMeta};

use super::AnyError;

/// Rows of a step: of a prompt and of the negative one.
pub(super) const ROWS: u64 = 2;
const TOKENS: u64 = 77;

pub(super) fn load(path: &Path) -> Result<TorchUnet, AnyError> {
    let options = LoadOptions {
        target: &Target::Cpu,
        storage: WeightStorage::Mapped,
        memory: &InProcessDevice,
        progress: &|_, _| (),
    };
    Ok(load_unet(Arc::new(ModelFile::open(path)?), options)?)
}

/// A tensor in memory of its own.
pub(super) struct Held {
    pub(super) meta: TensorMeta,
    span: Span,
}

impl Held {
    fn new<const N: usize>(shape: [u64; N], value: impl Fn(usize) -> f32) -> Result<Self, AnyError> {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of(shape));
        let length = meta.size_bytes()?;
        let span = Span::new(InProcessDevice.allocate(length)?, 0, length)?;
        span.write(&(0..length / 4).flat_map(|at| value(at).to_ne_bytes()).collect::<Vec<_>>())?;
        Ok(Self { meta, span })
    }

    fn input(&self) -> ModelInput<'_> {
        ModelInput { meta: self.meta, memory: &self.span }
    }

    pub(super) fn bytes(&self) -> Result<Vec<u8>, AnyError> {
        let mut bytes = vec![0; self.meta.size_bytes()?];
        self.span.read(&mut bytes)?;
        Ok(bytes)
    }
}

/// The tensors of one step.
pub(super) struct Step {
    pub(super) x: Held,
    pub(super) timesteps: Held,
    pub(super) context: Held,
    pub(super) y: Option<Held>,
    pub(super) output: Held,
}

impl Step {
    pub(super) fn new(scene: &Scene, side: u64, seed: usize) -> Result<Self, AnyError> {
        let facts = scene.unet.facts();
        let wave = |pace: f32| move |at: usize| ((at + 131 * seed) as f32 * pace).sin();
        Ok(Self {
            x: Held::new([ROWS, facts.in_channels, side, side], wave(0.37))?,
            timesteps: Held::new([ROWS], |_| 500.0)?,
            context: Held::new([ROWS, TOKENS, facts.context_width], wave(0.11))?,
            y: facts.vector_width.map(|width| Held::new([ROWS, width], wave(0.23))).transpose()?,
            output: Held::new([ROWS, facts.out_channels, side, side], |_| 0.0)?,
        })
    }

    fn call<'a>(&'a self, stack: Option<&'a ReadyStack>, run: Option<&'a mut RunMemory>) -> UnetCall<'a> {
        let input = StepInput {
            x: self.x.input(),
            timesteps: self.timesteps.input(),
            context: Some(self.context.input()),
            y: self.y.as_ref().map(Held::input),
            control: None,
        };
        UnetCall { input, output: &self.output.span, stack, run: run.map(|memory| (memory, &[0u32, 1][..])) }
    }
}

/// A loaded UNet.
pub(super) struct Scene {
    pub(super) unet: TorchUnet,
}

impl Scene {
    pub(super) fn load(path: &Path) -> Result<Self, AnyError> {
        Ok(Self { unet: load(path)? })
    }

    pub(super) fn stack(&self, path: &Path) -> Result<ReadyStack, AnyError> {
        let file = AdapterFile::read(Arc::new(ModelFile::open(path)?))?;
        let adapters = [Adapter { file: &file, strength: 0.8 }];
        Ok(self.unet.stack_maker().make(&adapters, AdapterMode::Side)?.0)
    }

    /// How long steps take at once.
    pub(super) fn time(&mut self, steps: &[Step], stack: Option<&ReadyStack>) -> Result<Duration, AnyError> {
        let mut calls: Vec<_> = steps.iter().map(|step| step.call(stack, None)).collect();
        let began = Instant::now();
        self.unet.step(&mut calls, &|| false)?;
        Ok(began.elapsed())
    }

    /// How long a step of a run takes, and what its cache did.
    pub(super) fn time_run(&mut self, step: &Step, run: &mut RunMemory) -> Result<(Duration, CacheStep), AnyError> {
        let mut calls = [step.call(None, Some(run))];
        let began = Instant::now();
        let done = self.unet.step(&mut calls, &|| false)?;
        let taken = began.elapsed();
        let cache = done.first().copied().flatten().ok_or("the run has a cache")?;
        Ok((taken, cache))
    }
}

pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

pub(super) fn verdict(holds: bool) -> &'static str {
    if holds { "holds" } else { "DOES NOT HOLD" }
}
