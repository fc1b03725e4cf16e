//! Whose turn it is, and what may not hold up others: many requests of one client, large adapters, stacks nobody uses.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use luna_broker::client::{CallOptions, Client};
use luna_broker::config::BrokerConfig;
use luna_broker::service::{AdapterMode, AdapterStack, AdapterUse, Service};
use rustix::fs::{Advice, fadvise};

use crate::support::{Place, broker_at, client_at, eventually};
use crate::{Scene, config, given, made, values};

fn queued(client: &Client) -> u64 {
    let lanes = client.status().unwrap().lanes;
    lanes.iter().find(|lane| lane.service == Service::Unet).unwrap().queued
}

#[test]
fn one_client_with_many_steps_does_not_hold_up_another() {
    const MANY: u64 = 8;
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { max_batch: Some(1), ..config() });
    let (busy, other) = (client_at(&place), client_at(&place));
    let (unet, others) = (scene.unet(&busy), scene.unet(&other));
    unet.step(&scene.input()).unwrap();
    let large = made(&[2, 4, 64, 64], |at| (at as f32).sin());
    std::thread::scope(|scope| {
        // Behind this one all others are queued.
        let first = scope.spawn(|| unet.step(&luna_broker::service::UnetInput { x: given(&large), ..scene.input() }));
        eventually("the large step's start", || {
            let lanes = other.status().unwrap().lanes;
            lanes.iter().any(|lane| lane.service == Service::Unet && lane.busy)
        });
        let call = || unet.call(&scene.input(), &AdapterStack::default(), &CallOptions::default()).unwrap().times;
        let many: Vec<_> = (0..MANY).map(|_| scope.spawn(call)).collect();
        eventually("the queue of one client", || queued(&other) == MANY);
        let times = others.call(&scene.input(), &AdapterStack::default(), &CallOptions::default()).unwrap().times;
        let mut started: Vec<_> = many.into_iter().map(|one| one.join().unwrap().started_ns).collect();
        started.sort_unstable();
        // The busy client was served last, so the other one is next.
        assert!(times.started_ns < started[1], "{times:?} after {started:?}");
        first.join().unwrap().unwrap();
    });
}

/// An adapter with one pair that the model has and so many bytes of keys that it has not.
fn large_adapter(scene: &Scene, place: &Place, bytes: usize) -> AdapterUse {
    let small = std::fs::read(scene.file("lora")).unwrap();
    let small = safetensors::SafeTensors::deserialize(&small).unwrap();
    let ballast = vec![1u8; bytes];
    let ballast = safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes], &ballast).unwrap();
    let mut all = small.tensors();
    all.push(("lora_unet_no_such_layer.lora_up.weight".to_owned(), ballast));
    let path = place.file("large.safetensors");
    safetensors::serialize_to_file(all, None, &path).unwrap();
    // Out of the page cache, as far as the file system does that.
    let file = std::fs::File::open(&path).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    AdapterUse { name: path.to_string_lossy().into_owned(), strength: 1.0 }
}

#[test]
fn a_large_adapter_that_is_read_for_one_holds_up_nobody_else() {
    const BYTES: usize = 400 << 20;
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (one, other) = (client_at(&place), client_at(&place));
    let plain = values(&scene.unet(&other).step(&scene.input()).unwrap());
    let adapters = AdapterStack { adapters: vec![large_adapter(&scene, &place, BYTES)], mode: AdapterMode::Side };
    let (asked, answered) = (AtomicBool::new(false), AtomicBool::new(false));
    let (readers, unet) = (scene.unet(&one), scene.unet(&other));
    let meanwhile = std::thread::scope(|scope| {
        let prefetch = scope.spawn(|| {
            asked.store(true, Ordering::Release);
            let taken = readers.prefetch(&adapters, &CallOptions::default());
            answered.store(true, Ordering::Release);
            taken
        });
        let mut meanwhile = 0;
        while !answered.load(Ordering::Acquire) {
            assert_eq!(values(&unet.step(&scene.input()).unwrap()), plain);
            meanwhile += u32::from(asked.load(Ordering::Acquire) && !answered.load(Ordering::Acquire));
        }
        assert_eq!(prefetch.join().unwrap().unwrap()[0].unknown_keys, 1);
        meanwhile
    });
    // In the lane it would have let one through before it, and one after.
    assert!(meanwhile > 2, "{meanwhile} steps while the adapter was read");
}

#[test]
fn of_stacks_that_are_asked_for_often_the_copies_nobody_uses_give_way() {
    let Some(scene) = Scene::of("sd15") else { return };
    let stack = |strength: &str| scene.stack(&format!("lora@{strength}"), AdapterMode::Auto);
    let heat = |client: &Client, strength: &str| {
        let unet = scene.unet(client);
        let mut rounds = 0;
        let is_hot = || {
            let stacks = client.status().unwrap().stacks;
            let merged = stacks.into_iter().find(|one| one.merged && one.adapters == stack(strength).adapters);
            merged.map(|one| one.bytes)
        };
        loop {
            if let Some(bytes) = is_hot() {
                return bytes;
            }
            rounds += 1;
            assert!(rounds < 2000, "lora@{strength} was asked for {rounds} times");
            unet.call(&scene.input(), &stack(strength), &CallOptions::default()).unwrap();
        }
    };
    let place = Place::new();
    let merged = {
        let _broker = broker_at(&place, config());
        heat(&client_at(&place), "1")
    };
    let place = Place::new();
    let adapter_bytes = merged + merged / 2;
    let _broker = broker_at(&place, BrokerConfig { adapter_bytes, ..config() });
    let client = client_at(&place);
    assert_eq!(heat(&client, "1"), merged);
    assert_eq!(heat(&client, "0.5"), merged);
    let stacks = client.status().unwrap().stacks;
    assert_eq!(stacks.iter().filter(|one| one.merged).count(), 1, "there is room for the copies of one");
}

#[test]
fn what_adapters_made_of_a_model_goes_with_it() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let _broker = broker_at(&place, BrokerConfig { model_idle: Some(Duration::from_millis(200)), ..config() });
    let client = client_at(&place);
    let unet = scene.unet(&client);
    let stack = scene.stack("lora@1", AdapterMode::Merged);
    let with = || values(&unet.call(&scene.input(), &stack, &CallOptions::default()).unwrap().tensor);
    let before = with();
    eventually("the model's and its stacks' end", || {
        let status = client.status().unwrap();
        status.stacks.is_empty() && status.models.iter().all(|model| !model.loaded)
    });
    assert_eq!(with(), before);
}
