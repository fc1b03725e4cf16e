use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use luna_broker::broker::Broker;
use luna_broker::client::{CallOptions, Client};
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::ModelReport;
use luna_broker::service::{Tiling, VaeCall, VaeOperation};
use luna_broker::{Error, ErrorKind};

use crate::support::{Place, broker_at, client_at, config, eventually, sample};
use crate::tiny::{self, Batch};
use crate::unet::{Numbers, write_sparse};

/// Two VAEs of one size, `one` and `two`, and a larger UNet, in a folder of models.
struct Setup {
    place: Place,
    folder: PathBuf,
    vae_bytes: u64,
    unet_bytes: u64,
}

impl Setup {
    fn new() -> Self {
        let place = Place::new();
        let folder = place.file("models");
        std::fs::create_dir(&folder).unwrap();
        tiny::write(&folder.join("one.safetensors"), 32);
        tiny::write(&folder.join("two.safetensors"), 32);
        write_sparse(&folder.join("unet.safetensors"), &Numbers::SMALL.entries(), "F16", None);
        let mut setup = Self { place, folder, vae_bytes: 0, unet_bytes: 0 };
        let broker = setup.broker(|_| {});
        setup.vae_bytes = broker.describe(luna_broker::service::Service::Vae, "one").unwrap().bytes;
        setup.unet_bytes = broker.describe(luna_broker::service::Service::Unet, "unet").unwrap().bytes;
        assert!(setup.unet_bytes > setup.vae_bytes && setup.vae_bytes > 0);
        setup
    }

    fn broker(&self, change: impl FnOnce(&mut BrokerConfig)) -> Broker {
        // Room for what an endless decode gives.
        let models = vec![self.folder.clone()];
        let mut config = BrokerConfig { model_folders: models, threads: 1, session_bytes: 1 << 30, ..config() };
        change(&mut config);
        broker_at(&self.place, config)
    }
}

fn report(client: &Client, name: &str) -> ModelReport {
    let models = client.status().unwrap().models;
    models.into_iter().find(|model| model.name == format!("{name}.safetensors")).unwrap_or_else(|| panic!("no {name}"))
}

fn loaded(client: &Client) -> Vec<String> {
    let models = client.status().unwrap().models.into_iter().filter(|model| model.loaded);
    let mut names: Vec<String> = models.map(|model| model.name.trim_end_matches(".safetensors").to_owned()).collect();
    names.sort();
    names
}

fn decode(client: &Client, model: &str) -> u64 {
    let vae = client.vae(model).unwrap();
    tiny::digest(vae.decode(Batch::new(1, 4, 1).input()).unwrap().bytes().unwrap())
}

/// A decode that runs until it is let go.
struct Endless {
    over: Arc<AtomicBool>,
    call: Option<std::thread::JoinHandle<Result<(), Error>>>,
}

impl Endless {
    fn start(client: &Client, model: &str) -> Self {
        let (vae, over) = (client.vae(model).unwrap(), Arc::new(AtomicBool::new(false)));
        let is_over = Arc::clone(&over);
        let call = std::thread::spawn(move || {
            let interrupted = || is_over.load(Ordering::Relaxed);
            let options = CallOptions { interrupted: Some(&interrupted), ..CallOptions::default() };
            let call = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };
            vae.call(call, Batch::endless().input(), &options).map(drop)
        });
        let endless = Self { over, call: Some(call) };
        eventually("the endless decode runs", || client.status().unwrap().lanes.iter().any(|lane| lane.busy));
        endless
    }

    fn end(mut self) {
        self.over.store(true, Ordering::Relaxed);
        let ended = self.call.take().unwrap().join().unwrap();
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
    }
}

#[test]
fn the_longest_unused_model_gives_way_to_another_of_its_lane() {
    let setup = Setup::new();
    tiny::write(&setup.folder.join("three.safetensors"), 32);
    let _broker = setup.broker(|config| config.model_bytes = Some(2 * setup.vae_bytes));
    let client = client_at(&setup.place);
    let first = decode(&client, "one");
    decode(&client, "two");
    decode(&client, "one");
    decode(&client, "three");
    assert_eq!(loaded(&client), ["one", "three"]);
    decode(&client, "two");
    assert_eq!(loaded(&client), ["three", "two"]);
    assert_eq!(decode(&client, "one"), first, "the same once it is loaded again");
    let metrics = client.metrics().unwrap();
    let evicted = sample(&metrics, r#"model_evictions_total{service="vae",device="cpu",reason="room"}"#);
    assert_eq!(evicted, Some(3.0), "{metrics}");
}

#[test]
fn models_give_way_to_those_of_another_lane() {
    let setup = Setup::new();
    let _broker = setup.broker(|config| config.model_bytes = Some(setup.unet_bytes));
    let client = client_at(&setup.place);
    client.load("one").unwrap();
    client.load("two").unwrap();
    client.load("unet").unwrap();
    assert_eq!(loaded(&client), ["unet"]);
    client.load("one").unwrap();
    assert_eq!(loaded(&client), ["one"]);
}

#[test]
fn what_a_request_runs_on_stays_and_what_then_has_no_room_is_refused_with_sizes() {
    let setup = Setup::new();
    let limit = setup.unet_bytes + setup.vae_bytes - 1;
    let _broker = setup.broker(|config| config.model_bytes = Some(limit));
    let client = client_at(&setup.place);
    let endless = Endless::start(&client, "one");
    let error = client.load("unet").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    for word in [&setup.unet_bytes.to_string(), &setup.vae_bytes.to_string(), &limit.to_string(), "one.safetensors"] {
        assert!(error.message().contains(word), "{word}: {error}");
    }
    assert!(error.remedy().contains("--model-bytes"), "{error}");
    assert_eq!(loaded(&client), ["one"]);
    endless.end();
    eventually("the request has left the lane", || report(&client, "one").idle_s.is_some());
    client.load("unet").unwrap();
    assert_eq!(loaded(&client), ["unet"]);
}

#[test]
fn a_model_larger_than_the_bound_is_refused_and_takes_nobodys_place() {
    let setup = Setup::new();
    let _broker = setup.broker(|config| config.model_bytes = Some(setup.unet_bytes - 1));
    let client = client_at(&setup.place);
    decode(&client, "one");
    let error = client.load("unet").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::OutOfMemory);
    assert!(error.message().contains(&format!("unet.safetensors takes {} bytes", setup.unet_bytes)), "{error}");
    assert_eq!(loaded(&client), ["one"]);
}

#[test]
fn a_model_that_nobody_uses_goes_after_a_while_and_one_in_use_stays() {
    let setup = Setup::new();
    let _broker = setup.broker(|config| config.model_idle = Some(Duration::from_millis(200)));
    let client = client_at(&setup.place);
    client.load("unet").unwrap();
    let endless = Endless::start(&client, "one");
    // Loaded before the other, and in use since.
    eventually("the unused model goes", || !loaded(&client).contains(&"unet".to_owned()));
    client.load("unet").unwrap();
    eventually("the unused model goes again", || !loaded(&client).contains(&"unet".to_owned()));
    assert_eq!(loaded(&client), ["one"]);
    endless.end();
    eventually("the other goes once it is unused", || loaded(&client).is_empty());
    let evicted = |service: &str| {
        let series = format!(r#"model_evictions_total{{service="{service}",device="cpu",reason="idle"}}"#);
        sample(&client.metrics().unwrap(), &series)
    };
    assert_eq!((evicted("unet"), evicted("vae")), (Some(2.0), Some(1.0)));
    decode(&client, "one");
}

#[test]
fn reports_tell_who_has_asked_for_a_model_and_since_when_nobody_uses_it() {
    let setup = Setup::new();
    let _broker = setup.broker(|_| {});
    let [first, second] = [client_at(&setup.place), client_at(&setup.place)];
    decode(&first, "one");
    decode(&first, "one");
    assert_eq!(report(&first, "one").users, 1);
    second.vae("one").unwrap();
    assert_eq!(report(&first, "one").users, 2);
    second.close();
    eventually("the closed session is no user any more", || report(&first, "one").users == 1);
    let endless = Endless::start(&first, "one");
    assert_eq!(report(&first, "one").idle_s, None);
    endless.end();
    eventually("nobody uses it", || report(&first, "one").idle_s.is_some());
    first.unload("one").unwrap();
    assert_eq!(report(&first, "one").users, 0);
}
