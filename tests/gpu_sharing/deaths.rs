//! One side killed while the other holds GPU memory, or has work in flight.

use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use luna_broker::ErrorKind;
use luna_broker::service::GpuOrder;

use super::*;
use crate::stalled::{LONG, Stalled, meanwhile, patient_for};

/// Tells the test that was started again, as the process to be killed, where the broker is.
const VICTIM: &str = "LUNA_BROKER_TEST_VICTIM_AT";

/// What the victim has done is said behind this, apart from what the harness says.
const MARK: &str = "> ";

/// The calling test once more, in a process to be killed. Killed when dropped.
pub(super) struct Victim {
    child: Child,
    said: Lines<BufReader<ChildStdout>>,
}

impl Victim {
    pub(super) fn start(socket: &str) -> Self {
        let thread = std::thread::current();
        let test = thread.name().expect("the harness names a test's thread after the test");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([test, "--exact", "--nocapture"])
            .env(VICTIM, socket)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let said = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, said }
    }

    /// Where this process is the victim: the socket.
    pub(super) fn is_this() -> Option<String> {
        std::env::var(VICTIM).ok()
    }

    /// Says what was done.
    pub(super) fn say(what: &str) {
        // The harness has begun a line of its own.
        println!("\n{MARK}{what}");
    }

    /// Waits until the victim has said so.
    pub(super) fn await_word(&mut self, what: &str) {
        let said = self.said.by_ref().map_while(Result::ok);
        let mut words = said.filter_map(|line| line.strip_prefix(MARK).map(str::to_owned));
        assert_eq!(words.next().as_deref(), Some(what));
    }

    /// SIGKILL; the process is gone when this returns.
    pub(super) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(super) fn wait_for_death() -> ! {
        loop {
            std::thread::park();
        }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        // Gone already where the test killed it.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

#[test]
fn a_broker_that_is_killed_leaves_its_clients_whole_and_the_next_one_serves_them() {
    if let Some(socket) = Victim::is_this() {
        let _broker = Broker::builder().config(on_the_gpu()).address(socket).start().unwrap();
        Victim::say("serving");
        Victim::wait_for_death();
    }
    Stage::new().alone(|| {
        let place = Place::new();
        let serve = || {
            let mut broker = Victim::start(&place.socket());
            broker.await_word("serving");
            broker
        };
        let mut broker = serve();
        let client = Client::connect(Some(&place.socket())).unwrap();
        let latent = OwnLatent::new(0, 16);
        let vae = client.vae(HAND_OFF).unwrap();
        let image = decode(&vae, &latent);
        let mut built = client.empty_on_gpu(latent.meta, "cuda:0").unwrap();
        built.write(&bytes_of(&latent.values)).unwrap();
        broker.kill();
        let lost = vae.call(DECODE, latent.input(), &CallOptions::default()).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::ConnectionLost, "{lost}");
        // Nobody vouches for what is in them any more.
        for error in [image.to_vec().map(|_| ()).unwrap_err(), built.write(&[0; 4]).unwrap_err()] {
            assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
        }
        let _broker = serve();
        // Tensors of the broker that is gone are no input of the next, and are dropped while it serves.
        let stale = vae.call(DECODE, Input::try_from(&built).unwrap(), &CallOptions::default()).unwrap_err();
        assert_eq!(stale.kind(), ErrorKind::Stale, "{stale}");
        drop((image, built));
        decode_checked(&client, &latent);
        let rung = rung_of(&client, gpu(0));
        assert_eq!((rung.rung, rung.order), (Rung::CudaIpc, Some(GpuOrder::Events)));
    });
}

#[test]
fn a_client_is_told_at_once_that_its_broker_was_killed_whatever_its_streams_do() {
    if let Some(socket) = Victim::is_this() {
        let _broker = Broker::builder().config(on_the_gpu()).address(socket).start().unwrap();
        Victim::say("serving");
        Victim::wait_for_death();
    }
    Stage::new().alone(|| {
        let place = Place::new();
        let mut broker = Victim::start(&place.socket());
        broker.await_word("serving");
        let client = Client::connect(Some(&place.socket())).unwrap();
        decode_checked(&client, &OwnLatent::new(0, 16));
        let stream = Stalled::new();
        broker.kill();
        let caller = client.clone();
        let lost = meanwhile(stream, move || caller.ping_with(&CallOptions::default())).unwrap_err();
        assert_eq!(lost.kind(), ErrorKind::ConnectionLost, "{lost}");
    });
}

/// A client that leaves, and is killed later, with `work` of its in flight on a stream that stands still.
fn leaves_with<T>(work: impl FnOnce(&Client, &OwnLatent, &Stalled) -> T) {
    if let Some(socket) = Victim::is_this() {
        let client = Client::connect(Some(&socket)).unwrap();
        client.open_gpu("cuda:0").unwrap();
        let (latent, stream) = (OwnLatent::new(0, 128), Stalled::new());
        let _kept = work(&client, &latent, &stream);
        client.close();
        Victim::say("left");
        Victim::wait_for_death();
    }
    // Room for one picture of 12 MiB with its latent of 256 KiB, and for no other latent.
    let bytes = 12 * MIB + (384 << 10);
    let config = BrokerConfig { gpu_arena_bytes: bytes, gpu_bytes: bytes, ..patient_for(LONG) };
    play(Stage::new(), config, |guest| {
        let mut victim = Victim::start(&guest.socket);
        victim.await_word("left");
        eventually("quarantine", || guest.sessions()[0]["quarantined"] == true);
        let client = guest.connect();
        let vae = client.vae(HAND_OFF).unwrap();
        let latent = OwnLatent::new(0, 128);
        let call = || vae.call(DECODE, latent.input(), &CallOptions::default());
        assert_eq!(call().unwrap_err().kind(), ErrorKind::OutOfMemory);
        victim.kill();
        eventually("room for a picture", || match call() {
            Ok(output) => {
                latent.check(&output.tensor.to_vec().unwrap()).unwrap();
                true
            }
            Err(_) => false,
        });
    });
}

#[test]
fn a_slot_that_is_being_read_is_free_once_its_clients_process_is_gone_and_not_before() {
    leaves_with(|client, latent, stream| {
        let image = decode(&client.vae(HAND_OFF).unwrap(), latent);
        let length = image.meta().size_bytes().unwrap();
        let copy = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap().allocate(length).unwrap();
        image.copy_to_gpu(&stream.range(&copy, length)).unwrap();
        // The copy goes on until the process is killed.
        std::mem::forget(copy);
        image
    });
}

#[test]
fn a_slot_that_is_to_be_written_is_free_once_its_clients_process_is_gone_and_not_before() {
    // The call is given up while the copy of its input waits, which nobody can take back.
    leaves_with(|client, latent, stream| {
        let vae = client.vae(HAND_OFF).unwrap();
        let short = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
        let late = vae.call(DECODE, stream.input(latent), &short).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
    });
}
