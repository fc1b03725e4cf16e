use luna_broker::service::GpuOrder;

use super::*;
use crate::roles::Role;
use crate::stalled::{LONG, ONE_WAITS, QUEUED, Stalled, lane, patient_for};

/// What a picture holds at this moment, for whoever does not wait.
fn read_at_once(image: &Tensor) -> Vec<u8> {
    let (address, length) = (image.address().unwrap(), image.meta().size_bytes().unwrap());
    // SAFETY: the substitute's device addresses are addresses of this process; the tensor is alive.
    unsafe { std::slice::from_raw_parts(std::ptr::with_exposed_provenance(address), length) }.to_vec()
}

#[test]
fn a_reply_comes_before_the_work_is_done_and_only_waiting_shows_the_result() {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_DELAY_MS", 40);
    let stage = stage.only_on_the_substitute("the CPU reads device addresses");
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        client.open_gpu("cuda:0").unwrap();
        let latent = OwnLatent::new(0, 16);
        let image = decode(&client.vae(HAND_OFF).unwrap(), &latent);
        let early = read_at_once(&image);
        assert!(latent.check(&early).is_err(), "who does not wait reads what was there before");
        latent.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn a_reply_from_the_lane_comes_before_the_work_on_a_written_input_is_done() {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_DELAY_MS", 40);
    let stage = stage.only_on_the_substitute("the CPU reads device addresses");
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        let mut built = client.empty_on_gpu(latent.meta, "cuda:0").unwrap();
        built.write(&bytes_of(&latent.values)).unwrap();
        let vae = client.vae(QUEUED).unwrap();
        let image = vae.call(DECODE, Input::try_from(&built).unwrap(), &CallOptions::default()).unwrap().tensor;
        let early = read_at_once(&image);
        assert!(latent.check(&early).is_err(), "the broker does not wait for its work either");
        latent.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn a_reply_from_the_lane_comes_after_the_input_is_written_and_before_the_work_on_it_is_done() {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_DELAY_MS", 40);
    let stage = stage.only_on_the_substitute("the CPU reads device addresses");
    play(stage, patient_for(LONG), |guest| {
        let client = guest.connect();
        client.open_gpu("cuda:0").unwrap();
        let latent = OwnLatent::new(0, 16);
        let mut stream = Stalled::new();
        let (vae, input) = (client.vae(QUEUED).unwrap(), stream.input(&latent));
        let image = std::thread::scope(|scope| {
            let call = scope.spawn(|| vae.call(DECODE, input, &CallOptions::default()).unwrap().tensor);
            eventually("the call to wait for its input", || lane(guest) == ONE_WAITS);
            assert!(!call.is_finished(), "the reply says that the work is enqueued, which it is not yet");
            stream.let_go();
            call.join().unwrap()
        });
        let early = read_at_once(&image);
        assert!(latent.check(&early).is_err(), "the broker does not wait for its work either");
        latent.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn the_broker_reads_an_input_only_when_the_clients_stream_has_written_it() {
    // The copy into the slot runs long after the request is on its way.
    let stage = Stage::new().set_for(Role::Client, "SUBSTITUTE_CUDA_DELAY_MS", 25);
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let mut latent = OwnLatent::new(0, 16);
        for _ in 0..4 {
            latent.renew();
            let image = decode(&vae, &latent);
            latent.check(&image.to_vec().unwrap()).unwrap();
        }
    });
}

/// Fresh data in every round, slots reused as fast as they can be, with streams on both sides that lag.
fn stress(config: BrokerConfig, expected: GpuOrder, rounds: usize) {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_DELAY_MS", 1);
    play(stage, config, move |guest| {
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let mut latent = OwnLatent::new(0, 16);
        let mut before: Option<(Tensor, OwnLatent)> = None;
        for round in 0..rounds {
            latent.renew();
            let image = decode(&vae, &latent);
            // Read one round later, so that several are in flight.
            if let Some((image, latent)) = before.take() {
                latent.check(&image.to_vec().unwrap()).unwrap_or_else(|error| panic!("round {round}: {error}"));
            }
            let mut kept = OwnLatent::new(0, 16);
            kept.values.clone_from(&latent.values);
            before = Some((image, kept));
        }
        assert_eq!(rung_of(&client, gpu(0)).order, Some(expected));
        drop(before);
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
    });
}

#[test]
fn many_rounds_of_fresh_data_are_all_right_by_events() {
    let rounds = std::env::var("LUNA_BROKER_ORDER_ROUNDS").map_or(60, |rounds| rounds.parse().unwrap());
    stress(on_the_gpu(), GpuOrder::Events, rounds);
}

#[test]
fn many_rounds_of_fresh_data_are_all_right_by_waiting_on_the_host() {
    stress(BrokerConfig { gpu_order: GpuOrder::Host, ..on_the_gpu() }, GpuOrder::Host, 20);
}

#[test]
fn an_input_that_is_built_anew_at_once_does_not_reach_the_call_before() {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_DELAY_MS", 10);
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let (first, second) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        let mut built = client.empty_on_gpu(first.meta, "cuda:0").unwrap();
        built.write(&bytes_of(&first.values)).unwrap();
        let one = vae.call(DECODE, Input::try_from(&built).unwrap(), &CallOptions::default()).unwrap().tensor;
        built.write(&bytes_of(&second.values)).unwrap();
        let two = vae.call(DECODE, Input::try_from(&built).unwrap(), &CallOptions::default()).unwrap().tensor;
        first.check(&one.to_vec().unwrap()).unwrap();
        second.check(&two.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn a_client_may_want_the_host_to_wait() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect_with(|config| config.gpu_order = GpuOrder::Host);
        decode_checked(&client, &OwnLatent::new(0, 16));
        assert_eq!(rung_of(&client, gpu(0)).order, Some(GpuOrder::Host));
    });
}
