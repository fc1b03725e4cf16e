use std::fmt;

use instant_clip_tokenizer::Tokenizer as Bpe;
use unicode_normalization::UnicodeNormalization;

/// What each chunk starts with.
pub const START: u32 = 49406;
/// What ends the text of each chunk.
pub const END: u32 = 49407;

/// Texts that stand for a mark rather than for themselves, spelled exactly so.
const MARKS: [(&str, u32); 2] = [("<|startoftext|>", START), ("<|endoftext|>", END)];
/// Texts that the byte-pair crate takes for marks, and what it takes for the same text without a mark in it: a space
/// where a word ends anyway.
const FOREIGN_MARKS: [(&str, &str); 2] = [("<start_of_text>", "< start_of_text>"), ("<end_of_text>", "< end_of_text>")];

/// CLIP's byte pairs. Making one takes tens of milliseconds; it never changes and may be used from many threads.
pub struct Tokenizer {
    bpe: Bpe,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").finish_non_exhaustive()
    }
}

impl Default for Tokenizer {
    fn default() -> Self {
        Self::new()
    }
}

impl Tokenizer {
    /// Reads the vocabulary, which is part of the program.
    #[must_use]
    pub fn new() -> Self {
        Self { bpe: Bpe::new() }
    }

    /// The numbers of `text`, without marks at start and end. The same as `transformers.CLIPTokenizer` gives, except
    /// for a mark written with capitals, which is text here.
    ///
    /// Time grows with the square of the longest word; callers bound the length of what they pass.
    #[must_use]
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((before, id, after)) = next_mark(rest) {
            self.encode_plain(before, &mut ids);
            ids.push(id);
            rest = after;
        }
        self.encode_plain(rest, &mut ids);
        ids
    }

    fn encode_plain(&self, text: &str, ids: &mut Vec<u32>) {
        // Letter by letter: lower-casing a whole text would choose the form that sigma has at the end of a word.
        let mut plain: String = text.nfc().flat_map(char::to_lowercase).collect();
        for (foreign, harmless) in FOREIGN_MARKS {
            if plain.contains(foreign) {
                plain = plain.replace(foreign, harmless);
            }
        }
        let mut tokens = Vec::new();
        self.bpe.encode(&plain, &mut tokens);
        ids.extend(tokens.into_iter().map(|token| u32::from(token.to_u16())));
    }
}

/// The first mark in `text`, with what is before and after it.
fn next_mark(text: &str) -> Option<(&str, u32, &str)> {
    let found = MARKS.iter().filter_map(|&(mark, id)| text.split_once(mark).map(|(before, after)| (before, id, after)));
    found.min_by_key(|(before, ..)| before.len())
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
