//! Tensors that a worker hands to the broker for others.

use luna_broker::client::{AttachOptions, CallOptions, Published};
use luna_broker::tensor::{CastRule, DType, Dims, TensorMeta, digest_tensors};
use luna_broker::{Error, ErrorKind};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::file::{bytes, counted, first, floats, publish};
use crate::leases::{holders, only};
use crate::obey::{is, worker};
use crate::scene::Scene;
use crate::support::{client_at, eventually};

/// Hashes as who publishes does, where no thread can be started.
pub(crate) fn digest_without_threads() {
    /// Less than the stack of a thread, enough for what else is allocated.
    const ROOM_BYTES: u64 = 1 << 20;
    let data = vec![1u8; 1 << 20];
    let keys = ["a", "b", "c", "d"];
    let digest = || digest_tensors(keys.map(|key| (key, DType::U8, &[1 << 20][..], &data[..])));
    let pages = std::fs::read_to_string("/proc/self/statm").expect("readable");
    let pages: u64 = pages.split(' ').next().and_then(|pages| pages.parse().ok()).expect("a number");
    let before = getrlimit(Resource::As);
    let limit = pages * rustix::param::page_size() as u64 + ROOM_BYTES;
    setrlimit(Resource::As, Rlimit { current: Some(limit), ..before }).expect("a limit may be lowered");
    let thread = std::thread::Builder::new().spawn(|| {});
    let alone = digest();
    setrlimit(Resource::As, before).expect("a limit may be raised again");
    assert!(thread.is_err(), "there was room for a thread");
    assert!(alone == digest());
}

#[test]
fn what_two_workers_publish_is_there_once_and_outlives_them() {
    let scene = Scene::new(&[]);
    let (mut one, mut two) = (worker(&scene, "one"), worker(&scene, "two"));
    for worker in [&mut one, &mut two] {
        worker.tell("publish merged/lora 5");
    }
    for worker in [&mut one, &mut two] {
        assert_eq!(worker.hear().as_deref(), Some("done"));
        assert_eq!(worker.ask("first t0"), "5");
    }
    assert_eq!(one.ask("mapped"), two.ask("mapped"), "the same memory");
    let set = only(&scene);
    assert_eq!((holders(&set), set.path.as_str()), (vec![("one", 1), ("two", 1)], ""));
    one.kill();
    two.kill();
    eventually("the end of both sessions", || only(&scene).holders.is_empty());
    let third = scene.bystander.attach("merged/lora").unwrap();
    let header = scene.bystander.header("merged/lora").unwrap();
    assert_eq!(header, [("t0".to_owned(), *third.tensor("t0").unwrap().meta())]);
    assert_eq!(first(&third, "t0"), 5.0);
    assert_eq!(scene.bystander.verify("merged/lora").unwrap()[0].found, third.content());
    scene.check_bystander();
}

#[test]
fn a_file_and_a_published_set_of_the_same_content_are_one() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    let path = path.to_str().unwrap();
    let client = client_at(&scene.place);
    let published = publish(&client, "published", 0.0, 5000).unwrap();
    let of_file = client.attach(path).unwrap();
    assert_eq!(only(&scene).holders[0].attachments, 2);
    assert_eq!(published.content(), of_file.content());
    // The other way round, with what comes of casting; and once more under the same name.
    let rule = CastRule::all(DType::F16);
    let half = client.attach_with(path, &AttachOptions { rule, ..AttachOptions::default() }).unwrap();
    let held = half.tensor("t0").unwrap();
    let tensor = [Published { key: "t0", meta: *held.meta(), bytes: held.bytes().unwrap() }];
    for _ in 0..2 {
        let same = client.publish("half", &tensor, &CallOptions::default()).unwrap();
        assert_eq!(same.content(), half.content());
    }
    assert_eq!(scene.bystander.status().unwrap().weights.len(), 2);
    // And with what is published before it comes of casting.
    let path = scene.place.file("other.safetensors");
    crate::file::write_counted(&path, 1, 100, 0.5);
    let halves: Vec<u8> = floats(0.5, 100).into_iter().flat_map(|one| half::f16::from_f32(one).to_le_bytes()).collect();
    let meta = TensorMeta::contiguous(DType::F16, Dims::of([100]));
    let tensor = [Published { key: "t0", meta, bytes: &halves }];
    let published = client.publish("other half", &tensor, &CallOptions::default()).unwrap();
    let rule = CastRule::all(DType::F16);
    let cast = client.attach_with(path.to_str().unwrap(), &AttachOptions { rule, ..AttachOptions::default() }).unwrap();
    assert_eq!(cast.content(), published.content());
    assert_eq!(scene.bystander.status().unwrap().weights.len(), 3);
    scene.check_bystander();
}

#[test]
fn a_name_means_one_thing_as_long_as_somebody_holds_it() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    let held = publish(&one, "name", 1.0, 5000).unwrap();
    let error = publish(&two, "name", 2.0, 5000).unwrap_err();
    let session = only(&scene).holders[0].session;
    assert_eq!(error.kind(), ErrorKind::InUse);
    assert!(error.message().contains(&format!("session {session}")), "{error}");
    assert_eq!(first(&two.attach("name").unwrap(), "t0"), 1.0);
    drop(held);
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    let replaced = publish(&two, "name", 2.0, 5000).unwrap();
    assert_eq!(first(&one.attach("name").unwrap(), "t0"), 2.0);
    drop(replaced);
    assert_eq!(only(&scene).names, ["name"], "what no name means any more is gone");
    let error = publish(&one, path.to_str().unwrap(), 3.0, 5000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    scene.check_bystander();
}

#[test]
fn what_cannot_be_published_is_refused_with_a_remedy() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let data = bytes(&floats(0.0, 6));
    let meta = TensorMeta::contiguous(DType::F32, Dims::of([2, 3]));
    let tensor = |key, meta| Published { key, meta, bytes: &data };
    let publish = |name: &str, tensors: &[Published<'_>]| -> Error {
        client.publish(name, tensors, &CallOptions::default()).unwrap_err()
    };
    let turned = TensorMeta::strided(DType::F32, Dims::of([3, 2]), Dims::of([1, 3])).unwrap();
    let longer = TensorMeta::contiguous(DType::F32, Dims::of([2, 4]));
    let long = "x".repeat(600);
    let cases = [
        ("not contiguous", publish("name", &[tensor("a", turned)]), ErrorKind::InvalidTensor),
        ("too few bytes", publish("name", &[tensor("a", longer)]), ErrorKind::InvalidTensor),
        ("a key twice", publish("name", &[tensor("a", meta), tensor("a", meta)]), ErrorKind::InvalidTensor),
        ("no tensors", publish("name", &[]), ErrorKind::InvalidTensor),
        ("no name", publish("", &[tensor("a", meta)]), ErrorKind::Configuration),
        ("a long name", publish(&long, &[tensor("a", meta)]), ErrorKind::Configuration),
        ("a name of two lines", publish("a\nb", &[tensor("a", meta)]), ErrorKind::Configuration),
    ];
    for (case, error, kind) in cases {
        eprintln!("{case}: {error} ({})", error.remedy());
        assert_eq!(error.kind(), kind, "{case}: {error}");
    }
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    client.publish("name", &[tensor("a", meta)], &CallOptions::default()).unwrap();
    scene.check_bystander();
}

#[test]
fn a_set_has_so_many_names_and_no_more() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let error = (0..1000).find_map(|at| publish(&client, &format!("name-{at}"), 0.0, 16).err());
    assert_eq!(error.expect("a bound").kind(), ErrorKind::Busy);
    assert!(only(&scene).names.len() < 100);
    scene.check_bystander();
}

#[test]
fn answers_of_other_processes_are_typed() {
    let scene = Scene::new(&[]);
    let mut one = worker(&scene, "one");
    assert_eq!(one.ask("publish name 1"), "done");
    let mut two = worker(&scene, "two");
    assert!(is(&two.ask("publish name 2"), ErrorKind::InUse));
    scene.check_bystander();
}

#[test]
fn a_folder_where_the_worker_runs_does_not_stand_for_what_was_published() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    // As the folders of diffusers are called.
    let folder = scene.place.file("diffusers");
    std::fs::create_dir_all(folder.join("unet")).unwrap();
    std::os::unix::fs::symlink(path, folder.join("linked.safetensors")).unwrap();
    let mut worker = worker(&scene, "worker");
    for command in [&format!("enter {}", folder.display()), "publish unet 5", "drop", "attach unet"] {
        assert_eq!(worker.ask(command), "done", "{command}");
    }
    assert_eq!(worker.ask("first t0"), "5");
    // A file does, also by a link, to attach and to publish alike.
    assert_eq!(worker.ask("attach linked.safetensors"), "done");
    assert_eq!(worker.ask("first t0"), "0");
    assert!(is(&worker.ask("publish linked.safetensors 5"), ErrorKind::InUse));
    scene.check_bystander();
}

#[test]
fn who_can_start_no_thread_can_publish() {
    let scene = Scene::new(&[]);
    assert_eq!(worker(&scene, "crowded").ask("digest"), "done");
}
