//! Tensors of a GPU that shares no memory with the broker's: they pass through page-locked memory of their own.

use std::process::{Command, Stdio};

use luna_broker::ErrorKind;
use luna_broker::client::{ResultPlace, Unshared, VaeOutput};
use luna_broker::protocol::Rung;
use luna_broker::service::Pages;

use super::*;
use crate::cuda::{is_real, registered};
use crate::roles::Role;

const STAGED: CallOptions<'_> =
    CallOptions { timeout: None, interrupted: None, result: ResultPlace::LikeInput, unshared: Unshared::Staging };

/// Two GPUs that do not reach each other; the broker is on the first, and the client sees these.
fn apart(clients: &str) -> Stage {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta");
    stage.set_for(Role::Client, "CUDA_VISIBLE_DEVICES", clients)
}

/// Memory of the caller's on a GPU, for a result to be copied to.
struct OwnImage {
    gpu: GpuUuid,
    region: Arc<dyn Region>,
}

impl OwnImage {
    fn new(ordinal: usize, bytes: usize) -> Self {
        let device = CudaDevice::open(gpu(ordinal), CudaSharing::Ipc).unwrap();
        Self { gpu: gpu(ordinal), region: device.allocate(bytes).unwrap() }
    }

    fn take(&self, image: &Tensor) {
        let length = image.meta().size_bytes().unwrap();
        // SAFETY: the region outlives the copy, which is done on return; the default stream is one of its context.
        let range = unsafe { GpuRange::new(self.gpu, self.region.address(), length, StreamRef::DEFAULT) };
        image.copy_to_gpu(&range).unwrap();
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.region.size_bytes()];
        self.region.copy_out(0, &mut bytes).unwrap();
        bytes
    }
}

fn call(client: &Client, latent: &OwnLatent, options: &CallOptions<'_>) -> VaeOutput {
    client.vae(HAND_OFF).unwrap().call(DECODE, latent.input(), options).unwrap()
}

/// A decode whose result is copied to the GPU that the latent is on, and is right there.
fn round_trip(client: &Client, latent: &OwnLatent, own: usize) {
    let output = call(client, latent, &STAGED);
    assert!(output.tensor.is_staged());
    let length = output.tensor.meta().size_bytes().unwrap();
    assert_eq!((output.copied_in_bytes, output.copied_out_bytes), (latent.size_bytes(), length as u64));
    let image = OwnImage::new(own, length);
    image.take(&output.tensor);
    drop(output);
    latent.check(&image.bytes()[..length]).unwrap();
}

/// As the client holds the memory that tensors of its first GPU pass through, and as the broker does.
fn pages(guest: &Guest, client: &Client) -> (Option<Pages>, Option<Pages>) {
    let told = guest.sessions()[0]["rungs"][1]["pages"].clone();
    (rung_of(client, gpu(0)).pages, serde_json::from_value(told).unwrap())
}

/// Rounds that are right, with every byte through locked pages on the client's side, and locked pages on the broker's.
fn locked(stage: Stage, rung: Option<Rung>) {
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect_with(|config| config.rung = rung);
        let mut latent = OwnLatent::new(0, 16);
        client.open_gpu("cuda:0").unwrap();
        assert_eq!(rung_of(&client, gpu(0)).rung, Rung::Shm);
        for _ in 0..3 {
            latent.renew();
            round_trip(&client, &latent, 0);
        }
        assert_eq!(pages(guest, &client), (Some(Pages::Locked), Some(Pages::Locked)));
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
        assert_eq!(guest.sessions()[0]["input_slots"], 1, "the input slot is kept from call to call");
        if is_real() {
            return;
        }
        assert_eq!((registered(), guest.brokers_registered()), (1, 1));
        let image = OwnImage::new(0, MIB as usize);
        let before = Transit::so_far();
        let output = call(&client, &latent, &STAGED);
        image.take(&output.tensor);
        let bytes = latent.size_bytes() + output.tensor.meta().size_bytes().unwrap() as u64;
        assert_eq!(Transit::so_far().since(before), Transit { locked: bytes, pageable: 0 });
    });
}

#[test]
fn tensors_of_a_gpu_that_does_not_reach_the_brokers_pass_through_locked_pages() {
    locked(apart("1"), None);
}

#[test]
fn tensors_pass_through_locked_pages_where_the_rungs_of_the_gpu_failed() {
    locked(Stage::new().set("SUBSTITUTE_CUDA_IPC", "refused").set("SUBSTITUTE_CUDA_VMM", "refused"), None);
}

#[test]
fn tensors_pass_through_locked_pages_where_the_host_is_forced() {
    locked(Stage::new(), Some(Rung::Shm));
}

#[test]
fn the_broker_copies_through_locked_pages_in_either_direction() {
    // The client's second GPU is the broker's.
    play(apart("1,0"), on_the_gpu(), |guest| {
        let client = guest.connect();
        let (there, here) = (OwnLatent::new(0, 16), OwnLatent::new(1, 16));
        let to_shared = CallOptions { result: ResultPlace::Gpu(gpu(1)), ..STAGED };
        let to_unshared = CallOptions { result: ResultPlace::Gpu(gpu(0)), ..STAGED };
        let image = OwnImage::new(0, MIB as usize);
        for round in 0..2 {
            let before = guest.brokers_transit();
            let shared = call(&client, &there, &to_shared).tensor;
            there.check(&shared.to_vec().unwrap()).unwrap();
            let staged = call(&client, &here, &to_unshared).tensor;
            image.take(&staged);
            here.check(&image.bytes()[..staged.meta().size_bytes().unwrap()]).unwrap();
            // The first round has probes in it. The do-nothing model copies sixteen elements.
            if round > 0 {
                let marks = 2 * 16 * 4;
                assert_eq!(guest.brokers_transit().since(before), Transit { locked: marks, pageable: 0 });
            }
        }
    });
}

/// Rounds that are right although these sides' drivers lock no pages; what each says of it.
fn refused(stage: Stage, check: impl FnOnce(Pages, Pages)) {
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let mut latent = OwnLatent::new(0, 16);
        for _ in 0..3 {
            latent.renew();
            round_trip(&client, &latent, 0);
        }
        let (clients, brokers) = pages(guest, &client);
        check(clients.unwrap(), brokers.unwrap());
    });
}

fn is_refusal(pages: &Pages) -> bool {
    matches!(pages, Pages::Pageable(why) if why.contains("cuMemHostRegister_v2 answers 801"))
}

const REGISTER: &str = "SUBSTITUTE_CUDA_HOST_REGISTER";

#[test]
fn pages_that_no_driver_locks_are_used_all_the_same_and_it_is_said() {
    refused(apart("1").set(REGISTER, "refused"), |clients, brokers| {
        assert!(is_refusal(&clients) && is_refusal(&brokers), "{clients}, {brokers}");
    });
}

#[test]
fn pages_that_the_clients_driver_does_not_lock_are_locked_by_the_brokers() {
    refused(apart("1").set_for(Role::Client, REGISTER, "refused"), |clients, brokers| {
        assert!(is_refusal(&clients), "{clients}");
        assert_eq!(brokers, Pages::Locked);
    });
}

#[test]
fn pages_that_the_brokers_driver_does_not_lock_are_locked_by_the_clients() {
    refused(apart("1").set_for(Role::Broker, REGISTER, "refused"), |clients, brokers| {
        assert!(is_refusal(&brokers), "{brokers}");
        assert_eq!(clients, Pages::Locked);
    });
}

#[test]
fn a_broker_on_the_cpu_locks_nothing_and_says_why() {
    play(Stage::new().unaccounted(), support::config(), |guest| {
        let client = guest.connect();
        round_trip(&client, &OwnLatent::new(0, 16), 0);
        let (clients, brokers) = pages(guest, &client);
        assert_eq!(clients, Some(Pages::Locked));
        assert!(matches!(brokers, Some(Pages::Pageable(why)) if why.contains("no GPU")));
    });
}

#[test]
fn nothing_is_locked_and_no_arena_made_before_the_first_tensor_passes_through() {
    play(apart("1"), on_the_gpu(), |guest| {
        let client = guest.connect();
        client.open_gpu("cuda:0").unwrap();
        let host = support::Latent::new(16, 16, 3.0);
        host.check(&client.vae(HAND_OFF).unwrap().decode(host.input()).unwrap()).unwrap();
        assert_eq!(pages(guest, &client), (None, None));
        assert_eq!((registered(), guest.brokers_registered()), (0, 0));
        let arenas = guest.sessions()[0]["arena_bytes"].clone();
        round_trip(&client, &OwnLatent::new(0, 16), 0);
        assert_eq!((registered(), guest.brokers_registered()), (1, 1));
        assert_eq!(guest.sessions()[0]["arena_bytes"].as_u64().unwrap(), arenas.as_u64().unwrap() + 4 * MIB);
    });
}

#[test]
fn what_users_are_given_is_never_in_locked_pages() {
    play(apart("1"), on_the_gpu(), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        let staged = call(&client, &latent, &STAGED).tensor;
        let error = staged.bytes().unwrap_err();
        assert_eq!((error.kind(), staged.address()), (ErrorKind::Unsupported, None), "{error}");
        assert_eq!(Input::try_from(&staged).unwrap_err().kind(), ErrorKind::Unsupported);
        latent.check(&staged.to_vec().unwrap()).unwrap();
        drop(staged);
        let own = OwnImage::new(0, MIB as usize);
        let on_host =
            [CallOptions { result: ResultPlace::Host, ..STAGED }, CallOptions { unshared: Unshared::Host, ..STAGED }];
        let mut given: Vec<Tensor> = on_host.iter().map(|options| call(&client, &latent, options).tensor).collect();
        given.push(client.empty(latent.meta).unwrap());
        for tensor in given {
            let bytes = tensor.bytes().unwrap();
            let before = Transit::so_far();
            own.region.copy_in(0, bytes).unwrap();
            assert_eq!(Transit::so_far().since(before), Transit { locked: 0, pageable: bytes.len() as u64 });
        }
    });
}

#[test]
fn idle_slots_of_the_two_kinds_are_not_mixed() {
    play(apart("1"), on_the_gpu(), |guest| {
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let (on_gpu, on_host) = (OwnLatent::new(0, 16), support::Latent::new(16, 16, 3.0));
        for _ in 0..3 {
            on_gpu.check(call(&client, &on_gpu, &CallOptions::default()).tensor.bytes().unwrap()).unwrap();
            on_host.check(&vae.decode(on_host.input()).unwrap()).unwrap();
        }
        assert_eq!(guest.sessions()[0]["input_slots"], 2);
        let before = Transit::so_far();
        call(&client, &on_gpu, &CallOptions::default());
        assert_eq!(Transit::so_far().since(before), Transit { locked: on_gpu.size_bytes(), pageable: 0 });
    });
}

#[test]
fn what_passes_through_is_bounded_as_what_is_held() {
    // Room for one picture of 3.1 MB.
    play(apart("1"), BrokerConfig { session_bytes: 4 * MIB, ..on_the_gpu() }, |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 64);
        let held = call(&client, &latent, &STAGED).tensor;
        let vae = client.vae(HAND_OFF).unwrap();
        let error = vae.call(DECODE, latent.input(), &STAGED).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        assert!(error.to_string().contains("--session-bytes"), "{error}");
        assert_eq!(guest.sessions()[0]["arena_bytes"], 8 * MIB);
        latent.check(&held.to_vec().unwrap()).unwrap();
        drop(held);
        eventually("room for another picture", || vae.call(DECODE, latent.input(), &STAGED).is_ok());
    });
}

#[test]
fn pages_beyond_the_brokers_limit_stay_pageable_and_it_is_said() {
    // Room for one arena of one session.
    play(apart("1"), BrokerConfig { pinned_bytes: 4 * MIB, ..on_the_gpu() }, |guest| {
        let latent = OwnLatent::new(0, 16);
        let brokers =
            |at: usize| -> Pages { serde_json::from_value(guest.sessions()[at]["rungs"][1]["pages"].clone()).unwrap() };
        let first = guest.connect();
        round_trip(&first, &latent, 0);
        let second = guest.connect();
        round_trip(&second, &latent, 0);
        assert_eq!(brokers(0), Pages::Locked);
        assert!(matches!(brokers(1), Pages::Pageable(why) if why.contains("--pinned-bytes")));
        assert_eq!(guest.brokers_registered(), 1);
        first.close();
        second.close();
        eventually("the sessions' end", || guest.sessions().as_array().unwrap().is_empty());
        let third = guest.connect();
        round_trip(&third, &latent, 0);
        assert_eq!((brokers(0), guest.brokers_registered()), (Pages::Locked, 1));
    });
}

#[test]
fn a_staged_result_is_read_after_its_client_has_left() {
    play(apart("1"), on_the_gpu(), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        let staged = call(&client, &latent, &STAGED).tensor;
        client.close();
        eventually("the session's end", || guest.sessions().as_array().unwrap().is_empty());
        assert_eq!(guest.brokers_registered(), 0);
        let image = OwnImage::new(0, MIB as usize);
        image.take(&staged);
        latent.check(&image.bytes()[..staged.meta().size_bytes().unwrap()]).unwrap();
        drop((client, staged));
        eventually("the client's pages to be unlocked", || registered() == 0);
    });
}

/// A client of its own process, to be killed while a picture of its is on the way.
const VICTIM: &str = "LUNA_BROKER_TEST_VICTIM_ON_THE_WAY";

#[test]
fn what_a_killed_client_had_locked_at_the_broker_is_unlocked() {
    if let Ok(socket) = std::env::var(VICTIM) {
        let client = Client::connect(Some(&socket)).unwrap();
        let _held = call(&client, &OwnLatent::new(0, 16), &STAGED).tensor;
        // Ends with the test where that fails before it kills.
        std::io::stdin().read_line(&mut String::new()).unwrap();
        return;
    }
    play(apart("1"), on_the_gpu(), |guest| {
        let name = "staging::what_a_killed_client_had_locked_at_the_broker_is_unlocked";
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(VICTIM, &guest.socket)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        eventually("the victim's picture", || {
            guest.sessions().as_array().unwrap().iter().any(|one| one["leases"] == 1)
        });
        assert_eq!(guest.brokers_registered(), 1);
        victim.kill().unwrap();
        victim.wait().unwrap();
        eventually("the session's end", || guest.sessions().as_array().unwrap().is_empty());
        assert_eq!(guest.brokers_registered(), 0);
        let client = guest.connect();
        round_trip(&client, &OwnLatent::new(0, 16), 0);
    });
}
