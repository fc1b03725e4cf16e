//! A client dies; what it held comes back, and nobody else notices.

use std::time::{Duration, Instant};

use crate::Scene;
use crate::process::{ClientProcess, Footprint};
use crate::raw::Raw;
use crate::support::eventually;

/// The time in which a dead client's leases must be back.
const REAPED: Duration = Duration::from_secs(1);

/// Kills the client and checks that its session, and `done`, are gone in time.
fn kill_and_check(scene: &Scene, victim: &mut ClientProcess, what: &str, mut done: impl FnMut() -> bool) {
    let killed = Instant::now();
    victim.kill();
    eventually(what, || {
        let status = scene.bystander.status().unwrap();
        status.sessions.len() == 1 && done()
    });
    let took = killed.elapsed();
    eprintln!("{what}: {took:?} after the kill");
    assert!(took < REAPED, "{what} took {took:?}");
    let session = &scene.bystander.status().unwrap().sessions[0];
    assert_eq!(session.name, scene.bystander.session().name);
    scene.check_bystander();
}

/// A client that never became a session dies, having got as far as `command` takes it.
fn killed_before_the_session(command: &str) {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let mut victim = ClientProcess::start(&scene.place.socket());
    assert_eq!(victim.ask(command), "done");
    eventually("the broker's hold on the new connection", || {
        let now = scene.footprint();
        now.threads > before.threads && now.descriptors > before.descriptors
    });
    kill_and_check(&scene, &mut victim, "the end of what was no session yet", || {
        scene.bystander.status().unwrap().refused == 1 && scene.footprint().is_back_to(&before)
    });
}

/// A client with a session dies, having got as far as `commands` take it.
fn killed_in_session(commands: &[&str], leases: u64) {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let mut victim = ClientProcess::start(&scene.place.socket());
    for command in commands {
        assert_eq!(victim.ask(command), "done");
    }
    let status = scene.bystander.status().unwrap();
    let session = status.sessions.iter().find(|session| session.name == "victim").expect("the victim has a session");
    assert_eq!(session.leases, leases);
    assert!(scene.footprint().arenas > before.arenas);
    kill_and_check(&scene, &mut victim, "the end of the session and its memory", || {
        scene.bystander.status().unwrap().sessions_lost == 1 && scene.footprint().is_back_to(&before)
    });
}

#[test]
fn a_client_killed_before_its_hello_leaves_nothing() {
    killed_before_the_session("socket");
}

#[test]
fn a_client_killed_before_its_probe_answer_leaves_nothing() {
    killed_before_the_session("hello");
}

#[test]
fn a_client_killed_after_negotiation_leaves_nothing() {
    killed_in_session(&["connect"], 0);
}

#[test]
fn a_killed_clients_leases_are_back_within_a_second() {
    killed_in_session(&["connect", "hold 3"], 3);
}

#[cfg(feature = "torch")]
mod at_work {
    use super::*;
    use crate::support::{HAND_OFF, client_at};
    use crate::tiny::{self, Batch, digest};

    /// A scene with a model of that width; the lane has run once, so that its threads exist.
    fn scene_at_work(width: usize) -> (Scene, String, u64) {
        let scene = Scene::new(&[]);
        let model = scene.place.file("tiny.safetensors");
        tiny::write(&model, width);
        let model = model.to_string_lossy().into_owned();
        let result = scene.bystander.vae(&model).unwrap().decode(Batch::new(2, 8, 3).input()).unwrap();
        let expected = digest(result.bytes().unwrap());
        (scene, model, expected)
    }

    fn lane_is(scene: &Scene, what: &str, busy: bool, queued: u64) {
        eventually(what, || {
            let lane = &scene.bystander.status().unwrap().lanes[0];
            lane.busy == busy && lane.queued == queued
        });
    }

    fn check_model(scene: &Scene, model: &str, expected: u64) {
        let result = scene.bystander.vae(model).unwrap().decode(Batch::new(2, 8, 3).input()).unwrap();
        assert_eq!(digest(result.bytes().unwrap()), expected);
    }

    #[test]
    fn a_client_killed_while_its_job_runs_gives_back_its_leases_at_once_and_the_lane_soon() {
        let (scene, model, expected) = scene_at_work(64);
        let before = scene.footprint();
        let mut victim = ClientProcess::start(&scene.place.socket());
        victim.ask("connect");
        victim.tell(&format!("endless {model}"));
        lane_is(&scene, "the start of the victim's job", true, 0);
        kill_and_check(&scene, &mut victim, "the end of the session", || true);
        lane_is(&scene, "the end of a job nobody waits for", false, 0);
        check_model(&scene, &model, expected);
        eventually("the unmapping of the memory the job held", || scene.footprint().is_back_to(&before));
    }

    #[test]
    fn a_client_killed_while_its_job_waits_takes_the_job_with_it_and_others_keep_their_place() {
        let (scene, model, expected) = scene_at_work(64);
        let before = scene.footprint();
        let mut runner = ClientProcess::start(&scene.place.socket());
        runner.ask("connect");
        runner.tell(&format!("endless {model}"));
        lane_is(&scene, "the start of the first job", true, 0);
        let mut victim = ClientProcess::start(&scene.place.socket());
        victim.ask("connect");
        victim.tell(&format!("endless {model}"));
        lane_is(&scene, "the queueing of the victim's job", true, 1);
        let completed = scene.bystander.status().unwrap().lanes[0].completed;
        let other = client_at(&scene.place);
        std::thread::scope(|scope| {
            let waiting = scope.spawn({
                let (other, model) = (&other, &model);
                move || digest(other.vae(model).unwrap().decode(Batch::new(2, 8, 3).input()).unwrap().bytes().unwrap())
            });
            lane_is(&scene, "the queueing of the third job", true, 2);
            let killed = Instant::now();
            victim.kill();
            lane_is(&scene, "the removal of the victim's job", true, 1);
            let took = killed.elapsed();
            assert!(took < REAPED, "the removal took {took:?}");
            // Nothing ran meanwhile: the victim's job was taken out of the queue, not run.
            assert_eq!(scene.bystander.status().unwrap().lanes[0].completed, completed);
            runner.kill();
            assert_eq!(waiting.join().unwrap(), expected, "the job behind them gets its own result");
        });
        drop(other);
        eventually("the end of all other sessions", || scene.bystander.status().unwrap().sessions.len() == 1);
        assert_eq!(scene.bystander.status().unwrap().lanes[0].completed, completed + 2);
        check_model(&scene, &model, expected);
        eventually("the unmapping of the dead clients' memory", || scene.footprint().is_back_to(&before));
    }

    #[test]
    fn eight_clients_at_once_get_bit_for_bit_what_one_gets_alone() {
        let (scene, model, _) = scene_at_work(16);
        let alone = scene.bystander.vae(&model).unwrap();
        let batch = |seed: u64| Batch::new(1 + seed % 2, 8 + 2 * (seed % 3), seed);
        let expected: Vec<u64> =
            (0..8).map(|seed| digest(alone.decode(batch(seed).input()).unwrap().bytes().unwrap())).collect();
        assert!(expected.iter().all(|one| expected.iter().filter(|other| *other == one).count() == 1));
        std::thread::scope(|scope| {
            for client in 0..8u64 {
                let (scene, model, expected) = (&scene, &model, &expected);
                scope.spawn(move || {
                    let own = client_at(&scene.place);
                    let (vae, nothing) = (own.vae(model).unwrap(), own.vae(HAND_OFF).unwrap());
                    for round in 0..8 {
                        let seed = (client + round) % 8;
                        let image = vae.decode(batch(seed).input()).unwrap();
                        let marks = crate::support::Latent::new(8, 8, (client * 1000 + round) as f32);
                        marks.check(&nothing.decode(marks.input()).unwrap()).unwrap();
                        assert_eq!(digest(image.bytes().unwrap()), expected[seed as usize], "client {client}, {round}");
                    }
                });
            }
        });
    }
}

#[test]
fn shared_memory_cannot_be_truncated_by_the_client_it_was_handed_to() {
    let scene = Scene::new(&[]);
    let (mut raw, welcome, fd) = Raw::welcomed(&scene.place.socket());
    for length in [0, 4096, 1 << 40] {
        assert_eq!(rustix::fs::ftruncate(&fd, length), Err(rustix::io::Errno::PERM), "to {length} bytes");
    }
    assert_eq!(
        rustix::fs::fallocate(&fd, rustix::fs::FallocateFlags::KEEP_SIZE, 1 << 40, 4096),
        Err(rustix::io::Errno::PERM)
    );
    // Punching a hole is a write of zeros, which the client may do to its own memory: the broker reads zeros.
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&fd, punch, 0, welcome.probe.unwrap().arena.size_bytes).unwrap();
    let outcome = luna_broker::protocol::ProbeOutcome::Failed("truncated".to_owned());
    let answer = luna_broker::protocol::ProbeAnswer { outcome };
    raw.send(&luna_broker::protocol::ClientMessage::Probed(answer));
    raw.receive().expect("the session goes on without shared memory");
    scene.check_bystander();
}

#[test]
fn a_client_that_does_not_read_is_not_listened_to_and_delays_nobody() {
    use luna_broker::protocol::Operation;
    use luna_broker::transport::Wait;

    /// Their answers fill every socket buffer many times over.
    const REQUESTS: u64 = 100_000;
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let raw = Raw::inline(&scene.place.socket());
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let send =
                |id| raw.try_bytes(&crate::raw::frame(&crate::raw::request(id, Operation::Status), 0), Wait::Block);
            (0..REQUESTS).position(|id| send(id).is_err())
        });
        while !flood.is_finished() {
            scene.check_bystander();
        }
        let sent = flood.join().unwrap().expect("the broker stops taking requests whose answers nobody takes");
        eprintln!("{sent} requests were taken");
    });
    eventually("the end of a session that takes no replies", || scene.footprint().is_back_to(&before));
    scene.check_bystander();
}

#[test]
fn a_footprint_counts_what_a_connection_costs() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let raw = Raw::shared(&scene.place.socket());
    let with: Footprint = scene.footprint();
    assert!(with.arenas > before.arenas && with.descriptors > before.descriptors && with.threads > before.threads);
    drop(raw);
    eventually("the end of the session", || scene.footprint().is_back_to(&before));
}
