//! Bytes that are no messages, and messages that are out of place.

use std::os::fd::OwnedFd;
use std::time::Duration;

use luna_broker::ErrorKind;
use luna_broker::config::BrokerConfig;
use luna_broker::id::RequestId;
use luna_broker::protocol::{
    ClientMessage, Features, NONCE_BYTES, Operation, Outcome, PROTOCOL_VERSION, ProbeAnswer, ProbeOutcome, Rung,
    TensorSource, codec,
};
use luna_broker::transport::{HEADER_BYTES, TransportError, Wait};

use crate::Expected;
use crate::raw::{Raw, decode, frame, hello, request};
use crate::scene::Scene;
use crate::support::{HAND_OFF, Latent, Place, broker_at, config, eventually};

const PROTOCOL: ErrorKind = ErrorKind::Protocol;

/// A header that announces these lengths.
fn header(message: u32, payload: u64) -> Vec<u8> {
    [&message.to_le_bytes()[..], &payload.to_le_bytes()].concat()
}

/// `message` in a frame, whatever it is.
fn framed(message: &[u8]) -> Vec<u8> {
    [header(message.len() as u32, 0), message.to_vec()].concat()
}

/// Sends `bytes` on a fresh or a negotiated connection; the session must end with the expected fault.
fn refused(scene: &Scene, case: &str, negotiated: bool, bytes: &[u8], expected: &Expected) {
    scene.check_bystander();
    let socket = scene.place.socket();
    let mut raw = if negotiated { Raw::inline(&socket) } else { Raw::connect(&socket) };
    raw.bytes(bytes);
    expected.check(case, &raw.refusal());
    scene.check_bystander();
}

#[test]
fn what_is_no_message_ends_the_session_with_the_reason() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let limit = codec::MAX_MESSAGE_BYTES as u32;
    let valid = frame(&ClientMessage::Hello(hello(Features(0))), 0);
    let trailing = framed(&[&valid[HEADER_BYTES..], &[0xc0]].concat());
    let cut = framed(&valid[HEADER_BYTES..valid.len() - 3]);
    let unknown = framed(b"\x81\xa7Explode\xc0");
    let cases: [(&str, Vec<u8>, &'static [&'static str]); 10] = [
        ("a message beyond the limit", header(limit + 1, 0), &["exceeds the limit of 1048576"]),
        ("the longest message there is", header(u32::MAX, 0), &["4294967295"]),
        ("a payload beyond the limit", header(1, u64::MAX), &["18446744073709551615", "exceeds the limit"]),
        ("another protocol", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), &["exceeds the limit"]),
        ("garbage", framed(&[0xc1; 64]), &["not a message"]),
        ("nothing", framed(&[]), &["not a message"]),
        ("half a message", cut, &["not a message"]),
        ("a message and a half", trailing, &["follow"]),
        ("nesting without end", framed(&vec![0x91; 100_000]), &["not a message"]),
        ("an unknown kind of message", unknown, &["not a message", "Explode"]),
    ];
    for (case, bytes, says) in &cases {
        for negotiated in [false, true] {
            refused(&scene, case, negotiated, bytes, &Expected::new(PROTOCOL, says));
        }
    }
    let leases = [b"\x81\xa7Release\xdd".as_slice(), &u32::MAX.to_be_bytes()].concat();
    refused(&scene, "four billion leases", true, &framed(&leases), &Expected::new(PROTOCOL, &["not a message"]));
    let nine = [0x81, 0xa6].iter().copied().chain(*b"Probed").chain([0x99; 9]).collect::<Vec<u8>>();
    refused(&scene, "a list where a map belongs", true, &framed(&nine), &Expected::new(PROTOCOL, &["not a message"]));
    eventually("the end of all refused sessions", || scene.footprint().is_back_to(&before));
}

#[test]
fn a_message_out_of_place_ends_the_session_with_the_reason() {
    let scene = Scene::new(&[]);
    let ping = || frame(&request(1, Operation::Ping), 0);
    let hello = || frame(&ClientMessage::Hello(hello(Features(0))), 0);
    let (read, wrote) = ([0; NONCE_BYTES], [0; NONCE_BYTES]);
    let probed = ClientMessage::Probed(ProbeAnswer { outcome: ProbeOutcome::Mapped { read, wrote } });
    let out = |says| Expected::new(PROTOCOL, says);
    refused(&scene, "a request before the hello", false, &ping(), &out(&["request", "out of place", "Connected"]));
    refused(&scene, "a goodbye before the hello", false, &frame(&ClientMessage::Goodbye, 0), &out(&["goodbye"]));
    refused(&scene, "a second hello", true, &hello(), &out(&["hello", "out of place", "Open"]));
    refused(&scene, "an answer to no probe", true, &frame(&probed, 0), &out(&["probed", "out of place"]));
    let (mut raw, ..) = Raw::welcomed(&scene.place.socket());
    raw.bytes(&ping());
    out(&["request", "Probing"]).check("a request before the probe's answer", &raw.refusal());
    scene.check_bystander();
}

#[test]
fn another_version_and_an_impossible_rung_are_refused_with_a_way_out() {
    let scene = Scene::new(&[]);
    let mut future = hello(Features(0));
    future.version = PROTOCOL_VERSION + 41;
    let expected = Expected::new(ErrorKind::Refused, &["version 43", "speaks 2"]).with_remedy();
    refused(&scene, "a version from the future", false, &frame(&ClientMessage::Hello(future), 0), &expected);
    let mut forced = hello(Features::HANDLES);
    forced.forced = Some(Rung::Local);
    let expected = Expected::new(ErrorKind::Refused, &["local", "forced"]).with_remedy();
    refused(&scene, "a rung that cannot be", false, &frame(&ClientMessage::Hello(forced), 0), &expected);
}

#[test]
fn a_probe_that_lies_gets_no_shared_memory() {
    let scene = Scene::new(&[]);
    let (mut raw, ..) = Raw::welcomed(&scene.place.socket());
    let (read, wrote) = ([1; NONCE_BYTES], [2; NONCE_BYTES]);
    raw.send(&ClientMessage::Probed(ProbeAnswer { outcome: ProbeOutcome::Mapped { read, wrote } }));
    match raw.receive().unwrap() {
        luna_broker::protocol::ServerMessage::Accepted(accepted) => assert_eq!(accepted.rungs[0].rung, Rung::Inline),
        other => panic!("the session should go on over the socket, not with {other:?}"),
    }
    assert_eq!(raw.ask(Operation::Ping, &[]), Outcome::Done);
    scene.check_bystander();
}

#[test]
fn half_a_frame_and_the_end_leaves_nothing() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let bytes = frame(&ClientMessage::Hello(hello(Features(0))), 0);
    for length in 0..bytes.len() {
        Raw::connect(&scene.place.socket()).bytes(&bytes[..length]);
    }
    let latent = Latent::new(8, 8, 0.0);
    let bytes = frame(&request(1, decode(HAND_OFF, TensorSource::Inline(latent.meta))), 1024);
    for length in (0..bytes.len()).step_by(7) {
        Raw::inline(&scene.place.socket()).bytes(&bytes[..length]);
    }
    // And within the payload, while the broker writes it into a slot.
    let raw = Raw::inline(&scene.place.socket());
    raw.bytes(&bytes);
    raw.bytes(&[0; 500]);
    drop(raw);
    eventually("the end of all broken connections", || scene.footprint().is_back_to(&before));
    scene.check_bystander();
}

#[test]
fn a_pause_within_a_payload_ends_the_session_and_runs_nothing_of_it() {
    let place = Place::new();
    let settings = BrokerConfig { payload_patience: Duration::from_millis(50), ..config() };
    let broker = broker_at(&place, settings);
    let mut raw = Raw::inline(&place.socket());
    let latent = Latent::new(8, 8, 0.0);
    // Requests in the place of elements.
    let mut payload = frame(&request(2, Operation::Status), 0).repeat(64);
    payload.truncate(latent.meta.size_bytes().unwrap());
    raw.bytes(&frame(&request(1, decode(HAND_OFF, TensorSource::Inline(latent.meta))), payload.len() as u64));
    raw.bytes(&payload[..payload.len() / 2]);
    let reply = raw.reply();
    assert_eq!(reply.id, RequestId(1));
    assert!(matches!(reply.outcome, Outcome::Fault(fault) if fault.kind == ErrorKind::Timeout));
    // The broker may be gone already.
    _ = raw.try_bytes(&payload[payload.len() / 2..], Wait::Block);
    assert_eq!(raw.refusal().kind, ErrorKind::Timeout);
    eventually("the end of the session", || broker.status().sessions.is_empty());
    assert_eq!((broker.status().requests, broker.status().sessions_lost), (1, 1));
}

#[test]
fn descriptors_that_nobody_asked_for_are_closed() {
    let scene = Scene::new(&[]);
    let mut raw = Raw::inline(&scene.place.socket());
    assert_eq!(raw.ask(Operation::Ping, &[]), Outcome::Done);
    let before = scene.footprint();
    let eight = || -> Vec<OwnedFd> { (0..8).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect() };
    for id in 0..100 {
        raw.bytes_with(&frame(&request(id, Operation::Ping), 0), eight()).unwrap();
        assert_eq!(raw.reply().id, RequestId(id));
    }
    assert!(scene.footprint().descriptors <= before.descriptors, "{:?} after {before:?}", scene.footprint());
    // Beside the bytes behind a frame, too.
    let latent = Latent::new(2, 2, 0.0);
    let payload = latent.meta.size_bytes().unwrap();
    raw.bytes(&frame(&request(100, decode(HAND_OFF, TensorSource::Inline(latent.meta))), payload as u64));
    for _ in 0..payload {
        raw.bytes_with(&[0], eight()).unwrap();
    }
    assert!(matches!(raw.reply().outcome, Outcome::InlineTensor { .. }));
    assert!(scene.footprint().descriptors <= before.descriptors, "{:?} after {before:?}", scene.footprint());
    raw.close();
    scene.check_bystander();
}

#[test]
fn a_reader_that_closed_its_half_ends_its_own_session_only() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let mut raw = Raw::inline(&scene.place.socket());
    raw.send(&ClientMessage::Goodbye);
    assert!(matches!(raw.receive(), Err(TransportError::Closed)));
    eventually("the end of the session", || scene.footprint().is_back_to(&before));
    assert_eq!(scene.bystander.status().unwrap().sessions_lost, 0, "a goodbye is no loss");
}

#[cfg(feature = "torch")]
#[test]
fn a_request_id_that_is_still_in_flight_ends_the_session() {
    let scene = Scene::new(&[]);
    let model = scene.place.file("tiny.safetensors");
    crate::tiny::write(&model, 64);
    let work = crate::tiny::Batch::endless();
    let operation = decode(&model.to_string_lossy(), TensorSource::Inline(work.meta));
    let mut raw = Raw::inline(&scene.place.socket());
    raw.bytes(&frame(&request(5, operation), work.bytes.len() as u64));
    raw.bytes(&work.bytes);
    raw.send(&request(5, Operation::Ping));
    Expected::new(PROTOCOL, &["request id 5", "in flight"]).check("a duplicate id", &raw.refusal());
    eventually("the end of the job of the ended session", || !scene.bystander.status().unwrap().lanes[0].busy);
    scene.check_bystander();
}
