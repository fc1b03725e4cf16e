use luna_broker::ErrorKind;
use luna_broker::protocol::RegisteredModel;
use luna_broker::service::Service;

use crate::support::{Place, broker_at, client_at, config, eventually, sample};

fn model(name: &str) -> RegisteredModel {
    let family = "controlnet".to_owned();
    RegisteredModel { name: name.to_owned(), service: Service::Unet, family, bytes: 700, device: "cuda:1".to_owned() }
}

#[test]
fn a_model_that_a_worker_holds_itself_is_listed_until_its_session_ends() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let [worker, other] = [client_at(&place), client_at(&place)];
    worker.register(RegisteredModel { bytes: 1, ..model("depth") }).unwrap();
    worker.register(model("depth")).unwrap();
    for listed in [other.models().unwrap(), other.status().unwrap().models] {
        let found: Vec<_> = listed.iter().filter(|model| model.name == "depth").collect();
        assert_eq!(found.len(), 1, "{listed:?}");
        assert_eq!((found[0].bytes, found[0].device.as_str(), found[0].loaded), (700, "cuda:1", true));
        assert_eq!(found[0].registered_by, Some(worker.session().id));
    }
    assert_eq!(other.unet("depth").unwrap_err().kind(), ErrorKind::ModelNotFound, "it is listed, and nothing else");
    let loaded = sample(&other.metrics().unwrap(), r#"model_bytes{service="unet",device="cuda:1"}"#);
    assert_eq!(loaded, None, "no bytes of the broker's");
    worker.close();
    eventually("it is gone with its session", || {
        other.status().unwrap().models.iter().all(|model| model.registered_by.is_none())
    });
}

#[test]
fn what_cannot_be_listed_is_refused() {
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    for name in ["", "two\nlines", &"long".repeat(200)] {
        assert_eq!(client.register(model(name)).unwrap_err().kind(), ErrorKind::Configuration, "{name:?}");
    }
    (0..256).for_each(|at| client.register(model(&at.to_string())).unwrap());
    assert_eq!(client.register(model("more")).unwrap_err().kind(), ErrorKind::Busy);
    client.register(model("7")).unwrap();
}
