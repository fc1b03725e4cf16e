//! Turns in a lane for work that workers do themselves.

use std::time::{Duration, Instant};

use luna_broker::ErrorKind;
use luna_broker::protocol::{ClientMessage, LaneReport, Operation, Outcome, SessionReport};
use luna_broker::service::Service;

use crate::obey::{is, worker};
use crate::raw::{Raw, frame, request};
use crate::scene::Scene;
use crate::support::{Latent, client_at, eventually, sample};

/// The do-nothing model that waits for its turn.
const QUEUED: &str = "builtin:hand-off-queued";

fn lane(scene: &Scene) -> LaneReport {
    scene.bystander.status().unwrap().lanes.remove(0)
}

fn waits(scene: &Scene, count: u64) {
    eventually(&format!("{count} wait"), || lane(scene).queued == count);
}

/// The name of the session that has the lane by a permit.
fn holder(scene: &Scene) -> Option<String> {
    let status = scene.bystander.status().unwrap();
    let is_it = |session: &&SessionReport| Some(session.id) == status.lanes[0].permitted;
    status.sessions.iter().find(is_it).map(|session| session.name.clone())
}

fn lane_is_free(scene: &Scene) {
    eventually("a lane that nobody has", || !lane(scene).busy && lane(scene).queued == 0);
    let permit = scene.bystander.permit(Service::Vae, 1, &scene.bystander.default_options()).unwrap();
    drop(permit);
    eventually("the end of that permit", || lane(scene).permitted.is_none());
    scene.check_bystander();
}

#[test]
fn permits_come_in_order_and_one_at_a_time_together_with_the_brokers_own_work() {
    let scene = Scene::new(&[]);
    let mut workers = ["one", "two", "three"].map(|name| worker(&scene, name));
    let [one, two, three] = &mut workers;
    assert_eq!(one.ask("permit 1000"), "done");
    assert_eq!(holder(&scene).as_deref(), Some("one"));
    two.tell("permit 1000");
    waits(&scene, 1);
    let client = client_at(&scene.place);
    std::thread::scope(|scope| {
        let decoding = scope.spawn(|| {
            let latent = Latent::new(8, 8, 3.0);
            latent.check(&client.vae(QUEUED).unwrap().decode(latent.input()).unwrap()).unwrap();
        });
        waits(&scene, 2);
        three.tell("permit 1000");
        waits(&scene, 3);
        // Others are not held up meanwhile.
        scene.check_bystander();
        one.ask("release");
        assert_eq!(two.hear().as_deref(), Some("done"));
        assert_eq!((holder(&scene).as_deref(), lane(&scene).queued), (Some("two"), 2));
        assert!(!decoding.is_finished(), "one at a time");
        two.ask("release");
        decoding.join().unwrap();
        assert_eq!(three.hear().as_deref(), Some("done"));
        assert_eq!(holder(&scene).as_deref(), Some("three"));
        three.ask("release");
    });
    lane_is_free(&scene);
    assert_eq!(holder(&scene), None);
}

#[test]
fn a_permit_ends_with_its_session_and_the_next_one_comes_within_a_second() {
    for end in ["close", "kill"] {
        let scene = Scene::new(&[]);
        let mut one = worker(&scene, "one");
        let mut two = worker(&scene, "two");
        assert_eq!(one.ask("permit 1000"), "done");
        two.tell("permit 1000");
        waits(&scene, 1);
        let ended = Instant::now();
        match end {
            "kill" => one.kill(),
            end => assert_eq!(one.ask(end), "done"),
        }
        assert_eq!(two.hear().as_deref(), Some("done"));
        let took = ended.elapsed();
        assert!(took < Duration::from_secs(1), "{end}: {took:?}");
        two.ask("release");
        lane_is_free(&scene);
    }
}

#[test]
fn who_waits_and_dies_or_gives_up_leaves_no_ghost() {
    let scene = Scene::new(&[]);
    let mut workers = ["one", "two", "three"].map(|name| worker(&scene, name));
    let [one, two, three] = &mut workers;
    assert_eq!(one.ask("permit 1000"), "done");
    two.tell("permit 1000");
    waits(&scene, 1);
    let answer = three.ask("hurry");
    assert!(is(&answer, ErrorKind::Timeout), "{answer}");
    waits(&scene, 1);
    two.kill();
    waits(&scene, 0);
    assert_eq!(holder(&scene).as_deref(), Some("one"));
    one.ask("release");
    lane_is_free(&scene);
}

#[test]
fn a_permit_that_crosses_its_cancellation_is_taken_back() {
    let scene = Scene::new(&[]);
    let raw = Raw::inline(&scene.place.socket());
    // The answer stays unread, as with a client that has just given up and says no more.
    raw.bytes(&frame(&request(5, Operation::Permit { service: Service::Vae, bytes: 1 }), 0));
    eventually("the permit", || lane(&scene).permitted.is_some());
    raw.send(&ClientMessage::Cancel { id: luna_broker::id::RequestId(5) });
    lane_is_free(&scene);
}

#[test]
fn a_permit_is_ended_by_its_own_session_alone() {
    let scene = Scene::new(&[]);
    let (mut one, mut two) = (Raw::inline(&scene.place.socket()), Raw::inline(&scene.place.socket()));
    let permit = Operation::Permit { service: Service::Vae, bytes: 1 };
    let Outcome::Permitted { permit } = one.ask(permit, &[]) else { panic!("a permit was due") };
    two.send(&ClientMessage::EndPermit { permit });
    assert_eq!(two.ask(Operation::Ping, &[]), Outcome::Done);
    assert!(lane(&scene).permitted.is_some());
    one.send(&ClientMessage::EndPermit { permit });
    lane_is_free(&scene);
}

#[test]
fn who_has_the_lane_does_not_wait_for_itself() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let options = client.default_options();
    let model = client.vae(QUEUED).unwrap();
    let permit = client.permit(Service::Vae, 1, &options).unwrap();
    let latent = Latent::new(8, 8, 3.0);
    let errors = [
        client.permit(Service::Vae, 1, &options).map(|_| ()).unwrap_err(),
        model.decode(latent.input()).map(|_| ()).unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.remedy().contains("permit"), "{}", error.remedy());
    }
    drop(permit);
    latent.check(&model.decode(latent.input()).unwrap()).unwrap();
    lane_is_free(&scene);
}

#[test]
fn a_permit_that_is_kept_too_long_lets_the_lane_go_on() {
    let scene = Scene::new(&["--permit-seconds", "1"]);
    let (mut one, mut two) = (worker(&scene, "one"), worker(&scene, "two"));
    assert_eq!(one.ask("permit 1000"), "done");
    assert_eq!(two.ask("permit 1000"), "done");
    assert_eq!(holder(&scene).as_deref(), Some("two"));
    assert_eq!(one.ask("release"), "done", "late, which harms nobody");
    assert_eq!(holder(&scene).as_deref(), Some("two"));
    assert_eq!(sample(&scene.bystander.metrics().unwrap(), "expired_permits_total"), Some(1.0));
    two.ask("release");
    lane_is_free(&scene);
}

#[test]
fn more_working_memory_than_one_call_may_use_is_refused() {
    let scene = Scene::new(&[]);
    let mut one = worker(&scene, "one");
    let answer = one.ask(&format!("permit {}", u64::MAX));
    assert!(is(&answer, ErrorKind::OutOfMemory) && answer.contains("tiles"), "{answer}");
    lane_is_free(&scene);
}

#[test]
fn a_broker_that_stops_waits_for_no_permit() {
    let mut scene = Scene::new(&[]);
    let (mut one, mut two) = (worker(&scene, "one"), worker(&scene, "two"));
    assert_eq!(one.ask("permit 1000"), "done");
    two.tell("permit 1000");
    waits(&scene, 1);
    scene.check_bystander();
    let stopping = Instant::now();
    scene.broker.terminate();
    assert!(scene.broker.wait().success());
    assert!(stopping.elapsed() < Duration::from_secs(10), "{:?}", stopping.elapsed());
    let answer = two.hear().unwrap();
    assert!(is(&answer, ErrorKind::ShuttingDown) || is(&answer, ErrorKind::ConnectionLost), "{answer}");
    assert_eq!(one.ask("release"), "done");
}
