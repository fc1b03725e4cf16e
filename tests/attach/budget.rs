//! Bytes for weights that do not suffice for everything.

use luna_broker::ErrorKind;
use luna_broker::client::AttachOptions;
use luna_broker::tensor::{CastRule, DType};

use crate::file::{counted, first, publish};
use crate::obey::holder;
use crate::scene::Scene;
use crate::support::{client_at, eventually};

/// Elements of one tensor of 256 KiB.
const LENGTH: usize = 64 << 10;

/// Names of the sets there are.
fn files(scene: &Scene) -> Vec<String> {
    let name = |path: String| path.rsplit('/').next().unwrap().to_owned();
    scene.bystander.status().unwrap().weights.into_iter().map(|set| name(set.path)).collect()
}

#[test]
fn sets_that_nobody_holds_give_way_the_longest_unused_first() {
    // Three sets.
    let scene = Scene::new(&["--weight-bytes", "780K"]);
    let paths: Vec<_> = ["a", "b", "c", "d"]
        .into_iter()
        .zip(0u8..)
        .map(|(name, at)| {
            let path = scene.place.file(name);
            crate::file::write_counted(&path, 1, LENGTH, f32::from(at));
            path.to_str().unwrap().to_owned()
        })
        .collect();
    let client = client_at(&scene.place);
    for path in &paths[..3] {
        drop(client.attach(path).unwrap());
    }
    let used_again = client.attach(&paths[0]).unwrap();
    drop(used_again);
    let idle = || scene.bystander.status().unwrap().weights.iter().all(|set| set.holders.is_empty());
    eventually("giving back", idle);
    let fourth = client.attach(&paths[3]).unwrap();
    assert_eq!(files(&scene), ["a", "c", "d"], "b was unused for longest");
    // A second copy of what is there takes no room.
    let again = client.attach(&paths[2]).unwrap();
    assert_eq!((first(&fourth, "t0"), first(&again, "t0")), (3.0, 2.0));
    scene.check_bystander();
}

#[test]
fn sets_that_are_held_stay_and_the_error_says_who_holds_them() {
    let scene = Scene::new(&["--weight-bytes", "600K"]);
    let one = counted(&scene.place, "one.safetensors", 1, LENGTH);
    let two = counted(&scene.place, "two.safetensors", 1, LENGTH + 16);
    let three = counted(&scene.place, "three.safetensors", 1, 2 * LENGTH);
    let mut worker = holder(&scene, "worker", one.to_str().unwrap());
    let session = scene.bystander.status().unwrap().weights[0].holders[0].session;
    let client = client_at(&scene.place);
    drop(client.attach(two.to_str().unwrap()).unwrap());
    let errors =
        [client.attach(three.to_str().unwrap()).unwrap_err(), publish(&client, "name", 9.0, 2 * LENGTH).unwrap_err()];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::OutOfMemory);
        assert!(
            error.message().contains("one.safetensors") && error.message().contains(&format!("session {session}")),
            "{error}"
        );
        assert!(error.remedy().contains("--weight-bytes"), "{}", error.remedy());
    }
    assert_eq!(files(&scene), ["one.safetensors", "two.safetensors"], "nothing gave way to what does not fit anyway");
    let rule = CastRule::all(DType::F16);
    let half =
        client.attach_with(three.to_str().unwrap(), &AttachOptions { rule, ..AttachOptions::default() }).unwrap();
    assert_eq!(half.len(), 1, "the smaller element type fits");
    drop(half);
    assert_eq!((worker.ask("first t0"), worker.ask("check")), ("0".to_owned(), "done".to_owned()));
    worker.ask("drop");
    eventually("room for the largest", || client.attach(three.to_str().unwrap()).is_ok());
    scene.check_bystander();
}

#[test]
fn what_a_session_may_attach_has_a_bound() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 16);
    let path = path.to_str().unwrap();
    let (mut raw, _memory) = crate::raw::Raw::shared(&scene.place.socket());
    let request = luna_broker::protocol::AttachRequest {
        name: path.to_owned(),
        rule: CastRule::stored(),
        gpu: None,
        replaces: None,
    };
    let mut count = 0;
    let fault = loop {
        match raw.ask(luna_broker::protocol::Operation::Attach(request.clone()), &[]) {
            luna_broker::protocol::Outcome::Attached(_) => drop(raw.take_fd()),
            luna_broker::protocol::Outcome::Fault(fault) => break fault,
            other => panic!("{other:?}"),
        }
        count += 1;
        assert!(count < 100_000);
    };
    assert_eq!(fault.kind, ErrorKind::Busy, "{fault}");
    drop(client_at(&scene.place).attach(path).unwrap());
    scene.check_bystander();
}

#[test]
fn a_file_that_holds_the_same_as_before_needs_no_room_of_its_own() {
    // One set and a little.
    let scene = Scene::new(&["--weight-bytes", "300K"]);
    let path = counted(&scene.place, "model.safetensors", 1, LENGTH);
    let path = path.to_str().unwrap();
    let client = client_at(&scene.place);
    let held = client.attach(path).unwrap();
    // Written anew, and copied: other files with the same in them.
    crate::file::write_counted(path.as_ref(), 1, LENGTH, 0.0);
    let copy = scene.place.file("copy.safetensors");
    std::fs::copy(path, &copy).unwrap();
    for other in [path, copy.to_str().unwrap()] {
        assert_eq!(client.attach(other).unwrap().content(), held.content());
    }
    // What is as large and contains something else still finds no room.
    crate::file::write_counted(&copy, 1, LENGTH, 1.0);
    let error = client.attach(copy.to_str().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert_eq!(client.attach(path).unwrap().content(), held.content());
    scene.check_bystander();
}
