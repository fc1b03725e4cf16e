//! A slot of GPU memory that is used again, and descriptors of its earlier use.

use luna_broker::ErrorKind;
use luna_broker::device::RegionHandle;
use luna_broker::id::LeaseRef;
use luna_broker::protocol::{
    ArenaHandle, Descriptor, GpuAnswer, GpuFindings, GpuProbeOutcome, GpuProbed, GpuTarget, NONCE_BYTES, OpenGpu,
    Operation, Outcome, SlotPlace, TensorSource,
};

use super::*;
use crate::raw::{self, Raw, Shared};

/// A client that speaks bytes, with the first arena of the broker's GPU open.
struct RawOnGpu {
    raw: Raw,
    /// Host memory, for results.
    host: Shared,
    target: GpuTarget,
    arena: Arc<dyn Region>,
}

impl RawOnGpu {
    fn connect(socket: &str) -> Self {
        let (mut raw, host) = Raw::shared(socket);
        let gpu = gpu(0);
        let step = gpu_answer(raw.ask(Operation::OpenGpu(OpenGpu { gpu, forced: None, failed: None }), &[]));
        let GpuAnswer::Probe(offer) = step else { panic!("no memory was offered: {step:?}") };
        let arena = offer.arena.expect("an arena comes with the first offer");
        let ArenaHandle::CudaIpc(handle) = &arena.handle else { panic!("the first rung is another one") };
        let handle = RegionHandle::CudaIpc(handle.as_slice().try_into().unwrap());
        let device = CudaDevice::open(gpu, CudaSharing::Ipc).unwrap();
        let arena = device.import(handle, arena.size_bytes as usize).unwrap();
        let (mut read, wrote) = ([0; NONCE_BYTES], [7; NONCE_BYTES]);
        arena.copy_out(offer.offset as usize, &mut read).unwrap();
        arena.copy_in(offer.offset as usize + NONCE_BYTES, &wrote).unwrap();
        // Without marks: each side waits for its GPU work.
        let findings = GpuFindings { open_us: 0, read, wrote, marked: None };
        let outcome = GpuProbeOutcome::Opened(findings);
        let step = gpu_answer(raw.ask(Operation::GpuProbed(GpuProbed { gpu, outcome }), &[]));
        let GpuAnswer::Settled { target, .. } = step else { panic!("the probe failed: {step:?}") };
        Self { raw, host, target, arena }
    }

    /// A slot that holds the latent.
    fn hold(&mut self, latent: &OwnLatent) -> Descriptor {
        let size_bytes = latent.meta.size_bytes().unwrap() as u64;
        let operation = Operation::Allocate { place: SlotPlace::Gpu(self.target), size_bytes, kept: false };
        let Outcome::Allocated { descriptor } = self.raw.ask(operation, &[]) else { panic!("no slot was granted") };
        self.arena.copy_in(descriptor.offset as usize, &bytes_of(&latent.values)).unwrap();
        Descriptor { meta: latent.meta, ..descriptor }
    }

    fn read(&self, descriptor: &Descriptor) -> Vec<u8> {
        let mut bytes = vec![0; descriptor.meta.size_bytes().unwrap()];
        self.arena.copy_out(descriptor.offset as usize, &mut bytes).unwrap();
        bytes
    }

    /// The image of the tensor that `descriptor` names, or the kind of error with which it is refused.
    fn decode(&mut self, descriptor: Descriptor) -> Result<Vec<u8>, ErrorKind> {
        match self.raw.ask(raw::decode(HAND_OFF, TensorSource::Leased(descriptor)), &[]) {
            Outcome::Tensor { descriptor, .. } => {
                let mut bytes = vec![0; descriptor.meta.size_bytes().unwrap()];
                self.host.region.copy_out(descriptor.offset as usize, &mut bytes).unwrap();
                Ok(bytes)
            }
            Outcome::Fault(fault) => Err(fault.kind),
            other => panic!("an image or a fault was due, not {other:?}"),
        }
    }
}

fn gpu_answer(outcome: Outcome) -> GpuAnswer {
    match outcome {
        Outcome::Gpu(answer) => *answer,
        other => panic!("an answer on a GPU was due, not {other:?}"),
    }
}

#[test]
fn a_descriptor_of_an_earlier_use_of_a_slot_is_stale() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let mut client = RawOnGpu::connect(&guest.socket);
        let (first, second) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        let old = client.hold(&first);
        first.check(&client.decode(old).unwrap()).unwrap();
        client.raw.release(old.lease);
        let new = client.hold(&second);
        assert_eq!((new.lease.slot, new.offset), (old.lease.slot, old.offset), "the slot is used again");
        assert_eq!(client.decode(old).err(), Some(ErrorKind::Stale));
        // The control: to whoever does not look at the generation, the old descriptor is good and names other bytes.
        let blind = Descriptor { lease: LeaseRef { generation: new.lease.generation, ..old.lease }, ..old };
        let image = client.decode(blind).unwrap();
        assert!(first.check(&image).is_err(), "nothing was there to be mistaken");
        second.check(&image).unwrap();
    });
}

#[test]
fn a_descriptor_does_not_outlive_its_lease_into_another_session() {
    play(Stage::new(), on_the_gpu(), |guest| {
        let (mut client, mut stranger) = (RawOnGpu::connect(&guest.socket), RawOnGpu::connect(&guest.socket));
        let (mine, theirs) = (OwnLatent::new(0, 16), OwnLatent::new(0, 16));
        let old = client.hold(&mine);
        client.raw.release(old.lease);
        let new = stranger.hold(&theirs);
        assert_eq!((new.lease.slot, new.offset), (old.lease.slot, old.offset), "the slot is used again");
        assert_eq!(client.decode(old).err(), Some(ErrorKind::Stale));
        // Nor with the generation of the moment, which is another session's.
        assert_eq!(client.decode(Descriptor { lease: new.lease, ..old }).err(), Some(ErrorKind::Stale));
        // The control: whoever goes by the place alone reads the stranger's bytes.
        assert!(client.read(&old) == bytes_of(&theirs.values), "nothing was there to be mistaken");
        theirs.check(&stranger.decode(new).unwrap()).unwrap();
    });
}
