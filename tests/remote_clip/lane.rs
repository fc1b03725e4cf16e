use luna_broker::ErrorKind;
use luna_broker::broker::Broker;
use luna_broker::client::CallOptions;
use luna_broker::config::BrokerConfig;
use luna_broker::id::RequestId;
use luna_broker::protocol::{ClientMessage, ClipRequest, LaneReport, Operation, Outcome, SlotPlace};
use luna_broker::service::{AdapterStack, ClipInput, ClipKind, ClipOptions, ClipText, Service};
use std::time::Duration;

use crate::config;
use crate::golden::{Cases, TOLERANCE, difference, encoders, golden, numbers, path};
use crate::raw::{Raw, frame, request};
use crate::support::{Place, broker_at, client_at, eventually};

/// A prompt of as many chunks as are taken, which keeps the lane for a while.
fn heavy(folder: &std::path::Path) -> Operation {
    let text = ClipText { text: "word ".repeat(75 * 128), text_g: None };
    Operation::Clip(Box::new(ClipRequest {
        models: vec![path(folder, "words.l"), path(folder, "words.g")],
        input: ClipInput::Text(text),
        options: ClipOptions::default(),
        adapters: AdapterStack::default(),
        result: SlotPlace::Host,
    }))
}

fn lane(broker: &Broker) -> LaneReport {
    let lanes = broker.status().lanes;
    lanes.into_iter().find(|lane| lane.service == Service::Clip).expect("a lane for text encoders")
}

#[test]
fn a_full_lane_refuses_what_it_has_no_room_for_and_runs_the_rest() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = broker_at(&place, BrokerConfig { lane_capacity: 1, ..config() });
    let mut raw = Raw::inline(&place.socket());
    assert!(matches!(raw.ask(heavy(&folder), &[]), Outcome::Encoded(_)), "loaded, and the vocabulary read");
    // While the session's thread is at the next prompts, the lane has at most one running and one waiting.
    let all: Vec<u64> = (1..=16).collect();
    for &id in &all {
        raw.bytes(&frame(&request(id, heavy(&folder)), 0));
    }
    let (mut done, mut busy) = (0, 0);
    for _ in &all {
        match raw.reply().outcome {
            Outcome::Encoded(_) => done += 1,
            Outcome::Fault(fault) => {
                assert_eq!(fault.kind, ErrorKind::Busy, "{fault}");
                assert!(fault.message.contains("clip lane"), "{fault}");
                busy += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    println!("{done} run, {busy} refused");
    assert!(done >= 1 && busy >= 1 && done + busy == all.len());
    assert!(matches!(raw.ask(heavy(&folder), &[]), Outcome::Encoded(_)), "there is room again");
    assert_eq!(lane(&broker).queued, 0);
}

#[test]
fn what_is_taken_back_or_comes_too_late_leaves_the_lane_to_others() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = broker_at(&place, config());
    let mut raw = Raw::inline(&place.socket());
    for id in 1..=3 {
        raw.bytes(&frame(&request(id, heavy(&folder)), 0));
    }
    for id in 1..=3 {
        raw.send(&ClientMessage::Cancel { id: RequestId(id) });
    }
    let outcomes: Vec<_> = (1..=3).map(|_| raw.reply().outcome).collect();
    let cancelled = outcomes
        .iter()
        .filter(|outcome| matches!(outcome, Outcome::Fault(fault) if fault.kind == ErrorKind::Cancelled));
    assert!(cancelled.count() >= 1, "{outcomes:?}");
    let clip = encoders(&client_at(&place), &folder, &["words.l"]);
    let text = ClipText { text: "word ".repeat(75 * 128), text_g: None };
    let options = CallOptions { timeout: Some(Duration::from_millis(1)), ..CallOptions::default() };
    let late = clip.encode_with(&text, ClipOptions::default(), &options).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
    assert!(clip.encode("a cat").is_ok());
    assert_eq!(lane(&broker).queued, 0);
}

#[test]
fn a_client_that_is_gone_in_the_middle_of_a_call_leaves_nothing() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = broker_at(&place, config());
    let bystander = client_at(&place);
    let (cases, clip) = (Cases::of(&folder, "clip_l"), encoders(&bystander, &folder, &["clip_l.float"]));
    let (raw, _) = Raw::shared(&place.socket());
    for id in 1..=8 {
        raw.bytes(&frame(&request(id, heavy(&folder)), 0));
    }
    eventually("the first call", || lane(&broker).busy);
    raw.close();
    eventually("the end of its session", || broker.status().sessions.len() == 1);
    eventually("the end of its calls", || !lane(&broker).busy && lane(&broker).queued == 0);
    let sessions = broker.status().sessions;
    assert_eq!((sessions.len(), sessions[0].leases), (1, 0));
    let got = numbers(&clip.encode_tokens(&[cases.prompt(ClipKind::L, "short")]).unwrap());
    assert!(difference(&got.cond, &cases.floats("short.cond")) <= TOLERANCE);
}
