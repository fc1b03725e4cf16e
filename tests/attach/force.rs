//! Weights that are taken away, and stray writes.

use luna_broker::ErrorKind;
use luna_broker::protocol::{Force, WeightState};

use crate::file::{counted, publish};
use crate::leases::{holders, only};
use crate::obey::{holder, is, worker};
use crate::scene::Scene;
use crate::support::{client_at, eventually};

#[test]
fn weights_in_use_are_not_unloaded_and_the_error_says_by_whom() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let path = path.to_str().unwrap();
    let mut one = holder(&scene, "one", path);
    let session = only(&scene).holders[0].session;
    let error = scene.bystander.unload(path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.message().contains(&format!("session {session}")), "{error}");
    assert_eq!(one.ask("check"), "done");
    one.ask("drop");
    eventually("an unload of what nobody holds", || scene.bystander.unload(path).is_ok());
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    assert_eq!(scene.bystander.unload("nobody-knows-it").unwrap_err().kind(), ErrorKind::ModelNotFound);
    scene.check_bystander();
}

#[test]
fn what_is_unloaded_by_force_stays_readable_and_stale_until_it_is_reattached_or_dropped() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 50_000);
    let path = path.to_str().unwrap();
    let alias = scene.place.file("alias.safetensors");
    std::os::unix::fs::symlink(path, &alias).unwrap();
    let (mut one, mut two) = (holder(&scene, "one", path), holder(&scene, "two", path));
    let mut three = worker(&scene, "three");
    let address = one.ask("address t1");
    let mapped = one.ask("mapped");
    scene.bystander.unload_with(path, Force::Yes).unwrap();
    let sets = scene.bystander.status().unwrap().weights;
    assert_eq!((sets.len(), sets[0].state), (1, WeightState::Revoked));
    for (worker, name) in [(&mut one, "one"), (&mut two, "two")] {
        assert_eq!(worker.ask("first t1"), "1000", "{name}");
        for command in
            ["check".to_owned(), "permit 1".to_owned(), format!("attach {path}"), format!("attach {}", alias.display())]
        {
            let answer = worker.ask(&command);
            assert!(is(&answer, ErrorKind::Stale), "{name}: {command}: {answer}");
        }
    }
    assert_eq!(three.ask(&format!("attach {path}")), "done", "others get it anew");
    assert_eq!(three.ask("check"), "done");
    let sets = scene.bystander.status().unwrap().weights;
    assert_eq!(sets.len(), 2);
    assert_eq!(holders(sets.iter().find(|set| set.state == WeightState::Ready).unwrap()), [("three", 1)]);

    assert_eq!(one.ask("reattach"), "done");
    assert_eq!((one.ask("address t1"), one.ask("first t1")), (address, "1000".to_owned()));
    assert_ne!(one.ask("mapped"), mapped, "the old memory is gone from this process");
    assert_eq!(one.ask("mapped"), three.ask("mapped"));
    assert_eq!(one.ask("check"), "done");
    assert_eq!(one.ask("permit 1"), "done");
    one.ask("release");

    assert_eq!(two.ask("drop"), "done");
    eventually("the taken set goes with its last holder", || scene.bystander.status().unwrap().weights.len() == 1);
    assert_eq!(two.ask(&format!("attach {path}")), "done");
    assert_eq!(holders(&only(&scene)), [("one", 1), ("two", 1), ("three", 1)]);
    scene.check_bystander();
}

#[test]
fn a_failed_reattach_changes_nothing() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let mut one = holder(&scene, "one", path.to_str().unwrap());
    let mapped = one.ask("mapped");
    scene.bystander.unload_with(path.to_str().unwrap(), Force::Yes).unwrap();
    crate::file::write_counted(&path, 2, 5000, 0.5);
    for _ in 0..2 {
        let answer = one.ask("reattach");
        assert!(is(&answer, ErrorKind::Stale), "{answer}");
        assert_eq!((one.ask("first t1"), one.ask("mapped")), ("1000".to_owned(), mapped.clone()));
        let answer = one.ask("check");
        assert!(is(&answer, ErrorKind::Stale), "what it holds was taken from it all the same: {answer}");
    }
    eventually("the hold on the other weights is given back", || {
        let sets = scene.bystander.status().unwrap().weights;
        sets.iter().all(|set| (set.state == WeightState::Revoked) == (holders(set) == [("one", 1)]))
    });
    std::fs::remove_file(&path).unwrap();
    let answer = one.ask("reattach");
    assert!(is(&answer, ErrorKind::ModelNotFound) || is(&answer, ErrorKind::Io), "{answer}");
    assert!(is(&one.ask("check"), ErrorKind::Stale));
    scene.check_bystander();
}

#[test]
fn what_a_worker_writes_is_its_own_and_status_tells() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 50_000);
    let path = path.to_str().unwrap();
    let (mut one, mut two) = (holder(&scene, "one", path), holder(&scene, "two", path));
    // Reading makes no page anybody's own.
    assert_eq!((one.ask("first t1"), two.ask("first t1")), ("1000".to_owned(), "1000".to_owned()));
    assert!(only(&scene).holders.iter().all(|holder| holder.diverged_bytes == Some(0)));
    assert_eq!(one.ask("write t1 7"), "done");
    assert_eq!((one.ask("first t1"), two.ask("first t1")), ("7".to_owned(), "1000".to_owned()));
    let mine = scene.bystander.attach(path).unwrap();
    assert_eq!(crate::file::first(&mine, "t1"), 1000.0);
    let set = only(&scene);
    for holder in &set.holders {
        let diverged = holder.diverged_bytes.unwrap();
        assert_eq!(diverged > 0, holder.name == "one", "{}: {diverged}", holder.name);
        assert!(diverged <= 4096, "one page: {diverged}");
    }
    let reports = scene.bystander.verify(path).unwrap();
    assert_eq!((reports.len(), reports[0].found), (1, reports[0].expected));
    assert_eq!(one.ask("reattach"), "done", "puts it right");
    assert_eq!(one.ask("first t1"), "1000");
    assert!(only(&scene).holders.iter().all(|holder| holder.diverged_bytes == Some(0)));
    scene.check_bystander();
}

#[test]
fn weights_that_others_were_taken_beside_are_as_good_as_before() {
    let scene = Scene::new(&[]);
    let one = counted(&scene.place, "one.safetensors", 2, 5000);
    let two = counted(&scene.place, "two.safetensors", 2, 6000);
    let client = client_at(&scene.place);
    let (taken, kept) = (client.attach(one.to_str().unwrap()).unwrap(), client.attach(two.to_str().unwrap()).unwrap());
    scene.bystander.unload_with(one.to_str().unwrap(), Force::Yes).unwrap();
    kept.check().unwrap();
    assert_eq!(taken.check().unwrap_err().kind(), ErrorKind::Stale);
    taken.reattach().unwrap();
    taken.check().unwrap();
    scene.check_bystander();
}

#[test]
fn unloading_one_name_leaves_the_set_to_its_other_names() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    let path = path.to_str().unwrap();
    let client = client_at(&scene.place);
    for name in ["one", "two"] {
        drop(publish(&client, name, 0.0, 5000).unwrap());
    }
    drop(client.attach(path).unwrap());
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    scene.bystander.unload("one").unwrap();
    assert_eq!(client.attach("one").unwrap_err().kind(), ErrorKind::ModelNotFound);
    drop(client.attach("two").unwrap());
    eventually("nobody holds it again", || only(&scene).holders.is_empty());
    scene.bystander.unload(path).unwrap();
    assert_eq!(only(&scene).path, "", "published alone by now");
    scene.bystander.unload("two").unwrap();
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    scene.check_bystander();
}

#[test]
fn a_set_whose_file_is_gone_is_unloaded_by_the_name_it_was_attached_by() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    let alias = scene.place.file("alias.safetensors");
    std::os::unix::fs::symlink(&path, &alias).unwrap();
    let client = client_at(&scene.place);
    drop(client.attach(alias.to_str().unwrap()).unwrap());
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    for gone in [&alias, &path] {
        std::fs::remove_file(gone).unwrap();
    }
    assert_eq!(client.verify(alias.to_str().unwrap()).unwrap().len(), 1);
    scene.bystander.unload(alias.to_str().unwrap()).unwrap();
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    scene.check_bystander();
}
