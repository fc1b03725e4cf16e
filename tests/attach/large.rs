//! Sets that take their time, and sets of many tensors.

use std::cell::{Cell, RefCell};
use std::time::{Duration, Instant};

use luna_broker::ErrorKind;
use luna_broker::client::AttachOptions;
use luna_broker::protocol::{Force, WeightState};

use crate::file::{bytes, first, floats, sparse, write};
use crate::leases::only;
use crate::scene::Scene;
use crate::support::{client_at, eventually};

const GIB: u64 = 1 << 30;

/// Memory in use by shared memory of the whole machine.
fn shared_bytes() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = info.lines().find_map(|line| line.strip_prefix("Shmem:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

#[test]
fn ten_gigabytes_of_nothing_take_seconds_and_no_memory() {
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let path = sparse(&scene.place, "large.safetensors", 10 * GIB);
    let client = client_at(&scene.place);
    let before = shared_bytes();
    let (heard, last) = (Cell::new(0), Cell::new(0));
    let progress = |done: u64, total: u64| {
        assert!(last.replace(done) <= done && done <= total, "{done} of {total}");
        heard.set(heard.get() + 1);
    };
    let options = AttachOptions { progress: Some(&progress), ..AttachOptions::default() };
    let started = Instant::now();
    let weights = client.attach_with(path.to_str().unwrap(), &options).unwrap();
    let took = started.elapsed();
    eprintln!("10 GiB in {took:?}, {} times told", heard.get());
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!((weights.size_bytes(), first(&weights, "t0")), (10 * GIB, 0.0));
    assert!(shared_bytes() < before + GIB, "{} bytes more", shared_bytes() - before);
    assert!(heard.get() > 0, "somebody who waits for so long is told how far it is");
    heard.set(0);
    let again = client.attach_with(path.to_str().unwrap(), &options).unwrap();
    assert_eq!((heard.get(), again.content()), (0, weights.content()));
    scene.check_bystander();
}

#[test]
fn who_gives_up_waiting_leaves_the_broker_as_it_was() {
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let path = sparse(&scene.place, "large.safetensors", 10 * GIB);
    let path = path.to_str().unwrap();
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    let timeout = Some(Duration::from_millis(300));
    let error = one.attach_with(path, &AttachOptions { timeout, ..AttachOptions::default() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let set = only(&scene);
    assert_eq!((set.state, set.holders.len()), (WeightState::Loading, 0));
    scene.check_bystander();
    let told = RefCell::new(false);
    let progress = |_: u64, _: u64| {
        assert_eq!(only(&scene).state, WeightState::Loading, "one load for both");
        *told.borrow_mut() = true;
    };
    let interrupted = || *told.borrow();
    let options =
        AttachOptions { progress: Some(&progress), interrupted: Some(&interrupted), ..AttachOptions::default() };
    let error = two.attach_with(path, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    // Both go on, in the same sessions.
    let weights = one.attach(path).unwrap();
    assert_eq!(two.attach(path).unwrap().content(), weights.content());
    assert_eq!(scene.broker.said().matches("weights loaded").count(), 1);
    eventually("nothing is held by those who gave up", || only(&scene).holders.len() == 1);
    scene.check_bystander();
}

#[test]
fn who_is_told_how_far_a_reattach_is_may_look_at_the_weights() {
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let path = sparse(&scene.place, "large.safetensors", 4 * GIB);
    let path = path.to_str().unwrap();
    let weights = client_at(&scene.place).attach(path).unwrap();
    scene.bystander.unload_with(path, Force::Yes).unwrap();
    let heard = Cell::new(0);
    let progress = |_: u64, _: u64| {
        assert_eq!(weights.check().unwrap_err().kind(), ErrorKind::Stale);
        heard.set(heard.get() + 1);
    };
    weights.reattach_with(&AttachOptions { progress: Some(&progress), ..AttachOptions::default() }).unwrap();
    assert!(heard.get() > 0);
    weights.check().unwrap();
    scene.check_bystander();
}

#[test]
fn who_dies_waiting_holds_nothing_and_loads_that_nobody_waits_for_are_not_begun() {
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let first = "first.safetensors";
    let paths = [(first, 10 * GIB), ("second.safetensors", 9 * GIB)];
    let paths = paths.map(|(name, size_bytes)| sparse(&scene.place, name, size_bytes));
    let mut victim = crate::obey::worker(&scene, "victim");
    victim.tell(&format!("attach {}", paths[0].display()));
    eventually("the victim's load", || scene.bystander.status().unwrap().weights.len() == 1);
    let timeout = Some(Duration::from_millis(50));
    let options = AttachOptions { timeout, ..AttachOptions::default() };
    let error = client_at(&scene.place).attach_with(paths[1].to_str().unwrap(), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout);
    victim.kill();
    eventually("the end of both loads", || {
        let sets = scene.bystander.status().unwrap().weights;
        sets.iter().all(|set| set.state == WeightState::Ready)
    });
    let set = only(&scene);
    assert!(set.path.ends_with(first) && set.holders.is_empty(), "{set:#?}");
    scene.check_bystander();
}

#[test]
fn ten_thousand_tensors_are_ten_thousand_views() {
    const COUNT: usize = 10_000;
    let scene = Scene::new(&["--weight-bytes", "99999G"]);
    let path = scene.place.file("many.safetensors");
    let keys: Vec<String> = (0..COUNT).map(|at| format!("model.diffusion_model.blocks.{at}.weight")).collect();
    let tensors: Vec<_> = keys
        .iter()
        .enumerate()
        .map(|(at, key)| (key.as_str(), safetensors::Dtype::F32, vec![3], bytes(&floats(at as f32, 3))))
        .collect();
    write(&path, &tensors);
    let client = client_at(&scene.place);
    let weights = client.attach(path.to_str().unwrap()).unwrap();
    assert_eq!(weights.len(), COUNT);
    for (at, key) in keys.iter().enumerate() {
        assert_eq!(weights.tensor(key).unwrap().values::<f32>().unwrap(), floats(at as f32, 3));
    }
    scene.check_bystander();
}
