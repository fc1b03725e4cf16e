use std::collections::BTreeMap;

use luna_broker::ErrorKind;
use luna_broker::client::{Addresses, Brokers, CallOptions, Client};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::protocol::Force;
use luna_broker::service::Service;

use crate::clip_names::{Size, transformers};
#[cfg(feature = "cuda")]
use crate::cuda::SubstituteCuda;
use crate::process::{BrokerProcess, serve_command};
use crate::support::{HAND_OFF, Latent, Place, broker_at, client_at, config};
use crate::tiny;
use crate::unet::{Numbers, write_sparse};

/// Brokers in places of their own, of which the first serves VAEs, the second UNets and the third text encoders, and a folder
/// of one model each.
struct Split {
    places: [Place; 3],
    _brokers: [luna_broker::broker::Broker; 3],
}

impl Split {
    fn new() -> Self {
        let places = [Place::new(), Place::new(), Place::new()];
        tiny::write(&places[0].file("vae.safetensors"), 8);
        write_sparse(&places[0].file("unet.safetensors"), &Numbers::SMALL.entries(), "F16", None);
        let small = Size { vocabulary: 600, width: 64, layers: 2, ff: 128 };
        write_sparse(&places[0].file("clip.safetensors"), &transformers("text_model.", small), "F16", None);
        let folder = places[0].folder.path().to_owned();
        let start = |place: &Place, service| {
            let (model_folders, services) = (vec![folder.clone()], vec![service]);
            broker_at(place, BrokerConfig { model_folders, services, ..config() })
        };
        let brokers =
            [start(&places[0], Service::Vae), start(&places[1], Service::Unet), start(&places[2], Service::Clip)];
        Self { places, _brokers: brokers }
    }

    fn addresses(&self) -> Addresses {
        let [vae, unet, clip] = self.places.each_ref().map(Place::socket);
        Addresses::parse(&format!("vae={vae},unet={unet},clip={clip}")).unwrap()
    }
}

#[test]
fn what_is_not_served_is_refused_with_what_is() {
    let split = Split::new();
    let client = client_at(&split.places[0]);
    let error = client.unet("unet").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert_eq!(error.message(), "the unet service is not served here, only vae");
    assert!(error.remedy().contains("--services"), "{error}");
    assert_eq!(
        client.load_with(Some(Service::Unet), "unet", &CallOptions::default()).unwrap_err().kind(),
        error.kind()
    );
    let other = client_at(&split.places[1]);
    let permit = other.permit(Service::Vae, 0, &CallOptions::default()).unwrap_err();
    assert_eq!(permit.message(), "the vae service is not served here, only unet");
    assert_eq!(other.vae(HAND_OFF).unwrap_err().kind(), ErrorKind::Unsupported);
    let lanes = |client: &Client| client.status().unwrap().lanes.iter().map(|lane| lane.service).collect::<Vec<_>>();
    assert_eq!((lanes(&client), lanes(&other)), (vec![Service::Vae], vec![Service::Unet]));
    let third = client_at(&split.places[2]);
    assert_eq!(third.unet("unet").unwrap_err().message(), "the unet service is not served here, only clip");
    assert_eq!(client.clip(&["clip"]).unwrap_err().message(), "the clip service is not served here, only vae");
    assert_eq!(lanes(&third), [Service::Clip]);
    let listed: Vec<_> = other.models().unwrap().into_iter().map(|model| model.name).collect();
    assert_eq!(listed, ["unet.safetensors"], "nothing that it cannot run");
}

#[test]
fn calls_go_to_the_broker_of_their_service() {
    let split = Split::new();
    let brokers = Brokers::connect(&split.addresses(), ClientConfig::default()).unwrap();
    let latent = Latent::new(8, 8, 1.0);
    latent.check(&brokers.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap()).unwrap();
    assert_eq!(brokers.unet("unet").unwrap().info().service, Service::Unet);
    let clip = brokers.clip(&["clip"]).unwrap();
    assert_eq!((clip.info().service, clip.info().name.as_str()), (Service::Clip, "clip.safetensors"));
    for (service, place) in [Service::Vae, Service::Unet, Service::Clip].into_iter().zip(&split.places) {
        let status = brokers.of(service).unwrap().status().unwrap();
        assert_eq!(status.address, place.socket(), "{service:?}");
        let known: Vec<_> = status.models.into_iter().map(|model| model.service).collect();
        assert!(known.iter().all(|known| *known == service), "{service:?}: {known:?}");
    }
    let mut listed: Vec<_> = brokers.models().unwrap().into_iter().map(|model| model.service.name()).collect();
    listed.dedup();
    assert_eq!(listed, ["vae", "unet", "clip"]);
    assert_eq!(brokers.each().len(), 3);
    for client in brokers.each() {
        assert_eq!(client.status().unwrap().sessions.len(), 1, "each broker is connected to once");
    }
    brokers.close();
    assert_eq!(brokers.first().ping().unwrap_err().kind(), ErrorKind::ConnectionLost);
}

#[cfg(feature = "torch")]
#[test]
fn a_model_is_loaded_and_unloaded_wherever_a_part_of_it_is_run() {
    let split = Split::new();
    let brokers = Brokers::connect(&split.addresses(), ClientConfig::default()).unwrap();
    let loaded = |name: &str| {
        let models = brokers.models().unwrap();
        models.iter().any(|model| model.name == format!("{name}.safetensors") && model.loaded)
    };
    for name in ["vae", "unet", "clip"] {
        assert_eq!(brokers.load(name).unwrap().len(), 1);
        assert!(loaded(name));
        brokers.unload(name, Force::No).unwrap();
        assert!(!loaded(name));
    }
    assert_eq!(brokers.load("neither").unwrap_err().kind(), ErrorKind::ModelNotFound);
}

#[test]
fn a_service_without_a_broker_is_told_with_those_that_have_one() {
    let split = Split::new();
    let only = Addresses::Each(vec![(Service::Unet, split.places[1].socket())]);
    let brokers = Brokers::connect(&only, ClientConfig::default()).unwrap();
    let error = brokers.vae("vae").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("no broker was named for the vae service, only for unet"), "{error}");
    let several = format!("vae={},unet={}", split.places[0].socket(), split.places[1].socket());
    let error = Client::connect(Some(&several)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Configuration);
}

#[test]
fn a_device_is_looked_for_only_where_its_service_is_served() {
    let place = Place::new();
    let devices = BTreeMap::from([(Service::Unet, "oven".to_owned())]);
    let config = BrokerConfig { service_devices: devices, ..config() };
    let unserved = BrokerConfig { services: vec![Service::Vae], ..config.clone() };
    // What it says depends on whether there is a driver that knows devices.
    assert!(luna_broker::broker::Broker::builder().config(config).start().is_err());
    let _broker = broker_at(&place, unserved);
}

#[test]
fn flags_say_what_is_served_and_where() {
    let place = Place::new();
    let serve = ["--services", "vae", "--vae-device", "cpu", "--unet-device", "oven"];
    let broker = BrokerProcess::start(&place.socket(), &serve);
    let lanes = client_at(&place).status().unwrap().lanes;
    assert_eq!((lanes.len(), lanes[0].service, lanes[0].device.as_str()), (1, Service::Vae, "cpu"));
    drop(broker);
    let wrong: [&[&str]; 2] = [&["--services", "vae,oven"], &["--services", "vae", "--unet", "x.safetensors"]];
    for arguments in wrong {
        let said = BrokerProcess::launch(serve_command(&place.socket(), arguments)).err().unwrap();
        assert!(said.contains("--services"), "{said}");
    }
}

#[cfg(feature = "cuda")]
#[test]
fn each_service_runs_where_its_flag_says_in_one_process() {
    let cuda = SubstituteCuda::new();
    let devices = |flags: &[&str]| {
        let place = Place::new();
        let mut command = serve_command(&place.socket(), flags);
        command.envs(cuda.environment()).env("SUBSTITUTE_CUDA_DEVICES", "alpha,beta");
        let broker = BrokerProcess::launch(command).unwrap_or_else(|said| panic!("{flags:?}: {said}"));
        let lanes = client_at(&place).status().unwrap().lanes;
        drop(broker);
        [Service::Vae, Service::Unet, Service::Clip]
            .map(|service| lanes.iter().find(|lane| lane.service == service).unwrap().device.clone())
    };
    let [first, _, second] = devices(&["--device", "cuda:0", "--clip-device", "cuda:1"]);
    assert!(first.starts_with("GPU-") && second.starts_with("GPU-") && first != second, "{first} {second}");
    let (first, second) = (first.as_str(), second.as_str());
    for (flags, expected) in [
        (&["--unet-device", "cuda:1", "--clip-device", "cuda:0"][..], ["cpu", second, first]),
        (&["--vae-device", "cuda:1", "--clip-device", "cuda"], [second, "cpu", first]),
        (&["--device", "cuda:1", "--vae-device", "cpu", "--unet-device", first], ["cpu", first, second]),
        (&["--device", "cuda:0", "--unet-device", "cpu", "--clip-device", "cpu"], [first, "cpu", "cpu"]),
    ] {
        assert_eq!(devices(flags), expected, "{flags:?}");
    }
}
