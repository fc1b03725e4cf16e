//! One copy for everybody, whatever it is called.

use luna_broker::ErrorKind;
use luna_broker::client::{AttachOptions, Client, Weights};
use luna_broker::protocol::Force;
use luna_broker::tensor::{CastRule, DType};

use crate::file::{counted, first, floats};
use crate::leases::only;
use crate::obey::worker;
use crate::scene::Scene;
use crate::support::{client_at, eventually};

fn attach_as(client: &Client, name: &str, rule: CastRule) -> Weights {
    client.attach_with(name, &AttachOptions { rule, ..AttachOptions::default() }).unwrap()
}

#[test]
fn two_clients_see_one_copy_and_each_its_own_writes() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5000);
    let name = path.to_string_lossy();
    let (one, two) = (client_at(&scene.place), client_at(&scene.place));
    let first = one.attach(&name).unwrap();
    let second = two.attach(&name).unwrap();
    assert_eq!(first.content(), second.content());
    let tensor = first.tensor("t1").unwrap();
    assert_eq!(tensor.values::<f32>().unwrap(), floats(1000.0, 5000));
    let set = only(&scene);
    assert_eq!((set.holders.len(), set.saved_bytes), (2, set.bytes));
    drop((first, tensor));
    eventually("giving back", || only(&scene).holders.len() == 1);
    assert_eq!(second.tensor("t9").unwrap_err().kind(), ErrorKind::InvalidTensor);
    scene.check_bystander();
}

#[test]
fn a_set_is_told_by_its_content_and_element_types_alone() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 3, 5001);
    let copy = scene.place.file("copy.safetensors");
    std::fs::copy(&path, &copy).unwrap();
    let (path, copy) = (path.to_str().unwrap(), copy.to_str().unwrap());
    let client = client_at(&scene.place);
    let stored = client.attach(path).unwrap();
    let of_copy = client.attach(copy).unwrap();
    let unchanged = attach_as(&client, path, CastRule::all(DType::F32));
    assert_eq!((only(&scene).holders[0].attachments, only(&scene).names.len()), (3, 2));

    // A variant is made when it is asked for, and once.
    let half = attach_as(&client, path, CastRule::all(DType::F16));
    let half_of_copy = attach_as(&client, copy, CastRule::all(DType::F16));
    let sets = scene.bystander.status().unwrap().weights;
    assert_eq!(sets.iter().map(|set| set.holders[0].attachments).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(half.content(), half_of_copy.content());
    assert_ne!(half.content(), stored.content());
    assert_eq!(half.tensor("t1").unwrap().values::<half::f16>().unwrap()[7], half::f16::from_f32(1007.0));
    assert_eq!(of_copy.tensor("t2").unwrap().values::<f32>().unwrap(), floats(2000.0, 5001));

    // The extents make the tensors end at odd places.
    for weights in [&stored, &unchanged, &half] {
        for key in ["t0", "t1", "t2"] {
            let address = weights.tensor(key).unwrap().address().unwrap();
            assert!(address.is_multiple_of(64), "{key}: {address:x}");
        }
    }
    // What part of a file is wanted in is part of what is wanted.
    let mixed = attach_as(&client, path, CastRule::stored().with("t1", Some(DType::Bf16)));
    assert_eq!(mixed.tensor("t1").unwrap().meta().dtype, DType::Bf16);
    assert_eq!(first(&mixed, "t2"), 2000.0);
    let rule = CastRule::all(DType::I64);
    let error = client.attach_with(path, &AttachOptions { rule, ..AttachOptions::default() }).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    scene.check_bystander();
}

#[test]
fn what_is_the_same_once_cast_is_loaded_once_from_each_file() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 1, 100);
    let half = scene.place.file("half.safetensors");
    let bytes = floats(0.0, 100).into_iter().flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect();
    crate::file::write(&half, &[("t0", safetensors::Dtype::F16, vec![100], bytes)]);
    let client = client_at(&scene.place);
    let names = [path.to_str().unwrap(), half.to_str().unwrap()];
    let held: Vec<_> = names.iter().map(|name| attach_as(&client, name, CastRule::all(DType::F16))).collect();
    assert_eq!(held[0].content(), held[1].content());
    let again = names.map(|name| attach_as(&client, name, CastRule::all(DType::F16)));
    assert_eq!(only(&scene).holders[0].attachments, (held.len() + again.len()) as u64);
    assert_eq!(scene.broker.said().matches("weights loaded").count(), names.len());
    scene.check_bystander();
}

#[test]
fn a_file_of_a_model_folder_is_found_by_its_name() {
    let folder = tempfile::tempdir().unwrap();
    let scene = Scene::new(&["--models", folder.path().to_str().unwrap()]);
    let inner = folder.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let path = inner.join("model.safetensors");
    crate::file::write_counted(&path, 2, 100, 0.0);
    let client = client_at(&scene.place);
    let held =
        ["inner/model.safetensors", "inner/model", path.to_str().unwrap()].map(|name| client.attach(name).unwrap());
    assert_eq!(only(&scene).holders[0].attachments, held.len() as u64);
    for name in ["../inner/model", "model", "inner/../inner/model", ""] {
        assert_eq!(client.attach(name).unwrap_err().kind(), ErrorKind::ModelNotFound, "{name}");
    }
    scene.check_bystander();
}

#[test]
fn what_many_ask_for_at_once_is_loaded_once() {
    const WORKERS: usize = 6;
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 40, 200_000);
    let mut workers: Vec<_> = (0..WORKERS).map(|at| worker(&scene, &format!("worker-{at}"))).collect();
    for worker in &mut workers {
        worker.tell(&format!("attach {}", path.display()));
    }
    for worker in &mut workers {
        assert_eq!(worker.hear().as_deref(), Some("done"));
        assert_eq!(worker.ask("first t39"), "39000");
    }
    assert_eq!(only(&scene).holders.len(), WORKERS);
    assert_eq!(scene.broker.said().matches("weights loaded").count(), 1);
    scene.check_bystander();
}

#[test]
fn a_session_maps_a_set_once_however_often_it_attaches_it() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let name = path.to_str().unwrap();
    let client = client_at(&scene.place);
    let (one, two) = (client.attach(name).unwrap(), client.attach(name).unwrap());
    assert_eq!(one.address(), two.address());
    assert_eq!(only(&scene).holders[0].attachments, 2, "each is a hold of its own");
    drop(one);
    eventually("one hold is given back", || only(&scene).holders[0].attachments == 1);
    assert_eq!(first(&two, "t1"), 1000.0);
    // Taken by force and taken up again by one, they are the same memory still, and good for both.
    let three = client.attach(name).unwrap();
    scene.bystander.unload_with(name, Force::Yes).unwrap();
    two.reattach().unwrap();
    assert_eq!(three.check().unwrap_err().kind(), ErrorKind::Stale, "this one's hold is still on what was taken");
    three.reattach().unwrap();
    three.check().unwrap();
    let four = client.attach(name).unwrap();
    assert!([&three, &four].iter().all(|weights| weights.address() == two.address()));
    assert_eq!((first(&two, "t1"), first(&four, "t0")), (1000.0, 0.0));
    eventually("the old set is gone", || only(&scene).holders[0].attachments == 3);
    scene.check_bystander();
}
