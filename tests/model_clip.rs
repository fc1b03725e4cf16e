//! The text encoders against the reference's results, which `tests/golden/make_clip.py` wrote.
#![cfg(feature = "torch")]

use std::cell::Cell;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use luna_broker::device::{Device, InProcessDevice, Span};
use luna_broker::model::clip::{
    Clip, ClipCall, ClipKind, ClipPrompt, SdxlSizes, TextEncoders, sdxl_vector, text_encoders,
};
use luna_broker::model::text::{Chunk, Token, Tokenizer, WeightedToken};
use luna_broker::model::torch::{LoadOptions, Target, load_clip};
use luna_broker::model::{ModelError, ModelFile, StoredDType, WeightStorage};

/// Largest difference that differently ordered sums explain.
const TOLERANCE: f32 = 1e-5;
/// Positions of a chunk.
const LENGTH: usize = 77;

/// The generated files, or `None` with a word about how to get them.
fn golden() -> Option<PathBuf> {
    let folder = std::env::var_os("LUNA_BROKER_GOLDEN").map(|folder| PathBuf::from(folder).join("clip"));
    let folder = folder.filter(|folder| folder.is_dir());
    if folder.is_none() {
        eprintln!("skipped: set LUNA_BROKER_GOLDEN to FOLDER after `python tests/golden/make_clip.py FOLDER/clip`");
    }
    folder
}

struct Loaded {
    set: TextEncoders,
    clip: Box<dyn Clip>,
}

fn open(path: &Path) -> Arc<ModelFile> {
    Arc::new(ModelFile::open(path).unwrap_or_else(|error| panic!("{error}")))
}

fn load(folder: &Path, names: &[&str], storage: WeightStorage) -> Loaded {
    let files: Vec<_> = names.iter().map(|name| open(&folder.join(format!("{name}.safetensors")))).collect();
    let set = text_encoders(&files.iter().map(AsRef::as_ref).collect::<Vec<_>>()).unwrap_or_else(|e| panic!("{e}"));
    let seen = Cell::new((0, 0));
    let progress = |done: u64, total: u64| {
        assert!(done > seen.get().0 && done <= total, "{done} of {total} after {:?}", seen.get());
        seen.set((done, total));
    };
    let options = LoadOptions { target: &Target::Cpu, storage, memory: &InProcessDevice, progress: &progress };
    let clip = Box::new(load_clip(&files, options).unwrap_or_else(|error| panic!("{error}")));
    assert_eq!(seen.get(), (set.weight_bytes(), set.weight_bytes()), "progress ends with everything loaded");
    Loaded { set, clip }
}

/// Inputs and expected results.
struct Cases(Arc<ModelFile>);

impl Cases {
    fn of(folder: &Path, name: &str) -> Self {
        Self(open(&folder.join(format!("{name}.io.safetensors"))))
    }

    fn bytes(&self, name: &str, dtype: StoredDType) -> &[u8] {
        let stored = self.0.tensor(name).unwrap_or_else(|| panic!("no {name} in {}", self.0.path().display()));
        assert_eq!(stored.dtype, dtype, "{name}");
        self.0.bytes(stored).expect("its bytes")
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let bytes = self.bytes(name, StoredDType::F32);
        bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect()
    }

    fn integers(&self, name: &str) -> Vec<usize> {
        let number = |bytes: &[u8]| i64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        self.bytes(name, StoredDType::I64).chunks_exact(8).map(|bytes| number(bytes) as usize).collect()
    }

    fn chunks(&self, name: &str) -> Vec<Chunk> {
        let plain = |id: &usize| WeightedToken { token: Token::Id(*id as u32), weight: 1.0 };
        self.integers(name).chunks_exact(LENGTH).map(|chunk| chunk.iter().map(plain).collect()).collect()
    }
}

fn call(prompts: &[(ClipKind, Vec<Chunk>)]) -> ClipCall {
    let prompts = prompts.iter().map(|(kind, chunks)| ClipPrompt { kind: *kind, chunks: chunks.clone() }).collect();
    ClipCall { prompts, from_end: None, project: true }
}

fn span(bytes: usize) -> Span {
    // An offset shows whether a run keeps to its slot.
    Span::new(InProcessDevice.allocate(bytes + 128).expect("memory"), 64, bytes).expect("a range of the region")
}

/// The numbers in a slot; nothing beside it may have been written.
fn numbers(slot: &Span) -> Vec<f32> {
    let mut all = vec![0; slot.length() + 128];
    Span::new(Arc::clone(slot.region()), 0, all.len()).expect("the region").read(&mut all).expect("it fits");
    assert!(all[..64].iter().chain(&all[64 + slot.length()..]).all(|&byte| byte == 0), "written beside the slot");
    let inside = &all[64..64 + slot.length()];
    inside.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().expect("four bytes"))).collect()
}

#[derive(Debug, PartialEq)]
struct Encoded {
    cond: Vec<f32>,
    pooled: Vec<f32>,
}

fn try_encode(loaded: &mut Loaded, call: &ClipCall, stop: &dyn Fn() -> bool) -> Result<Encoded, ModelError> {
    let plan = loaded.set.plan(call)?;
    let [cond, pooled] = [plan.cond, plan.pooled].map(|meta| span(meta.size_bytes().expect("a size")));
    loaded.clip.encode(call, None, &cond, &pooled, stop)?;
    assert!(loaded.clip.stream().is_none());
    Ok(Encoded { cond: numbers(&cond), pooled: numbers(&pooled) })
}

fn encode(loaded: &mut Loaded, call: &ClipCall) -> Encoded {
    try_encode(loaded, call, &|| false).unwrap_or_else(|error| panic!("{error}"))
}

fn difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(a, b)| (a - b).abs()).fold(0.0, |worst, off| if off > worst { off } else { worst })
}

/// Compares, and keeps the largest difference seen.
struct Compare {
    what: String,
    worst: f32,
}

impl Compare {
    fn of(what: impl Into<String>) -> Self {
        Self { what: what.into(), worst: 0.0 }
    }

    fn check(&mut self, case: &str, got: &[f32], expected: &[f32]) {
        let off = difference(got, expected);
        assert!(off <= TOLERANCE && got.iter().all(|value| value.is_finite()), "{} {case}: {off:e}", self.what);
        self.worst = self.worst.max(off);
    }
}

impl Drop for Compare {
    fn drop(&mut self) {
        println!("{}: largest difference {:e}", self.what, self.worst);
    }
}

/// Checks one encoder by everything its file of cases has.
fn check_encoder(folder: &Path, name: &str, weights: &str, kind: ClipKind, storage: WeightStorage) {
    let cases = Cases::of(folder, name);
    let mut loaded = load(folder, &[weights], storage);
    let [facts] = loaded.set.encoders() else { panic!("{weights} is one encoder") };
    assert_eq!(facts.kind, kind, "{weights}");
    let projects = facts.projection.is_some();
    let mut compare = Compare::of(format!("{weights} {storage:?}"));
    for prompt in ["short", "full", "long"] {
        let mut call = call(&[(kind, cases.chunks(prompt))]);
        let got = encode(&mut loaded, &call);
        compare.check(prompt, &got.cond, &cases.floats(&format!("{prompt}.cond")));
        let pooled = if projects { "projected" } else { "pooled" };
        compare.check(prompt, &got.pooled, &cases.floats(&format!("{prompt}.{pooled}")));
        call.project = false;
        let got = encode(&mut loaded, &call);
        compare.check(prompt, &got.pooled, &cases.floats(&format!("{prompt}.pooled")));
    }
    let mut weighted = cases.chunks("long");
    for (at, weight) in weighted.iter_mut().flatten().zip(cases.floats("weights")) {
        at.weight = weight;
    }
    let got = encode(&mut loaded, &call(&[(kind, weighted)]));
    compare.check("weighted", &got.cond, &cases.floats("weighted.cond"));
    compare.check("weights leave the pooled row alone", &got.pooled, &{
        encode(&mut loaded, &call(&[(kind, cases.chunks("long"))])).pooled
    });
    let mut with_rows = cases.chunks("short");
    let rows = cases.floats("rows");
    let rows = rows.chunks_exact(rows.len() / 3);
    for (place, row) in cases.integers("places").into_iter().zip(rows) {
        with_rows[0][place].token = Token::Vector(row.into());
    }
    let got = encode(&mut loaded, &call(&[(kind, with_rows)]));
    compare.check("rows", &got.cond, &cases.floats("rows.cond"));
    for from_end in [1, 2, 3, 99] {
        let skip = ClipCall { from_end: NonZeroU32::new(from_end), ..call(&[(kind, cases.chunks("short"))]) };
        let got = encode(&mut loaded, &skip);
        compare.check(&format!("skip {from_end}"), &got.cond, &cases.floats(&format!("skip{from_end}.cond")));
    }
}

#[test]
fn each_encoder_agrees_with_the_reference_under_every_name() {
    let Some(folder) = golden() else { return };
    for (name, weights, kind) in [
        ("clip_l", "clip_l.transformers", ClipKind::L),
        ("clip_l", "clip_l.float", ClipKind::L),
        ("clip_l", "clip_l.checkpoint", ClipKind::L),
        ("clip_l", "clip_l.bare", ClipKind::L),
        ("clip_h", "clip_h.checkpoint", ClipKind::H),
        ("clip_h24", "clip_h24.transformers", ClipKind::H),
        ("clip_g", "clip_g.transformers", ClipKind::G),
        ("clip_g", "clip_g.refiner", ClipKind::G),
    ] {
        for storage in [WeightStorage::Mapped, WeightStorage::Copied] {
            check_encoder(&folder, name, weights, kind, storage);
        }
    }
}

#[test]
fn a_clip_h_without_its_last_block_counts_from_where_that_was() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "clip_h24");
    let mut whole = load(&folder, &["clip_h24.transformers"], WeightStorage::Mapped);
    let mut less = load(&folder, &["clip_h24.one-less"], WeightStorage::Mapped);
    let encoder = &less.set.encoders()[0];
    assert_eq!((encoder.kind, encoder.layers), (ClipKind::H, 23));
    let mut call = call(&[(ClipKind::H, cases.chunks("full"))]);
    for from_end in [None, Some(2), Some(3), Some(24)] {
        call.from_end = from_end.and_then(NonZeroU32::new);
        assert_eq!(encode(&mut less, &call).cond, encode(&mut whole, &call).cond, "{from_end:?}");
    }
    let usual = encode(&mut less, &ClipCall { from_end: None, ..call.clone() });
    call.from_end = NonZeroU32::new(1);
    assert_eq!(encode(&mut less, &call).cond, usual.cond, "the last block that is there");
}

#[test]
fn both_encoders_of_sdxl_work_side_by_side() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "sdxl");
    let sources: [&[&str]; 3] = [
        &["sdxl.checkpoint"],
        &["clip_l.checkpoint", "clip_g.transformers"],
        &["clip_g.transformers", "clip_l.transformers"],
    ];
    for source in sources {
        let mut loaded = load(&folder, source, WeightStorage::Mapped);
        let kinds: Vec<_> = loaded.set.encoders().iter().map(|facts| facts.kind).collect();
        assert_eq!(kinds, [ClipKind::L, ClipKind::G]);
        let mut compare = Compare::of(source.join(" + "));
        // The prompts need not come in the order of the set.
        let mut call = call(&[(ClipKind::G, cases.chunks("g")), (ClipKind::L, cases.chunks("l"))]);
        let got = encode(&mut loaded, &call);
        compare.check("cond", &got.cond, &cases.floats("cond"));
        compare.check("pooled", &got.pooled, &cases.floats("pooled"));
        call.from_end = NonZeroU32::new(3);
        compare.check("skip 3", &encode(&mut loaded, &call).cond, &cases.floats("skip3.cond"));
    }
}

#[test]
fn sdxl_gets_its_sizes_behind_the_pooled_row() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "sdxl");
    let pooled = cases.floats("vector.pooled");
    let (original, crop) = ([1024.0, 832.0], [16.0, 0.0]);
    let base = sdxl_vector(&pooled, SdxlSizes::Base { original, crop, target: [1152.0, 896.0] });
    let refiner = sdxl_vector(&pooled, SdxlSizes::Refiner { original, crop, aesthetic: 2.5 });
    let mut compare = Compare::of("sizes");
    compare.check("base", &base, &cases.floats("vector.base"));
    compare.check("refiner", &refiner, &cases.floats("vector.refiner"));
    let real = vec![0.0; 1280];
    let length = |sizes| sdxl_vector(&real, sizes).len();
    assert_eq!(length(SdxlSizes::Base { original, crop, target: original }), 2816);
    assert_eq!(length(SdxlSizes::Refiner { original, crop, aesthetic: 6.0 }), 2560);
}

#[test]
fn a_weight_of_one_changes_no_bit_beside_other_weights() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "clip_l");
    let mut loaded = load(&folder, &["clip_l.transformers"], WeightStorage::Mapped);
    let mut chunks = cases.chunks("short");
    // The batch that a prompt with weights makes: what differs is not how sums are ordered.
    let id = |id| WeightedToken { token: Token::Id(id), weight: 1.0 };
    let empty = [vec![id(598)], vec![id(599); LENGTH - 1]].concat();
    let plain = encode(&mut loaded, &call(&[(ClipKind::L, vec![chunks[0].clone(), empty])]));
    chunks[0][5].weight = 2.0;
    let got = encode(&mut loaded, &call(&[(ClipKind::L, chunks)]));
    let width = got.cond.len() / LENGTH;
    for (at, (one, other)) in got.cond.chunks(width).zip(plain.cond.chunks(width)).enumerate() {
        assert_eq!(one == other, at != 5, "position {at}");
    }
}

#[test]
fn calls_that_do_not_fit_are_refused_before_anything_runs() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "clip_l");
    let mut loaded = load(&folder, &["clip_l.transformers"], WeightStorage::Mapped);
    let good = cases.chunks("short");
    let edited = |edit: &dyn Fn(&mut Vec<Chunk>)| {
        let mut chunks = good.clone();
        edit(&mut chunks);
        call(&[(ClipKind::L, chunks)])
    };
    let refusals: [(ClipCall, &str); 10] = [
        (call(&[]), "none for clip_l"),
        (call(&[(ClipKind::L, good.clone()), (ClipKind::L, good.clone())]), "two for clip_l"),
        (call(&[(ClipKind::L, good.clone()), (ClipKind::G, good.clone())]), "clip_g, which is not loaded"),
        (edited(&|chunks| chunks.clear()), "no chunk"),
        (edited(&|chunks| chunks.resize(129, chunks[0].clone())), "129 chunks"),
        (edited(&|chunks| chunks.push(chunks[0][..76].to_vec())), "one length"),
        (edited(&|chunks| chunks[0].extend_from_within(..1)), "one length"),
        (edited(&|chunks| chunks[0][3].token = Token::Id(600)), "token 600"),
        (edited(&|chunks| chunks[0][3].token = Token::Vector(Arc::from([0.0; 5]))), "row of 5 numbers"),
        (edited(&|chunks| chunks[0][3].weight = f32::NAN), "a weight is NaN"),
    ];
    for (call, reason) in refusals {
        let planned = loaded.set.plan(&call).expect_err(reason).to_string();
        assert!(planned.contains(reason), "{reason}: {planned}");
        let ran = loaded.clip.encode(&call, None, &span(64), &span(64), &|| panic!("it ran")).expect_err(reason);
        assert!(matches!(ran, ModelError::Prompt { .. }), "{reason}: {ran}");
    }
    let fine = call(&[(ClipKind::L, good)]);
    let refused = loaded.clip.encode(&fine, None, &span(64), &span(4096), &|| false);
    assert!(matches!(refused, Err(ModelError::Tensor(_))), "the slot is too small");
    assert!(try_encode(&mut loaded, &fine, &|| false).is_ok(), "the model is as before");
}

#[test]
fn a_prompt_without_an_end_is_pooled_at_its_last_position() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "clip_l");
    let mut loaded = load(&folder, &["clip_l.transformers"], WeightStorage::Mapped);
    let mut chunks = cases.chunks("full");
    chunks[0][76].token = Token::Id(3);
    let open = encode(&mut loaded, &ClipCall { project: false, ..call(&[(ClipKind::L, chunks.clone())]) });
    let width = open.cond.len() / LENGTH;
    assert_eq!(open.pooled, open.cond[76 * width..]);
    // Shorter chunks are fine too: attention looks back only, so nothing of what is cut off was seen.
    chunks[0].truncate(5);
    let short = encode(&mut loaded, &ClipCall { project: false, ..call(&[(ClipKind::L, chunks)]) });
    assert_eq!(short.pooled, short.cond[4 * width..]);
    assert!(difference(&short.cond, &open.cond[..5 * width]) <= TOLERANCE);
}

#[test]
fn a_call_can_be_stopped_between_blocks() {
    let Some(folder) = golden() else { return };
    let cases = Cases::of(&folder, "sdxl");
    let mut loaded = load(&folder, &["sdxl.checkpoint"], WeightStorage::Mapped);
    let call = call(&[(ClipKind::L, cases.chunks("l")), (ClipKind::G, cases.chunks("g"))]);
    let asked = Cell::new(0);
    let stop = || {
        asked.set(asked.get() + 1);
        asked.get() == 5
    };
    let stopped = try_encode(&mut loaded, &call, &stop);
    assert!(matches!(stopped, Err(ModelError::Cancelled)) && asked.get() == 5, "{stopped:?}");
    assert!(try_encode(&mut loaded, &call, &|| false).is_ok(), "the encoders are as before");
}

#[test]
fn a_file_that_changes_under_a_mapped_encoder_is_noticed() {
    let Some(folder) = golden() else { return };
    let place = tempfile::tempdir().expect("a temporary folder");
    let copy = place.path().join("clip.safetensors");
    for storage in [WeightStorage::Mapped, WeightStorage::Copied] {
        std::fs::copy(folder.join("clip_l.transformers.safetensors"), &copy).expect("a copy");
        let mut loaded = load(place.path(), &["clip"], storage);
        let other = place.path().join("other");
        std::fs::copy(folder.join("clip_l.float.safetensors"), &other).expect("a copy");
        std::fs::rename(&other, &copy).expect("it is replaced");
        let call = call(&[(ClipKind::L, Cases::of(&folder, "clip_l").chunks("short"))]);
        let refused = try_encode(&mut loaded, &call, &|| false);
        match storage {
            WeightStorage::Mapped => assert!(matches!(refused, Err(ModelError::Changed { .. })), "{refused:?}"),
            WeightStorage::Copied => assert!(refused.is_ok(), "{refused:?}"),
        }
    }
}

#[test]
fn a_prompt_in_words_has_the_form_that_encoders_take() {
    let Some(folder) = golden() else { return };
    let loaded = load(&folder, &["sdxl.checkpoint"], WeightStorage::Mapped);
    let rules = loaded.set.get(ClipKind::G).expect("it is there").rules();
    assert_eq!((rules.length, rules.pad, rules.key), (LENGTH, 0, "clip_g"));
    let tokens = Tokenizer::new().chunks("a (photo:1.2)", &rules, None).expect("a prompt");
    let refused = loaded.set.plan(&call(&[(ClipKind::G, tokens.chunks.clone()), (ClipKind::L, tokens.chunks)]));
    let error = refused.expect_err("the small encoders have few tokens").to_string();
    assert!(error.contains("token 49406 is not one of the 600"), "{error}");
}
