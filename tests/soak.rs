//! Many clients come, work, and are killed; afterwards the broker holds nothing that it did not hold before.
//! `LUNA_BROKER_SOAK_REQUESTS` says how many requests, `LUNA_BROKER_SOAK_SEED` repeats a run.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[path = "support/process.rs"]
mod process;
#[path = "support/scene.rs"]
mod scene;
mod support;
#[cfg(feature = "torch")]
#[path = "support/tiny.rs"]
mod tiny;

use luna_broker::client::{Client, Tensor, Vae};
use luna_broker::config::ClientConfig;
use luna_broker::protocol::Rung;
use process::{ClientProcess, answer, named_segments, obey_commands};
use scene::Scene;
use support::{HAND_OFF, Latent, eventually};

/// Requests in an ordinary run.
const REQUESTS: u64 = 1000;

/// Client processes alive at once.
const CLIENTS: usize = 3;

/// Mappings by which the allocator's own may differ, as it splits and joins them; clients are several times as many.
const SPLITS: usize = 4;

/// A fixed sequence of numbers for each seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

fn from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|value| value.parse().ok())
}

#[test]
#[ignore = "the client process of other tests"]
fn client_process() {
    obey_commands(|socket, words| match *words {
        ["work", seed, model] => work(socket, seed.parse().expect("a number"), model),
        _ => panic!("{words:?} is no command"),
    });
}

/// Sends requests of all kinds, says so after each, and never stops.
fn work(socket: &str, seed: u64, model: &str) -> ! {
    let mut random = Random(seed);
    let rung = (random.below(4) == 0).then_some(Rung::Inline);
    let config = ClientConfig { rung, name: format!("worker-{seed}"), ..ClientConfig::default() };
    let client = Client::connect_with(Some(socket), config).unwrap();
    let vae = client.vae(HAND_OFF).unwrap();
    let computing = (model != "none").then(|| client.vae(model).unwrap());
    let mut held: Vec<Tensor> = Vec::new();
    loop {
        request(&client, &vae, computing.as_ref(), &mut random, &mut held);
        answer("done");
    }
}

fn request(client: &Client, vae: &Vae, computing: Option<&Vae>, random: &mut Random, held: &mut Vec<Tensor>) {
    match random.below(20) {
        0 => _ = client.status().unwrap(),
        1 => held.clear(),
        2 => assert!(vae.decode(Latent::new(8, 0, 0.0).input()).is_err()),
        #[cfg(feature = "torch")]
        3..6 => {
            let computing = computing.expect("a model is made where it can be run");
            let image = computing.decode(tiny::Batch::new(1 + random.below(3), 8, random.below(100)).input()).unwrap();
            held.push(image);
        }
        _ => {
            let latent = Latent::new(2 + random.below(60), 2 + random.below(60), random.below(1000) as f32);
            let image = vae.decode(latent.input()).unwrap();
            latent.check(&image).unwrap();
            if random.below(3) == 0 && held.len() < 20 {
                held.push(image);
            }
        }
    }
    // Only a build that computes has a second model.
    _ = computing;
}

/// Runs clients and kills each after some requests, in the middle of the next one, until `requests` were answered.
fn round(scene: &Scene, model: &str, random: &mut Random, requests: u64) {
    let start = |random: &mut Random| {
        let mut client = ClientProcess::start(&scene.place.socket());
        client.tell(&format!("work {} {model}", random.below(u64::MAX)));
        let life = 10 + random.below(requests.div_ceil(8).clamp(20, 400));
        (client, life)
    };
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| start(random)).collect();
    let (mut answered, mut killed) = (0, 0);
    while answered < requests {
        for place in &mut clients {
            let (client, life) = place;
            for _ in 0..*life {
                assert_eq!(client.hear().as_deref(), Some("done"), "a client does its work until it is killed");
            }
            answered += *life;
            client.kill();
            killed += 1;
            *place = start(random);
        }
        scene.check_bystander();
    }
    for (client, _) in &mut clients {
        client.kill();
    }
    eprintln!("{answered} requests were answered, {} clients killed", killed + clients.len());
    eventually("the end of all sessions", || scene.bystander.status().unwrap().sessions.len() == 1);
    eventually("an idle lane", || !scene.bystander.status().unwrap().lanes[0].busy);
}

#[test]
fn nothing_is_left_of_killed_clients() {
    let requests = from_environment("LUNA_BROKER_SOAK_REQUESTS").unwrap_or(REQUESTS);
    let seed = from_environment("LUNA_BROKER_SOAK_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("LUNA_BROKER_SOAK_SEED={seed}");
    let mut random = Random(seed);
    let scene = Scene::prepared(&[], |command| {
        // The C library keeps stacks and heaps of ended threads for later, as many as there ever were at once. Without
        // them every mapping is somebody's.
        command.env("MALLOC_ARENA_MAX", "1").env("GLIBC_TUNABLES", "glibc.pthread.stack_cache_size=0");
    });
    #[cfg(feature = "torch")]
    let model = {
        let path = scene.place.file("tiny.safetensors");
        tiny::write(&path, 16);
        path.to_string_lossy().into_owned()
    };
    #[cfg(not(feature = "torch"))]
    let model = "none".to_owned();
    // What the first clients make the broker keep for good: threads that compute, caches of the allocator.
    round(&scene, &model, &mut random, requests.div_ceil(5));
    let mut before = scene.footprint();
    eventually("a calm broker", || {
        let now = scene.footprint();
        std::mem::replace(&mut before, now) == now
    });
    let segments = named_segments();
    round(&scene, &model, &mut random, requests);
    eventually("the return of threads, descriptors and memory", || scene.footprint().is_back_to(&before));
    let (after, status) = (scene.footprint(), scene.bystander.status().unwrap());
    eprintln!("before: {before:?}, {segments} named segments");
    eprintln!("after:  {after:?}, {} named segments", named_segments());
    eprintln!("leases: {}, sessions lost: {}", status.sessions[0].leases, status.sessions_lost);
    // The bystander's one kept result.
    assert_eq!((status.sessions.len(), status.sessions[0].leases), (1, 1));
    assert!(after.mappings <= before.mappings + SPLITS, "mappings grew: {before:?} {after:?}");
    assert!(named_segments() <= segments, "named segments are left");
    scene.check_bystander();
}
