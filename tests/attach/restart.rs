//! The broker dies; who holds weights goes on, and takes them up again once it is back.

use luna_broker::ErrorKind;

use crate::file::{counted, write_counted};
use crate::leases::{holders, only};
use crate::obey::{holder, is};
use crate::process::BrokerProcess;
use crate::scene::Scene;

#[test]
fn tensors_outlive_a_killed_broker_and_are_reattached_in_place() {
    let mut scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 50_000);
    let path = path.to_str().unwrap();
    let (mut one, mut two) = (holder(&scene, "one", path), holder(&scene, "two", path));
    for worker in [&mut one, &mut two] {
        worker.ask("keep t2");
        assert_eq!(worker.ask("write t2 7"), "done");
    }
    let (address, mapped) = (one.ask("address t2"), one.ask("mapped"));
    scene.broker.kill();
    assert_eq!((one.ask("first t1"), one.ask("kept")), ("1000".to_owned(), "7".to_owned()));
    for command in ["check", "reattach", "permit 1"] {
        let answer = one.ask(command);
        assert!(is(&answer, ErrorKind::ConnectionLost), "{command}: {answer}");
    }
    assert_eq!(one.ask("mapped"), mapped, "what cannot be reattached is kept");

    scene.broker = BrokerProcess::start(&scene.place.socket(), &[]);
    assert!(is(&one.ask("check"), ErrorKind::ConnectionLost), "not held before it is reattached");
    assert_eq!(one.ask("reattach"), "done");
    assert_eq!(one.ask("check"), "done");
    assert_eq!((one.ask("address t2"), one.ask("kept")), (address, "2000".to_owned()), "stray writes are gone");
    assert_ne!(one.ask("mapped"), mapped);
    assert_eq!(one.ask("mapped").split(',').count(), 1, "the old mapping is gone");
    assert_eq!(two.ask("kept"), "7", "who does not reattach keeps what it has");
    assert_eq!(two.ask(&format!("attach {path}")), "done", "attaching anew works, too");
    assert_eq!(two.ask("first t2"), "2000");
    assert_eq!(holders(&only(&scene)), [("one", 1), ("two", 1)]);
    scene.check_bystander();
}

#[test]
fn weights_that_changed_while_the_broker_was_gone_are_not_put_in_place_of_the_old() {
    let mut scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5000);
    let mut one = holder(&scene, "one", path.to_str().unwrap());
    let mapped = one.ask("mapped");
    scene.broker.kill();
    write_counted(&path, 3, 5000, 0.5);
    scene.broker = BrokerProcess::start(&scene.place.socket(), &[]);
    let answer = one.ask("reattach");
    assert!(is(&answer, ErrorKind::Stale), "{answer}");
    assert_eq!((one.ask("first t1"), one.ask("mapped")), ("1000".to_owned(), mapped));
    assert!(is(&one.ask("check"), ErrorKind::ConnectionLost));
    // The same content again, in a new file.
    write_counted(&path, 3, 5000, 0.0);
    assert_eq!(one.ask("reattach"), "done");
    assert_eq!((one.ask("first t1"), one.ask("check")), ("1000".to_owned(), "done".to_owned()));
    scene.check_bystander();
}
