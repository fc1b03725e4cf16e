use std::sync::Arc;

use luna_broker::ErrorKind;
use luna_broker::client::CallOptions;
use luna_broker::protocol::{ClipRequest, Operation, Outcome, SlotPlace, TensorSource};
use luna_broker::service::{AdapterStack, ClipInput, ClipKind, ClipOptions, ClipPrompt, ClipText, ClipTokens, Token};
use luna_broker::tensor::{DType, Dims, TensorMeta};

use crate::config;
use crate::golden::{Cases, encoders, golden, numbers, path};
use crate::raw::Raw;
use crate::support::{Place, broker_at, client_at, eventually};

#[test]
fn prompts_that_do_not_fit_are_refused_by_name_and_harm_nobody() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (client, bystander) = (client_at(&place), client_at(&place));
    let cases = Cases::of(&folder, "clip_l");
    let clip = encoders(&client, &folder, &["clip_l.transformers"]);
    let good = cases.prompt(ClipKind::L, "short");
    let expected = numbers(&clip.encode_tokens(std::slice::from_ref(&good)).unwrap());
    let edited = |edit: &dyn Fn(&mut ClipPrompt)| {
        let mut prompt = good.clone();
        edit(&mut prompt);
        vec![prompt]
    };
    let row = |width| Token::Vector(Arc::from(vec![0.5; width]));
    let refusals: [(Vec<ClipPrompt>, &str); 13] = [
        (Vec::new(), "none for clip_l"),
        (vec![good.clone(), good.clone()], "there are 2 for 1"),
        (edited(&|prompt| prompt.kind = ClipKind::G), "clip_g, which is not loaded"),
        (edited(&|prompt| prompt.chunks.clear()), "no chunk"),
        (edited(&|prompt| prompt.chunks[0].clear()), "no chunk"),
        (edited(&|prompt| prompt.chunks.resize(129, good.chunks[0].clone())), "up to 128 chunks"),
        (edited(&|prompt| prompt.chunks.push(good.chunks[0][..76].to_vec())), "not 77 and 76"),
        (edited(&|prompt| prompt.chunks[0].extend_from_slice(&good.chunks[0][..1])), "up to 77 positions"),
        (edited(&|prompt| prompt.chunks[0][3].token = Token::Id(600)), "token 600"),
        (edited(&|prompt| prompt.chunks[0][3].token = Token::Id(u32::MAX)), "a token 4294967295"),
        (edited(&|prompt| prompt.chunks[0][3].token = row(5)), "[up to 77 rows, 128]"),
        (
            edited(&|prompt| {
                prompt.chunks[0][3].token = row(128);
                prompt.chunks[0][4].token = row(64);
            }),
            "not 128 and 64",
        ),
        (edited(&|prompt| prompt.chunks[0][3].weight = f32::NAN), "a weight is NaN"),
    ];
    for (prompts, says) in refusals {
        let error = clip.encode_tokens(&prompts).unwrap_err();
        println!("{error}");
        assert_eq!(error.kind(), ErrorKind::InvalidTensor, "{says}: {error}");
        assert!(error.message().contains(says), "{says}: {error}");
        assert_eq!(numbers(&clip.encode_tokens(std::slice::from_ref(&good)).unwrap()), expected, "the session goes on");
    }
    let other = encoders(&bystander, &folder, &["clip_l.transformers"]);
    assert_eq!(numbers(&other.encode_tokens(&[good]).unwrap()), expected);
}

#[test]
fn texts_that_cannot_be_encoded_are_refused() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let l = encoders(&client, &folder, &["words.l"]);
    let refused = |text: &str, text_g: Option<&str>| {
        let text = ClipText { text: text.to_owned(), text_g: text_g.map(str::to_owned) };
        let error = l.encode_with(&text, ClipOptions::default(), &CallOptions::default()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidTensor, "{error}");
        error.message().to_owned()
    };
    assert!(refused("a", Some("b")).contains("clip_g, which is not loaded"));
    assert!(refused(&"a ".repeat(40_000), None).contains("80000 bytes"));
    assert!(refused(&"a ".repeat(20_000), None).contains("chunks; at most 128"));
    let nested = format!("{}a{}", "(".repeat(100), ")".repeat(100));
    assert!(refused(&nested, None).contains("nested"));
    let small = encoders(&client, &folder, &["clip_l.float"]);
    assert!(small.encode("a cat").unwrap_err().message().contains("token 49406"), "a vocabulary of its own");
    for odd in ["", " ", "\0", "(((", "embedding:", "\u{10ffff}", &"x".repeat(5000)] {
        assert!(l.encode(odd).is_ok(), "{odd:?}");
    }
}

/// Tokens as they are sent.
type Tokens = Vec<ClipTokens<TensorSource>>;

fn request(folder: &std::path::Path, tokens: Tokens) -> Operation {
    Operation::Clip(Box::new(ClipRequest {
        models: vec![path(folder, "clip_l.transformers")],
        input: ClipInput::Tokens(tokens),
        options: ClipOptions::default(),
        adapters: AdapterStack::default(),
        result: SlotPlace::Host,
    }))
}

fn inline(dtype: DType, shape: &[u64]) -> TensorSource {
    TensorSource::Inline(TensorMeta::contiguous(dtype, Dims::new(shape).unwrap()))
}

fn ids(values: &[i32]) -> Vec<u8> {
    let mut all = values.to_vec();
    all.resize(77, 0);
    all.iter().flat_map(|id| id.to_ne_bytes()).collect()
}

#[test]
fn hostile_token_payloads_are_refused_one_by_one() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = broker_at(&place, config());
    let bystander = encoders(&client_at(&place), &folder, &["clip_l.transformers"]);
    let good = [Cases::of(&folder, "clip_l").prompt(ClipKind::L, "short")];
    let expected = numbers(&bystander.encode_tokens(&good).unwrap());
    let (kind, row) = (ClipKind::L, [0u8; 128 * 4]);
    let plain = || inline(DType::I32, &[1, 77]);
    let of = |ids, weights, rows| vec![ClipTokens { kind, ids, weights, rows }];
    let strided = TensorMeta { strides: Dims::of([1, 1]), ..plain().meta() };
    let with_row = |first: &[i32], rows: usize| [ids(first), row.repeat(rows)].concat();
    let cases: Vec<(&str, Tokens, Vec<u8>)> = vec![
        ("a row that is not there", of(plain(), None, None), ids(&[-1])),
        ("the least number", of(plain(), None, None), ids(&[i32::MIN])),
        ("a token beyond the table", of(plain(), None, None), ids(&[i32::MAX])),
        ("rows that stand nowhere", of(plain(), None, Some(inline(DType::F32, &[1, 128]))), with_row(&[1], 1)),
        ("rows out of order", of(plain(), None, Some(inline(DType::F32, &[2, 128]))), with_row(&[-2, -1], 2)),
        ("a row used twice", of(plain(), None, Some(inline(DType::F32, &[1, 128]))), with_row(&[-1, -1], 1)),
        ("rows without a width", of(plain(), None, Some(inline(DType::F32, &[7, 0]))), ids(&[1])),
        ("more rows than places", of(plain(), None, Some(inline(DType::F32, &[78, 128]))), ids(&[1])),
        ("numbers without end", of(inline(DType::I32, &[u64::MAX, u64::MAX]), None, None), Vec::new()),
        ("a chunk without positions", of(inline(DType::I32, &[128, 0]), None, None), Vec::new()),
        ("another element type", of(inline(DType::I64, &[1, 77]), None, None), vec![0; 77 * 8]),
        ("another rank", of(inline(DType::I32, &[77]), None, None), ids(&[])),
        ("steps of nothing", of(TensorSource::Inline(strided), None, None), ids(&[])),
        ("weights of another shape", of(plain(), Some(inline(DType::F32, &[77, 1])), None), vec![0; 2 * 77 * 4]),
        ("endless weights", of(plain(), Some(plain()), None), vec![0; 2 * 77 * 4]),
        ("the same encoder again and again", vec![of(plain(), None, None).remove(0); 1000], Vec::new()),
        ("no encoder", Vec::new(), Vec::new()),
    ];
    let mut raw = Raw::inline(&place.socket());
    for (what, tokens, payload) in cases {
        let fault = raw.fault(request(&folder, tokens), &payload);
        println!("{what}: {fault}");
        assert_eq!(fault.kind, ErrorKind::InvalidTensor, "{what}: {fault}");
        assert!(matches!(raw.ask(Operation::Ping, &[]), Outcome::Done), "{what}: the next frame is where it should be");
    }
    // Fewer bytes than are spoken of.
    let fault = raw.fault(request(&folder, of(plain(), None, None)), &[0; 64]);
    assert_eq!(fault.kind, ErrorKind::Protocol, "{fault}");
    assert!(matches!(raw.ask(Operation::Ping, &[]), Outcome::Done));
    assert!(matches!(raw.ask(request(&folder, of(plain(), None, None)), &ids(&[3])), Outcome::Encoded(_)));
    eventually("the return of all memory", || broker.status().sessions.iter().all(|session| session.leases == 0));
    assert_eq!(numbers(&bystander.encode_tokens(&good).unwrap()), expected);
}

#[test]
fn tokens_in_slots_that_are_not_the_sessions_are_refused() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let (mut raw, shared) = Raw::shared(&place.socket());
    let slot = raw.allocate(1 << 16);
    let meta = TensorMeta::contiguous(DType::I32, Dims::of([1, 77]));
    let good = shared.fill(slot, meta, &ids(&[598, 3, 599]));
    let of = |descriptor| {
        let ids = TensorSource::Leased(descriptor);
        request(&folder, vec![ClipTokens { kind: ClipKind::L, ids, weights: None, rows: None }])
    };
    assert!(matches!(raw.ask(of(good), &[]), Outcome::Encoded(_)));
    let mut outside = good;
    outside.offset += 1 << 16;
    assert_eq!(raw.fault(of(outside), &[]).kind, ErrorKind::InvalidTensor);
    let mut odd = good;
    odd.offset += 1;
    assert_eq!(raw.fault(of(odd), &[]).kind, ErrorKind::InvalidTensor);
    raw.release(good.lease);
    assert_eq!(raw.fault(of(good), &[]).kind, ErrorKind::Stale);
    assert!(matches!(raw.ask(Operation::Ping, &[]), Outcome::Done));
}
