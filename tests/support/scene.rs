//! A broker in a process of its own, and somebody who must not notice what others do to it.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::process::Command;

use luna_broker::client::{Client, Tensor};

use crate::process::{BrokerProcess, Footprint, serve_command};
use crate::support::{HAND_OFF, Latent, Place, client_at};

/// A broker with a bystander: a client that does nothing wrong and must not notice what happens to others.
pub struct Scene {
    pub broker: BrokerProcess,
    pub bystander: Client,
    latent: Latent,
    /// A result from before anything happened.
    kept: Tensor,
    pub place: Place,
}

impl Scene {
    pub fn new(arguments: &[&str]) -> Self {
        Self::prepared(arguments, |_| {})
    }

    /// As [`Scene::new`], with something done to the broker's command first.
    pub fn prepared(arguments: &[&str], prepare: impl FnOnce(&mut Command)) -> Self {
        let place = Place::new();
        let mut command = serve_command(&place.socket(), arguments);
        prepare(&mut command);
        let broker = BrokerProcess::launch(command).unwrap_or_else(|said| panic!("the broker does not serve: {said}"));
        let bystander = client_at(&place);
        let latent = Latent::new(16, 16, 42.0);
        let kept = bystander.vae(HAND_OFF).unwrap().decode(latent.input()).unwrap();
        Self { broker, bystander, latent, kept, place }
    }

    /// What the broker holds while nobody but the bystander is there.
    pub fn footprint(&self) -> Footprint {
        self.broker.footprint()
    }

    /// The bystander's old result is still its own, and new ones are right.
    pub fn check_bystander(&self) {
        self.latent.check(&self.kept).unwrap();
        let vae = self.bystander.vae(HAND_OFF).unwrap();
        for round in 0..20 {
            let latent = Latent::new(8 + round % 3, 24, round as f32 * 1000.0);
            latent.check(&vae.decode(latent.input()).unwrap()).unwrap();
        }
        self.latent.check(&self.kept).unwrap();
    }
}
