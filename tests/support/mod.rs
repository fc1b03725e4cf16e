//! What several test files need: brokers in this process, inputs, and what the do-nothing model should answer.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use luna_broker::broker::Broker;
use luna_broker::client::{Client, Input, Tensor};
use luna_broker::config::{BrokerConfig, ClientConfig};
use luna_broker::tensor::{DType, Dims, TensorMeta};

/// The do-nothing model.
pub const HAND_OFF: &str = "builtin:hand-off";

/// Settings that keep tests small and quick to fail.
pub fn config() -> BrokerConfig {
    BrokerConfig { bench_models: true, arena_bytes: 4 << 20, session_bytes: 256 << 20, ..BrokerConfig::default() }
}

/// A folder for one test's socket, gone with the value.
pub struct Place {
    pub folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder can be made") }
    }

    pub fn socket(&self) -> String {
        if cfg!(windows) {
            let unique = self.folder.path().file_name().expect("a temporary folder has a name");
            return format!("luna-broker-test-{}", unique.to_string_lossy());
        }
        self.folder.path().join("broker.sock").to_string_lossy().into_owned()
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

/// A broker that listens on a socket of its own.
pub fn broker_at(place: &Place, config: BrokerConfig) -> Broker {
    Broker::builder().config(config).address(place.socket()).start().expect("the broker starts")
}

/// A client of this test's own name.
pub fn client_at(place: &Place) -> Client {
    connect(place, |_| {})
}

/// A client with other settings than the default.
pub fn connect(place: &Place, change: impl FnOnce(&mut ClientConfig)) -> Client {
    let mut config = ClientConfig { timeout: Some(Duration::from_secs(60)), ..ClientConfig::default() };
    change(&mut config);
    Client::connect_with(Some(&place.socket()), config).expect("the client connects")
}

/// A client inside the broker's process.
pub fn local_client(broker: &Arc<Broker>) -> Client {
    let broker = Arc::clone(broker);
    Client::over(ClientConfig::default(), move || broker.connect_local()).expect("the client connects")
}

/// The value of a series, name and labels as `metrics` writes them; absent where it is not told.
pub fn sample(metrics: &str, series: &str) -> Option<f64> {
    let line = metrics.lines().find_map(|line| line.strip_prefix("luna_broker_")?.strip_prefix(series));
    line.and_then(|rest| rest.strip_prefix(' ')).map(|value| value.parse().expect("a sample is a number"))
}

/// A latent `[1, 4, h, w]` in float32 whose elements count up from `start`.
pub struct Latent {
    pub meta: TensorMeta,
    bytes: Vec<u8>,
    start: f32,
}

impl Latent {
    pub fn new(height: u64, width: u64, start: f32) -> Self {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of([1, 4, height, width]));
        let count = meta.elements().expect("small");
        let bytes = (0..count).flat_map(|at| (start + at as f32).to_ne_bytes()).collect();
        Self { meta, bytes, start }
    }

    pub fn input(&self) -> Input<'_> {
        Input::new(self.meta, &self.bytes).expect("the bytes fit the description")
    }

    /// What is wrong with the do-nothing model's answer, if anything.
    pub fn check(&self, image: &Tensor) -> Result<(), String> {
        let shape = self.meta.shape.as_slice();
        let expected = Dims::of([1, 8 * shape[2], 8 * shape[3], 3]);
        if image.meta() != &TensorMeta::contiguous(DType::F32, expected) {
            return Err(format!("the image is {:?}", image.meta()));
        }
        let values = image.floats().map_err(|error| error.to_string())?;
        for at in 0..16 {
            let (found, expected) = (values[at * (values.len() / 16)], self.start + at as f32);
            if found != expected {
                return Err(format!("mark {at} is {found} instead of {expected}"));
            }
        }
        Ok(())
    }
}

/// Waits for something that another thread or process brings about; the panic says what did not happen.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen within 20 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}
