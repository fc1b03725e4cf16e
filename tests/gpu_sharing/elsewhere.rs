use std::collections::BTreeMap;

use luna_broker::ErrorKind;
use luna_broker::client::ResultPlace;
use luna_broker::service::Service;

use super::*;
use crate::tiny::{self, Batch};

#[test]
fn a_service_that_runs_elsewhere_takes_host_tensors_and_says_so_of_others() {
    let service_devices = BTreeMap::from([(Service::Vae, "cpu".to_owned())]);
    play(Stage::new(), BrokerConfig { service_devices, ..on_the_gpu() }, |guest| {
        let place = Place::new();
        let path = place.file("vae.safetensors");
        tiny::write(&path, 8);
        let client = guest.connect();
        let lanes = client.status().unwrap().lanes;
        let devices: Vec<_> = lanes.into_iter().map(|lane| (lane.service, lane.device)).collect();
        let expected = [(Service::Vae, "cpu".to_owned()), (Service::Unet, gpu(0).to_string())];
        assert_eq!(devices, [&expected[..], &[(Service::Clip, gpu(0).to_string())]].concat());
        let vae = client.vae(path.to_str().unwrap()).unwrap();
        assert_eq!(vae.info().device, "cpu");
        let (batch, latent) = (Batch::new(1, 8, 1), OwnLatent::new(0, 8));
        let on_gpu = CallOptions { result: ResultPlace::Gpu(gpu(0)), ..CallOptions::default() };
        let to_host = CallOptions { result: ResultPlace::Host, ..CallOptions::default() };
        for (input, options) in [(latent.input(), to_host), (batch.input(), on_gpu)] {
            let error = vae.call(DECODE, input, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.message().contains(&format!("runs on cpu, and memory of {}", gpu(0))), "{error}");
        }
        vae.decode(batch.input()).unwrap();
        decode_checked(&client, &latent);
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
    });
}
