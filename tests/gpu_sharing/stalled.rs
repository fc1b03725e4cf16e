use std::ffi::c_void;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use cudarc::driver::sys;
use luna_broker::ErrorKind;
use luna_broker::device::cuda::CudaStream;

use super::*;

/// The do-nothing model that takes its turn in the lane.
const QUEUED: &str = "builtin:hand-off-queued";

/// A stream on which everything enqueued from now on waits until it is let go.
pub(crate) struct Stalled {
    stream: CudaStream,
    gate: Option<Sender<()>>,
}

/// Waits until the gate's other end is dropped.
unsafe extern "C" fn wait_at(gate: *mut c_void) {
    // SAFETY: `Stalled::new` made a box of the receiver for this one call.
    let gate = unsafe { Box::from_raw(gate.cast::<Receiver<()>>()) };
    _ = gate.recv();
}

/// Calls the driver in the context of the first GPU.
fn in_context(call: impl FnOnce() -> sys::CUresult) {
    let done = |code| assert_eq!(code, sys::CUresult::CUDA_SUCCESS);
    let (mut device, mut context) = (0, std::ptr::null_mut());
    // SAFETY: the driver was opened and initialised by the library under test; out-pointers are valid for their calls; what
    // is retained is released, and the context is current between the two.
    unsafe {
        done(sys::cuDeviceGet(&raw mut device, 0));
        done(sys::cuDevicePrimaryCtxRetain(&raw mut context, device));
        done(sys::cuCtxPushCurrent_v2(context));
        done(call());
        done(sys::cuCtxPopCurrent_v2(&raw mut context));
        done(sys::cuDevicePrimaryCtxRelease_v2(device));
    }
}

impl Stalled {
    pub(crate) fn new() -> Self {
        let stream = CudaDevice::open(gpu(0), CudaSharing::Ipc).unwrap().stream().unwrap();
        let (gate, wait) = channel();
        let wait = Box::into_raw(Box::new(wait)).cast();
        let raw = std::ptr::with_exposed_provenance_mut(stream.handle().0);
        in_context(|| {
            // SAFETY: the stream lives, and the function takes its argument over.
            unsafe { sys::cuLaunchHostFunc(raw, Some(wait_at), wait) }
        });
        Self { stream, gate: Some(gate) }
    }

    /// The start of a region, used by work on this stream.
    pub(crate) fn range<'a>(&self, region: &'a Arc<dyn Region>, length: usize) -> GpuRange<'a> {
        // SAFETY: the region lives as long as the borrow and waits for the GPU before it closes; the stream lives until the
        // end of its test, behind every call.
        unsafe { GpuRange::new(gpu(0), region.address(), length, self.stream.handle()) }
    }

    /// The latent, as work on this stream has written it.
    pub(crate) fn input<'a>(&self, latent: &'a OwnLatent) -> Input<'a> {
        Input::on_gpu(latent.meta, self.range(&latent.region, latent.meta.size_bytes().unwrap())).unwrap()
    }

    fn let_go(&mut self) {
        self.gate = None;
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        // Also where a test fails: memory that the stream uses is closed behind it.
        self.let_go();
    }
}

fn patient_for(patience: Duration) -> BrokerConfig {
    BrokerConfig { input_patience: patience, ..on_the_gpu() }
}

/// More than any test takes.
const LONG: Duration = Duration::from_secs(600);
/// As good as none.
const SHORT: Duration = Duration::from_millis(20);

/// Calls that wait in the lane; one that is just being asked whether it is ready is none of them.
fn queued(guest: &Guest) -> u64 {
    guest.status()["lanes"][0]["queued"].as_u64().unwrap()
}

fn decode_through_the_lane(client: &Client, latent: &OwnLatent) {
    let image = decode(&client.vae(QUEUED).unwrap(), latent);
    assert!(is_on_gpu(&image));
    latent.check(&image.to_vec().unwrap()).unwrap();
}

#[test]
fn a_stream_that_stands_still_holds_up_its_own_call_alone() {
    play(Stage::new(), patient_for(LONG), |guest| {
        let (stalled, bystander) = (guest.connect(), guest.connect());
        let (mine, theirs) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        decode_through_the_lane(&stalled, &mine);
        let mut stream = Stalled::new();
        let vae = stalled.vae(QUEUED).unwrap();
        let input = stream.input(&mine);
        let image = std::thread::scope(|scope| {
            let call = scope.spawn(|| vae.call(DECODE, input, &CallOptions::default()).unwrap().tensor);
            eventually("the call's turn", || queued(guest) == 1);
            for _ in 0..20 {
                decode_through_the_lane(&bystander, &theirs);
            }
            assert!(!call.is_finished());
            stream.let_go();
            call.join().unwrap()
        });
        mine.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn a_call_whose_input_does_not_come_is_given_up_with_everything_intact() {
    play(Stage::new(), patient_for(SHORT), |guest| {
        let client = guest.connect_with(|config| config.name = "the slow one".to_owned());
        let mut latent = OwnLatent::new(0, 16);
        decode_through_the_lane(&client, &latent);
        let vae = client.vae(QUEUED).unwrap();
        let mut stream = Stalled::new();
        let late = vae.call(DECODE, stream.input(&latent), &CallOptions::default()).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
        for part in ["the slow one", "intact", "--input-patience"] {
            assert!(late.to_string().contains(part), "{late}");
        }
        stream.let_go();
        stream.stream.synchronize().unwrap();
        latent.renew();
        decode_through_the_lane(&client, &latent);
        eventually("the leases' return", || guest.sessions()[0]["leases"] == 0);
    });
}

#[test]
fn a_call_whose_input_does_not_come_ends_with_the_callers_patience_too() {
    play(Stage::new(), patient_for(LONG), |guest| {
        let client = guest.connect();
        let latent = OwnLatent::new(0, 16);
        decode_through_the_lane(&client, &latent);
        let vae = client.vae(QUEUED).unwrap();
        let mut stream = Stalled::new();
        let options = CallOptions { timeout: Some(SHORT), ..CallOptions::default() };
        let late = vae.call(DECODE, stream.input(&latent), &options).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
        eventually("the lane to be empty", || queued(guest) == 0);
        stream.let_go();
        stream.stream.synchronize().unwrap();
        decode_through_the_lane(&client, &latent);
    });
}

/// A client of its own process, to be killed while its call waits for its stream.
const VICTIM: &str = "LUNA_BROKER_TEST_STALLED_OF";

#[test]
fn a_client_that_is_killed_before_its_input_is_written_leaves_the_lane_to_others() {
    if let Ok(socket) = std::env::var(VICTIM) {
        let client = Client::connect(Some(&socket)).unwrap();
        let latent = OwnLatent::new(0, 16);
        client.open_gpu("cuda:0").unwrap();
        let stream = Stalled::new();
        _ = client.vae(QUEUED).unwrap().call(DECODE, stream.input(&latent), &CallOptions::default());
        unreachable!("it is killed before");
    }
    play(Stage::new(), patient_for(LONG), |guest| {
        let name = "stalled::a_client_that_is_killed_before_its_input_is_written_leaves_the_lane_to_others";
        let mut victim = Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(VICTIM, &guest.socket)
            .spawn()
            .unwrap();
        let bystander = guest.connect();
        let latent = OwnLatent::new(0, 16);
        eventually("the victim's call", || queued(guest) == 1);
        decode_through_the_lane(&bystander, &latent);
        eventually("the next question to the victim's call", || queued(guest) == 1);
        victim.kill().unwrap();
        victim.wait().unwrap();
        eventually("the end of the victim's call", || queued(guest) == 0);
        eventually("the end of the victim's session", || guest.sessions().as_array().unwrap().len() == 1);
        decode_through_the_lane(&bystander, &latent);
        // Whether the victim's call was run is left open: a driver may count the marks of a dead process as passed, and
        // that may be seen before the end of the connection.
    });
}
