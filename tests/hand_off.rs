//! Tensors cross between client and broker, over every rung.

mod support;

use std::sync::Arc;

use luna_broker::ErrorKind;
use luna_broker::broker::Broker;
use luna_broker::client::{CallOptions, Client, Input};
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::{Reason, Rung};
use luna_broker::service::{Tiling, VaeCall, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use support::{HAND_OFF, Latent, Place, broker_at, client_at, config, connect, eventually, local_client};

const DECODE: VaeCall = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };

/// Decodes a few latents of different sizes and checks every answer.
fn exercise(client: &Client) {
    let vae = client.vae(HAND_OFF).unwrap();
    for (at, (height, width)) in [(8, 8), (16, 8), (64, 96), (8, 8), (200, 200), (2, 3)].into_iter().enumerate() {
        let latent = Latent::new(height, width, at as f32 * 1000.0);
        latent.check(&vae.decode(latent.input()).unwrap()).unwrap();
    }
}

#[test]
fn every_rung_brings_the_same_answer_and_says_why_it_was_chosen() {
    let place = Place::new();
    let broker = Arc::new(broker_at(&place, config()));
    let sealed = client_at(&place);
    let inline = connect(&place, |config| config.rung = Some(Rung::Inline));
    let local = local_client(&broker);
    let expected = if cfg!(target_os = "linux") { Reason::SealedMemoryProbed } else { Reason::NamedSegmentProbed };
    for (client, rung, reason) in [
        (&sealed, Rung::Shm, expected),
        (&inline, Rung::Inline, Reason::Forced),
        (&local, Rung::Local, Reason::SameProcess),
    ] {
        let rungs = client.session().rungs;
        assert_eq!((rungs[0].rung, &rungs[0].reason), (rung, &reason));
        exercise(client);
    }
}

#[test]
fn named_segments_work_where_sealed_memory_is_not_wanted() {
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { named_segments: true, ..config() });
    let client = client_at(&place);
    assert_eq!(client.session().rungs[0].reason, Reason::NamedSegmentProbed);
    exercise(&client);
    #[cfg(target_os = "linux")]
    {
        let left = std::fs::read_dir("/dev/shm").unwrap().flatten();
        let left = left.filter(|entry| entry.file_name().to_string_lossy().starts_with("luna-broker-")).count();
        assert_eq!(left, 0, "a name is gone as soon as the segment is open");
    }
}

#[test]
fn a_result_is_read_in_place_and_its_slot_is_free_when_the_last_clone_is_dropped() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = client_at(&place);
    let vae = client.vae(HAND_OFF).unwrap();
    let latent = Latent::new(8, 8, 1.0);
    let first = vae.call(DECODE, latent.input(), &client.default_options()).unwrap();
    assert!(first.tensor.is_shared());
    assert_eq!((first.copied_in_bytes, first.copied_out_bytes), (4 * 8 * 8 * 4, 0));
    let clone = first.tensor.clone();
    let second = vae.decode(latent.input()).unwrap();
    assert_ne!(second.address(), clone.address(), "a slot in use is not given out again");
    let address = clone.address();
    drop((first, clone));
    let third = vae.decode(latent.input()).unwrap();
    assert_eq!(third.address(), address, "a free slot is used again");
    drop((second, third));
    eventually("the release of both results", || broker.status().sessions[0].leases == 0);
    assert_eq!(broker.status().sessions[0].input_slots, 1, "kept for the next call");
}

#[test]
fn an_input_built_in_place_is_not_copied() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let vae = client.vae(HAND_OFF).unwrap();
    let latent = Latent::new(8, 8, 5.0);
    let mut built = client.empty(latent.meta).unwrap();
    let source: Vec<u8> = (0..256).flat_map(|at| (5.0 + at as f32).to_ne_bytes()).collect();
    built.write(&source).unwrap();
    let output = vae.call(DECODE, Input::try_from(&built).unwrap(), &client.default_options()).unwrap();
    assert_eq!(output.copied_in_bytes, 0);
    latent.check(&output.tensor).unwrap();
}

#[test]
fn tensors_stay_readable_after_the_client_and_the_broker_are_gone() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = client_at(&place);
    let latent = Latent::new(8, 8, 3.0);
    let image = client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
    client.close();
    drop(client);
    latent.check(&image).unwrap();
    drop(broker);
    latent.check(&image).unwrap();
}

#[test]
fn strides_survive_the_wire() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    for rung in [None, Some(Rung::Inline)] {
        let client = connect(&place, |config| config.rung = rung);
        let vae = client.vae(HAND_OFF).unwrap();
        // Channels last: element (c, y, x) of a 4 × 8 × 8 latent lies at y·32 + x·4 + c.
        let meta = TensorMeta::strided(DType::F32, Dims::of([1, 4, 8, 8]), Dims::of([256, 1, 32, 4])).unwrap();
        let mut bytes = vec![0u8; 1024];
        for (c, y, x) in (0..4).flat_map(|c| (0..8).flat_map(move |y| (0..8).map(move |x| (c, y, x)))) {
            let at = 4 * (y * 32 + x * 4 + c);
            bytes[at..at + 4].copy_from_slice(&((c * 64 + y * 8 + x) as f32).to_ne_bytes());
        }
        let image = vae.decode(Input::new(meta, &bytes).unwrap()).unwrap();
        Latent::new(8, 8, 0.0).check(&image).unwrap();
    }
}

#[test]
fn one_client_serves_many_threads_and_each_gets_its_own_answer() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    for rung in [None, Some(Rung::Inline)] {
        let client = connect(&place, |config| config.rung = rung);
        let vae = client.vae(HAND_OFF).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let vae = &vae;
                scope.spawn(move || {
                    for round in 0..100 {
                        let latent = Latent::new(8 + thread % 3, 8, (thread * 100_000 + round) as f32);
                        latent.check(&vae.decode(latent.input()).unwrap()).unwrap();
                    }
                });
            }
        });
    }
}

#[test]
fn a_tensor_beyond_the_sessions_bytes_is_out_of_memory_and_nothing_else_is_lost() {
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { session_bytes: 16 << 20, ..config() });
    for rung in [None, Some(Rung::Inline)] {
        let client = connect(&place, |config| config.rung = rung);
        let vae = client.vae(HAND_OFF).unwrap();
        let held = Latent::new(64, 64, 7.0);
        let image = vae.decode(held.input()).unwrap();
        let large = Latent::new(256, 256, 0.0);
        let error = vae.decode(large.input()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
        assert!(error.remedy().contains("--session-bytes"), "{error}");
        held.check(&image).unwrap();
        exercise_small(&client);
    }
}

fn exercise_small(client: &Client) {
    let latent = Latent::new(8, 8, 1.0);
    latent.check(&client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap()).unwrap();
}

#[test]
fn a_broker_without_a_socket_serves_its_own_process() {
    let broker = Arc::new(Broker::builder().config(config()).start().unwrap());
    exercise(&local_client(&broker));
    assert_eq!(broker.status().sessions_lost, 0);
}

#[test]
fn a_connection_beyond_the_limit_is_refused_as_busy_and_room_is_made_by_one_that_leaves() {
    let place = Place::new();
    let broker = broker_at(&place, BrokerConfig { max_sessions: 1, ..config() });
    let first = client_at(&place);
    let refused = Client::connect(Some(&place.socket())).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "{refused}");
    exercise_small(&first);
    first.close();
    eventually("the end of the first session", || broker.status().sessions.is_empty());
    exercise_small(&client_at(&place));
}

#[test]
fn of_two_connections_at_once_for_one_place_one_gets_it() {
    let place = Place::new();
    let broker = broker_at(&place, BrokerConfig { max_sessions: 1, ..config() });
    for _ in 0..50 {
        let start = std::sync::Barrier::new(2);
        let served = std::thread::scope(|scope| {
            let connect = || {
                start.wait();
                Client::connect(Some(&place.socket()))
            };
            let both = [scope.spawn(connect), scope.spawn(connect)];
            both.map(|connecting| connecting.join().unwrap()).into_iter().filter_map(Result::ok).collect::<Vec<_>>()
        });
        assert_eq!(served.len(), 1);
        drop(served);
        eventually("the end of the session", || broker.status().sessions.is_empty());
    }
}

#[test]
fn a_broker_that_could_serve_nobody_does_not_start() {
    let refused = Broker::builder().config(BrokerConfig { max_sessions: 0, ..config() }).start().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Configuration);
    assert!(refused.to_string().contains("sessions"), "{refused}");
}

#[test]
fn a_tensor_that_cannot_be_written_to_says_why() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let latent = Latent::new(8, 8, 1.0);
    let mut tensor = client.empty(latent.meta).unwrap();
    let clone = tensor.clone();
    let shared = tensor.write(&[0; 4]).unwrap_err();
    assert_eq!(shared.kind(), ErrorKind::InvalidTensor);
    assert!(shared.message().contains("clone") && !shared.remedy().is_empty(), "{shared}");
    drop(clone);
    tensor.write(&[0; 4]).unwrap();
    let inline = connect(&place, |config| config.rung = Some(Rung::Inline));
    let mut received = inline.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
    let private = received.write(&[0; 4]).unwrap_err();
    assert_eq!(private.kind(), ErrorKind::InvalidTensor);
    assert!(private.message().contains("shared") && !private.remedy().is_empty(), "{private}");
}

#[cfg(unix)]
#[test]
fn a_broker_whose_socket_file_was_removed_still_stops() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = client_at(&place);
    std::fs::remove_file(place.socket()).unwrap();
    exercise_small(&client);
    broker.shut_down();
    assert_eq!(client.ping().unwrap_err().kind(), ErrorKind::ConnectionLost);
}

#[test]
fn callers_that_give_up_at_once_leave_the_client_usable() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = connect(&place, |config| config.timeout = None);
    // Interrupted before any answer can come: the reader and the sleepers give up in every order.
    for _ in 0..50 {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let hurried = CallOptions { interrupted: Some(&|| true), ..CallOptions::default() };
                    _ = client.ping_with(&hurried);
                });
            }
        });
        client.ping_with(&client.default_options()).unwrap();
    }
    eventually("the end of every request", || broker.status().sessions[0].in_flight == 0);
}
