use std::ffi::c_void;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use cudarc::driver::sys;
use luna_broker::ErrorKind;
use luna_broker::device::cuda::CudaStream;

use super::*;

/// The do-nothing model that takes its turn in the lane.
pub(crate) const QUEUED: &str = "builtin:hand-off-queued";

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

    pub(crate) fn let_go(&mut self) {
        self.gate = None;
    }
}

impl Drop for Stalled {
    fn drop(&mut self) {
        // Also where a test fails: memory that the stream uses is closed behind it.
        self.let_go();
    }
}

pub(crate) fn patient_for(patience: Duration) -> BrokerConfig {
    BrokerConfig { input_patience: patience, ..on_the_gpu() }
}

/// More than any test takes.
pub(crate) const LONG: Duration = Duration::from_secs(600);
/// More than an input takes that nothing holds up.
const SHORT: Duration = Duration::from_millis(500);

/// Calls that wait in the lane, and whether one runs, at one moment.
pub(crate) fn lane(guest: &Guest) -> (u64, bool) {
    let lane = &guest.status()["lanes"][0];
    (lane["queued"].as_u64().unwrap(), lane["busy"].as_bool().unwrap())
}

const EMPTY: (u64, bool) = (0, false);
/// One call waits for its input.
pub(crate) const ONE_WAITS: (u64, bool) = (1, false);

fn decode_through_the_lane(client: &Client, latent: &OwnLatent) {
    let image = decode(&client.vae(QUEUED).unwrap(), latent);
    assert!(is_on_gpu(&image));
    latent.check(&image.to_vec().unwrap()).unwrap();
}

#[test]
fn a_stream_that_stands_still_holds_up_its_own_call_alone() {
    play(Stage::new(), patient_for(LONG), |guest| {
        let (stalled, bystander) = (guest.connect(), guest.connect());
        let (mut mine, theirs) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        decode_through_the_lane(&stalled, &mine);
        // The slot of its next input still holds what was right for this one.
        mine.renew();
        let mut stream = Stalled::new();
        let vae = stalled.vae(QUEUED).unwrap();
        let input = stream.input(&mine);
        let image = std::thread::scope(|scope| {
            let call = scope.spawn(|| vae.call(DECODE, input, &CallOptions::default()).unwrap().tensor);
            eventually("the call's turn", || lane(guest) == ONE_WAITS);
            for _ in 0..20 {
                decode_through_the_lane(&bystander, &theirs);
            }
            assert_eq!(lane(guest), ONE_WAITS);
            stream.let_go();
            call.join().unwrap()
        });
        mine.check(&image.to_vec().unwrap()).unwrap();
    });
}

#[test]
fn streams_that_stand_still_lock_nobody_out_of_a_full_lane() {
    play(Stage::new(), BrokerConfig { lane_capacity: 1, ..patient_for(LONG) }, |guest| {
        let stalled = [guest.connect(), guest.connect()];
        let bystander = guest.connect();
        let (mine, theirs) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        let mut stream = Stalled::new();
        let input = stream.input(&mine);
        std::thread::scope(|scope| {
            for (at, client) in (1..).zip(&stalled) {
                let vae = client.vae(QUEUED).unwrap();
                scope.spawn(move || vae.call(DECODE, input, &CallOptions::default()).unwrap());
                eventually("the call's turn", || lane(guest) == (at, false));
            }
            for _ in 0..5 {
                decode_through_the_lane(&bystander, &theirs);
            }
            stream.let_go();
        });
    });
}

#[test]
fn a_call_that_needs_no_lane_waits_for_its_input_beside_the_sessions_other_requests() {
    play(Stage::new(), patient_for(LONG), |guest| {
        let client = guest.connect();
        let mut latent = OwnLatent::new(0, 16);
        decode_checked(&client, &latent);
        latent.renew();
        let mut stream = Stalled::new();
        let vae = client.vae(HAND_OFF).unwrap();
        let input = stream.input(&latent);
        let short = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
        assert_eq!(vae.call(DECODE, input, &short).unwrap_err().kind(), ErrorKind::Timeout);
        eventually("the call to be taken back", || lane(guest) == EMPTY);
        let image = std::thread::scope(|scope| {
            let call = scope.spawn(|| vae.call(DECODE, input, &CallOptions::default()).unwrap().tensor);
            eventually("the call to wait", || lane(guest) == ONE_WAITS);
            client.ping().unwrap();
            stream.let_go();
            call.join().unwrap()
        });
        latent.check(&image.to_vec().unwrap()).unwrap();
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
        let options = CallOptions { timeout: Some(Duration::from_millis(20)), ..CallOptions::default() };
        let late = vae.call(DECODE, stream.input(&latent), &options).unwrap_err();
        assert_eq!(late.kind(), ErrorKind::Timeout, "{late}");
        eventually("the lane to be empty", || lane(guest) == EMPTY);
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
        eventually("the victim's call", || lane(guest) == ONE_WAITS);
        decode_through_the_lane(&bystander, &latent);
        // The reply leaves before the lane has put the call away.
        eventually("the end of the bystander's call", || lane(guest) == ONE_WAITS);
        victim.kill().unwrap();
        victim.wait().unwrap();
        eventually("the end of the victim's call", || lane(guest) == EMPTY);
        eventually("the end of the victim's session", || guest.sessions().as_array().unwrap().len() == 1);
        decode_through_the_lane(&bystander, &latent);
        // Whether the victim's call was run is left open: a driver may count the marks of a dead process as passed, and
        // that may be seen before the end of the connection.
    });
}

/// What `work` answers, in a thread of its own, while the stream stands still.
pub(crate) fn meanwhile<T: Send + 'static>(stream: Stalled, work: impl FnOnce() -> T + Send + 'static) -> T {
    let thread = std::thread::spawn(work);
    // A panic in here lets the stream go.
    eventually("the end of what has nothing to do with the stream", || thread.is_finished());
    drop(stream);
    thread.join().unwrap()
}

/// A client with memory of the broker's open, by handle or by descriptor, that leaves while a stream of its stands still.
fn leaves_at_once(stage: Stage, rung: Rung) {
    play(stage, on_the_gpu(), |guest| {
        let client = guest.connect();
        decode_checked(&client, &OwnLatent::new(0, 16));
        assert_eq!(rung_of(&client, gpu(0)).rung, rung);
        let leaving = client.clone();
        meanwhile(Stalled::new(), move || leaving.close());
        eventually("the session's end", || guest.sessions().as_array().unwrap().is_empty());
    });
}

#[test]
fn a_client_leaves_at_once_whatever_its_streams_do() {
    leaves_at_once(Stage::new(), Rung::CudaIpc);
}

#[test]
fn a_client_with_descriptors_leaves_at_once_whatever_its_streams_do() {
    leaves_at_once(Stage::new().set("SUBSTITUTE_CUDA_IPC", "refused"), Rung::CudaVmm);
}
