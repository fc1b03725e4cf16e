use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::client::{CallOptions, Client, Published, Weights};
use luna_broker::config::BrokerConfig;
use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::weights::WeightPlan;
use luna_broker::model::{AdapterFile, ModelError, ModelFile};
use luna_broker::protocol::ModelReport;
use luna_broker::tensor::{DType, Dims, TensorMeta};
use luna_broker::{ErrorKind, Result};
use safetensors::SafeTensors;

use crate::support::{Place, broker_at, client_at, config, eventually};
use crate::tiny::{self, Batch};

/// A VAE in a file that the broker does not look at by name.
fn vae_file(place: &Place) -> PathBuf {
    let path = place.file("vae.safetensors");
    tiny::write(&path, 32);
    path
}

/// Publishes the float32 tensors of a file with this value for what is added to each colour last.
fn publish(client: &Client, name: &str, path: &Path, bias: f32) -> Result<Weights> {
    let bytes = std::fs::read(path).unwrap();
    let bias = bias.to_le_bytes().repeat(3);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let views = file.tensors();
    let tensors: Vec<Published<'_>> = views
        .iter()
        .map(|(key, view)| {
            let shape: Vec<u64> = view.shape().iter().map(|&extent| extent as u64).collect();
            let meta = TensorMeta::contiguous(DType::F32, Dims::new(&shape).unwrap());
            Published { key, meta, bytes: if *key == "taesd_decoder.19.bias" { &bias } else { view.data() } }
        })
        .collect();
    client.publish(name, &tensors, &CallOptions::default())
}

fn decode(client: &Client, model: &str) -> Result<u64> {
    Ok(tiny::digest(client.vae(model)?.decode(Batch::new(1, 4, 1).input())?.bytes()?))
}

fn report(client: &Client, name: &str) -> Option<ModelReport> {
    client.status().unwrap().models.into_iter().find(|model| model.name == name)
}

#[test]
fn a_published_set_is_run_under_its_name_as_its_file_is() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let [publisher, client] = [client_at(&place), client_at(&place)];
    let path = vae_file(&place);
    publish(&publisher, "merged vae", &path, 0.5).unwrap();
    publisher.close();
    let found = decode(&client, "merged vae").unwrap();
    assert_eq!(found, decode(&client, path.to_str().unwrap()).unwrap());
    let report = report(&client, "merged vae").unwrap();
    assert_eq!((report.family.as_str(), report.path.as_str(), report.loaded), ("taesd", "", true));
    assert_eq!(client.unet("merged vae").unwrap_err().kind(), ErrorKind::InvalidModel);
}

#[test]
fn a_set_that_is_run_gives_way_to_nothing_until_it_is_unloaded() {
    let place = Place::new();
    let path = vae_file(&place);
    let room = std::fs::metadata(&path).unwrap().len() * 3 / 2;
    let _broker = broker_at(&place, BrokerConfig { weight_bytes: Some(room), ..config() });
    let client = client_at(&place);
    drop(publish(&client, "one", &path, 0.5).unwrap());
    let first = decode(&client, "one").unwrap();
    eventually("the publisher has given it back", || client.status().unwrap().weights[0].holders.is_empty());
    // It could give way now, but for the lane that runs it.
    let error = publish(&client, "two", &path, 0.25).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.message().contains("one (the broker, which runs it)"), "{error}");
    assert_eq!(publish(&client, "one", &path, 0.25).unwrap_err().kind(), ErrorKind::InUse);
    assert_eq!(decode(&client, "one").unwrap(), first);
    client.unload("one").unwrap();
    eventually("its memory is free", || client.status().unwrap().weights.is_empty());
    assert_eq!(decode(&client, "one").unwrap_err().kind(), ErrorKind::ModelNotFound);
    drop(publish(&client, "one", &path, 0.25).unwrap());
    assert_ne!(decode(&client, "one").unwrap(), first, "the name means what was published last");
}

#[test]
fn what_a_session_has_attached_is_unloaded_by_force_alone_and_then_runs_no_more() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let held = publish(&client, "held", &vae_file(&place), 0.5).unwrap();
    decode(&client, "held").unwrap();
    assert_eq!(client.unload("held").unwrap_err().kind(), ErrorKind::InUse);
    assert!(report(&client, "held").unwrap().loaded, "nothing was unloaded");
    client.unload_with("held", luna_broker::protocol::Force::Yes).unwrap();
    assert_eq!(decode(&client, "held").unwrap_err().kind(), ErrorKind::ModelNotFound);
    assert_eq!(held.check().unwrap_err().kind(), ErrorKind::Stale);
}

#[test]
fn a_set_that_holds_no_model_is_refused_as_a_file_of_it_is() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let meta = TensorMeta::contiguous(DType::U8, Dims::of([4]));
    let _held = client.publish("words", &[Published { key: "a", meta, bytes: &[1; 4] }], &CallOptions::default());
    let error = client.vae("words").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidModel);
    assert!(error.message().contains("words holds no VAE"), "{error}");
}

/// A low-rank adapter's two matrices and its alpha, laid out in memory.
fn adapter() -> (WeightPlan, Span) {
    let tensor = |key: &str, shape: &[u64]| {
        let meta = TensorMeta::contiguous(DType::F32, Dims::new(shape).unwrap());
        (format!("lora_unet_input_blocks_1_1_proj_in.{key}"), meta)
    };
    let tensors = [tensor("lora_down.weight", &[2, 8]), tensor("lora_up.weight", &[8, 2]), tensor("alpha", &[])];
    let plan = WeightPlan::of_tensors(tensors, 64).unwrap();
    let region = InProcessDevice.allocate(plan.size_bytes as usize).unwrap();
    (plan.clone(), Span::new(region, 0, plan.size_bytes as usize).unwrap())
}

#[test]
fn tensors_in_memory_are_read_where_they_lie() {
    let (plan, span) = adapter();
    let address = span.address();
    let keeper = Arc::new("in use");
    let file = ModelFile::in_memory("style", &plan, span, Arc::clone(&keeper) as _).unwrap();
    for tensor in &plan.tensors {
        let stored = file.tensor(&tensor.key).unwrap();
        assert_eq!(file.bytes(stored).unwrap().as_ptr() as usize, address + tensor.offset as usize);
    }
    let mut read = [1; 4];
    file.read_exact_at(plan.tensors[0].offset, &mut read).unwrap();
    assert_eq!(read, [0; 4]);
    assert!(file.read_exact_at(plan.size_bytes, &mut read).is_err(), "beyond the end");
    file.check_unchanged().unwrap();
    let adapter = AdapterFile::read(Arc::new(file)).unwrap();
    assert_eq!((adapter.path().to_str(), Arc::strong_count(&keeper)), (Some("style"), 2));
    drop(adapter);
    assert_eq!(Arc::strong_count(&keeper), 1, "nothing is kept longer than it is used");
}

#[test]
fn a_plan_that_leaves_its_memory_is_refused() {
    let (plan, span) = adapter();
    let less = span.part(0, plan.tensors[2].offset as usize).unwrap();
    let refused = ModelFile::in_memory("style", &plan, less, Arc::new(()));
    assert!(matches!(refused, Err(ModelError::PlanMismatch { .. })), "{refused:?}");
}
