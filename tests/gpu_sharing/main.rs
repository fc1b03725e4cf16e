//! Sessions with GPU memory on the substitute driver, broker and clients in processes of their own: which rung is
//! chosen and why, what happens when a better one fails, and order between the two sides.
#![cfg(all(feature = "cuda", target_os = "linux"))]

#[path = "../support/cuda.rs"]
mod cuda;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/roles.rs"]
mod roles;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "torch")]
#[path = "../support/tiny.rs"]
mod tiny;

mod deaths;
#[cfg(feature = "torch")]
mod elsewhere;
mod faults;
mod generations;
mod ladder;
mod leases;
mod order;
mod staging;
mod stalled;
mod weights;
mod weights_limits;

use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{CallOptions, Client, Input, Tensor, Vae};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::device::cuda::{CudaDevice, CudaSharing, Driver};
use luna_broker::device::{Device, GpuRange, Region, StreamRef};
use luna_broker::id::GpuUuid;
use luna_broker::protocol::{DeviceRung, Rung};
use luna_broker::service::{Tiling, VaeCall, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};

use crate::cuda::Transit;
use crate::roles::{Peer, Stage};
use crate::support::{HAND_OFF, Place, eventually, sample};

const MIB: u64 = 1 << 20;
/// What the client asks the broker's process beside its status.
const TRANSIT: &[u8] = b"transit?";
const REGISTERED: &[u8] = b"registered?";
const DECODE: VaeCall = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };

/// Settings of a broker on the first GPU it sees, with arenas that one picture fills.
fn on_the_gpu() -> BrokerConfig {
    BrokerConfig { device: "cuda".to_owned(), gpu_arena_bytes: 4 * MIB, gpu_bytes: 256 * MIB, ..support::config() }
}

/// A broker with these settings in one process, and in the other a client that knows where it listens.
fn play(stage: Stage, config: BrokerConfig, client: impl FnOnce(&Guest)) {
    stage.two(
        |peer| {
            let place = Place::new();
            let broker = support::broker_at(&place, config);
            peer.say(place.socket().as_bytes());
            // The client asks for numbers that only the broker has, and leaves.
            while let Some(asked) = peer.listen() {
                match &*asked {
                    TRANSIT => {
                        let Transit { locked, pageable } = Transit::so_far();
                        peer.say_number(locked);
                        peer.say_number(pageable);
                    }
                    REGISTERED => peer.say_number(cuda::registered()),
                    _ => peer.say(&serde_json::to_vec(&broker.status()).unwrap()),
                }
            }
            eventually("the sessions' end", || broker.status().sessions.is_empty());
            broker.shut_down();
        },
        |peer| {
            let socket = String::from_utf8(peer.hear()).unwrap();
            client(&Guest { peer, socket });
        },
    );
}

/// The client's side of a play.
struct Guest {
    peer: Peer,
    socket: String,
}

impl Guest {
    fn connect(&self) -> Client {
        self.connect_with(|_| {})
    }

    fn connect_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Client {
        let mut config = ClientConfig::default();
        change(&mut config);
        Client::connect_with(Some(&self.socket), config).unwrap()
    }

    /// What the broker itself says.
    fn status(&self) -> serde_json::Value {
        self.peer.say(b"status?");
        serde_json::from_slice(&self.peer.hear()).unwrap()
    }

    /// What the broker itself says of its sessions.
    fn sessions(&self) -> serde_json::Value {
        self.status()["sessions"].clone()
    }

    /// What the broker's copies took through host memory.
    fn brokers_transit(&self) -> Transit {
        self.peer.say(TRANSIT);
        Transit { locked: self.peer.hear_number(), pageable: self.peer.hear_number() }
    }

    /// Regions whose pages the broker has locked.
    fn brokers_registered(&self) -> u64 {
        self.peer.say(REGISTERED);
        self.peer.hear_number()
    }
}

/// The GPU at this place in the order in which this process sees them.
fn gpu(ordinal: usize) -> GpuUuid {
    Driver::get().unwrap().gpus()[ordinal].uuid
}

/// A latent in memory of the caller's own on a GPU, as another library would hold it.
struct OwnLatent {
    meta: TensorMeta,
    values: Vec<f32>,
    region: Arc<dyn Region>,
    gpu: GpuUuid,
}

impl OwnLatent {
    fn new(ordinal: usize, side: u64) -> Self {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, 4, side, side]));
        let region =
            CudaDevice::open(gpu(ordinal), CudaSharing::Ipc).unwrap().allocate(meta.size_bytes().unwrap()).unwrap();
        let mut latent = Self { meta, values: Vec::new(), region, gpu: gpu(ordinal) };
        latent.renew();
        latent
    }

    /// Other values than ever before.
    fn renew(&mut self) {
        let mut bytes = vec![0; self.meta.size_bytes().unwrap()];
        getrandom::fill(&mut bytes).unwrap();
        // Any bits do, but NaN would be unequal to itself.
        self.values = bytes.chunks_exact(4).map(|four| f32::from(four[0]) + f32::from(four[1]) / 256.0).collect();
        // The last call's copy of it may be enqueued still, on the stream that `input` names.
        let device = CudaDevice::open(self.gpu, CudaSharing::Ipc).unwrap();
        device.synchronize_stream(StreamRef::DEFAULT).unwrap();
        self.region.copy_in(0, &bytes_of(&self.values)).unwrap();
    }

    fn size_bytes(&self) -> u64 {
        self.meta.size_bytes().unwrap() as u64
    }

    fn input(&self) -> Input<'_> {
        // SAFETY: the region lives as long as the borrow, waits for the GPU before it closes, and the default stream is one
        // of its context.
        let range = unsafe {
            GpuRange::new(self.gpu, self.region.address(), self.meta.size_bytes().unwrap(), StreamRef::DEFAULT)
        };
        Input::on_gpu(self.meta, range).unwrap()
    }

    /// What is wrong with the do-nothing model's answer, if anything.
    fn check(&self, image: &[u8]) -> Result<(), String> {
        let image: Vec<f32> = image.chunks_exact(4).map(|four| f32::from_ne_bytes(four.try_into().unwrap())).collect();
        for at in 0..16 {
            let (found, expected) = (image[at * (image.len() / 16)], self.values[at]);
            if found != expected {
                return Err(format!("mark {at} is {found} instead of {expected}"));
            }
        }
        Ok(())
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn decode(vae: &Vae, latent: &OwnLatent) -> Tensor {
    vae.call(DECODE, latent.input(), &CallOptions::default()).unwrap().tensor
}

/// A decode there and back that must be right, whatever the rung.
fn decode_checked(client: &Client, latent: &OwnLatent) {
    let image = decode(&client.vae(HAND_OFF).unwrap(), latent);
    latent.check(&image.to_vec().unwrap()).unwrap();
}

/// What the client settled on for a GPU.
fn rung_of(client: &Client, gpu: GpuUuid) -> DeviceRung {
    let rungs = client.session().rungs;
    rungs.into_iter().find(|rung| rung.device == gpu.to_string()).expect("the GPU is open")
}

fn is_on_gpu(tensor: &Tensor) -> bool {
    tensor.place() == luna_broker::device::Place::Gpu(gpu(0))
}

fn start(config: BrokerConfig) -> luna_broker::Result<Broker> {
    Broker::builder().config(config).start()
}

/// The rungs in a reason of failures, and the code of each.
fn failures(rung: &DeviceRung) -> Vec<(Rung, &'static str)> {
    match &rung.reason {
        luna_broker::protocol::Reason::Failed(failures) => {
            failures.iter().map(|failure| (failure.rung, failure.code.name())).collect()
        }
        other => panic!("nothing failed: {other}"),
    }
}

/// The rungs of sessions and the failures before them, as monitoring is told.
fn told(client: &Client, expected: &[(&str, f64)]) {
    let metrics = client.metrics().unwrap();
    for (series, count) in expected {
        assert_eq!(sample(&metrics, series), Some(*count), "{series} in\n{metrics}");
    }
}
