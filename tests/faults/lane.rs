//! The lane is crowded; whoever cannot be served is told, and whoever leaves makes room.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use luna_broker::client::{CallOptions, Client};
use luna_broker::id::RequestId;
use luna_broker::protocol::{ClientMessage, LaneReport, Outcome, Reply, Request, TensorSource};
use luna_broker::{Error, ErrorKind};

use crate::Scene;
use crate::raw::{DECODE, Raw, decode, frame, request};
use crate::support::{client_at, eventually};
use crate::tiny::{self, Batch};

struct Crowd {
    scene: Scene,
    model: String,
    work: Batch,
}

impl Crowd {
    fn new(arguments: &[&str]) -> Self {
        let scene = Scene::new(arguments);
        let model = scene.place.file("tiny.safetensors");
        tiny::write(&model, 64);
        let model = model.to_string_lossy().into_owned();
        scene.bystander.load(&model).unwrap();
        let crowd = Self { scene, model, work: Batch::endless() };
        // The load is answered a moment before the lane counts it as done.
        crowd.await_lane(false, 0);
        crowd
    }

    fn lane(&self) -> LaneReport {
        self.scene.bystander.status().unwrap().lanes.remove(0)
    }

    fn await_lane(&self, busy: bool, queued: u64) {
        eventually(&format!("a lane with busy = {busy} and {queued} waiting"), || {
            let lane = self.lane();
            lane.busy == busy && lane.queued == queued
        });
    }

    fn operation(&self) -> luna_broker::protocol::Operation {
        decode(&self.model, TensorSource::Inline(self.work.meta))
    }

    /// Sends an endless decode without waiting for its answer.
    fn occupy(&self, raw: &Raw, id: u64) {
        raw.bytes(&frame(&request(id, self.operation()), self.work.bytes.len() as u64));
        raw.bytes(&self.work.bytes);
    }

    fn decode(&self, client: &Client, options: &CallOptions<'_>) -> Result<(), Error> {
        client.vae(&self.model)?.call(DECODE, self.work.input(), options).map(|_| ())
    }

    /// The lane takes work again, and gives the right shape of answer.
    fn check_free(&self) {
        self.await_lane(false, 0);
        let image = self.scene.bystander.vae(&self.model).unwrap().decode(Batch::new(1, 8, 1).input()).unwrap();
        assert_eq!(image.meta().shape.as_slice(), [1, 64, 64, 3]);
        self.scene.check_bystander();
    }
}

fn fault(reply: Reply, id: u64) -> luna_broker::Fault {
    assert_eq!(reply.id, RequestId(id));
    match reply.outcome {
        Outcome::Fault(fault) => fault,
        other => panic!("a fault was due, not {other:?}"),
    }
}

#[test]
fn a_full_lane_refuses_at_once_as_busy() {
    let crowd = Crowd::new(&["--lane-capacity", "1"]);
    let mut raw = Raw::inline(&crowd.scene.place.socket());
    crowd.occupy(&raw, 1);
    crowd.await_lane(true, 0);
    crowd.occupy(&raw, 2);
    crowd.await_lane(true, 1);
    crowd.occupy(&raw, 3);
    let refused = fault(raw.reply(), 3);
    assert_eq!(refused.kind, ErrorKind::Busy);
    assert!(refused.message.contains("1 requests waiting") && refused.remedy.contains("--lane-capacity"), "{refused}");
    crowd.await_lane(true, 1);
    raw.close();
    crowd.check_free();
}

#[test]
fn a_session_with_too_many_requests_in_flight_is_refused_as_busy_and_others_are_not() {
    let crowd = Crowd::new(&["--session-in-flight", "2"]);
    let mut raw = Raw::inline(&crowd.scene.place.socket());
    crowd.occupy(&raw, 1);
    crowd.occupy(&raw, 2);
    crowd.await_lane(true, 1);
    crowd.occupy(&raw, 3);
    let refused = fault(raw.reply(), 3);
    assert_eq!(refused.kind, ErrorKind::Busy);
    assert!(refused.message.contains('2') && refused.remedy.contains("--session-in-flight"), "{refused}");
    let other = Raw::inline(&crowd.scene.place.socket());
    crowd.occupy(&other, 1);
    crowd.await_lane(true, 2);
    // An answered request makes room for one more.
    raw.send(&ClientMessage::Cancel { id: RequestId(2) });
    assert_eq!(fault(raw.reply(), 2).kind, ErrorKind::Cancelled);
    crowd.occupy(&raw, 4);
    crowd.await_lane(true, 2);
    raw.close();
    other.close();
    crowd.check_free();
}

#[test]
fn a_request_whose_time_passes_while_it_waits_is_not_run() {
    let crowd = Crowd::new(&[]);
    let runner = Raw::inline(&crowd.scene.place.socket());
    crowd.occupy(&runner, 1);
    crowd.await_lane(true, 0);
    let completed = crowd.lane().completed;
    // A client gives up by itself and takes the request back.
    let client = client_at(&crowd.scene.place);
    let options = CallOptions { timeout: Some(Duration::from_millis(50)), ..CallOptions::default() };
    let error = crowd.decode(&client, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(!error.remedy().is_empty());
    crowd.await_lane(true, 0);
    // A peer that does not is told when its turn comes.
    let mut raw = Raw::inline(&crowd.scene.place.socket());
    let (id, operation) = (RequestId(9), crowd.operation());
    let late = ClientMessage::Request(Request { id, timeout_ms: Some(1), releases: Vec::new(), operation });
    raw.bytes(&frame(&late, crowd.work.bytes.len() as u64));
    raw.bytes(&crowd.work.bytes);
    crowd.await_lane(true, 1);
    assert_eq!(crowd.lane().completed, completed);
    runner.close();
    let refused = fault(raw.reply(), 9);
    assert_eq!(refused.kind, ErrorKind::Timeout);
    assert!(refused.message.contains("not run") && !refused.remedy.is_empty(), "{refused}");
    crowd.await_lane(false, 0);
    assert_eq!(crowd.lane().completed, completed + 1, "only the job that ran is counted");
    crowd.check_free();
}

#[test]
fn a_cancelled_request_frees_the_lane_whether_it_waits_or_runs() {
    let crowd = Crowd::new(&[]);
    let completed = crowd.lane().completed;
    let stop = [AtomicBool::new(false), AtomicBool::new(false)];
    let outcome = |at: usize| {
        let client = client_at(&crowd.scene.place);
        let interrupted = || stop[at].load(Ordering::Relaxed);
        let options = CallOptions { interrupted: Some(&interrupted), ..CallOptions::default() };
        let error = crowd.decode(&client, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        // The session goes on; the slots of the request taken back are the broker's again once the job is off them.
        client.ping().unwrap();
        eventually("the return of the request's slots", || {
            let status = client.status().unwrap();
            let own = status.sessions.iter().find(|session| session.id == client.session().id).unwrap().clone();
            own.leases == 0
        });
    };
    std::thread::scope(|scope| {
        let running = scope.spawn(|| outcome(0));
        crowd.await_lane(true, 0);
        let waiting = scope.spawn(|| outcome(1));
        crowd.await_lane(true, 1);
        stop[1].store(true, Ordering::Relaxed);
        waiting.join().unwrap();
        crowd.await_lane(true, 0);
        assert_eq!(crowd.lane().completed, completed, "what waited was not run");
        stop[0].store(true, Ordering::Relaxed);
        running.join().unwrap();
    });
    crowd.await_lane(false, 0);
    assert_eq!(crowd.lane().completed, completed + 1);
    crowd.check_free();
}

#[test]
fn a_call_queued_behind_an_unload_leaves_one_copy_that_can_be_unloaded() {
    let crowd = Crowd::new(&[]);
    let stop = AtomicBool::new(false);
    let interrupted = || stop.load(Ordering::Relaxed);
    let small = Batch::new(1, 8, 1);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let client = client_at(&crowd.scene.place);
            crowd
                .decode(&client, &CallOptions { interrupted: Some(&interrupted), ..CallOptions::default() })
                .map(|_| ())
        });
        crowd.await_lane(true, 0);
        let unloading = scope.spawn(|| client_at(&crowd.scene.place).unload(&crowd.model));
        crowd.await_lane(true, 1);
        let queued = scope.spawn(|| client_at(&crowd.scene.place).vae(&crowd.model)?.decode(small.input()).map(|_| ()));
        crowd.await_lane(true, 2);
        stop.store(true, Ordering::Relaxed);
        assert!(running.join().unwrap().is_err());
        unloading.join().unwrap().unwrap();
        queued.join().unwrap().unwrap();
    });
    let loaded = || {
        let models = crowd.scene.bystander.status().unwrap().models;
        models.iter().filter(|model| model.path == crowd.model).map(|model| model.loaded).collect::<Vec<_>>()
    };
    assert_eq!(loaded(), [true], "the call loaded it again, and status knows");
    crowd.scene.bystander.unload(&crowd.model).unwrap();
    assert_eq!(loaded(), [false]);
}

/// A model of `scene`'s that nothing else uses.
fn another(crowd: &Crowd, name: &str) -> String {
    let path = crowd.scene.place.file(name);
    tiny::write(&path, 16);
    path.to_string_lossy().into_owned()
}

/// What `status` tells of the model at `path`: one entry per time it is listed.
fn listed(crowd: &Crowd, path: &str) -> Vec<bool> {
    let models = crowd.scene.bystander.status().unwrap().models;
    models.iter().filter(|model| model.path == path).map(|model| model.loaded).collect()
}

/// Runs `meanwhile` while two loads of `model` wait, the first and the second on either side of other work. Between the
/// loads `between` runs. What comes of them.
fn two_loads(
    crowd: &Crowd,
    model: &str,
    meanwhile: impl FnOnce(),
    between: impl FnOnce(),
) -> [Result<(), ErrorKind>; 2] {
    let load = || client_at(&crowd.scene.place).load(model).map(|_| ()).map_err(|error| error.kind());
    std::thread::scope(|scope| {
        let blockers = [(); 2].map(|()| Raw::inline(&crowd.scene.place.socket()));
        crowd.occupy(&blockers[0], 1);
        crowd.await_lane(true, 0);
        let first = scope.spawn(load);
        crowd.await_lane(true, 1);
        crowd.occupy(&blockers[1], 1);
        crowd.await_lane(true, 2);
        let second = scope.spawn(load);
        crowd.await_lane(true, 3);
        meanwhile();
        blockers[0].close();
        let first = first.join().unwrap();
        between();
        blockers[1].close();
        [first, second.join().unwrap()]
    })
}

#[test]
fn a_load_that_fails_in_passing_leaves_no_weights_that_cannot_be_unloaded() {
    let crowd = Crowd::new(&[]);
    let model = another(&crowd, "passing.safetensors");
    let away = crowd.scene.place.file("away");
    let back = || std::fs::rename(&away, &model).unwrap();
    let [first, second] = two_loads(&crowd, &model, || std::fs::rename(&model, &away).unwrap(), back);
    assert_eq!((first, second), (Err(ErrorKind::Stale), Ok(())));
    assert_eq!(listed(&crowd, &model), [true], "what is loaded is listed");
    crowd.scene.bystander.unload(&model).unwrap();
    assert_eq!(listed(&crowd, &model), [false]);
    // Given up while the second one waits, because somebody asked for it while it was not there.
    let between = || {
        assert_eq!(crowd.scene.bystander.vae(&model).unwrap_err().kind(), ErrorKind::ModelNotFound);
        back();
    };
    let [first, second] = two_loads(&crowd, &model, || std::fs::rename(&model, &away).unwrap(), between);
    assert_eq!((first, second), (Err(ErrorKind::Stale), Err(ErrorKind::Stale)));
    // The last one is answered a moment before its job lets go of the file.
    eventually("the end of weights that nobody could have unloaded", || {
        crowd.scene.broker.mappings_of("passing.safetensors") == 0
    });
    crowd.scene.bystander.load(&model).unwrap();
    assert_eq!(listed(&crowd, &model), [true]);
    crowd.check_free();
}

#[test]
fn a_model_that_is_waited_for_survives_a_flood_of_names() {
    let crowd = Crowd::new(&[]);
    let model = another(&crowd, "waited.safetensors");
    let flood = || {
        let client = client_at(&crowd.scene.place);
        for length in 1..2100 {
            client.vae(&format!("{}{}", "/".repeat(length), crowd.model)).unwrap();
        }
        crowd.scene.bystander.vae(&another(&crowd, "last.safetensors")).unwrap();
    };
    let [first, second] = two_loads(&crowd, &model, flood, || ());
    assert_eq!((first, second), (Ok(()), Ok(())));
    assert_eq!(listed(&crowd, &model), [true]);
    crowd.scene.bystander.unload(&model).unwrap();
    assert_eq!(listed(&crowd, &model), [false]);
    crowd.check_free();
}
