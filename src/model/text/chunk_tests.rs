use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};

use super::*;

const RULES: ChunkRules = ChunkRules { length: 77, pad: END, key: "clip_l", width: 3 };

fn tokenizer() -> &'static Tokenizer {
    static ONE: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    ONE.get_or_init(Tokenizer::new)
}

fn chunks(prompt: &str) -> Vec<Chunk> {
    tokenizer().chunks(prompt, &RULES, None).expect("a prompt").chunks
}

/// The text of a chunk: what is between its first position and its first end.
fn text(chunk: &Chunk) -> &[WeightedToken] {
    assert_eq!((chunk.len(), &chunk[0].token), (77, &Token::Id(START)));
    let end = chunk.iter().position(|at| at.token == Token::Id(END)).expect("an end");
    assert!(chunk[end..].iter().all(|at| at.token == Token::Id(END) && at.weight == 1.0));
    &chunk[1..end]
}

fn words(count: usize) -> String {
    vec!["cat"; count].join(" ")
}

#[test]
fn an_empty_prompt_is_one_chunk_of_padding() {
    let only = chunks("");
    assert_eq!((only.len(), text(&only[0]).len()), (1, 0));
    let padded = tokenizer().chunks("cat", &ChunkRules { pad: 0, ..RULES }, None).expect("a prompt").chunks;
    let ids: Vec<_> = padded[0].iter().map(|at| at.token.clone()).collect();
    assert_eq!(ids[..4], [START, 2368, END, 0].map(Token::Id));
    assert!(ids[4..].iter().all(|token| *token == Token::Id(0)));
}

#[test]
fn a_prompt_of_seventy_five_tokens_fills_one_chunk() {
    assert_eq!(chunks(&words(75)).len(), 1);
    let two = chunks(&words(76));
    assert_eq!(two.iter().map(|chunk| text(chunk).len()).collect::<Vec<_>>(), [75, 1]);
}

#[test]
fn a_short_part_moves_to_the_next_chunk_and_a_long_one_is_cut() {
    let lengths = |prompt: String| chunks(&prompt).iter().map(|chunk| text(chunk).len()).collect::<Vec<_>>();
    assert_eq!(lengths(format!("{}({})", words(70), words(7))), [70, 7]);
    assert_eq!(lengths(format!("{}({})", words(70), words(8))), [75, 3]);
    assert_eq!(lengths(format!("{}({})", words(75), words(160))), [75, 75, 75, 10]);
}

#[test]
fn weights_reach_their_own_tokens_only() {
    let only = chunks("a (cat:1.5) and ((dog))");
    let weights: Vec<_> = text(&only[0]).iter().map(|at| at.weight).collect();
    assert_eq!(weights, [1.0, 1.5, 1.0, 1.21]);
}

#[test]
fn oversized_prompts_and_chunks_without_room_are_refused() {
    let long = "a".repeat(MAX_PROMPT_BYTES + 1);
    assert!(matches!(tokenizer().chunks(&long, &RULES, None), Err(ModelError::Prompt { .. })));
    let tight = ChunkRules { length: 2, ..RULES };
    assert!(matches!(tokenizer().chunks("a", &tight, None), Err(ModelError::Prompt { .. })));
    let shortest = ChunkRules { length: 3, ..RULES };
    assert_eq!(tokenizer().chunks("cat dog", &shortest, None).expect("a prompt").chunks.len(), 2);
}

/// A folder of embeddings with rows of three numbers, which tell where they come from.
struct Folder {
    folder: tempfile::TempDir,
}

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("embeddings")).expect("a folder in it");
        Self { folder }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("embeddings")
    }

    /// Writes `tensors` of name, columns and values.
    fn file(&self, path: &str, tensors: &[(&str, usize, &[f32])]) {
        let path = self.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
        let owned: Vec<_> =
            tensors.iter().map(|(name, columns, values)| (*name, *columns, bytes(values), values.len())).collect();
        let views = owned.iter().map(|(name, columns, bytes, length)| {
            (*name, TensorView::new(Dtype::F32, vec![length / columns, *columns], bytes).expect("a tensor"))
        });
        safetensors::serialize_to_file(views, None, &path).expect("it can be written");
    }

    fn chunks(&self, prompt: &str, rules: &ChunkRules) -> PromptTokens {
        let embeddings = Embeddings::new(vec![self.path()]);
        tokenizer().chunks(prompt, rules, Some(&embeddings)).expect("a prompt")
    }
}

/// First numbers of the rows that are not of the encoder's own table.
fn vectors(chunk: &Chunk) -> Vec<f32> {
    let first = |at: &WeightedToken| match &at.token {
        Token::Vector(row) => row.first().copied(),
        Token::Id(_) => None,
    };
    chunk.iter().filter_map(first).collect()
}

#[test]
fn an_embedding_gives_its_rows_for_the_encoder_that_asks() {
    let folder = Folder::new();
    folder.file("one.safetensors", &[("emb_params", 3, &[1.0, 0.0, 0.0, 2.0, 0.0, 0.0])]);
    folder.file("below/two.safetensors", &[("clip_l", 3, &[3.0; 3]), ("clip_g", 4, &[4.0; 4])]);
    folder.file("star.safetensors", &[("*", 3, &[5.0; 3])]);
    folder.file("odd.safetensors", &[("a", 2, &[6.0; 2]), ("b", 3, &[7.0; 3])]);
    let prompt = "cat embedding:one, (embedding:two:1.5)\nembedding:below/two.safetensors embedding:star embedding:odd";
    let found = folder.chunks(prompt, &RULES);
    assert_eq!((vectors(&found.chunks[0]), found.ignored), (vec![1.0, 2.0, 3.0, 3.0, 5.0, 7.0], vec![]));
    let kept = text(&found.chunks[0]);
    // cat, two rows, a comma, the other rows.
    assert_eq!(kept.len(), 1 + 2 + 1 + 4);
    assert_eq!((&kept[3].token, kept[4].weight), (&Token::Id(267), 1.5));
    let other = folder.chunks("embedding:two", &ChunkRules { key: "clip_g", width: 4, ..RULES });
    assert_eq!(vectors(&other.chunks[0]), [4.0]);
}

#[test]
fn an_embedding_that_cannot_be_had_is_left_out_and_named() {
    let folder = Folder::new();
    folder.file("wide.safetensors", &[("clip_l", 4, &[1.0; 4])]);
    folder.file("../outside.safetensors", &[("emb_params", 3, &[1.0; 3])]);
    std::fs::write(folder.path().join("old.pt"), b"PK\x03\x04 and more").expect("it can be written");
    for (prompt, name, reason) in [
        ("cat embedding:wide dog", "wide", "text encoder's width"),
        ("cat embedding:none, dog", "none", "no such file"),
        ("cat embedding:old dog", "old", "pickle"),
        ("cat embedding:../outside dog", "../outside", "no such file"),
        ("cat embedding: dog", "dog", "no such file"),
    ] {
        let found = folder.chunks(prompt, &RULES);
        let [ignored] = found.ignored.as_slice() else { panic!("{prompt}: {:?}", found.ignored) };
        assert!(ignored.name == name && ignored.reason.contains(reason), "{prompt}: {ignored:?}");
        assert!(vectors(&found.chunks[0]).is_empty(), "{prompt}");
        let plain = prompt.replace("embedding:", "").replace(name, "");
        assert_eq!(found.chunks, chunks(&plain), "{prompt}: the text around it stays");
    }
}

#[test]
fn without_a_folder_the_name_of_an_embedding_is_text() {
    let only = chunks("embedding:cat");
    assert!(text(&only[0]).len() >= 3 && vectors(&only[0]).is_empty());
}

proptest! {
    #[test]
    fn chunks_hold_every_token_in_order(lengths in prop::collection::vec(1usize..30, 0..12), length in 3usize..20) {
        let mut next = 0;
        let groups: Vec<Vec<WeightedToken>> = lengths.iter().map(|&length| {
            (0..length).map(|_| { next += 1; WeightedToken { token: Token::Id(next), weight: 1.0 } }).collect()
        }).collect();
        let rules = ChunkRules { length, pad: 0, ..RULES };
        let chunks = fill(groups.clone(), &rules);
        let mut seen = Vec::new();
        for chunk in &chunks {
            prop_assert_eq!(chunk.len(), length);
            let end = chunk.iter().position(|at| at.token == Token::Id(END)).expect("an end");
            seen.extend(chunk[1..end].iter().cloned());
            prop_assert!(chunk[0].token == Token::Id(START) && chunk[end + 1..].iter().all(|at| at.token == Token::Id(0)));
        }
        prop_assert_eq!(seen, groups.concat());
        for group in groups.iter().filter(|group| group.len() < CUT_FROM.min(length - 1)) {
            let whole = |chunk: &Chunk| chunk.windows(group.len()).any(|part| part == group.as_slice());
            prop_assert!(chunks.iter().any(whole));
        }
    }
}
