//! The broker dies or stops; clients hear of it and come back with it.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::obey::ride_out;
use crate::process::{BrokerProcess, ClientProcess};
use crate::support::{Place, client_at, eventually};

#[test]
fn every_call_during_a_brokers_death_and_return_ends_in_the_right_answer_or_a_typed_error() {
    let place = Place::new();
    let mut broker = BrokerProcess::start(&place.socket(), &[]);
    let mut other = ClientProcess::start(&place.socket());
    assert_eq!(other.ask("connect"), "done");
    let shared = client_at(&place);
    let healthy = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (place, shared, healthy) = (&place, &shared, &healthy);
            scope.spawn(move || {
                // Half of the threads share one client.
                let client = if thread < 3 { shared.clone() } else { client_at(place) };
                ride_out(&client, || _ = healthy.fetch_add(1, Ordering::Relaxed)).unwrap();
            });
        }
        assert_eq!(other.ask("storm"), "healthy");
        eventually("all clients at work", || healthy.load(Ordering::Relaxed) == 6);
        broker.kill();
        broker = BrokerProcess::start(&place.socket(), &[]);
    });
    assert_eq!(other.hear().as_deref(), Some("done"));
    let status = shared.status().unwrap();
    assert_eq!(status.pid, broker.pid());
}

#[test]
fn a_stopped_broker_ends_with_success_and_takes_its_socket_along() {
    let place = Place::new();
    let mut broker = BrokerProcess::start(&place.socket(), &[]);
    let client = client_at(&place);
    client.ping().unwrap();
    broker.terminate();
    assert!(broker.wait().success());
    assert!(!std::path::Path::new(&place.socket()).exists());
    assert_eq!(client.ping().unwrap_err().kind(), luna_broker::ErrorKind::ConnectionLost);
}

#[cfg(feature = "torch")]
mod at_work {
    use std::sync::mpsc::channel;

    use luna_broker::ErrorKind;
    use luna_broker::protocol::{ClientMessage, Operation, Outcome, TensorSource};

    use super::*;
    use crate::raw::{Raw, decode, frame, request};
    use crate::support::connect;
    use crate::tiny::{self, Batch, digest};

    #[test]
    fn a_stopping_broker_finishes_the_running_job_and_answers_the_waiting_ones_first() {
        let place = Place::new();
        let model = place.file("tiny.safetensors");
        tiny::write(&model, 64);
        let model = model.to_string_lossy().into_owned();
        let mut broker = BrokerProcess::start(&place.socket(), &[]);
        let watcher = client_at(&place);
        // Long enough that signal and refusals come while it runs.
        let work = Batch::new(10, 24, 1);
        let expected = digest(watcher.vae(&model).unwrap().decode(work.input()).unwrap().bytes().unwrap());
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            let lane_is = |busy: bool, queued: u64| {
                eventually("the lane's work", || {
                    let lane = &watcher.status().unwrap().lanes[0];
                    (lane.busy, lane.queued) == (busy, queued)
                });
            };
            for (name, queued) in [("running", 0), ("waiting", 1)] {
                let client = connect(&place, |_| {});
                let (tell, model, work) = (tell.clone(), &model, &work);
                scope.spawn(move || {
                    let result = client.vae(model).unwrap().decode(work.input());
                    tell.send((name, result.map(|image| digest(image.bytes().unwrap())))).unwrap();
                });
                lane_is(true, queued);
            }
            let mut raw = Raw::inline(&place.socket());
            let operation = decode(&model, TensorSource::Inline(work.meta));
            raw.bytes(&frame(&request(1, operation), work.bytes.len() as u64));
            raw.bytes(&work.bytes);
            lane_is(true, 2);
            broker.terminate();
            assert!(matches!(raw.receive(), Ok(luna_broker::protocol::ServerMessage::Closing)));
            match raw.reply().outcome {
                Outcome::Fault(fault) => {
                    assert_eq!(fault.kind, ErrorKind::ShuttingDown);
                    assert!(!fault.remedy.is_empty());
                }
                other => panic!("a fault was due, not {other:?}"),
            }
            // One that comes now is answered too, not left waiting.
            raw.send(&request(2, Operation::Load { service: None, model: model.clone() }));
            assert!(matches!(raw.reply().outcome, Outcome::Fault(fault) if fault.kind == ErrorKind::ShuttingDown));
            raw.send(&ClientMessage::Goodbye);
            let (first, refused) = told.recv().unwrap();
            assert_eq!(first, "waiting", "who waits is told before the running job is done");
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::ShuttingDown);
            let (_, finished) = told.recv().unwrap();
            assert_eq!(finished.unwrap(), expected);
        });
        assert!(broker.wait().success());
        assert!(!std::path::Path::new(&place.socket()).exists());
    }
}
