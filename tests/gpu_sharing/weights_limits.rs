//! Weights in memory of a GPU where something is in the way: other content, too little memory, many tensors.

use std::fs::OpenOptions;
use std::io::{Seek, SeekFrom, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use luna_broker::ErrorKind;
use luna_broker::client::{AttachOptions, CallOptions, Published};
use luna_broker::tensor::CastRule;
use safetensors::tensor::{Dtype, TensorView};

use super::*;
use crate::weights::{Model, check, counted, on_gpu};

/// Bytes of the GPU that nobody has.
fn free() -> u64 {
    CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap().free_and_total_bytes().unwrap().0
}

/// A file of `gigabytes` of which the disk stores none.
fn sparse(folder: &tempfile::TempDir, gigabytes: u64) -> String {
    let path = folder.path().join("sparse.safetensors");
    let size_bytes = gigabytes << 30;
    let header = format!(r#"{{"t":{{"dtype":"F32","shape":[{}],"data_offsets":[0,{size_bytes}]}}}}"#, size_bytes / 4);
    let header = format!("{header:width$}", width = header.len().next_multiple_of(8));
    std::fs::write(&path, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(8 + header.len() as u64 + size_bytes).unwrap();
    path.to_string_lossy().into_owned()
}

#[test]
fn a_file_that_changed_is_another_set_on_the_gpu_too() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let model = Model::new();
        let client = guest.connect();
        let old = client.attach_with(&model.path, &on_gpu()).unwrap();
        let data = counted(7);
        let view = TensorView::new(Dtype::F32, vec![data.len() / 4], &data).unwrap();
        std::fs::write(&model.path, safetensors::serialize([("first", view)], None).unwrap()).unwrap();
        let new = client.attach_with(&model.path, &on_gpu()).unwrap();
        assert!(new.tensor("first").unwrap().to_vec().unwrap() == data);
        check(&old);
        let states: Vec<_> =
            guest.status()["weights"].as_array().unwrap().iter().map(|set| set["state"].clone()).collect();
        assert_eq!(states, ["outdated", "ready"]);
        assert_eq!(old.reattach().unwrap_err().kind(), ErrorKind::Stale, "the file holds something else by now");
        check(&old);
    });
}

#[test]
fn a_file_that_changes_while_it_goes_to_the_gpu_is_an_error_and_nothing_is_kept() {
    play(Stage::new().set("SUBSTITUTE_CUDA_MEMORY", 4u64 << 30), on_the_gpu(), |guest| {
        let folder = tempfile::tempdir().unwrap();
        let path = sparse(&folder, 1);
        let client = guest.connect();
        client.open_gpu("cuda:0").unwrap();
        let before = free();
        let is_over = AtomicBool::new(false);
        let error = std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut file = OpenOptions::new().write(true).open(&path).unwrap();
                while !is_over.load(Ordering::Relaxed) {
                    file.seek(SeekFrom::End(-4)).unwrap();
                    file.write_all(&[1, 2, 3, 4]).unwrap();
                    std::thread::yield_now();
                }
            });
            let attached = client.attach_with(&path, &on_gpu());
            is_over.store(true, Ordering::Relaxed);
            attached.map(|_| ()).unwrap_err()
        });
        assert!(matches!(error.kind(), ErrorKind::Stale | ErrorKind::InvalidModel), "{:?}: {error}", error.kind());
        eventually("the end of the load", || guest.status()["weights"].as_array().unwrap().is_empty());
        assert_eq!(free(), before);
        client.attach_with(&Model::new().path, &on_gpu()).unwrap();
    });
}

/// Attaches until nothing more is to be had, which changes nothing for what is held.
fn fill_up(guest: &Guest) {
    let model = Model::new();
    let client = guest.connect();
    let held = client.attach_with(&model.path, &on_gpu()).unwrap();
    let mut more = Vec::new();
    let error = loop {
        match client.attach_with(&Model::starting_at(5 + more.len()).path, &on_gpu()) {
            Ok(weights) => more.push(weights),
            Err(error) => break error,
        }
        assert!(more.len() < 3, "there is no end of memory");
    };
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert!(!error.remedy().is_empty(), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let error = client.attach_with(&sparse(&folder, 10), &on_gpu()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    held.check().unwrap();
    check(&held);
    client.attach(&model.path).expect("the host's memory has as much again");
    drop((held, more));
    let other = Model::starting_at(50);
    eventually("room for another", || client.attach_with(&other.path, &on_gpu()).is_ok());
}

#[test]
fn more_weights_than_are_allowed_are_refused_and_nothing_is_lost() {
    play(Stage::new(), BrokerConfig { weight_bytes: Some(10 * MIB), ..on_the_gpu() }, fill_up);
}

#[test]
fn more_weights_than_the_gpu_has_are_refused_and_nothing_is_lost() {
    let stage = Stage::new().set("SUBSTITUTE_CUDA_MEMORY", 24 * MIB);
    play(stage, BrokerConfig { weight_bytes: Some(u64::MAX), ..on_the_gpu() }, fill_up);
}

#[test]
fn ten_thousand_small_tensors_lie_on_the_gpu_each_where_it_should() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("many.safetensors");
        let data: Vec<(String, [u8; 4])> = (0..10_000u32).map(|at| (format!("t{at}"), at.to_le_bytes())).collect();
        let views = data.iter().map(|(key, bytes)| (key, TensorView::new(Dtype::I32, vec![1], bytes).unwrap()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let client = guest.connect();
        let weights = client.attach_with(&path.to_string_lossy(), &on_gpu()).unwrap();
        assert_eq!(weights.len(), 10_000);
        for (key, bytes) in &data {
            let tensor = weights.tensor(key).unwrap();
            assert!(tensor.address().unwrap().is_multiple_of(512) && tensor.to_vec().unwrap() == bytes, "{key}");
        }
    });
}

#[test]
fn a_name_stays_with_those_who_hold_it_on_the_gpu() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let client = guest.connect();
        let publish = |start: usize| {
            let bytes = counted(start);
            let meta = TensorMeta::contiguous(DType::F32, Dims::of([bytes.len() as u64 / 4]));
            client.publish("name", &[Published { key: "first", meta, bytes: &bytes }], &CallOptions::default())
        };
        drop(publish(0).unwrap());
        let held = client.attach_with("name", &on_gpu()).unwrap();
        assert_eq!(publish(1).unwrap_err().kind(), ErrorKind::InUse);
        assert!(held.tensor("first").unwrap().to_vec().unwrap() == counted(0));
        let missing = held.tensor("second").unwrap_err();
        assert!(missing.to_string().contains("second"), "{missing}");
        let rule = CastRule::all(DType::I64);
        let refused = client.attach_with("name", &AttachOptions { rule, ..on_gpu() }).unwrap_err();
        assert!(refused.to_string().contains("name"), "{refused}");
        drop(held);
        eventually("the name is free", || publish(1).is_ok());
    });
}
