//! Peers that take their time: negotiation ends when its time is up, whatever they do.

use std::time::Duration;

use luna_broker::ErrorKind;
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::{ClientMessage, Features};
use luna_broker::transport::Wait;

use crate::Expected;
use crate::raw::{Raw, frame, hello};
use crate::support::{HAND_OFF, Latent, Place, broker_at, client_at, config, eventually};

const TIMED_OUT: Expected = Expected::new(ErrorKind::Timeout, &["within the time allowed"]);

fn impatient() -> BrokerConfig {
    BrokerConfig { negotiation_timeout: Duration::from_millis(100), ..config() }
}

#[test]
fn silence_at_any_point_of_the_negotiation_ends_it() {
    let place = Place::new();
    let broker = broker_at(&place, impatient());
    let client = client_at(&place);
    let hello_frame = frame(&ClientMessage::Hello(hello(Features::HANDLES)), 0);
    for length in [0, 1, 11, 12, hello_frame.len() - 1] {
        let mut raw = Raw::connect(&place.socket());
        raw.bytes(&hello_frame[..length]);
        TIMED_OUT.check(&format!("silence after {length} bytes"), &raw.refusal());
    }
    let (mut raw, ..) = Raw::welcomed(&place.socket());
    TIMED_OUT.check("silence instead of the probe's answer", &raw.refusal());
    // Bytes that are announced and never come do not stop the clock.
    let mut raw = Raw::connect(&place.socket());
    raw.bytes(&frame(&ClientMessage::Hello(hello(Features::HANDLES)), 1 << 20));
    TIMED_OUT.check("silence instead of a payload", &raw.refusal());
    eventually("the count of refused connections", || broker.status().refused == 7);
    // Once negotiated, a client may be silent as long as it likes.
    let latent = Latent::new(8, 8, 1.0);
    latent.check(&client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap()).unwrap();
}

#[test]
fn a_peer_that_drips_bytes_is_given_up_all_the_same() {
    let place = Place::new();
    let _broker = broker_at(&place, impatient());
    let mut raw = Raw::connect(&place.socket());
    // The header of a message of a mebibyte: at this pace it would take half an hour.
    raw.bytes(&[0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    eventually("the end of the broker's patience", || raw.try_bytes(&[0], Wait::Never).is_err());
    TIMED_OUT.check("a drip", &raw.refusal());
    client_at(&place).ping().unwrap();
}
