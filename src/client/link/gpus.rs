use std::sync::Arc;

use super::super::open_gpu::{LinkGpu, demoted, open_gpu};
use super::super::options::CallOptions;
use super::Link;
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{DeviceRung, Rung, RungFailure};

impl Link {
    /// What was settled for a GPU.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] before anything was.
    pub(super) fn gpu(&self, gpu: GpuUuid) -> Result<Arc<LinkGpu>> {
        let gpus = self.gpus.read();
        let newest = gpus.iter().rev().find(|one| one.gpu == gpu).cloned();
        newest.ok_or_else(|| Error::new(ErrorKind::Protocol, format!("{gpu} is not open in this session"), ""))
    }

    /// How tensors of a GPU cross; found out with the first of them.
    ///
    /// # Errors
    /// As [`open_gpu`].
    pub(in crate::client) fn open_gpu(&self, gpu: GpuUuid, options: &CallOptions<'_>) -> Result<Arc<LinkGpu>> {
        if let Ok(open) = self.gpu(gpu) {
            return Ok(open);
        }
        let _opening = self.opening.lock();
        match self.gpu(gpu) {
            Ok(open) => Ok(open),
            Err(_) => self.settle_gpu(gpu, None, options),
        }
    }

    /// `worn` no longer works: the next rung for its GPU.
    ///
    /// # Errors
    /// As [`open_gpu`].
    pub(in crate::client) fn demote_gpu(
        &self,
        worn: &LinkGpu,
        why: &Error,
        options: &CallOptions<'_>,
    ) -> Result<Arc<LinkGpu>> {
        let _opening = self.opening.lock();
        match self.gpu(worn.gpu) {
            // Another call met the same failure first.
            Ok(open) if open.rung.rung != worn.rung.rung => Ok(open),
            _ => {
                tracing::warn!(gpu = %worn.gpu, rung = %worn.rung.rung, error = %why, "GPU memory no longer opens: taking the next rung");
                self.settle_gpu(worn.gpu, Some(demoted(worn, why)), options)
            }
        }
    }

    pub(super) fn settle_gpu(
        &self,
        gpu: GpuUuid,
        failed: Option<RungFailure>,
        options: &CallOptions<'_>,
    ) -> Result<Arc<LinkGpu>> {
        let opened = Arc::new(open_gpu(self, gpu, self.gpu_order, failed, options)?);
        self.gpus.write().push(Arc::clone(&opened));
        Ok(opened)
    }

    /// Rungs of the GPUs in use now.
    pub(in crate::client) fn gpu_rungs(&self) -> Vec<DeviceRung> {
        let gpus = self.gpus.read();
        let newest = |at: usize, gpu: &Arc<LinkGpu>| gpus.iter().skip(at + 1).all(|later| later.gpu != gpu.gpu);
        gpus.iter().enumerate().filter(|(at, gpu)| newest(*at, gpu)).map(|(_, gpu)| self.told(gpu)).collect()
    }

    /// A GPU's rung, with what is known by now of the host memory that its tensors pass through.
    pub(in crate::client) fn told(&self, gpu: &LinkGpu) -> DeviceRung {
        DeviceRung { pages: self.memory.pages().filter(|_| !gpu.is_shared()), ..gpu.rung.clone() }
    }

    /// Whether tensors of GPUs that share no memory pass through memory of their own.
    pub(in crate::client) fn has_staging(&self) -> bool {
        self.session.host_rung() == Rung::Shm
    }
}
