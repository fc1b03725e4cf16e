use std::fmt::Debug;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use luna_broker::ErrorKind;
use luna_broker::protocol::Rung;
use luna_broker::service::GpuOrder;
use tracing::field::Field;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use super::*;
use crate::roles::Role;

/// A picture of 16 times the bytes of the first arena.
const LARGE_SIDE: u64 = 256;

/// What is settled on under a fault, with every decode right all the same.
fn settled(stage: Stage, check: impl FnOnce(DeviceRung)) {
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let mut latent = OwnLatent::new(0, 16);
        for _ in 0..3 {
            latent.renew();
            decode_checked(&client, &latent);
        }
        check(rung_of(&client, gpu(0)));
    });
}

#[test]
fn another_pid_namespace_takes_descriptors() {
    settled(Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_PID_NAMESPACE", "container"), |rung| {
        assert_eq!(rung.rung, Rung::CudaVmm);
        assert_eq!(failures(&rung), [(Rung::CudaIpc, "open")]);
    });
}

#[test]
fn a_failed_open_and_the_rung_in_use_instead_are_counted() {
    let stage = Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_PID_NAMESPACE", "container");
    play(stage, on_the_gpu(), |guest| {
        let clients = [guest.connect(), guest.connect()];
        for client in &clients {
            decode_checked(client, &OwnLatent::new(0, 16));
        }
        let in_use = format!(r#"sessions{{device="{}",rung="cuda-vmm",reason="failed"}}"#, gpu(0));
        let arenas = format!(r#"arena_bytes{{device="{}"}}"#, gpu(0));
        told(
            &clients[0],
            &[
                (&in_use, 2.0),
                (r#"sessions{device="cpu",rung="shm",reason="sealed_memory_probed"}"#, 2.0),
                (r#"rung_failures_total{rung="cuda-ipc",code="open"}"#, 2.0),
                // One for each of the two ways in which memory was offered.
                (&arenas, 8.0 * MIB as f64),
            ],
        );
    });
}

#[test]
fn where_no_handle_opens_tensors_go_through_the_host() {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_IPC", "refused").set("SUBSTITUTE_CUDA_VMM", "refused");
    settled(stage, |rung| {
        assert_eq!((rung.rung, rung.order), (Rung::Shm, None));
        assert_eq!(failures(&rung), [(Rung::CudaIpc, "open"), (Rung::CudaVmm, "export")]);
    });
}

#[test]
fn memory_that_is_not_the_same_is_found_out() {
    settled(Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_CORRUPT_IMPORT", 1), |rung| {
        assert_eq!(rung.rung, Rung::CudaVmm);
        assert_eq!(failures(&rung), [(Rung::CudaIpc, "nonce_mismatch")]);
    });
}

#[test]
fn an_open_that_fails_in_passing_is_tried_again() {
    settled(Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_FAIL_OPEN", 1), |rung| {
        assert_eq!(rung.rung, Rung::CudaIpc);
    });
}

#[test]
fn events_that_do_not_open_leave_the_memory_shared_and_the_waiting_to_the_host() {
    settled(Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_FAIL_EVENT_OPEN", "1+"), |rung| {
        assert_eq!((rung.rung, rung.order), (Rung::CudaIpc, Some(GpuOrder::Host)));
    });
}

/// Records of one side's interprocess events count as done at once.
fn events_lost_by(role: Role) {
    let stage = Stage::new().set_for(role, "SUBSTITUTE_CUDA_LOSE_EVENTS", 1).set("SUBSTITUTE_CUDA_DELAY_MS", 3);
    settled(stage, |rung| {
        assert_eq!((rung.rung, rung.order), (Rung::CudaIpc, Some(GpuOrder::Host)));
    });
}

#[test]
fn events_of_the_broker_that_hold_nothing_back_are_found_out() {
    events_lost_by(Role::Broker);
}

#[test]
fn events_of_the_client_that_hold_nothing_back_are_found_out() {
    events_lost_by(Role::Client);
}

#[test]
fn memory_that_no_longer_opens_demotes_the_session_and_loses_no_call() {
    // The first arena opens; the larger one that a large picture needs does not, nor any after it.
    let stage = Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_FAIL_OPEN", "2+");
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        decode_checked(&client, &OwnLatent::new(0, 16));
        assert_eq!(rung_of(&client, gpu(0)).rung, Rung::CudaIpc);
        let kept = decode(&client.vae(HAND_OFF).unwrap(), &OwnLatent::new(0, 16));
        decode_checked(&client, &OwnLatent::new(0, LARGE_SIDE));
        let rung = rung_of(&client, gpu(0));
        assert_eq!(rung.rung, Rung::CudaVmm);
        assert_eq!(failures(&rung), [(Rung::CudaIpc, "demoted")]);
        let in_use = format!(r#"sessions{{device="{}",rung="cuda-vmm",reason="failed"}}"#, gpu(0));
        told(&client, &[(&in_use, 1.0), (r#"rung_failures_total{rung="cuda-ipc",code="demoted"}"#, 1.0)]);
        // What was received before stays readable, and is given back to where it came from.
        kept.to_vec().unwrap();
        drop(kept);
        decode_checked(&client, &OwnLatent::new(0, LARGE_SIDE));
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
    });
}

/// Counts the log's words about demotions, in all threads of its process.
#[derive(Debug, Default)]
struct Demotions(Arc<AtomicUsize>);

impl Subscriber for Demotions {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut |field: &Field, value: &dyn Debug| {
            if field.name() == "message" && format!("{value:?}").contains("taking the next rung") {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        });
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

#[test]
fn two_threads_that_meet_the_same_failure_demote_once_and_lose_no_call() {
    let stage = Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_FAIL_OPEN", "2+");
    play(stage, on_the_gpu(), |guest| {
        let demotions = Demotions::default();
        let counted = Arc::clone(&demotions.0);
        tracing::subscriber::set_global_default(demotions).unwrap();
        let client = guest.connect();
        decode_checked(&client, &OwnLatent::new(0, 16));
        let latents = [OwnLatent::new(0, LARGE_SIDE), OwnLatent::new(0, LARGE_SIDE)];
        let start = Barrier::new(latents.len());
        std::thread::scope(|scope| {
            for latent in &latents {
                scope.spawn(|| {
                    start.wait();
                    for _ in 0..4 {
                        decode_checked(&client, latent);
                    }
                });
            }
        });
        let rung = rung_of(&client, gpu(0));
        assert_eq!(rung.rung, Rung::CudaVmm);
        assert_eq!(failures(&rung), [(Rung::CudaIpc, "demoted")]);
        assert_eq!(counted.load(Ordering::Relaxed), 1);
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
    });
}

#[test]
fn a_gpu_without_memory_refuses_the_call_and_keeps_the_session() {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_MEMORY", 24 * MIB);
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let small = OwnLatent::new(0, 16);
        decode_checked(&client, &small);
        let large = TensorMeta::contiguous(DType::F32, Dims::of([1, 4, 2048, 2048]));
        let error = client.empty_on_gpu(large, "cuda:0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        decode_checked(&client, &small);
    });
}

#[test]
fn a_client_without_a_gpu_is_told_and_goes_on() {
    let stage = Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_NO_DEVICE", 1).unaccounted();
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let error = client.open_gpu("cuda:0").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let latent = support::Latent::new(16, 16, 3.0);
        let image = client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
        latent.check(&image).unwrap();
    });
}

#[test]
fn a_broker_without_the_gpu_it_should_run_on_does_not_start() {
    Stage::new().set("SUBSTITUTE_CUDA_NO_DEVICE", 1).unaccounted().alone(|| {
        let error = start(on_the_gpu()).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    });
}

#[test]
fn a_name_of_no_gpu_is_a_setting_to_correct() {
    Stage::new().alone(|| {
        let config = BrokerConfig { device: "cuda:7".to_owned(), ..on_the_gpu() };
        let error = start(config).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Configuration, "{error}");
        assert!(error.to_string().contains("cuda:7"), "{error}");
    });
}
