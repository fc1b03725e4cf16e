//! Judges how tensors of one device cross.

use super::finding::Finding;
use super::gpu::GpuFacts;
use crate::protocol::{DeviceRung, Reason, Rung};
use crate::service::GpuOrder;

/// What explains a rung.
#[derive(Debug, Default)]
pub(super) struct Circumstances {
    pub(super) is_wsl: bool,
    /// Kinds of namespaces, `PID` and `IPC`, in which the broker has another than this process.
    pub(super) other_namespaces: Vec<&'static str>,
    /// The GPU that the broker's models run on, by identity; `None` for the CPU.
    pub(super) brokers_gpu: Option<String>,
    /// Whether that is among the GPUs of this process.
    pub(super) sees_brokers_gpu: bool,
}

/// The name of a check of how tensors of `device` cross.
pub(super) fn check(device: &str) -> String {
    format!("this process -> {device}")
}

/// Tensors of host memory.
pub(super) fn host(rung: &DeviceRung) -> Finding {
    let (check, found) = (check(&rung.device), format!("{}: {}", rung.rung, rung.reason));
    let remedy = match (&rung.reason, rung.rung) {
        (_, Rung::Inline) if matches!(rung.reason, Reason::Forced) => "unset LUNA_BROKER_TRANSPORT to share memory",
        (_, Rung::Inline) => {
            "tensors cross as bytes, which is slower: broker and worker must be on one machine, and may need a larger \
             /dev/shm or memory limit"
        }
        _ => return Finding::ok(check, found),
    };
    Finding::note(check, found, remedy)
}

/// Tensors of a GPU of this process.
pub(super) fn gpu(rung: &DeviceRung, gpu: &GpuFacts, circumstances: &Circumstances) -> Finding {
    let opened = rung.open_us.map_or_else(String::new, |us| format!(" ({:.1} ms)", f64::from(us) / 1000.0));
    let found = format!("{}: {}{opened}", rung.rung, rung.why());
    let check = check(&rung.device);
    match rung.rung {
        Rung::Peer => {
            let brokers = circumstances.brokers_gpu.as_deref().unwrap_or("the broker's");
            Finding::note(check, found, format!("work on {brokers} to save the one copy between the two GPUs"))
        }
        _ if !rung.rung.is_gpu() && rung.rung != Rung::Local => {
            Finding::note(check, found, through_host(rung, gpu, circumstances))
        }
        _ if rung.order == Some(GpuOrder::Host) => Finding::note(
            check,
            format!("{found}; events do not cross, so each side waits for its GPU work"),
            share_namespaces(circumstances).unwrap_or_else(|| "update the driver".to_owned()),
        ),
        _ => Finding::ok(check, found),
    }
}

/// What gets tensors of a GPU out of host memory.
fn through_host(rung: &DeviceRung, gpu: &GpuFacts, circumstances: &Circumstances) -> String {
    let uuid = gpu.uuid.to_string();
    let Circumstances { is_wsl, brokers_gpu, sees_brokers_gpu, .. } = circumstances;
    match brokers_gpu {
        _ if matches!(rung.reason, Reason::Forced) => "unset LUNA_BROKER_TRANSPORT to share GPU memory".to_owned(),
        None => format!("the broker computes on the CPU: start it with luna-broker serve --device {uuid}"),
        Some(brokers) if *brokers != uuid && *sees_brokers_gpu => {
            format!(
                "work on the broker's GPU {brokers}, or start another broker with --device {uuid} and its own --socket"
            )
        }
        Some(brokers) if *brokers != uuid => format!(
            "this process does not see the broker's GPU: add {brokers} to CUDA_VISIBLE_DEVICES, or start another \
             broker with --device {uuid} and its own --socket"
        ),
        _ if *is_wsl => "WSL2 does not open handles of GPU memory: run broker and workers on Linux itself".to_owned(),
        _ if gpu.is_integrated => "nothing to do: no handles are made of an integrated GPU's memory".to_owned(),
        _ if gpu.is_mig => "give broker and worker the same instance of the divided GPU".to_owned(),
        _ => share_namespaces(circumstances).unwrap_or_else(|| {
            "see the broker's log; a sandbox, or a driver that differs between two containers, refuses handles"
                .to_owned()
        }),
    }
}

fn share_namespaces(Circumstances { other_namespaces: others, .. }: &Circumstances) -> Option<String> {
    let flags = "in containers --pid=container:BROKER --ipc=container:BROKER";
    (!others.is_empty()).then(|| format!("share the broker's {} namespace ({flags})", others.join(" and ")))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::gpu::fake::gpu as facts;
    use super::*;
    use crate::protocol::{FailureCode, RungFailure};

    fn rung(rung: Rung, reason: Reason) -> DeviceRung {
        let order = rung.is_gpu().then_some(GpuOrder::Events);
        let open_us = rung.is_gpu().then_some(312);
        DeviceRung { open_us, order, ..DeviceRung::new(facts(0).uuid.to_string(), rung, reason) }
    }

    fn failed() -> Reason {
        let detail = "cuIpcOpenMemHandle_v2 answers 400".to_owned();
        Reason::Failed(vec![RungFailure { rung: Rung::CudaIpc, code: FailureCode::Open, detail }])
    }

    fn on(ordinal: u8) -> Circumstances {
        Circumstances { brokers_gpu: Some(facts(ordinal).uuid.to_string()), ..Circumstances::default() }
    }

    #[test]
    fn shared_host_memory_is_fine_and_bytes_are_noticed() {
        assert_eq!(host(&DeviceRung::host(Rung::Shm, Reason::SealedMemoryProbed)).verdict, Verdict::Ok);
        let inline = host(&DeviceRung::host(Rung::Inline, Reason::ProbeFailed("no room".to_owned())));
        assert_eq!(inline.verdict, Verdict::Note);
        assert!(inline.found.contains("no room") && inline.remedy.contains("/dev/shm"), "{inline:?}");
        let forced = host(&DeviceRung::host(Rung::Inline, Reason::Forced));
        assert!(forced.remedy.contains("unset LUNA_BROKER_TRANSPORT"), "{forced:?}");
    }

    #[test]
    fn shared_gpu_memory_is_told_with_the_time_it_took() {
        let finding = gpu(&rung(Rung::CudaIpc, Reason::GpuMemoryProbed), &facts(0), &on(0));
        assert_eq!(finding.verdict, Verdict::Ok);
        assert_eq!(finding.found, "cuda-ipc: GPU memory passed the probe (0.3 ms)");
        assert_eq!(finding.check, format!("this process -> {}", facts(0).uuid));
        // The second rung costs no copy either.
        assert_eq!(gpu(&rung(Rung::CudaVmm, failed()), &facts(0), &on(0)).verdict, Verdict::Ok);
    }

    #[test]
    fn order_by_waiting_is_noticed() {
        let waits = DeviceRung { order: Some(GpuOrder::Host), ..rung(Rung::CudaIpc, Reason::GpuMemoryProbed) };
        let finding = gpu(&waits, &facts(0), &on(0));
        assert_eq!(finding.verdict, Verdict::Note);
        assert!(finding.found.contains("each side waits") && finding.remedy.contains("driver"), "{finding:?}");
        let apart = Circumstances { other_namespaces: vec!["PID"], ..on(0) };
        assert!(gpu(&waits, &facts(0), &apart).remedy.contains("PID namespace"));
    }

    #[test]
    fn another_gpu_is_told_where_to_work() {
        let peer = gpu(&rung(Rung::Peer, Reason::GpuMemoryProbed), &facts(0), &on(1));
        assert_eq!(peer.verdict, Verdict::Note);
        assert!(peer.remedy.contains(&facts(1).uuid.to_string()), "{peer:?}");
        let apart = || rung(Rung::Shm, Reason::NoSharedGpu("it does not reach".to_owned()));
        let hidden = gpu(&apart(), &facts(0), &on(1));
        assert!(hidden.remedy.contains("CUDA_VISIBLE_DEVICES"), "{hidden:?}");
        let seen = gpu(&apart(), &facts(0), &Circumstances { sees_brokers_gpu: true, ..on(1) });
        assert!(seen.remedy.contains("work on the broker's GPU"), "{seen:?}");
        assert!(seen.remedy.contains(&format!("--device {}", facts(0).uuid)), "{seen:?}");
    }

    #[test]
    fn a_broker_on_the_cpu_is_told_how_to_start() {
        let apart = rung(Rung::Shm, Reason::NoSharedGpu("the broker runs on no GPU".to_owned()));
        let finding = gpu(&apart, &facts(0), &Circumstances::default());
        assert!(finding.remedy.contains(&format!("serve --device {}", facts(0).uuid)), "{finding:?}");
    }

    #[test]
    fn handles_that_do_not_open_are_explained_by_where_the_process_runs() {
        let remedy = |gpu_facts: &GpuFacts, circumstances: Circumstances| {
            let finding = gpu(&rung(Rung::Shm, failed()), gpu_facts, &circumstances);
            assert_eq!(finding.verdict, Verdict::Note);
            assert!(finding.found.contains("answers 400"), "{finding:?}");
            finding.remedy
        };
        assert!(remedy(&facts(0), Circumstances { is_wsl: true, ..on(0) }).contains("WSL2"));
        let apart = Circumstances { other_namespaces: vec!["PID", "IPC"], ..on(0) };
        assert!(remedy(&facts(0), apart).contains("PID and IPC namespace"));
        assert!(remedy(&GpuFacts { is_mig: true, ..facts(0) }, on(0)).contains("same instance"));
        assert!(remedy(&GpuFacts { is_integrated: true, ..facts(0) }, on(0)).contains("integrated"));
        assert!(remedy(&facts(0), on(0)).contains("log"));
        let forced = gpu(&rung(Rung::Shm, Reason::Forced), &facts(0), &on(0));
        assert!(forced.remedy.contains("unset LUNA_BROKER_TRANSPORT"), "{forced:?}");
    }
}
