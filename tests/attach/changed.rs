//! Files that are replaced, rewritten and shortened.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use luna_broker::ErrorKind;
use luna_broker::protocol::WeightState;

use crate::file::{counted, first, sparse, write_counted};
use crate::leases::{holders, only};
use crate::obey::holder;
use crate::scene::Scene;
use crate::support::{client_at, eventually};

#[test]
fn a_file_that_changed_is_another_set_and_the_old_one_stays_with_its_holders() {
    for in_place in [false, true] {
        let scene = Scene::new(&[]);
        let path = counted(&scene.place, "model.safetensors", 2, 5000);
        let name = path.to_str().unwrap();
        let mut one = holder(&scene, "one", name);
        if in_place {
            let other = counted(&scene.place, "other.safetensors", 2, 5000);
            write_counted(&other, 2, 5000, 0.5);
            std::fs::write(&path, std::fs::read(other).unwrap()).unwrap();
        } else {
            write_counted(&path, 2, 5000, 0.5);
        }
        let client = client_at(&scene.place);
        let new = client.attach(name).unwrap();
        assert_eq!((first(&new, "t1"), one.ask("first t1")), (1000.5, "1000".to_owned()));
        assert_eq!(one.ask("check"), "done");
        let sets = scene.bystander.status().unwrap().weights;
        let states: Vec<_> = sets.iter().map(|set| set.state).collect();
        assert_eq!(states, [WeightState::Outdated, WeightState::Ready]);
        assert_eq!(holders(&sets[0]), [("one", 1)]);
        one.ask("drop");
        eventually("the end of the old set with its last holder", || {
            scene.bystander.status().unwrap().weights.len() == 1
        });
        assert_eq!(only(&scene).content, new.content());
        scene.check_bystander();
    }
}

#[test]
fn one_of_two_equal_files_may_change() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let copy = scene.place.file("copy.safetensors");
    std::fs::copy(&path, &copy).unwrap();
    let client = client_at(&scene.place);
    let names = [&path, &copy].map(|path| path.to_str().unwrap());
    let held = names.map(|name| client.attach(name).unwrap());
    assert_eq!(only(&scene).holders[0].attachments, 2);
    write_counted(&copy, 2, 5000, 0.5);
    assert_eq!(first(&client.attach(names[1]).unwrap(), "t1"), 1000.5);
    assert_eq!(first(&client.attach(names[0]).unwrap(), "t1"), 1000.0);
    assert!(scene.bystander.status().unwrap().weights.iter().all(|set| set.state == WeightState::Ready));
    assert_eq!(first(&held[1], "t1"), 1000.0);
    // The path means the new set alone.
    assert_eq!(scene.bystander.verify(names[1]).unwrap().len(), 1);
    eventually("an unload of the new set", || scene.bystander.unload(names[1]).is_ok());
    held[0].check().unwrap();
    scene.check_bystander();
}

#[test]
fn a_file_that_is_touched_stays_the_same_set() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let name = path.to_str().unwrap();
    let client = client_at(&scene.place);
    let old = client.attach(name).unwrap();
    write_counted(&path, 2, 5000, 0.0);
    let new = client.attach(name).unwrap();
    assert_eq!(old.content(), new.content());
    let set = only(&scene);
    assert_eq!((set.state, set.holders[0].attachments), (WeightState::Ready, 2));
    scene.check_bystander();
}

#[test]
fn the_broker_does_not_keep_deleted_files_on_the_disk() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let client = client_at(&scene.place);
    let held = client.attach(path.to_str().unwrap()).unwrap();
    let open = || {
        let fds = std::fs::read_dir(format!("/proc/{}/fd", scene.broker.pid())).unwrap().flatten();
        fds.filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|target| target.to_string_lossy().contains("model.safetensors"))
    };
    eventually("the closing of the file", || !open() && scene.broker.mappings_of("model.safetensors") == 0);
    assert_eq!(first(&held, "t0"), 0.0);
    scene.check_bystander();
}

/// Asks for a file of `size_bytes` while another thread does something to it over and over; what comes of it.
fn load_while(scene: &Scene, name: &str, disturb: impl Fn(&mut std::fs::File) + Sync) -> luna_broker::Error {
    let path = sparse(&scene.place, name, 4 << 30);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // From when it is being loaded: before, it is merely another file.
            eventually("the loading of the file", || {
                scene.bystander.status().unwrap().weights.iter().any(|set| set.state == WeightState::Loading)
            });
            let mut file = OpenOptions::new().write(true).open(&path).unwrap();
            while !is_over.load(Ordering::Relaxed) {
                disturb(&mut file);
                std::thread::yield_now();
            }
        });
        let attached = client_at(&scene.place).attach(path.to_str().unwrap());
        is_over.store(true, Ordering::Relaxed);
        attached.map(|_| ()).unwrap_err()
    })
}

#[test]
fn a_file_that_changes_while_it_is_loaded_is_an_error_and_nothing_is_kept() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let touched = load_while(&scene, "touched.safetensors", |file| {
        file.seek(SeekFrom::End(-4)).unwrap();
        file.write_all(&[1, 2, 3, 4]).unwrap();
    });
    let shortened = load_while(&scene, "shortened.safetensors", |file| file.set_len(1 << 20).unwrap());
    for (error, name) in [(touched, "touched.safetensors"), (shortened, "shortened.safetensors")] {
        eprintln!("{:?}: {error} ({})", error.kind(), error.remedy());
        assert!(error.message().contains(name) && !error.remedy().is_empty(), "{error}");
        assert!(matches!(error.kind(), ErrorKind::Stale | ErrorKind::InvalidModel), "{:?}: {error}", error.kind());
    }
    // Who asked is told as soon as the file does not open any more, which may be before the loading finds out.
    eventually("the end of both loads", || scene.bystander.status().unwrap().weights.is_empty());
    eventually("the end of what was loaded", || scene.footprint().is_back_to(&before));
    scene.check_bystander();
}

#[test]
fn a_file_that_is_rewritten_over_and_over_takes_nobody_down() {
    let mut scene = Scene::new(&[]);
    // Many tensors: reading the header takes its time.
    let path = counted(&scene.place, "model.safetensors", 4000, 1);
    let name = path.to_str().unwrap();
    let whole = std::fs::read(&path).unwrap();
    let client = client_at(&scene.place);
    let is_over = AtomicBool::new(false);
    let (described, attached): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // As `cp` does it: the file is emptied first.
                std::fs::write(&path, &whole).unwrap();
            }
        });
        let results = (0..1000).map(|_| (client.vae(name), client.attach(name))).unzip();
        is_over.store(true, Ordering::Relaxed);
        results
    });
    assert!(scene.broker.is_running());
    let (attached, refused): (Vec<_>, Vec<_>) = attached.into_iter().partition(Result::is_ok);
    let refused = refused.into_iter().map(Result::unwrap_err);
    for error in described.into_iter().map(Result::unwrap_err).chain(refused) {
        let is_expected = matches!(error.kind(), ErrorKind::Stale | ErrorKind::InvalidModel);
        assert!(is_expected && error.message().contains(name), "{:?}: {error}", error.kind());
    }
    eprintln!("{} of 1000 found the file whole", attached.len());
    let again = client.attach(name).unwrap();
    assert!(attached.into_iter().flatten().chain([again]).all(|weights| first(&weights, "t1") == 1000.0));
    scene.check_bystander();
}
