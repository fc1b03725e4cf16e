//! Random messages after a valid negotiation. `LUNA_BROKER_FUZZ_CASES` says how many of each kind.

use std::num::NonZeroU32;

use luna_broker::id::{ArenaId, Epoch, Generation, GpuUuid, LeaseRef, RequestId, RunId, SlotId};
use luna_broker::protocol::{
    ClientMessage, ClipRequest, Descriptor, EncodersTask, FailureCode, GpuFindings, GpuProbeOutcome, GpuProbed,
    GpuTarget, MarkedFindings, NONCE_BYTES, OpenGpu, OpenRun, Operation, Release, Request, Rung, RungFailure,
    ServerMessage, SlotPlace, StepSubject, TensorSource, UnetRequest, VaeRequest,
};
use luna_broker::service::{
    AdapterMode, AdapterStack, AdapterUse, BlockCache, ClipInput, ClipKind, ClipOptions, ClipText, ClipTokens, Control,
    RunSettings, Service, StepInput, TileShape, Tiling, VaeCall, VaeOperation,
};
use luna_broker::tensor::{DType, Dims, TensorMeta};
use luna_broker::transport::{HEADER_BYTES, TransportError};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::raw::{Raw, frame};
use crate::scene::Scene;
use crate::support::{HAND_OFF, eventually};

/// Cases of each kind in an ordinary run.
const CASES: u32 = 200;

/// Stands for the life of the broker under test until that is known.
const KNOWN: Epoch = Epoch(1);

fn runner() -> TestRunner {
    let cases = std::env::var("LUNA_BROKER_FUZZ_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() })
}

/// Numbers near every edge.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0u64..16,
        2 => prop::sample::select(vec![64, 512, 4096, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 62, i64::MAX as u64]),
        1 => prop::sample::select(vec![u64::MAX, u64::MAX - 1, 1 << 63]),
        1 => any::<u64>(),
    ]
}

fn dims() -> BoxedStrategy<Dims> {
    let latent = (number(), number(), number()).prop_map(|(n, h, w)| Dims::of([n, 4, h, w]));
    prop_oneof![
        latent,
        prop::collection::vec(number(), 0..=8).prop_map(|values| Dims::new(&values).expect("at most 8"))
    ]
    .boxed()
}

fn meta() -> impl Strategy<Value = TensorMeta> {
    let dtypes = vec![DType::F32, DType::F16, DType::F64, DType::Bf16, DType::I64, DType::Bool];
    (prop::sample::select(dtypes), dims(), dims(), any::<bool>()).prop_map(|(dtype, shape, strides, dense)| {
        TensorMeta { dtype, shape, strides: if dense { shape.contiguous_strides() } else { strides } }
    })
}

fn lease() -> impl Strategy<Value = LeaseRef> {
    (0u32..8, 0u32..8, 0u32..4).prop_map(|(arena, slot, generation)| LeaseRef {
        arena: ArenaId(arena),
        slot: SlotId(slot),
        generation: Generation(generation),
    })
}

fn source() -> BoxedStrategy<TensorSource> {
    let leased = (any::<bool>(), lease(), number(), number(), meta());
    prop_oneof![
        leased.prop_map(|(known, lease, offset, sequence, meta)| {
            let epoch = if known { KNOWN } else { Epoch(0) };
            TensorSource::Leased(Descriptor { epoch, lease, offset, sequence, meta })
        }),
        meta().prop_map(TensorSource::Inline),
    ]
    .boxed()
}

fn gpu() -> impl Strategy<Value = GpuUuid> {
    (0u8..3).prop_map(|byte| GpuUuid([byte; 16]))
}

fn target() -> impl Strategy<Value = GpuTarget> {
    (gpu(), 0u32..3).prop_map(|(gpu, opening)| GpuTarget { gpu, opening })
}

fn gpu_search() -> BoxedStrategy<Operation> {
    let rung = || prop::sample::select(Rung::ALL.to_vec());
    let failed =
        (rung(), ".{0,300}").prop_map(|(rung, detail)| RungFailure { rung, code: FailureCode::Demoted, detail });
    let wish = (gpu(), prop::option::of(rung()), prop::option::of(failed))
        .prop_map(|(gpu, forced, failed)| Operation::OpenGpu(OpenGpu { gpu, forced, failed }));
    let marked = (any::<[u8; NONCE_BYTES]>(), number()).prop_map(|(nonce, sequence)| MarkedFindings {
        read: nonce,
        wrote: nonce,
        sequence,
    });
    let findings =
        (any::<u32>(), any::<[u8; NONCE_BYTES]>(), prop::option::of(marked)).prop_map(|(open_us, nonce, marked)| {
            GpuProbeOutcome::Opened(GpuFindings { open_us, read: nonce, wrote: nonce, marked })
        });
    let outcome = prop_oneof![findings, ".{0,300}".prop_map(GpuProbeOutcome::Failed)];
    let probed = (gpu(), outcome).prop_map(|(gpu, outcome)| Operation::GpuProbed(GpuProbed { gpu, outcome }));
    prop_oneof![wish, probed, gpu().prop_map(|gpu| Operation::GpuReady { gpu })].boxed()
}

fn place() -> impl Strategy<Value = SlotPlace> {
    prop_oneof![
        8 => Just(SlotPlace::Host),
        1 => target().prop_map(SlotPlace::Gpu),
        1 => target().prop_map(SlotPlace::Staging),
    ]
}

fn tokens() -> BoxedStrategy<ClipTokens<TensorSource>> {
    let kind = prop::sample::select(ClipKind::ALL.to_vec());
    (kind, source(), prop::option::of(source()), prop::option::of(source()))
        .prop_map(|(kind, ids, weights, rows)| ClipTokens { kind, ids, weights, rows })
        .boxed()
}

fn adapters() -> BoxedStrategy<AdapterStack> {
    let uses = (".{0,40}", any::<f64>()).prop_map(|(name, strength)| AdapterUse { name, strength });
    let mode = prop::sample::select(AdapterMode::ALL.to_vec());
    (prop::collection::vec(uses, 0..4), mode).prop_map(|(adapters, mode)| AdapterStack { adapters, mode }).boxed()
}

fn control() -> BoxedStrategy<Control<TensorSource>> {
    let list = || prop::collection::vec(prop::option::of(source()), 0..3);
    (list(), list(), list()).prop_map(|(input, middle, output)| Control { input, middle, output }).boxed()
}

/// Steps of models that are not there and of runs that are not open, runs, and adapters.
fn sampling() -> BoxedStrategy<Operation> {
    let optional = || prop::option::of(source());
    let input = (source(), source(), optional(), optional(), prop::option::of(control()))
        .prop_map(|(x, timesteps, context, y, control)| StepInput { x, timesteps, context, y, control });
    let subject = prop_oneof![
        (".{0,40}", adapters()).prop_map(|(name, adapters)| StepSubject::Model { name, adapters }),
        (number(), prop::collection::vec(any::<u32>(), 0..5))
            .prop_map(|(run, conds)| StepSubject::Run { run: RunId(run), conds }),
    ];
    let cache = (any::<f64>(), any::<f64>(), any::<f64>(), prop::option::of(any::<u32>()))
        .prop_map(|(threshold, start, end, max_hits)| BlockCache { threshold, start, end, max_hits });
    let settings = (adapters(), prop::option::of(cache), prop::collection::vec(any::<f64>(), 0..4))
        .prop_map(|(adapters, cache, sigmas)| RunSettings { adapters, cache, sigmas });
    let models = prop::collection::vec(".{0,20}", 0..4);
    let service = prop::sample::select(Service::ALL.to_vec());
    prop_oneof![
        (subject, input, place())
            .prop_map(|(subject, input, result)| { Operation::Unet(Box::new(UnetRequest { subject, input, result })) }),
        (".{0,40}", settings).prop_map(|(model, settings)| Operation::OpenRun(Box::new(OpenRun { model, settings }))),
        (service, models, adapters()).prop_map(|(service, models, adapters)| Operation::Prefetch {
            service,
            models,
            adapters
        }),
    ]
    .boxed()
}

fn operation() -> BoxedStrategy<Operation> {
    let tiles = (number(), number(), number()).prop_map(|(width, height, overlap)| {
        Tiling::Tiles(TileShape { width: width as u32, height: height as u32, overlap: overlap as u32 })
    });
    let call = (any::<bool>(), prop_oneof![Just(Tiling::Auto), tiles]).prop_map(|(decode, tiling)| VaeCall {
        operation: if decode { VaeOperation::Decode } else { VaeOperation::Encode },
        tiling,
    });
    let model = prop_oneof![4 => Just(HAND_OFF.to_owned()), 1 => ".{0,40}"];
    let prompt = prop_oneof![
        (".{0,80}", prop::option::of(".{0,20}")).prop_map(|(text, text_g)| ClipInput::Text(ClipText { text, text_g })),
        prop::collection::vec(tokens(), 0..3).prop_map(ClipInput::Tokens),
    ];
    let models = prop::collection::vec(model.clone(), 0..6);
    let how = (any::<u32>(), any::<bool>())
        .prop_map(|(from_end, project)| ClipOptions { from_end: NonZeroU32::new(from_end), project });
    let task = prop::sample::select(vec![EncodersTask::Describe, EncodersTask::Load]);
    prop_oneof![
        2 => (models.clone(), prompt, how, adapters(), place()).prop_map(|(models, input, options, adapters, result)| {
            Operation::Clip(Box::new(ClipRequest { models, input, options, adapters, result }))
        }),
        3 => sampling(),
        1 => (models, task).prop_map(|(models, task)| Operation::Encoders { models, task }),
        6 => (model.clone(), call, source(), place())
            .prop_map(|(model, call, input, result)| Operation::Vae(VaeRequest { model, call, input, result })),
        1 => gpu_search(),
        3 => (place(), number(), any::<bool>())
            .prop_map(|(place, size_bytes, kept)| Operation::Allocate { place, size_bytes, kept }),
        1 => model.clone().prop_map(|model| Operation::Describe { service: Service::Unet, model }),
        1 => model.prop_map(|name| Operation::Header { name }),
        1 => prop::sample::select(vec![Operation::Ping, Operation::Models, Operation::Status, Operation::Metrics]),
    ]
    .boxed()
}

fn message() -> impl Strategy<Value = ClientMessage> {
    let release = || (lease(), number()).prop_map(|(lease, sequence)| Release { lease, sequence });
    let releases = || prop::collection::vec(release(), 0..4);
    let timeout = prop::option::of(any::<u32>());
    prop_oneof![
        8 => (0u64..4, timeout, releases(), operation()).prop_map(|(id, timeout_ms, releases, operation)| {
            ClientMessage::Request(Request { id: RequestId(id), timeout_ms, releases, operation })
        }),
        1 => number().prop_map(|id| ClientMessage::Cancel { id: RequestId(id) }),
        1 => releases().prop_map(ClientMessage::Release),
        1 => (0u32..8).prop_map(|arena| ClientMessage::Opened { arena: ArenaId(arena) }),
        1 => number().prop_map(|run| ClientMessage::CloseRun { run: RunId(run) }),
    ]
}

/// Turns a descriptor that is meant to be of this life into one near the session's own slot.
fn in_this_life(message: &mut ClientMessage, held: &Descriptor) {
    if let ClientMessage::Request(Request { operation: Operation::Vae(request), .. }) = message
        && let TensorSource::Leased(descriptor) = &mut request.input
        && descriptor.epoch == KNOWN
    {
        descriptor.epoch = held.epoch;
        descriptor.lease.arena = held.lease.arena;
        descriptor.offset = held.offset.wrapping_add(descriptor.offset);
    }
}

#[test]
fn well_formed_nonsense_is_answered_once_each() {
    let scene = Scene::new(&["--session-bytes", "256M"]);
    let before = scene.footprint();
    let cases = prop::collection::vec(message(), 1..12);
    let run = runner().run(&cases, |messages| {
        let (mut raw, _) = Raw::shared(&scene.place.socket());
        let held = raw.allocate(1 << 20);
        for mut message in messages {
            in_this_life(&mut message, &held);
            // As many bytes as an inline tensor of a reasonable size needs; what is too much is skipped.
            raw.bytes(&frame(&message, 64));
            raw.bytes(&[0; 64]);
            if let ClientMessage::Request(Request { id, .. }) = message {
                prop_assert_eq!(raw.reply().id, id);
            }
        }
        raw.send(&ClientMessage::Goodbye);
        prop_assert!(matches!(raw.receive(), Err(TransportError::Closed)), "the session lasted to its end");
        Ok(())
    });
    run.unwrap();
    scene.check_bystander();
    eventually("the end of all sessions", || scene.footprint().is_back_to(&before));
    assert_eq!(scene.bystander.status().unwrap().sessions_lost, 0);
}

#[test]
fn arbitrary_bytes_in_frames_end_their_session_and_nothing_else() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    let damage = (message(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(message, at, with)| {
        let mut bytes = frame(&message, 0).split_off(HEADER_BYTES);
        let at = at.index(bytes.len());
        bytes[at] = with;
        bytes
    });
    let cases = prop_oneof![bytes(), damage];
    let run = runner().run(&cases, |bytes| {
        let mut raw = Raw::inline(&scene.place.socket());
        let header = [&(bytes.len() as u32).to_le_bytes()[..], &[0; 8]].concat();
        raw.bytes(&[header, bytes].concat());
        // A damaged message may still be one; the goodbye ends the session where the bytes did not.
        _ = raw.try_bytes(&frame(&ClientMessage::Goodbye, 0), luna_broker::transport::Wait::Block);
        loop {
            match raw.receive() {
                Ok(ServerMessage::Reply(_) | ServerMessage::Refused(_)) => {}
                Ok(other) => prop_assert!(false, "{other:?} came out of place"),
                Err(error) => {
                    prop_assert!(matches!(error, TransportError::Closed), "{error}");
                    return Ok(());
                }
            }
        }
    });
    run.unwrap();
    scene.check_bystander();
    eventually("the end of all sessions", || scene.footprint().is_back_to(&before));
}

#[test]
fn arbitrary_bytes_instead_of_frames_end_their_session_and_nothing_else() {
    let scene = Scene::new(&[]);
    let before = scene.footprint();
    let run = runner().run(&(prop::collection::vec(any::<u8>(), 0..100), any::<bool>()), |(bytes, negotiated)| {
        let socket = scene.place.socket();
        let raw = if negotiated { Raw::inline(&socket) } else { Raw::connect(&socket) };
        raw.bytes(&bytes);
        Ok(())
    });
    run.unwrap();
    scene.check_bystander();
    eventually("the end of all sessions", || scene.footprint().is_back_to(&before));
}
