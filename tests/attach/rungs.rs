//! Sessions of other kinds than the usual.

use std::sync::Arc;

use luna_broker::ErrorKind;
use luna_broker::config::ClientConfig;
use luna_broker::protocol::Rung;
use luna_broker::service::Service;

use crate::file::{counted, first, publish};
use crate::scene::Scene;
use crate::support::{Place, broker_at, config, connect, local_client};

#[test]
fn where_no_memory_is_shared_the_error_says_what_to_do() {
    let scene = Scene::new(&[]);
    let path = counted(&scene.place, "model.safetensors", 2, 5000);
    let inline = connect(&scene.place, |config: &mut ClientConfig| config.rung = Some(Rung::Inline));
    let attached = inline.attach(path.to_str().unwrap()).unwrap_err();
    let published = publish(&inline, "name", 0.0, 5000).unwrap_err();
    for error in [attached, published] {
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.message().contains("inline") && !error.remedy().is_empty(), "{error}");
    }
    assert!(scene.bystander.status().unwrap().weights.is_empty());
    // A turn in the lane needs no memory.
    drop(inline.permit(Service::Vae, 1, &inline.default_options()).unwrap());
    scene.check_bystander();
}

#[test]
fn a_client_in_the_brokers_process_attaches_and_publishes_too() {
    let place = Place::new();
    let broker = Arc::new(broker_at(&place, config()));
    let path = counted(&place, "model.safetensors", 2, 5000);
    let client = local_client(&broker);
    let weights = client.attach(path.to_str().unwrap()).unwrap();
    assert_eq!(first(&weights, "t1"), 1000.0);
    let published = publish(&client, "name", 3.0, 5000).unwrap();
    assert_eq!(first(&published, "t0"), 3.0);
    weights.reattach().unwrap();
    assert_eq!(first(&weights, "t1"), 1000.0);
    assert_eq!(broker.status().weights.len(), 2);
    drop(client.permit(Service::Vae, 1, &client.default_options()).unwrap());
}
