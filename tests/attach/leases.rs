//! Who holds what, and how it comes back.

use std::time::{Duration, Instant};

use luna_broker::id::RequestId;
use luna_broker::protocol::{AttachRequest, ClientMessage, Operation, WeightReport};
use luna_broker::tensor::CastRule;

use crate::file::counted;
use crate::obey::{holder, worker};
use crate::raw::{Raw, request};
use crate::scene::Scene;
use crate::support::{eventually, sample};

/// The time in which a dead client's hold must be gone.
const REAPED: Duration = Duration::from_secs(1);

/// The only set there is.
pub(crate) fn only(scene: &Scene) -> WeightReport {
    let mut sets = scene.bystander.status().unwrap().weights;
    assert_eq!(sets.len(), 1, "{sets:#?}");
    sets.remove(0)
}

/// Names of those that hold a set, with how many attachments each has.
pub(crate) fn holders(set: &WeightReport) -> Vec<(&str, u64)> {
    set.holders.iter().map(|holder| (holder.name.as_str(), holder.attachments)).collect()
}

#[test]
fn status_tells_who_holds_what_and_what_sharing_saves() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5000);
    let path = path.to_str().unwrap();
    let mut one = holder(&scene, "one", path);
    let _two = holder(&scene, "two", path);
    let three = scene.bystander.attach(path).unwrap();
    let four = scene.bystander.attach(path).unwrap();
    let set = only(&scene);
    assert_eq!(holders(&set), [(scene.bystander.session().name.as_str(), 2), ("one", 1), ("two", 1)]);
    assert_eq!(set.saved_bytes, 2 * set.bytes, "two of three sessions need no copy of their own");
    assert!(set.holders.iter().all(|holder| holder.diverged_bytes == Some(0)), "{set:#?}");
    let metrics = scene.bystander.metrics().unwrap();
    let cpu = |name: &str| sample(&metrics, &format!(r#"{name}{{device="cpu"}}"#)).unwrap();
    assert_eq!((cpu("weight_sets"), cpu("weight_holders")), (1.0, 3.0), "{metrics}");
    assert_eq!((cpu("weights_bytes"), cpu("weights_saved_bytes")), (set.bytes as f64, 2.0 * set.bytes as f64));
    drop(three);
    // A clone and a tensor of it hold it as well.
    let (clone, tensor) = (four.clone(), four.tensor("t2").unwrap());
    drop(four);
    eventually("one of the attachments is given back", || only(&scene).holders[0].attachments == 1);
    drop(clone);
    assert_eq!(one.ask("drop"), "done");
    eventually("the worker's hold is given back", || only(&scene).holders.len() == 2);
    assert_eq!(tensor.values::<f32>().unwrap()[4999], 2000.0 + 4999.0);
    drop(tensor);
    eventually("the last view is given back", || holders(&only(&scene)) == [("two", 1)]);
    scene.check_bystander();
}

#[test]
fn a_killed_workers_hold_is_gone_within_a_second_and_others_keep_theirs() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5000);
    let path = path.to_str().unwrap();
    let before = scene.footprint();
    let mut one = holder(&scene, "one", path);
    let mut two = holder(&scene, "two", path);
    assert_eq!(holders(&only(&scene)), [("one", 1), ("two", 1)]);
    scene.check_bystander();
    let killed = Instant::now();
    one.kill();
    eventually("the dead worker's hold is gone", || holders(&only(&scene)) == [("two", 1)]);
    let took = killed.elapsed();
    assert!(took < REAPED, "{took:?}");
    assert_eq!(two.ask("first t1"), "1000");
    assert_eq!(two.ask("check"), "done");
    two.kill();
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    scene.bystander.unload(path).unwrap();
    eventually("all memory is back", || scene.footprint().is_back_to(&before));
    scene.check_bystander();
}

#[test]
fn a_session_that_ends_gives_back_and_its_tensors_stay_readable() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let path = path.to_str().unwrap();
    let mut one = holder(&scene, "one", path);
    for command in ["keep t1", "drop", "leave"] {
        assert_eq!(one.ask(command), "done");
    }
    assert_eq!(holders(&only(&scene)), [("one", 1)], "a tensor keeps the session that it is held by");
    assert_eq!(one.ask("kept"), "1000");
    one.ask("forget");
    eventually("the end of the session with its last tensor", || scene.bystander.status().unwrap().sessions.len() == 1);

    let mut two = holder(&scene, "two", path);
    for command in ["keep t1", "drop", "close"] {
        assert_eq!(two.ask(command), "done");
    }
    eventually("a closed client's hold is gone", || only(&scene).holders.is_empty());
    assert_eq!(two.ask("kept"), "1000");
    scene.check_bystander();
}

#[test]
fn a_tensor_outlives_the_broker() {
    let mut scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let mut one = worker(&scene, "one");
    assert_eq!(one.ask(&format!("attach {}", path.display())), "done");
    one.ask("keep t1");
    scene.broker.terminate();
    assert!(scene.broker.wait().success());
    assert_eq!(one.ask("drop"), "done");
    assert_eq!(one.ask("leave"), "done");
    assert_eq!(one.ask("kept"), "1000");
    assert_eq!(one.ask("mapped").split(',').count(), 1);
    one.ask("forget");
    assert_eq!(one.ask("mapped"), "", "unmapped with the last tensor");
}

#[test]
fn weights_that_crossed_a_cancellation_are_held_by_nobody() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 16);
    let name = path.to_str().unwrap().to_owned();
    let (raw, _memory) = Raw::shared(&scene.place.socket());
    // The answer stays unread, as with a client that has just given up and says no more.
    let attach = AttachRequest { name, rule: CastRule::stored(), gpu: None, replaces: None };
    raw.send(&request(5, Operation::Attach(attach)));
    let is_held = || scene.bystander.status().unwrap().weights.iter().any(|set| !set.holders.is_empty());
    eventually("the hold", is_held);
    raw.send(&ClientMessage::Cancel { id: RequestId(5) });
    eventually("its end", || !is_held());
    scene.check_bystander();
}
