use super::*;

/// Written by `tests/golden/make_clip_tokens.py`.
const REFERENCE: &str = include_str!("../../../tests/golden/clip_tokens.json");

#[test]
fn every_text_has_the_numbers_that_transformers_gives_it() {
    let cases: Vec<(String, Vec<u32>)> = serde_json::from_str(REFERENCE).expect("texts with their numbers");
    assert!(cases.len() >= 300, "{}", cases.len());
    let tokenizer = Tokenizer::new();
    let wrong: Vec<_> = cases.iter().filter(|(text, ids)| tokenizer.encode(text) != *ids).collect();
    for (text, ids) in &wrong {
        eprintln!("{text:?}: {:?} instead of {ids:?}", tokenizer.encode(text));
    }
    assert!(wrong.is_empty(), "{} of {} differ", wrong.len(), cases.len());
}
