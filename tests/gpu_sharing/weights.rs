//! Weights that lie in memory of a GPU once.

use luna_broker::ErrorKind;
use luna_broker::client::{AttachOptions, CallOptions, Published, Weights};
use luna_broker::device::{Place as MemoryPlace, StreamRef};
use luna_broker::protocol::Force;
use luna_broker::tensor::{CastRule, Dims, TensorMeta};
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::cuda::refuse_maps;
use crate::deaths::Victim;
use crate::roles::Role;

const COUNT: usize = 1 << 20;

/// A file with two tensors of 4 MiB, which count up from 0 and from 1.
pub(crate) struct Model {
    _folder: tempfile::TempDir,
    pub(crate) path: String,
}

impl Model {
    pub(crate) fn new() -> Self {
        Self::starting_at(0)
    }

    /// With tensors that count up from `start` and from one more.
    pub(crate) fn starting_at(start: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let data = [counted(start), counted(start + 1)];
        let views = ["first", "second"].into_iter().zip(&data);
        let views = views.map(|(key, bytes)| (key, TensorView::new(Dtype::F32, vec![COUNT], bytes).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        Self { path: path.to_string_lossy().into_owned(), _folder: folder }
    }
}

pub(crate) fn counted(start: usize) -> Vec<u8> {
    (start..start + COUNT).flat_map(|value| (value as f32).to_le_bytes()).collect()
}

pub(crate) fn on_gpu() -> AttachOptions<'static> {
    AttachOptions { gpu: Some(gpu(0)), ..AttachOptions::default() }
}

pub(crate) fn check(weights: &Weights) {
    for (start, key) in ["first", "second"].into_iter().enumerate() {
        let tensor = weights.tensor(key).unwrap();
        assert_eq!((tensor.place(), tensor.gpu_ordinal()), (MemoryPlace::Gpu(gpu(0)), Some(0)));
        assert!(tensor.to_vec().unwrap() == counted(start), "{key} holds something else");
        assert!(tensor.address().unwrap().is_multiple_of(512));
    }
}

#[test]
fn every_client_of_a_gpu_maps_the_same_weights() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let model = Model::new();
        let (one, two) = (guest.connect(), guest.connect());
        one.open_gpu("cuda:0").unwrap();
        two.open_gpu("cuda:0").unwrap();
        let device = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap();
        let free = || device.free_and_total_bytes().unwrap().0;
        let before = free();
        let first = one.attach_with(&model.path, &on_gpu()).unwrap();
        let taken = before - free();
        assert!((8 * MIB..=10 * MIB).contains(&taken), "{taken} bytes of weights");
        let second = two.attach_with(&model.path, &on_gpu()).unwrap();
        assert_eq!(before - free(), taken, "the second client's weights are the first's");
        check(&first);
        check(&second);
        let told = guest.status()["weights"][0].clone();
        assert_eq!((&told["device"], told["holders"].as_array().unwrap().len()), (&gpu(0).to_string().into(), 2));
    });
}

#[test]
fn the_driver_lets_no_client_write_to_weights() {
    // An access that is refused ends what the context can be used for.
    play(Stage::new().unaccounted(), on_the_gpu(), |guest| {
        let model = Model::new();
        let weights = guest.connect().attach_with(&model.path, &on_gpu()).unwrap();
        let device = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap();
        let region = device.allocate(4 * COUNT).unwrap();
        let tensor = weights.tensor("first").unwrap();
        // SAFETY: neither range is freed before the copy has been refused or awaited.
        let written = unsafe {
            let way = luna_broker::device::cuda::CopyWay::DeviceToDevice;
            let copied = device.copy(tensor.address().unwrap(), region.address(), 4 * COUNT, way, StreamRef::DEFAULT);
            copied.and_then(|()| device.synchronize())
        };
        assert!(written.is_err(), "the driver lets a client write to weights");
        let told = guest.connect().verify(&model.path).unwrap();
        assert_eq!(told[0].found, told[0].expected);
    });
}

#[test]
fn weights_lie_in_plain_memory_where_the_driver_hands_out_no_other() {
    let stage = Stage::new().set_for(Role::Broker, "SUBSTITUTE_CUDA_VMM", "refused");
    play(stage, on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let weights = client.attach_with(&model.path, &on_gpu()).unwrap();
        let again = client.attach_with(&model.path, &on_gpu()).unwrap();
        check(&weights);
        check(&again);
        client.unload_with(&model.path, Force::Yes).unwrap();
        let refused = weights.reattach().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        check(&weights);
    });
}

#[test]
fn weights_taken_by_force_are_replaced_behind_the_same_addresses() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let weights = client.attach_with(&model.path, &on_gpu()).unwrap();
        let address = weights.tensor("second").unwrap().address();
        let refused = client.unload(&model.path).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InUse, "{refused}");
        client.unload_with(&model.path, Force::Yes).unwrap();
        assert_eq!(weights.check().unwrap_err().kind(), ErrorKind::Stale);
        check(&weights);
        weights.reattach().unwrap();
        weights.check().unwrap();
        assert_eq!(weights.tensor("second").unwrap().address(), address);
        check(&weights);
        let sets = guest.status()["weights"].as_array().unwrap().len();
        assert_eq!(sets, 1, "the old memory is given up");
    });
}

#[test]
fn weights_that_the_driver_does_not_map_again_are_the_old_ones_or_say_that_they_are_not_there() {
    let stage = Stage::new().only_on_the_substitute("a driver refuses to map memory where we say so");
    play(stage, on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let weights = client.attach_with(&model.path, &on_gpu()).unwrap();
        let tensor = weights.tensor("second").unwrap();
        refuse_maps(1);
        let refused = weights.reattach().unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
        weights.check().unwrap();
        check(&weights);
        // Twice in a row is no better for having been tried before.
        for _ in 0..2 {
            refuse_maps(2);
            let lost = [weights.reattach().unwrap_err(), weights.check().unwrap_err(), tensor.to_vec().unwrap_err()];
            for error in lost {
                assert!(error.kind() == ErrorKind::Stale && !error.remedy().is_empty(), "{:?}: {error}", error.kind());
            }
        }
        // Who attaches them anew is not given what is not there; nor is anything left of it once nobody has it.
        let anew = client.attach_with(&model.path, &on_gpu()).unwrap();
        check(&anew);
        weights.reattach().unwrap();
        weights.check().unwrap();
        check(&weights);
        assert!(tensor.to_vec().unwrap() == counted(1));
        refuse_maps(2);
        weights.reattach().unwrap_err();
    });
}

#[test]
fn variants_of_a_gpu_and_of_the_host_are_sets_of_their_own() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let half = AttachOptions { rule: CastRule::all(DType::F16), ..on_gpu() };
        let there = client.attach_with(&model.path, &half).unwrap();
        let here = client.attach_with(&model.path, &AttachOptions { gpu: None, ..half }).unwrap();
        assert_eq!(there.content(), here.content());
        assert!(there.tensor("first").unwrap().to_vec().unwrap() == here.tensor("first").unwrap().bytes().unwrap());
        assert_eq!(guest.status()["weights"].as_array().unwrap().len(), 2);
        let found = client.verify(&model.path).unwrap();
        assert!(found.len() == 2 && found.iter().all(|report| report.found == report.expected), "{found:?}");
    });
}

#[test]
fn what_a_client_publishes_others_have_on_the_gpu() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let (one, two) = (guest.connect(), guest.connect());
        let data = [counted(0), counted(1)];
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([COUNT as u64]));
        let tensors: Vec<_> =
            ["first", "second"].into_iter().zip(&data).map(|(key, bytes)| Published { key, meta, bytes }).collect();
        let published = one.publish("merged", &tensors, &CallOptions::default()).unwrap();
        let device = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap();
        let free = || device.free_and_total_bytes().unwrap().0;
        let before = free();
        let first = one.attach_with("merged", &on_gpu()).unwrap();
        let taken = before - free();
        let second = two.attach_with("merged", &on_gpu()).unwrap();
        assert_eq!(before - free(), taken, "the second client's weights are the first's");
        check(&first);
        check(&second);
        assert_eq!(first.content(), published.content());
        let half = AttachOptions { rule: CastRule::all(DType::F16), ..on_gpu() };
        let (there, here) = (
            two.attach_with("merged", &half).unwrap(),
            two.attach_with("merged", &AttachOptions { gpu: None, ..half }),
        );
        let here = here.unwrap();
        assert!(there.tensor("second").unwrap().to_vec().unwrap() == here.tensor("second").unwrap().bytes().unwrap());
        let found = two.verify("merged").unwrap();
        assert!(found.len() == 4 && found.iter().all(|report| report.found == report.expected), "{found:?}");
    });
}

#[test]
fn published_weights_taken_by_force_are_replaced_behind_the_same_addresses() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect();
        let bytes = counted(0);
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([COUNT as u64]));
        let tensor = [Published { key: "first", meta, bytes: &bytes }];
        drop(client.publish("merged", &tensor, &CallOptions::default()).unwrap());
        let weights = client.attach_with("merged", &on_gpu()).unwrap();
        let address = weights.tensor("first").unwrap().address();
        client.unload_with("merged", Force::Yes).unwrap();
        assert_eq!(weights.check().unwrap_err().kind(), ErrorKind::Stale);
        assert_eq!(weights.reattach().unwrap_err().kind(), ErrorKind::ModelNotFound, "nobody has published it again");
        drop(client.publish("merged", &tensor, &CallOptions::default()).unwrap());
        weights.reattach().unwrap();
        let tensor = weights.tensor("first").unwrap();
        assert_eq!(tensor.address(), address);
        assert!(tensor.to_vec().unwrap() == bytes);
    });
}

/// A client that sees another GPU than the broker's is told so, and has the weights in host memory.
fn refused_on_another_gpu(stage: Stage) {
    let stage = stage.set("SUBSTITUTE_CUDA_DEVICES", "alpha,beta").set_for(Role::Client, "CUDA_VISIBLE_DEVICES", "1");
    play(stage, on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let refused = client.attach_with(&model.path, &on_gpu()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported, "{refused}");
        assert!(refused.to_string().contains("host memory"), "{refused}");
        client.attach(&model.path).unwrap();
    });
}

#[test]
fn weights_are_not_attached_on_a_gpu_that_does_not_reach_the_brokers() {
    refused_on_another_gpu(Stage::new());
}

#[test]
fn weights_are_not_attached_across_gpus() {
    refused_on_another_gpu(Stage::new().set("SUBSTITUTE_CUDA_P2P", 1));
}

#[test]
fn weights_outlive_the_broker_and_are_taken_up_again_from_the_next() {
    if let Some(socket) = Victim::is_this() {
        let _broker = Broker::builder().config(on_the_gpu()).address(socket).start().unwrap();
        Victim::say("serving");
        Victim::wait_for_death();
    }
    Stage::new().alone(|| {
        let place = Place::new();
        let serve = || {
            let mut broker = Victim::start(&place.socket());
            broker.await_word("serving");
            broker
        };
        let mut broker = serve();
        let model = Model::new();
        let client = Client::connect(Some(&place.socket())).unwrap();
        let weights = client.attach_with(&model.path, &on_gpu()).unwrap();
        let address = weights.tensor("first").unwrap().address();
        broker.kill();
        assert_eq!(weights.check().unwrap_err().kind(), ErrorKind::ConnectionLost);
        check(&weights);
        let _broker = serve();
        weights.reattach().unwrap();
        weights.check().unwrap();
        assert_eq!(weights.tensor("first").unwrap().address(), address);
        check(&weights);
    });
}

#[test]
fn a_killed_client_holds_no_weights_and_takes_them_from_nobody() {
    if let Some(socket) = Victim::is_this() {
        let client = Client::connect(Some(&socket)).unwrap();
        let path = client.status().unwrap().weights[0].path.clone();
        let _weights = client.attach_with(&path, &on_gpu()).unwrap();
        Victim::say("attached");
        Victim::wait_for_death();
    }
    play(Stage::new(), on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let weights = client.attach_with(&model.path, &on_gpu()).unwrap();
        let holders = || guest.status()["weights"][0]["holders"].as_array().unwrap().len();
        let mut victim = Victim::start(&guest.socket);
        victim.await_word("attached");
        assert_eq!(holders(), 2);
        victim.kill();
        eventually("the killed client's hold", || holders() == 1);
        weights.check().unwrap();
        check(&weights);
    });
}
