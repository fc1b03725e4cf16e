//! Steps of many stacks in turns on one model, in batches of changing make-up.

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::torch::TorchUnet;
use luna_broker::model::{Adapter, ModelInput, ReadyStack, StepInput, Unet, UnetCall};
use luna_broker::service::AdapterMode;
use luna_broker::tensor::{DType, Dims, TensorMeta};

use crate::{Scene, digest};

/// What each caller's steps are adapted by.
const STACKS: [Option<&str>; 8] = [
    None,
    Some("lora@0.8"),
    Some("lora@-0.5"),
    Some("loha@1"),
    Some("lokr@1"),
    Some("dora-rows@1"),
    Some("lora@0.8+set@1"),
    Some("oft@1"),
];
const ROUNDS: usize = 100;
/// How many callers each batch of a round has; every caller is in one of them.
const BATCHES: [&[usize]; 5] = [&[8], &[1; 8], &[3, 5], &[2, 1, 4, 1], &[6, 2]];
/// Sums in another order, for results of a size around one.
const TOLERANCE: f32 = 2e-5;
const TOKENS: u64 = 7;

/// A tensor in memory of its own.
struct Held {
    meta: TensorMeta,
    span: Span,
}

impl Held {
    fn new<const N: usize>(shape: [u64; N], value: impl Fn(usize) -> f32) -> Self {
        let meta = TensorMeta::contiguous(DType::F32, Dims::of(shape));
        let length = meta.size_bytes().expect("small");
        let span = Span::new(InProcessDevice.allocate(length).expect("memory"), 0, length).expect("all of it");
        span.write(&(0..length / 4).flat_map(|at| value(at).to_ne_bytes()).collect::<Vec<_>>()).expect("room");
        Self { meta, span }
    }

    fn input(&self) -> ModelInput<'_> {
        ModelInput { meta: self.meta, memory: &self.span }
    }
}

/// Who steps with tensors and adapters of its own.
struct Caller {
    x: Held,
    timesteps: Held,
    context: Held,
    y: Option<Held>,
    output: Held,
    stack: Option<ReadyStack>,
}

impl Caller {
    /// Every other one has one row only.
    fn new(unet: &TorchUnet, who: usize, stack: Option<ReadyStack>) -> Self {
        let (facts, rows) = (unet.facts(), 1 + who as u64 % 2);
        let wave = |pace: f32| move |at: usize| ((at + 131 * who) as f32 * pace).sin();
        Self {
            x: Held::new([rows, facts.in_channels, 8, 8], wave(0.37)),
            timesteps: Held::new([rows], |at| 100.0 * (who + at) as f32 + 50.0),
            context: Held::new([rows, TOKENS, facts.context_width], wave(0.11)),
            y: facts.vector_width.map(|width| Held::new([rows, width], wave(0.23))),
            output: Held::new([rows, facts.out_channels, 8, 8], |_| f32::NAN),
            stack,
        }
    }

    fn call(&self) -> UnetCall<'_> {
        let input = StepInput {
            x: self.x.input(),
            timesteps: self.timesteps.input(),
            context: Some(self.context.input()),
            y: self.y.as_ref().map(Held::input),
            control: None,
        };
        UnetCall { input, output: &self.output.span, stack: self.stack.as_ref(), run: None }
    }

    fn result(&self) -> Vec<f32> {
        let mut bytes = vec![0; self.output.meta.size_bytes().expect("small")];
        self.output.span.read(&mut bytes).expect("as long as the output");
        bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect()
    }
}

fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let apart = left.iter().zip(right).map(|(left, right)| (left - right).abs());
    apart.fold(0.0, |most, one| if one.is_nan() { f32::INFINITY } else { most.max(one) })
}

fn ready(scene: &Scene, stack: &str) -> ReadyStack {
    let parts = stack.split('+').map(|part| part.split_once('@').expect("a strength"));
    let parts: Vec<_> =
        parts.map(|(name, strength)| (scene.adapter(name), strength.parse().expect("a strength"))).collect();
    let adapters: Vec<_> = parts.iter().map(|(file, strength)| Adapter { file, strength: *strength }).collect();
    scene.unet.stack_maker().make(&adapters, AdapterMode::Auto).expect(stack).0
}

fn step(unet: &mut TorchUnet, callers: &[&Caller]) -> Vec<Vec<f32>> {
    let mut calls: Vec<_> = callers.iter().map(|caller| caller.call()).collect();
    unet.step(&mut calls, &|| false).unwrap_or_else(|error| panic!("{error}"));
    callers.iter().map(|caller| caller.result()).collect()
}

#[test]
fn a_hundred_rounds_of_eight_stacks_in_mixed_batches_leave_the_model_bit_by_bit_as_it_was() {
    let Some(mut scene) = Scene::of("sd15") else { return };
    let callers: Vec<_> = (STACKS.iter().enumerate())
        .map(|(who, stack)| Caller::new(&scene.unet, who, stack.map(|stack| ready(&scene, stack))))
        .collect();
    let before = digest(&scene.unet);
    let alone: Vec<_> = callers.iter().map(|caller| step(&mut scene.unet, &[caller]).remove(0)).collect();
    for (who, stack) in STACKS.iter().enumerate().skip(1) {
        let plain = Caller::new(&scene.unet, who, None);
        let plain = step(&mut scene.unet, &[&plain]).remove(0);
        assert!(difference(&plain, &alone[who]) > 1e-3, "{stack:?} does something");
    }
    for round in 0..ROUNDS {
        // Another order each time; 3 and 8 have no common divisor.
        let order: Vec<_> = (0..callers.len()).map(|at| (3 * at + round) % callers.len()).collect();
        let mut left = order.as_slice();
        for &size in BATCHES[round % BATCHES.len()] {
            let (batch, rest) = left.split_at(size);
            left = rest;
            let together: Vec<_> = batch.iter().map(|&who| &callers[who]).collect();
            for (result, &who) in step(&mut scene.unet, &together).iter().zip(batch) {
                let off = difference(result, &alone[who]);
                assert!(off <= TOLERANCE, "{:?} in round {round} among {size}: {off:e}", STACKS[who]);
            }
        }
        assert!(left.is_empty());
    }
    assert_eq!(digest(&scene.unet), before);
    for (caller, alone) in callers.iter().zip(&alone) {
        assert_eq!(step(&mut scene.unet, &[caller])[0], *alone, "alone again, and bit by bit");
    }
}
