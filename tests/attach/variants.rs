//! What was published, in other element types than it was published in.

use luna_broker::client::{AttachOptions, CallOptions, Client, Published, Weights};
use luna_broker::protocol::{Force, WeightState};
use luna_broker::tensor::{CastRule, DType, Dims, TensorMeta};
use luna_broker::{Error, ErrorKind};

use crate::file::{bytes, counted, first, floats, publish};
use crate::leases::only;
use crate::obey::worker;
use crate::scene::Scene;
use crate::support::{client_at, eventually};

fn attach_as(client: &Client, name: &str, rule: CastRule) -> Result<Weights, Error> {
    client.attach_with(name, &AttachOptions { rule, ..AttachOptions::default() })
}

fn half(client: &Client, name: &str) -> Result<Weights, Error> {
    attach_as(client, name, CastRule::all(DType::F16))
}

/// What `start`, counted up `length` times, is as float16.
fn halves(start: f32, length: usize) -> Vec<u8> {
    floats(start, length).into_iter().flat_map(|one| half::f16::from_f32(one).to_le_bytes()).collect()
}

#[test]
fn a_published_set_is_converted_once_for_all_who_want_it() {
    let scene = Scene::new(&[]);
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    let published = publish(&one, "merged", 0.3, 5000).unwrap();
    let (mine, theirs) = (half(&one, "merged").unwrap(), half(&two, "merged").unwrap());
    assert!(mine.tensor("t0").unwrap().bytes().unwrap() == halves(0.3, 5000), "each rounded to the nearest");
    assert_eq!(mine.content(), theirs.content());
    let sets = scene.bystander.status().unwrap().weights;
    let told: Vec<_> = sets.iter().map(|set| (set.names.as_slice(), set.holders.len())).collect();
    assert_eq!(told, [(&["merged".to_owned()][..], 1), (&["merged".to_owned()][..], 2)]);
    assert_eq!(two.attach("merged").unwrap().content(), published.content(), "as it was published, it is that set");
    let found = scene.bystander.verify("merged").unwrap();
    assert!(found.len() == 2 && found.iter().all(|report| report.found == report.expected), "{found:?}");
    scene.check_bystander();
}

#[test]
fn a_rule_by_prefix_holds_for_what_was_published_too() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let data = bytes(&floats(0.3, 6));
    let ids = [7u8; 24];
    let of = |dtype, count: u64| TensorMeta::contiguous(dtype, Dims::of([count]));
    let tensors = [
        Published { key: "unet.a", meta: of(DType::F32, 6), bytes: &data },
        Published { key: "unet.ids", meta: of(DType::I64, 3), bytes: &ids },
        Published { key: "vae.a", meta: of(DType::F32, 6), bytes: &data },
    ];
    client.publish("all", &tensors, &CallOptions::default()).unwrap();
    let rule = CastRule::stored().with("unet.", Some(DType::F16));
    let found = attach_as(&client, "all", rule).unwrap();
    assert!(found.tensor("unet.a").unwrap().bytes().unwrap() == halves(0.3, 6));
    assert_eq!(found.tensor("unet.ids").unwrap().bytes().unwrap(), ids);
    assert_eq!(found.tensor("vae.a").unwrap().bytes().unwrap(), data);
    let refused = attach_as(&client, "all", CastRule::all(DType::I64)).unwrap_err();
    assert!(refused.message().contains("all"), "{refused}");
    scene.check_bystander();
}

#[test]
fn a_variant_is_the_files_where_both_come_of_the_same() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 5000);
    let client = client_at(&scene.place);
    let of_file = half(&client, path.to_str().unwrap()).unwrap();
    publish(&client, "published", 0.0, 5000).unwrap();
    let of_name = half(&client, "published").unwrap();
    assert_eq!(of_name.content(), of_file.content());
    let sets = scene.bystander.status().unwrap().weights;
    assert_eq!(sets.iter().map(|set| set.holders.iter().map(|one| one.attachments).sum()).max(), Some(2u64));
    drop((of_file, of_name));
    scene.check_bystander();
}

#[test]
fn a_name_stays_with_those_who_hold_a_variant_of_it() {
    let scene = Scene::new(&[]);
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    drop(publish(&one, "name", 1.0, 5000).unwrap());
    let held = half(&two, "name").unwrap();
    let error = publish(&one, "name", 2.0, 5000).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    drop(held);
    let is_idle = || scene.bystander.status().unwrap().weights.iter().all(|set| set.holders.is_empty());
    eventually("nobody holds the variant", is_idle);
    let _again = publish(&one, "name", 2.0, 5000).unwrap();
    assert_eq!(only(&scene).names, ["name"], "the variant went with what it was made of");
    assert!(half(&two, "name").unwrap().tensor("t0").unwrap().bytes().unwrap() == halves(2.0, 5000));
    scene.check_bystander();
}

#[test]
fn unloading_a_name_unloads_its_variants() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    drop(publish(&client, "name", 1.0, 5000).unwrap());
    let held = half(&client, "name").unwrap();
    let error = client.unload("name").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
    client.unload_with("name", Force::Yes).unwrap();
    assert_eq!(held.check().unwrap_err().kind(), ErrorKind::Stale);
    assert!(held.tensor("t0").unwrap().bytes().unwrap() == halves(1.0, 5000), "what is held stays readable");
    drop(held);
    eventually("all of it is gone", || scene.bystander.status().unwrap().weights.is_empty());
    assert_eq!(half(&client, "name").unwrap_err().kind(), ErrorKind::ModelNotFound);
    scene.check_bystander();
}

#[test]
fn a_variant_outlives_what_it_was_made_of() {
    // The published set of 256 KiB, and one of its variant's size.
    let scene = Scene::new(&["--weight-bytes", "400K"]);
    let client = client_at(&scene.place);
    drop(publish(&client, "name", 1.0, 64 << 10).unwrap());
    let variant = half(&client, "name").unwrap();
    // Takes the room of the published set, which nobody holds.
    let other = publish(&client, "other", 3.0, 60 << 10).unwrap();
    let again = half(&client, "name").unwrap();
    assert_eq!(again.content(), variant.content());
    let error = client.attach("name").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ModelNotFound);
    assert!(error.message().contains("gave way"), "{error}");
    drop(other);
    scene.check_bystander();
}

#[test]
fn a_killed_worker_holds_no_variant() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    let published = publish(&client, "name", 1.0, 5000).unwrap();
    let mut victim = worker(&scene, "victim");
    assert_eq!(victim.ask("half name"), "done");
    assert_eq!(scene.bystander.status().unwrap().weights.len(), 2);
    victim.kill();
    let idle = || scene.bystander.status().unwrap().weights.iter().any(|set| set.holders.is_empty());
    eventually("the killed worker's hold", idle);
    assert_eq!(first(&published, "t0"), 1.0);
    scene.check_bystander();
}

#[test]
fn what_a_variant_is_made_of_does_not_give_way_to_it() {
    // The published set of 256 KiB, and not half as much beside it.
    let scene = Scene::new(&["--weight-bytes", "300K"]);
    let client = client_at(&scene.place);
    let published = publish(&client, "name", 1.0, 64 << 10).unwrap().content();
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    let error = half(&client, "name").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert_eq!(client.attach("name").unwrap().content(), published);
    scene.check_bystander();
}

/// Bytes that take some time to convert.
const LARGE: usize = 48 << 20;

#[test]
fn a_variant_is_known_by_every_name_that_it_was_asked_for_by() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    for name in ["one", "two"] {
        drop(publish(&client, name, 0.0, LARGE / 4).unwrap());
    }
    let (one, two) = std::thread::scope(|scope| {
        let two = scope.spawn(|| half(&client_at(&scene.place), "two"));
        (half(&client, "one").unwrap(), two.join().unwrap())
    });
    drop(one);
    assert_eq!(publish(&client, "two", 5.0, 16).unwrap_err().kind(), ErrorKind::InUse, "its variant is held");
    drop(two.unwrap());
    scene.check_bystander();
}

#[test]
fn what_is_being_converted_is_not_unloaded() {
    let scene = Scene::new(&[]);
    let client = client_at(&scene.place);
    drop(publish(&client, "name", 0.0, LARGE / 4).unwrap());
    eventually("nobody holds it", || only(&scene).holders.is_empty());
    let is_loading = || scene.bystander.status().unwrap().weights.iter().any(|set| set.state == WeightState::Loading);
    let variant = std::thread::scope(|scope| {
        let variant = scope.spawn(|| half(&client, "name"));
        eventually("the conversion", || is_loading() || variant.is_finished());
        if is_loading() {
            let error = scene.bystander.unload("name").unwrap_err();
            assert!(error.kind() == ErrorKind::InUse, "{error}");
        }
        variant.join().unwrap()
    });
    assert_eq!(variant.unwrap().len(), 1);
    scene.check_bystander();
}
