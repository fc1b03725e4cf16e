use super::gpu::{GpuFindings, MarkedFindings};
use super::negotiate::{FailureCode, NONCE_BYTES, Reason, RungFailure};
use crate::id::GpuUuid;
use crate::service::{GpuOrder, Rung};

/// What decides which rungs a GPU of a client's may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuSituation {
    /// The client's GPU.
    pub gpu: GpuUuid,
    /// The broker's, if it has one.
    pub brokers: Option<GpuUuid>,
    /// Whether the client's GPU reaches memory of the broker's.
    pub reaches: bool,
    /// Whether both ends are in one process.
    pub same_process: bool,
    /// Whether descriptors can cross.
    pub descriptors: bool,
}

impl GpuSituation {
    /// Rungs with GPU memory that are worth a probe, best first. None: tensors of this GPU cross through the host.
    #[must_use]
    pub fn ladder(&self) -> &'static [Rung] {
        if self.brokers == Some(self.gpu) {
            match (self.same_process, self.descriptors) {
                (true, _) => &[Rung::Local],
                (_, true) => &[Rung::CudaIpc, Rung::CudaVmm],
                (_, false) => &[Rung::CudaIpc],
            }
        } else if self.brokers.is_some() && self.reaches && !self.same_process {
            &[Rung::Peer]
        } else {
            &[]
        }
    }

    /// Why a GPU whose ladder is empty shares no memory.
    #[must_use]
    pub fn obstacle(&self) -> String {
        match self.brokers {
            None => "the broker runs on no GPU".to_owned(),
            Some(brokers) if brokers == self.gpu => "no handle of it can cross this connection".to_owned(),
            Some(brokers) => format!("the broker is on {brokers}, which {} does not reach", self.gpu),
        }
    }
}

/// What the broker wrote into GPU memory for the client to read, and read of what the client wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuNonces {
    /// The nonce that was simply written.
    pub plain: [u8; NONCE_BYTES],
    /// The nonce behind a pause and a mark.
    pub marked: [u8; NONCE_BYTES],
}

/// What a probe of GPU memory proved.
///
/// # Errors
/// The code and words of a rung that cannot be had.
pub fn judge_gpu(
    ours: &GpuNonces,
    findings: &GpuFindings,
    found: &[u8; NONCE_BYTES],
    found_marked: Option<&[u8; NONCE_BYTES]>,
) -> Result<GpuOrder, (FailureCode, &'static str)> {
    let mismatch = |what| Err((FailureCode::NonceMismatch, what));
    if findings.read != ours.plain {
        return mismatch("the client read something else than the broker wrote");
    }
    if &findings.wrote != found {
        return mismatch("the broker read something else than the client wrote");
    }
    if findings.wrote == ours.plain {
        return mismatch("the client did not write a nonce of its own");
    }
    let ordered = match (&findings.marked, found_marked) {
        (Some(MarkedFindings { read, wrote, .. }), Some(found)) => *read == ours.marked && wrote == found,
        _ => false,
    };
    Ok(if ordered { GpuOrder::Events } else { GpuOrder::Host })
}

/// Why a rung was settled on: what failed before it, or else what proved it.
#[must_use]
pub fn gpu_reason(rung: Rung, failures: &[RungFailure], situation: &GpuSituation) -> Reason {
    if !failures.is_empty() {
        Reason::Failed(failures.to_vec())
    } else if rung == Rung::Local {
        Reason::SameProcess
    } else if rung.is_gpu() {
        Reason::GpuMemoryProbed
    } else {
        Reason::NoSharedGpu(situation.obstacle())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: GpuUuid = GpuUuid([1; 16]);
    const THERE: GpuUuid = GpuUuid([2; 16]);

    fn situation(gpu: GpuUuid) -> GpuSituation {
        GpuSituation { gpu, brokers: Some(HERE), reaches: false, same_process: false, descriptors: true }
    }

    #[test]
    fn the_same_gpu_is_shared_and_another_only_where_it_reaches() {
        assert_eq!(situation(HERE).ladder(), [Rung::CudaIpc, Rung::CudaVmm]);
        assert_eq!(GpuSituation { descriptors: false, ..situation(HERE) }.ladder(), [Rung::CudaIpc]);
        assert_eq!(GpuSituation { same_process: true, ..situation(HERE) }.ladder(), [Rung::Local]);
        assert_eq!(situation(THERE).ladder(), []);
        assert_eq!(GpuSituation { reaches: true, ..situation(THERE) }.ladder(), [Rung::Peer]);
        let without = GpuSituation { brokers: None, reaches: true, ..situation(THERE) };
        assert_eq!(without.ladder(), []);
        assert!(without.obstacle().contains("no GPU"), "{}", without.obstacle());
        assert!(situation(THERE).obstacle().contains(&HERE.to_string()));
    }

    fn findings(read: u8, wrote: u8, marked: Option<(u8, u8)>) -> GpuFindings {
        let marked = marked.map(|(read, wrote)| MarkedFindings {
            read: [read; NONCE_BYTES],
            wrote: [wrote; NONCE_BYTES],
            sequence: 1,
        });
        GpuFindings { open_us: 7, read: [read; NONCE_BYTES], wrote: [wrote; NONCE_BYTES], marked }
    }

    #[test]
    fn memory_counts_when_each_side_read_the_other_and_marks_when_they_held_back_a_slow_copy() {
        let ours = GpuNonces { plain: [1; NONCE_BYTES], marked: [2; NONCE_BYTES] };
        let judge = |findings: &GpuFindings, found: u8, marked: Option<u8>| {
            judge_gpu(&ours, findings, &[found; NONCE_BYTES], marked.map(|byte| [byte; NONCE_BYTES]).as_ref())
        };
        assert_eq!(judge(&findings(1, 3, Some((2, 4))), 3, Some(4)), Ok(GpuOrder::Events));
        assert_eq!(judge(&findings(1, 3, None), 3, None), Ok(GpuOrder::Host));
        // The broker's mark did not hold back the client, then the other way round.
        assert_eq!(judge(&findings(1, 3, Some((0, 4))), 3, Some(4)), Ok(GpuOrder::Host));
        assert_eq!(judge(&findings(1, 3, Some((2, 4))), 3, Some(0)), Ok(GpuOrder::Host));
        for (findings, found) in [(findings(9, 3, None), 3), (findings(1, 3, None), 9), (findings(1, 1, None), 1)] {
            let (code, _) = judge(&findings, found, None).unwrap_err();
            assert_eq!(code, FailureCode::NonceMismatch);
        }
    }

    #[test]
    fn a_reason_names_what_failed_before_what_proved() {
        let failure = RungFailure { rung: Rung::CudaIpc, code: FailureCode::Open, detail: "205".to_owned() };
        let reason = gpu_reason(Rung::CudaVmm, std::slice::from_ref(&failure), &situation(HERE));
        assert_eq!(reason.to_string(), "better rungs failed: [cuda-ipc: open: 205]");
        assert_eq!(gpu_reason(Rung::CudaIpc, &[], &situation(HERE)), Reason::GpuMemoryProbed);
        assert!(matches!(gpu_reason(Rung::Shm, &[], &situation(THERE)), Reason::NoSharedGpu(_)));
    }
}
