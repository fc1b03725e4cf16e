//! Descriptors that point where they must not, and tensors that are not what they should be.

use luna_broker::id::{ArenaId, Epoch, Generation, GpuUuid, LeaseRef, SlotId};
use luna_broker::protocol::{
    ClientMessage, Descriptor, GpuTarget, OpenGpu, Operation, Outcome, SlotPlace, TensorSource, VaeRequest,
};
use luna_broker::service::{TileShape, Tiling, VaeCall, VaeOperation};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use luna_broker::{ErrorKind, Fault};

use crate::Expected;
use crate::raw::{Raw, Shared, decode};
use crate::scene::Scene;
use crate::support::{HAND_OFF, eventually};

const SHAPE: [u64; 4] = [1, 4, 8, 8];
const BYTES: u64 = 4 * 8 * 8 * 4;

fn latent() -> TensorMeta {
    TensorMeta::contiguous(DType::F32, Dims::of(SHAPE))
}

fn described(shape: &[u64]) -> TensorMeta {
    let shape = Dims::new(shape).unwrap();
    TensorMeta { dtype: DType::F32, shape, strides: shape.contiguous_strides() }
}

fn leased(descriptor: Descriptor) -> Operation {
    decode(HAND_OFF, TensorSource::Leased(descriptor))
}

/// A session with two neighbouring slots, and a change to the descriptor of a tensor in the second.
fn bent(raw: &mut Raw, bend: impl FnOnce(&mut Descriptor)) -> Fault {
    let (first, second) = (raw.allocate(BYTES), raw.allocate(BYTES));
    let mut descriptor = Descriptor { meta: latent(), ..second };
    bend(&mut descriptor);
    let fault = raw.fault(leased(descriptor), &[]);
    // The slot itself is untouched by the refusal.
    assert!(matches!(raw.ask(leased(Descriptor { meta: latent(), ..second }), &[]), Outcome::Tensor { .. }));
    raw.release(first.lease);
    raw.release(second.lease);
    fault
}

#[test]
fn a_descriptor_that_points_elsewhere_is_refused_and_the_session_goes_on() {
    let scene = Scene::new(&[]);
    let (mut raw, _) = Raw::shared(&scene.place.socket());
    let stale = || Expected::new(ErrorKind::Stale, &["stale"]);
    let outside = || Expected::new(ErrorKind::InvalidTensor, &["outside slot"]);
    type Bend = fn(&mut Descriptor);
    let cases: [(&str, Bend, Expected); 11] = [
        (
            "another life of the broker",
            |d| d.epoch = Epoch(d.epoch.0.wrapping_add(1)),
            Expected::new(ErrorKind::Stale, &["earlier life"]).with_remedy(),
        ),
        (
            "an earlier use of the slot",
            |d| d.lease.generation = Generation(d.lease.generation.0.wrapping_sub(1)),
            stale(),
        ),
        ("a later use of the slot", |d| d.lease.generation.0 += 1, stale()),
        ("a slot that is not there", |d| d.lease.slot = SlotId(u32::MAX), stale()),
        ("an arena that is not there", |d| d.lease.arena = ArenaId(u32::MAX), stale()),
        ("the slot before", |d| d.offset -= 512, outside()),
        ("the last byte of the slot before", |d| d.offset -= 4, outside()),
        ("the slot behind", |d| d.offset += BYTES, outside()),
        ("an offset that wraps", |d| d.offset = u64::MAX - 3, outside()),
        ("more than the slot holds", |d| d.meta = described(&[1, 4, 8, 9]), outside()),
        (
            "between two elements",
            |d| {
                d.meta = described(&[1, 4, 4, 4]);
                d.offset += 1;
            },
            Expected::new(ErrorKind::InvalidTensor, &["aligned"]),
        ),
    ];
    for (case, bend, expected) in cases {
        scene.check_bystander();
        expected.check(case, &bent(&mut raw, bend));
        scene.check_bystander();
    }
}

#[test]
fn a_lease_given_back_is_stale_even_when_its_slot_is_in_use_again() {
    let scene = Scene::new(&[]);
    let (mut raw, _) = Raw::shared(&scene.place.socket());
    let old = raw.allocate(BYTES);
    raw.release(old.lease);
    let operation = || leased(Descriptor { meta: latent(), ..old });
    let expected = Expected::new(ErrorKind::Stale, &["stale", "released"]);
    expected.check("a lease given back", &raw.fault(operation(), &[]));
    let new = raw.allocate(BYTES);
    assert_eq!((new.offset, new.lease.slot), (old.offset, old.lease.slot), "the slot is used again");
    expected.check("a lease given back and taken by another", &raw.fault(operation(), &[]));
}

#[test]
fn a_session_reaches_nothing_of_another() {
    let scene = Scene::new(&[]);
    let (mut owner, shared) = Raw::shared(&scene.place.socket());
    let (mut thief, _) = Raw::shared(&scene.place.socket());
    let slot = owner.allocate(BYTES);
    let bytes: Vec<u8> = (0..BYTES / 4).flat_map(|at| (at as f32).to_ne_bytes()).collect();
    let tensor = shared.fill(slot, latent(), &bytes);
    let expected = Expected::new(ErrorKind::Stale, &["never granted"]);
    expected.check("another session's lease", &thief.fault(leased(tensor), &[]));
    // Giving it back in the owner's place does nothing, and neither do leases out of thin air.
    thief.release(slot.lease);
    for at in 0..50 {
        thief.release(LeaseRef { arena: ArenaId(at), slot: SlotId(at % 3), generation: Generation(at % 2) });
    }
    thief.send(&ClientMessage::Opened { arena: slot.lease.arena });
    check_marks(&mut owner, &shared, tensor);
    scene.check_bystander();
}

/// The do-nothing model's answer to a latent that counts up from 0.
fn check_marks(raw: &mut Raw, shared: &Shared, tensor: Descriptor) {
    let Outcome::Tensor { descriptor, .. } = raw.ask(leased(tensor), &[]) else { panic!("a tensor was due") };
    let length = descriptor.meta.size_bytes().unwrap();
    let region = std::sync::Arc::clone(&shared.region);
    let span = luna_broker::device::Span::new(region, descriptor.offset as usize, length).unwrap();
    let mut image = vec![0; length];
    span.read(&mut image).unwrap();
    for at in 0..16 {
        let place = at * (length / 4 / 16) * 4;
        let value = f32::from_ne_bytes(image[place..place + 4].try_into().unwrap());
        assert_eq!(value.to_bits(), (at as f32).to_bits());
    }
}

#[test]
fn a_tensor_that_is_not_what_the_operation_takes_is_refused_by_name() {
    let scene = Scene::new(&[]);
    let mut raw = Raw::inline(&scene.place.socket());
    let invalid = |says| Expected::new(ErrorKind::InvalidTensor, says);
    let typed = |dtype| TensorMeta { dtype, ..latent() };
    let cases = [
        ("no rows", described(&[1, 4, 0, 8]), invalid(&["latent", "[1, 4, 0, 8]"])),
        ("no samples", described(&[0, 4, 8, 8]), invalid(&["latent", "[0, 4, 8, 8]"])),
        ("three dimensions", described(&[4, 8, 8]), invalid(&["latent", "[4, 8, 8]"])),
        ("no dimensions", described(&[]), invalid(&["latent", "[]"])),
        ("three channels", described(&[1, 3, 8, 8]), invalid(&["latent [N, 4, h, w]", "[1, 3, 8, 8]"])),
        ("integers", typed(DType::I32), invalid(&["latent", "int32"])),
        ("truth values", typed(DType::Bool), invalid(&["latent", "bool"])),
        (
            "more elements than there are addresses",
            described(&[1 << 40, 4, 1 << 40, 1 << 40]),
            invalid(&["1099511627776"]),
        ),
        ("strides of another rank", TensorMeta { strides: Dims::of([8, 1]), ..latent() }, invalid(&["4", "2"])),
        (
            "strides beyond the address space",
            TensorMeta { strides: Dims::of([1, u64::MAX, u64::MAX, 1]), ..latent() },
            invalid(&["[1, 4, 8, 8]"]),
        ),
        (
            "a result beyond the address space",
            TensorMeta { strides: Dims::of([0; 4]), ..described(&[1, 4, 1 << 31, 1 << 31]) },
            invalid(&["2147483648"]),
        ),
        (
            "a result beyond the session's bytes",
            TensorMeta { strides: Dims::of([0; 4]), ..described(&[1, 4, 1 << 14, 1 << 14]) },
            Expected::new(ErrorKind::OutOfMemory, &["does not fit", "intact"]).with_remedy(),
        ),
    ];
    for (case, meta, expected) in cases {
        scene.check_bystander();
        expected.check(case, &raw.fault(decode(HAND_OFF, TensorSource::Inline(meta)), &[0; 1024]));
        scene.check_bystander();
    }
    let short = raw.fault(decode(HAND_OFF, TensorSource::Inline(latent())), &[0; 100]);
    Expected::new(ErrorKind::Protocol, &["1024", "100"]).check("fewer bytes than described", &short);
    let huge = raw.fault(Operation::Allocate { place: SlotPlace::Host, size_bytes: u64::MAX, kept: false }, &[]);
    Expected::new(ErrorKind::OutOfMemory, &["18446744073709551615"]).with_remedy().check("all memory", &huge);
    eventually("the return of everything the refused calls took", || {
        let status = scene.bystander.status().unwrap();
        status.sessions.iter().filter(|session| session.name == "raw").all(|session| session.leases == 0)
    });
}

#[test]
fn an_operation_that_the_model_does_not_have_is_refused() {
    let scene = Scene::new(&[]);
    let mut raw = Raw::inline(&scene.place.socket());
    let mut call = |operation, tiling, shape: [u64; 4]| {
        let input = TensorSource::Inline(described(&shape));
        let request = VaeRequest {
            model: HAND_OFF.to_owned(),
            call: VaeCall { operation, tiling },
            input,
            result: SlotPlace::Host,
        };
        let bytes = vec![0; 4 * shape.iter().product::<u64>() as usize];
        raw.fault(Operation::Vae(request), &bytes)
    };
    let encode = call(VaeOperation::Encode, Tiling::Auto, [1, 8, 8, 3]);
    Expected::new(ErrorKind::InvalidModel, &[HAND_OFF, "encoder"]).with_remedy().check("no encoder", &encode);
    for (case, width, height, overlap) in [
        ("no tiles", 0, 0, 0),
        ("only overlap", 64, 64, 64),
        ("odd tiles", 65, 65, 8),
        ("vast tiles", u32::MAX, 8, u32::MAX),
    ] {
        let tiles = TileShape { width, height, overlap };
        let fault = call(VaeOperation::Decode, Tiling::Tiles(tiles), SHAPE);
        Expected::new(ErrorKind::InvalidTensor, &["tiles of", "overlap"]).check(case, &fault);
    }
    scene.check_bystander();
}

#[test]
fn memory_to_pass_through_is_had_for_an_opened_gpu_and_within_the_sessions_bytes() {
    let scene = Scene::new(&["--session-bytes", "64M"]);
    let (mut raw, _) = Raw::shared(&scene.place.socket());
    let gpu = GpuUuid([7; 16]);
    let wanted = |size_bytes, opening| {
        let place = SlotPlace::Staging(GpuTarget { gpu, opening });
        Operation::Allocate { place, size_bytes, kept: false }
    };
    let unopened = || Expected::new(ErrorKind::Unsupported, &["do not pass through"]).with_remedy();
    unopened().check("a GPU that is not open", &raw.fault(wanted(BYTES, 0), &[]));
    let open = || Operation::OpenGpu(OpenGpu { gpu, forced: None, failed: None });
    assert!(matches!(raw.ask(open(), &[]), Outcome::Gpu(_)));
    unopened().check("an opening that there is not", &raw.fault(wanted(BYTES, 1), &[]));
    let Outcome::Allocated { descriptor } = raw.ask(wanted(BYTES, 0), &[]) else { panic!("a slot was due") };
    let full = || Expected::new(ErrorKind::OutOfMemory, &["67108864"]).with_remedy();
    full().check("all that the session may have", &raw.fault(wanted(64 << 20, 0), &[]));
    full().check("all memory", &raw.fault(wanted(u64::MAX, 0), &[]));
    raw.release(descriptor.lease);
    let stale = raw.fault(leased(Descriptor { meta: latent(), ..descriptor }), &[]);
    Expected::new(ErrorKind::Stale, &["stale"]).check("a slot given back", &stale);
    scene.check_bystander();
    let mut inline = Raw::inline(&scene.place.socket());
    inline.ask(open(), &[]);
    unopened().check("a session without shared memory", &inline.fault(wanted(BYTES, 0), &[]));
    scene.check_bystander();
}

#[test]
fn not_a_number_passes_through() {
    let scene = Scene::new(&[]);
    #[cfg_attr(not(feature = "torch"), expect(unused_mut, reason = "executors add a model"))]
    let mut models = vec![HAND_OFF.to_owned()];
    #[cfg(feature = "torch")]
    {
        let model = scene.place.file("tiny.safetensors");
        crate::tiny::write(&model, 16);
        models.push(model.to_string_lossy().into_owned());
    }
    for model in models {
        let vae = scene.bystander.vae(&model).unwrap();
        let bytes: Vec<u8> = f32::NAN.to_ne_bytes().repeat((BYTES / 4) as usize);
        let image = vae.decode(luna_broker::client::Input::new(latent(), &bytes).unwrap()).unwrap();
        assert!(image.floats().unwrap()[0].is_nan(), "{model}");
        // And not into the next result.
        let image = vae.decode(luna_broker::client::Input::new(latent(), &[0; BYTES as usize]).unwrap()).unwrap();
        assert!(!image.floats().unwrap()[0].is_nan(), "{model}");
    }
    scene.check_bystander();
}
