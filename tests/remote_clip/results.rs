use std::num::NonZeroU32;
use std::path::Path;
use std::sync::Arc;

use luna_broker::broker::Broker;
use luna_broker::client::{CallOptions, Client, Clip};
use luna_broker::config::BrokerConfig;
use luna_broker::protocol::Rung;
use luna_broker::service::{ClipKind, ClipOptions, ClipPrompt, ClipText, Token};

use crate::config;
use crate::golden::{Cases, Numbers, TOLERANCE, difference, encoders, golden, numbers};
use crate::support::{Place, broker_at, client_at, connect, local_client};

/// One client per rung that this machine has.
fn rungs(place: &Place, broker: &Arc<Broker>) -> [Client; 3] {
    [client_at(place), connect(place, |config| config.rung = Some(Rung::Inline)), local_client(broker)]
}

/// The same encoders on every rung.
struct Everywhere([Clip; 3]);

impl Everywhere {
    fn of(clients: &[Client; 3], folder: &Path, names: &[&str]) -> Self {
        Self(clients.each_ref().map(|client| encoders(client, folder, names)))
    }

    /// What a call gives, which is the same on every rung.
    fn give(&self, call: impl Fn(&Clip) -> luna_broker::Result<luna_broker::client::ClipOutput>) -> Numbers {
        let [first, others @ ..] = self.0.each_ref().map(|clip| numbers(&call(clip).unwrap_or_else(|e| panic!("{e}"))));
        assert!(others.iter().all(|other| *other == first), "rungs differ");
        first
    }

    fn tokens(&self, prompts: &[ClipPrompt], how: ClipOptions) -> Numbers {
        self.give(|clip| clip.encode_tokens_with(prompts, how, &CallOptions::default()))
    }
}

fn check(what: &str, got: &[f32], expected: &[f32]) {
    let off = difference(got, expected);
    println!("{what} {off:.1e}");
    assert!(off <= TOLERANCE, "{what}: {off:e}");
}

fn from_end(number: u32) -> ClipOptions {
    ClipOptions { from_end: NonZeroU32::new(number), ..ClipOptions::default() }
}

#[test]
fn tokens_become_the_references_results_on_every_rung() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = Arc::new(broker_at(&place, config()));
    let clients = rungs(&place, &broker);
    let all = [
        ("clip_l", "clip_l.transformers", ClipKind::L),
        ("clip_h", "clip_h.checkpoint", ClipKind::H),
        ("clip_g", "clip_g.transformers", ClipKind::G),
    ];
    for (name, file, kind) in all {
        let cases = Cases::of(&folder, name);
        let clip = Everywhere::of(&clients, &folder, &[file]);
        let usual = ClipOptions::default();
        for prompt in ["short", "full", "long"] {
            let got = clip.tokens(&[cases.prompt(kind, prompt)], usual);
            check(&format!("{name} {prompt}"), &got.cond, &cases.floats(&format!("{prompt}.cond")));
            check(&format!("{name} {prompt} pooled"), &got.pooled, &cases.floats(&format!("{prompt}.projected")));
        }
        let got = clip.tokens(&[cases.prompt(kind, "short")], ClipOptions { project: false, ..usual });
        check(&format!("{name} as it is"), &got.pooled, &cases.floats("short.pooled"));
        let got = clip.tokens(&[cases.weighted(kind)], usual);
        check(&format!("{name} weighted"), &got.cond, &cases.floats("weighted.cond"));
        let got = clip.tokens(&[cases.with_rows(kind)], usual);
        check(&format!("{name} rows"), &got.cond, &cases.floats("rows.cond"));
        for skip in [1, 2, 3, 99] {
            let got = clip.tokens(&[cases.prompt(kind, "short")], from_end(skip));
            check(&format!("{name} skip {skip}"), &got.cond, &cases.floats(&format!("skip{skip}.cond")));
        }
    }
}

#[test]
fn a_set_gives_the_same_from_one_file_and_from_several_in_any_order() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let broker = Arc::new(broker_at(&place, config()));
    let clients = rungs(&place, &broker);
    let cases = Cases::of(&folder, "sdxl");
    let prompts = [cases.prompt(ClipKind::G, "g"), cases.prompt(ClipKind::L, "l")];
    let (l, g) = ("clip_l.transformers", "clip_g.transformers");
    for names in [&["sdxl.checkpoint"][..], &[l, g], &[g, l], &[g, l, g]] {
        let clip = Everywhere::of(&clients, &folder, names);
        let got = clip.tokens(&prompts, ClipOptions::default());
        check(&format!("{names:?}"), &got.cond, &cases.floats("cond"));
        check(&format!("{names:?} pooled"), &got.pooled, &cases.floats("pooled"));
        let got = clip.tokens(&prompts, from_end(3));
        check(&format!("{names:?} skip"), &got.cond, &cases.floats("skip3.cond"));
    }
    let sets = broker.status().models;
    assert_eq!(sets.len(), 2, "the checkpoint, and one set of two files: {sets:?}");
}

#[test]
fn words_become_the_references_results_on_every_rung() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let settings = BrokerConfig { embedding_folders: vec![folder.join("embeddings")], ..config() };
    let broker = Arc::new(broker_at(&place, settings));
    let clip = Everywhere::of(&rungs(&place, &broker), &folder, &["words.g", "words.l"]);
    let cases = Cases::of(&folder, "words");
    let got = clip.give(|clip| clip.encode("a photo of a cat"));
    check("cat", &got.cond, &cases.floats("cat.cond"));
    check("cat pooled", &got.pooled, &cases.floats("cat.pooled"));
    let text = |text: &str, text_g: Option<&str>| ClipText { text: text.to_owned(), text_g: text_g.map(str::to_owned) };
    let with = |text: ClipText, how| clip.give(|clip| clip.encode_with(&text, how, &CallOptions::default()));
    let plain = with(text("a photo of a cat", None), ClipOptions { project: false, ..ClipOptions::default() });
    check("cat as it is", &plain.pooled, &cases.floats("cat.plain"));
    let last = with(text("a photo of a cat", None), from_end(1));
    check("last", &last.cond, &cases.floats("last.cond"));
    let got = clip.give(|clip| clip.encode("a photo of a (cat:1.3)"));
    check("weighted", &got.cond, &cases.floats("weighted.cond"));
    let long = "word ".repeat(120);
    let got = clip.give(|clip| clip.encode(&long));
    check("long", &got.cond, &cases.floats("long.cond"));
    check("long pooled", &got.pooled, &cases.floats("long.pooled"));
    // The shorter of two texts is filled up, so that nothing of the longer one is lost.
    let got = with(text(&long, Some("a photo of a cat")), ClipOptions::default());
    check("split", &got.cond, &cases.floats("split.cond"));
    check("split pooled", &got.pooled, &cases.floats("cat.pooled"));
    let got = clip.give(|clip| clip.encode("a photo of embedding:style"));
    check("embedding", &got.cond, &cases.floats("embedding.cond"));
}

#[test]
fn embeddings_that_cannot_be_had_are_named_with_the_reason_and_left_out() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let embeddings = place.file("embeddings");
    std::fs::create_dir(&embeddings).unwrap();
    std::fs::write(embeddings.join("risky.pt"), b"a pickle").unwrap();
    std::fs::copy(folder.join("clip_l.io.safetensors"), embeddings.join("other.safetensors")).unwrap();
    let settings = BrokerConfig { embedding_folders: vec![embeddings], ..config() };
    let broker = Arc::new(broker_at(&place, settings));
    let clip = encoders(&local_client(&broker), &folder, &["words.l", "words.g"]);
    let expected = numbers(&clip.encode("a photo of a cat").unwrap());
    let got = clip.encode("a photo of a cat embedding:risky embedding:nowhere embedding:../other").unwrap();
    let names: Vec<_> = got.ignored.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["risky", "nowhere", "../other"], "each once, though two encoders look for it");
    assert!(got.ignored[1].reason.contains("no such file"), "{:?}", got.ignored);
    assert!(got.ignored[0].reason.contains("code"), "{:?}", got.ignored);
    assert_eq!(numbers(&got), expected);
    // What is said of them is bounded, whatever a prompt names.
    let many: Vec<String> = (0..1000).map(|at| format!("embedding:n{at}")).collect();
    let got = clip.encode(&many.join(" ")).unwrap();
    assert!(got.ignored.len() >= 10 && got.ignored.len() <= 100, "{}", got.ignored.len());
}

#[test]
fn clients_that_encode_at_the_same_time_get_what_each_gets_alone() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let all = [("clip_l", "clip_l.float", ClipKind::L), ("clip_h", "clip_h.checkpoint", ClipKind::H)];
    std::thread::scope(|scope| {
        for at in 0..4 {
            let (place, folder) = (&place, &folder);
            scope.spawn(move || {
                let (name, file, kind) = all[at % all.len()];
                let cases = Cases::of(folder, name);
                let clip = encoders(&client_at(place), folder, &[file]);
                for round in 0..10 {
                    let (prompt, result) = match round % 3 {
                        0 => (cases.prompt(kind, "short"), "short.cond"),
                        1 => (cases.weighted(kind), "weighted.cond"),
                        _ => (cases.with_rows(kind), "rows.cond"),
                    };
                    let got = numbers(&clip.encode_tokens(&[prompt]).unwrap());
                    assert!(difference(&got.cond, &cases.floats(result)) <= TOLERANCE, "{name} in round {round}");
                }
            });
        }
    });
}

#[test]
fn results_lie_in_slots_that_go_with_their_last_use() {
    let Some(folder) = golden() else { return };
    let place = Place::new();
    let _broker = broker_at(&place, config());
    let client = client_at(&place);
    let (cases, clip) = (Cases::of(&folder, "clip_l"), encoders(&client, &folder, &["clip_l.float"]));
    let leases = || client.status().unwrap().sessions[0].leases;
    let mut prompt = cases.prompt(ClipKind::L, "short");
    prompt.chunks[0][3].token = Token::Vector(vec![0.5; 128].into());
    let output = clip.encode_tokens(&[prompt]).unwrap();
    assert!(output.cond.is_shared() && output.pooled.is_shared());
    assert_eq!((output.copied_out_bytes, leases()), (0, 2));
    drop(output.pooled);
    assert_eq!(leases(), 1);
    let kept = output.cond.clone();
    drop(output.cond);
    assert_eq!(leases(), 1, "a clone keeps it");
    drop(kept);
    assert_eq!(leases(), 0);
}
