//! What only Windows does, and the real binary as a process of its own there. `run.sh` beside this file runs it under
//! wine.
#![cfg(all(windows, feature = "cli"))]

#[path = "../support/mod.rs"]
mod support;

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use luna_broker::ErrorKind;
use luna_broker::client::Client;
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::{Reason, Rung};
use luna_broker::transport::{Connection, LocalConnection};
use support::{HAND_OFF, Latent, Place, broker_at, client_at, config, connect, eventually};

/// Less than any orderly end waits for somebody who does not answer.
const AT_ONCE: Duration = Duration::from_millis(1500);

/// A command of the binary; killed when dropped.
struct Process(Child);

impl Process {
    fn spawn(place: &Place, arguments: &[&str], stderr: Stdio) -> Self {
        let child = command(place, arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr).spawn();
        Self(child.expect("the binary starts"))
    }

    /// A broker that serves.
    fn broker(place: &Place) -> Self {
        let mut broker = Self::spawn(place, &["serve", "--bench-models"], Stdio::piped());
        let mut said = BufReader::new(broker.0.stderr.take().expect("standard error is a pipe"));
        let mut line = String::new();
        while !line.contains("is serving at") {
            line.clear();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "the broker ended instead of serving");
        }
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        broker
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already where the test ended it.
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn command(place: &Place, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_luna-broker"));
    command.args(arguments).args(["--socket", &place.socket()]).env_remove("LUNA_BROKER_LOG");
    command
}

fn output(place: &Place, arguments: &[&str]) -> Output {
    command(place, arguments).output().expect("the binary starts")
}

fn decode(client: &Client, start: f32) {
    let latent = Latent::new(64, 96, start);
    latent.check(&client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap()).unwrap();
}

#[test]
fn a_client_uses_a_broker_of_another_process_over_named_segments_and_in_frames() {
    let place = Place::new();
    let broker = Process::broker(&place);
    let shared = client_at(&place);
    let inline = connect(&place, |config| config.rung = Some(Rung::Inline));
    for (client, rung, reason) in
        [(&shared, Rung::Shm, Reason::NamedSegmentProbed), (&inline, Rung::Inline, Reason::Forced)]
    {
        let rungs = client.session().rungs;
        assert_eq!((rungs[0].rung, &rungs[0].reason), (rung, &reason));
        for round in 0..20 {
            decode(client, round as f32 * 1000.0);
        }
    }
    let status = shared.status().unwrap();
    assert_eq!(status.pid, broker.0.id());
    assert_eq!(status.sessions.iter().map(|session| session.pid).collect::<Vec<_>>(), [Some(std::process::id()); 2]);
}

#[test]
fn bench_and_status_reach_the_broker_and_say_when_there_is_none() {
    let place = Place::new();
    let none = output(&place, &["status"]);
    assert_eq!(none.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&none.stderr).contains(&place.socket()));
    let broker = Process::broker(&place);
    let bench = output(&place, &["bench", "--json", "--iterations", "50", "--warm-up", "5", "--latent", "64x64"]);
    assert!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    let report: serde_json::Value = serde_json::from_slice(&bench.stdout).unwrap();
    assert_eq!(report["rung"], "shm");
    assert!(report["hand_off"][0]["p50_us"].as_f64().unwrap() > 0.0);
    println!("round trip p50 {} us, hand-off {}", report["control"]["p50_us"], report["hand_off"][0]);
    let status = output(&place, &["status", "--json"]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let report: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(report["pid"], broker.0.id());
    assert_eq!(report["sessions_lost"], 0, "the bench took its leave");
}

#[test]
fn a_second_broker_at_the_same_pipe_is_refused() {
    let place = Place::new();
    let _broker = Process::broker(&place);
    let second = output(&place, &["serve", "--bench-models"]);
    assert_eq!(second.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&second.stderr).contains("already serves"));
}

#[test]
fn a_killed_broker_is_noticed_and_its_successor_found() {
    let place = Place::new();
    let mut broker = Process::broker(&place);
    let client = client_at(&place);
    let latent = Latent::new(8, 8, 3.0);
    let image = client.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
    broker.kill();
    assert_eq!(client.ping().unwrap_err().kind(), ErrorKind::ConnectionLost);
    latent.check(&image).unwrap();
    let _successor = Process::broker(&place);
    decode(&client, 7.0);
}

#[test]
fn a_killed_client_leaves_no_session() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let mut client = Process::spawn(&place, &["bench", "--iterations", "1000000"], Stdio::null());
    eventually("the client's session", || broker.status().sessions.iter().any(|session| session.requests > 10));
    client.kill();
    eventually("the end of the client's session", || broker.status().sessions.is_empty());
    assert_eq!(broker.status().sessions_lost, 1);
}

#[test]
fn the_name_of_a_segment_is_gone_once_its_session_has_opened_it() {
    let folder = std::env::temp_dir().join("shared_memory-rs");
    let names = || {
        let files = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
        // A removed file has another name until its last user is gone.
        names.filter(|name| name.starts_with("luna-broker-") && !name.ends_with("_deleted")).collect::<HashSet<_>>()
    };
    let before = names();
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    // Answered after the message that says the segment is open.
    client.ping().unwrap();
    // Tests beside this one have segments too, with names for a moment.
    eventually("the removal of names", || names().is_subset(&before));
    decode(&client, 1.0);
}

#[test]
fn an_orderly_end_waits_for_no_idle_peer() {
    let place = Place::new();
    let broker = broker_at(&place, config());
    let clients = [client_at(&place), connect(&place, |config| config.rung = Some(Rung::Inline))];
    decode(&clients[0], 0.0);
    let began = Instant::now();
    broker.shut_down();
    assert!(broker.status().sessions.is_empty());
    assert!(began.elapsed() < AT_ONCE, "the broker took {:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(clients[0].ping().unwrap_err().kind(), ErrorKind::ConnectionLost);
    drop(clients);
    assert!(began.elapsed() < AT_ONCE, "the clients took {:?}", began.elapsed());
}

#[test]
fn a_connection_that_says_nothing_is_given_up() {
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { negotiation_timeout: Duration::from_millis(100), ..config() });
    let silent = LocalConnection::connect(&place.socket()).unwrap();
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        match silent.read(&mut buffer, None, Some(Duration::from_secs(10))).unwrap() {
            0 => break,
            count => received.extend_from_slice(&buffer[..count]),
        }
    }
    assert!(!received.is_empty(), "the reason comes before the end");
}
