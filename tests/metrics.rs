//! What monitoring is told: the rung in use and why, counts that only rise, and nothing that a client can name.
#![cfg(feature = "cli")]

mod support;

use std::process::Command;

use luna_broker::ErrorKind;
use luna_broker::protocol::Rung;
use support::{HAND_OFF, Latent, Place, broker_at, client_at, config, connect, eventually, sample};

/// The series that tells of a session on shared memory.
const SHM: &str = if cfg!(target_os = "linux") {
    r#"sessions{device="cpu",rung="shm",reason="sealed_memory_probed"}"#
} else {
    r#"sessions{device="cpu",rung="shm",reason="named_segment_probed"}"#
};

#[test]
fn each_session_is_counted_by_its_rung_and_the_reason_for_it() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let latent = Latent::new(8, 8, 1.0);
    let image = client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
    let inline = connect(&place, |config| config.rung = Some(Rung::Inline));
    let metrics = client.metrics().unwrap();
    let forced = r#"sessions{device="cpu",rung="inline",reason="forced"}"#;
    assert_eq!((sample(&metrics, SHM), sample(&metrics, forced)), (Some(1.0), Some(1.0)), "{metrics}");
    assert_eq!(sample(&metrics, "leases"), Some(1.0));
    assert!(sample(&metrics, "leased_bytes") >= Some(image.meta().size_bytes().unwrap() as f64));
    assert!(sample(&metrics, r#"arena_bytes{device="cpu"}"#) >= sample(&metrics, "leased_bytes"));
    drop(inline);
    eventually("the end of its series", || sample(&client.metrics().unwrap(), forced).is_none());
}

#[test]
fn counts_rise_with_what_they_count() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let client = client_at(&place);
    let count = |name: &str| sample(&broker.metrics(), name).unwrap();
    let before = ["requests_total", "faults_total", "refused_connections_total", "lost_sessions_total"].map(count);
    assert_eq!(before, [0.0; 4]);
    assert_eq!(client.vae("no-such-model").unwrap_err().kind(), ErrorKind::ModelNotFound);
    assert_eq!((count("requests_total"), count("faults_total")), (1.0, 1.0));
    let refused = luna_broker::client::Client::connect_with(
        Some(&place.socket()),
        luna_broker::config::ClientConfig { rung: Some(Rung::Local), ..Default::default() },
    );
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Refused);
    eventually("the count of refused connections", || count("refused_connections_total") == 1.0);
    client.load(HAND_OFF).unwrap();
    let lane = |name: &str| count(&format!(r#"{name}{{service="vae",device="cpu"}}"#));
    eventually("the end of the load", || lane("lane_completed_total") == 1.0);
    assert_eq!((lane("models_loaded"), lane("lane_queued"), lane("lane_busy")), (1.0, 0.0, 0.0));
}

#[test]
fn a_client_cannot_add_words_of_its_own() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let one = connect(&place, |config| config.name = "mine\"} 1\nluna_broker_leases 7".to_owned());
    _ = one.vae("mine").unwrap_err();
    let metrics = broker.metrics();
    assert!(!metrics.contains("mine") && sample(&metrics, "leases") == Some(0.0), "{metrics}");
}

#[test]
fn the_command_line_prints_them_for_a_file_that_is_collected() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_luna-broker"));
        command.args(["status", "--metrics", "--socket", &place.socket()]).args(arguments).output().unwrap()
    };
    let printed = command(&[]);
    let text = String::from_utf8(printed.stdout).unwrap();
    assert!(printed.status.success() && text.ends_with("# EOF\n"), "{text}");
    assert_eq!(sample(&text, SHM), Some(1.0), "{text}");
    assert_eq!(command(&["--json"]).status.code(), Some(2), "one form at a time");
}
