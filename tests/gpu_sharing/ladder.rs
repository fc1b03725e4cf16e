use luna_broker::ErrorKind;
use luna_broker::protocol::{Reason, Rung};
use luna_broker::service::GpuOrder;

use super::*;
use crate::roles::Role;

#[test]
fn the_same_gpu_is_shared_by_its_handle_and_ordered_by_events() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect();
        assert_eq!(client.session().rungs.len(), 1, "a GPU is opened with its first tensor");
        let latent = OwnLatent::new(0, 16);
        let output = client.vae(HAND_OFF).unwrap().call(DECODE, latent.input(), &CallOptions::default()).unwrap();
        assert!(is_on_gpu(&output.tensor));
        assert_eq!((output.copied_in_bytes, output.copied_out_bytes), (4 * 4 * 16 * 16, 0));
        latent.check(&output.tensor.to_vec().unwrap()).unwrap();
        let rung = rung_of(&client, gpu(0));
        assert_eq!(
            (rung.rung, &rung.reason, rung.order),
            (Rung::CudaIpc, &Reason::GpuMemoryProbed, Some(GpuOrder::Events))
        );
        assert!(rung.open_us.is_some());
        let told = guest.sessions()[0]["rungs"][1].clone();
        assert_eq!(told["rung"], "cuda-ipc");
        assert_eq!(told["device"], gpu(0).to_string());
    });
}

#[test]
fn a_latent_built_in_place_is_not_copied() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect();
        let reference = OwnLatent::new(0, 16);
        let mut built = client.empty_on_gpu(reference.meta, "cuda:0").unwrap();
        built.write(&bytes_of(&reference.values)).unwrap();
        let input = Input::try_from(&built).unwrap();
        let output = client.vae(HAND_OFF).unwrap().call(DECODE, input, &CallOptions::default()).unwrap();
        assert_eq!(output.copied_in_bytes, 0);
        reference.check(&output.tensor.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn results_go_where_the_caller_wants_them() {
    play(Stage::new(), on_the_gpu(), |guest| {
        use luna_broker::client::ResultPlace;
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let latent = OwnLatent::new(0, 16);
        let to_host = CallOptions { result: ResultPlace::Host, ..CallOptions::default() };
        let image = vae.call(DECODE, latent.input(), &to_host).unwrap().tensor;
        assert!(!is_on_gpu(&image));
        latent.check(image.bytes().unwrap()).unwrap();
        let bytes = bytes_of(&latent.values);
        let to_gpu = CallOptions { result: ResultPlace::Gpu(gpu(0)), ..CallOptions::default() };
        let image = vae.call(DECODE, Input::new(latent.meta, &bytes).unwrap(), &to_gpu).unwrap().tensor;
        assert!(is_on_gpu(&image));
        latent.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn another_order_of_ordinals_finds_the_same_gpu() {
    let stage =
        Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").set_for(Role::Client, "CUDA_VISIBLE_DEVICES", "1,0");
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        // The broker's first GPU is this process's second.
        decode_checked(&client, &OwnLatent::new(1, 16));
        assert_eq!(rung_of(&client, gpu(1)).rung, Rung::CudaIpc);
        // By ordinals, this one would have been taken for the broker's.
        decode_checked(&client, &OwnLatent::new(0, 16));
        let other = rung_of(&client, gpu(0));
        assert_eq!(other.rung, Rung::Shm);
        assert!(other.reason.to_string().contains(&gpu(1).to_string()), "{}", other.reason);
    });
}

#[test]
fn another_gpu_that_reaches_the_brokers_reads_and_writes_it_from_there() {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").set("SUBSTITUTE_CUDA_P2P", 1).set_for(
        Role::Client,
        "CUDA_VISIBLE_DEVICES",
        "1",
    );
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        let image = decode(&client.vae(HAND_OFF).unwrap(), &latent);
        assert_eq!(rung_of(&client, gpu(0)).rung, Rung::Peer);
        let own = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap();
        let copy = own.allocate(image.meta().size_bytes().unwrap()).unwrap();
        // SAFETY: the region outlives the copy, which is waited for below.
        let range = unsafe { GpuRange::new(gpu(0), copy.address(), copy.size_bytes(), StreamRef::DEFAULT) };
        image.copy_to_gpu(&range).unwrap();
        own.synchronize_stream(StreamRef::DEFAULT).unwrap();
        let mut bytes = vec![0; image.meta().size_bytes().unwrap()];
        copy.copy_out(0, &mut bytes).unwrap();
        latent.check(&bytes).unwrap();
    });
}

#[test]
fn a_broker_on_the_cpu_takes_tensors_of_a_gpu_through_the_host() {
    play(Stage::new().unaccounted(), support::config(), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        let image = decode(&client.vae(HAND_OFF).unwrap(), &latent);
        assert!(!is_on_gpu(&image));
        latent.check(image.bytes().unwrap()).unwrap();
        let rung = rung_of(&client, gpu(0));
        assert_eq!(rung.rung, Rung::Shm);
        assert!(matches!(rung.reason, Reason::NoSharedGpu(why) if why.contains("no GPU")));
        // Not by a UUID that only the client vouches for.
        told(&client, &[(r#"sessions{device="other_gpu",rung="shm",reason="no_shared_gpu"}"#, 1.0)]);
    });
}

#[test]
fn a_forced_rung_is_taken_or_refused_but_never_replaced() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let forced = |rung| guest.connect_with(|config| config.rung = Some(rung));
        let latent = OwnLatent::new(0, 16);
        for rung in [Rung::CudaIpc, Rung::CudaVmm, Rung::Shm, Rung::Inline] {
            let client = forced(rung);
            decode_checked(&client, &latent);
            assert_eq!(rung_of(&client, gpu(0)).rung, rung);
        }
        let client = forced(Rung::Peer);
        let refused = client.open_gpu("cuda:0").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Refused, "{refused}");
        assert!(refused.to_string().contains("peer"), "{refused}");
        client.ping().unwrap();
    });
}

#[test]
fn a_client_in_the_brokers_process_uses_its_memory_as_it_is() {
    Stage::new().alone(|| {
        let broker = Arc::new(start(on_the_gpu()).unwrap());
        let client = support::local_client(&broker);
        let latent = OwnLatent::new(0, 16);
        let image = decode(&client.vae(HAND_OFF).unwrap(), &latent);
        assert!(is_on_gpu(&image));
        latent.check(&image.to_vec().unwrap()).unwrap();
        assert_eq!(rung_of(&client, gpu(0)).rung, Rung::Local);
    });
}
