use std::path::PathBuf;
use std::sync::Arc;

use half::{bf16, f16};

use crate::device::{CopyStream, DeviceError, Place, Span, StreamRef};
use crate::service::{VaeMode, VaeOperation};
use crate::tensor::{DType, TensorError, TensorMeta};

use super::{ModelError, ModelInput, Vae, VaeFacts, VaePlan};

/// Elements that are handed over.
const MARKS: usize = 16;
/// Bytes of a result element.
const F32_BYTES: usize = 4;

/// A VAE that computes nothing: it shows what handing a latent in and an image out costs by itself.
///
/// A decode takes the latent's first 16 elements in row-major order and writes element `i`, as float32, at element
/// `i · ⌊n / 16⌋` of the `n` of the image. It reads and writes nothing else and allocates nothing.
///
/// On a GPU it copies within its memory, so the latent must be float32 there.
#[derive(Debug, Default)]
pub struct HandOff {
    /// Where copies with GPU memory are enqueued.
    queue: Option<Arc<dyn CopyStream>>,
}

impl HandOff {
    /// One that works on memory of a GPU too.
    #[must_use]
    pub fn on(queue: Arc<dyn CopyStream>) -> Self {
        Self { queue: Some(queue) }
    }

    /// Copies the elements where one side is GPU memory.
    fn enqueue(
        queue: &dyn CopyStream,
        input: &ModelInput<'_>,
        output: &Span,
        step: usize,
        marks: usize,
    ) -> Result<(), ModelError> {
        if input.meta.dtype != DType::F32 {
            let expected = "a float32 latent in GPU memory".to_owned();
            let TensorMeta { shape, dtype, .. } = input.meta;
            return Err(TensorError::Unexpected { tensor: "latent", expected, shape, dtype }.into());
        }
        for at in 0..marks {
            let Some(start) = start_of(&input.meta, at) else { continue };
            let from = input.memory.part(start, F32_BYTES).map_err(executor)?;
            let to = output.part(at * step * F32_BYTES, F32_BYTES).map_err(executor)?;
            queue.copy(&from, &to).map_err(executor)?;
        }
        Ok(())
    }

    /// The name of the usual one.
    pub const NAME: &'static str = "builtin:hand-off";

    /// The name of the one that waits for its turn in the lane, as models do that compute.
    pub const QUEUED: &'static str = "builtin:hand-off-queued";

    /// Its names and the pixels per latent element that each stands for: the usual 8, and two that make images of
    /// 0.8 MB and 104 MB of the latent that gives 12.6 MB with 8, so that only the size of the image varies.
    const RATIOS: [(&'static str, u64); 4] =
        [(Self::NAME, 8), (Self::QUEUED, 8), ("builtin:hand-off-x2", 2), ("builtin:hand-off-x23", 23)];

    /// The facts of the do-nothing VAE of that name, if it is one.
    #[must_use]
    pub fn facts(name: &str) -> Option<VaeFacts> {
        let (name, ratio) = Self::RATIOS.into_iter().find(|(known, _)| *known == name)?;
        Some(VaeFacts {
            path: PathBuf::from(name),
            family: "hand-off",
            latent_channels: 4,
            ratio,
            can_decode: true,
            can_encode: false,
            weight_bytes: 0,
            decode_bytes_per_pixel: 0,
            encode_bytes_per_pixel: 0,
            runs_inline: name != Self::QUEUED,
        })
    }
}

impl Vae for HandOff {
    fn run(
        &mut self,
        plan: &VaePlan,
        input: ModelInput<'_>,
        output: &Span,
        _stop: &dyn Fn() -> bool,
    ) -> Result<VaeMode, ModelError> {
        if plan.operation == VaeOperation::Encode {
            return Err(ModelError::Unsupported {
                path: PathBuf::from("builtin:hand-off"),
                what: "encoding with the do-nothing VAE".to_owned(),
            });
        }
        input.meta.check_fits(input.memory.length())?;
        plan.output.check_fits(output.length())?;
        let count = plan.output.elements()?;
        let step = count / MARKS;
        let marks = MARKS.min(input.meta.elements()?).min(count);
        if let Some(queue) = self.queue.as_ref().filter(|_| is_gpu(input.memory) || is_gpu(output)) {
            Self::enqueue(&**queue, &input, output, step, marks)?;
            return Ok(plan.mode);
        }
        let source = input.memory.bytes(input.meta.span_bytes()?).map_err(executor)?;
        for at in 0..marks {
            let value = element(source, &input.meta, at);
            if let Some(value) = value {
                output.write_at(at * step * F32_BYTES, &value.to_ne_bytes()).map_err(executor)?;
            }
        }
        Ok(plan.mode)
    }

    fn stream(&self) -> Option<StreamRef> {
        self.queue.as_ref().map(|queue| queue.handle())
    }
}

fn is_gpu(span: &Span) -> bool {
    span.place() != Place::Host
}

fn executor(cause: DeviceError) -> ModelError {
    ModelError::Executor { what: "hand-off", cause: cause.to_string() }
}

/// Bytes from the first element to element `at` in row-major order, whatever the strides.
fn start_of(meta: &TensorMeta, at: usize) -> Option<usize> {
    let mut rest = at as u64;
    let mut offset = 0u64;
    for (&extent, &stride) in meta.shape.as_slice().iter().zip(meta.strides.as_slice()).rev() {
        offset += rest.checked_rem(extent)? * stride;
        rest /= extent;
    }
    Some(usize::try_from(offset).ok()? * meta.dtype.size_bytes())
}

fn element(source: &[u8], meta: &TensorMeta, at: usize) -> Option<f32> {
    let start = start_of(meta, at)?;
    let bytes = source.get(start..start + meta.dtype.size_bytes())?;
    Some(match meta.dtype {
        DType::F16 => f16::from_ne_bytes(bytes.try_into().ok()?).to_f32(),
        DType::Bf16 => bf16::from_ne_bytes(bytes.try_into().ok()?).to_f32(),
        DType::F32 => f32::from_ne_bytes(bytes.try_into().ok()?),
        DType::F64 => f64::from_ne_bytes(bytes.try_into().ok()?) as f32,
        _ => return None,
    })
}
