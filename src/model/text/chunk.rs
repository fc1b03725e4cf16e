use super::super::ModelError;
use super::{END, Embeddings, START, Tokenizer, segments};
use crate::error::Error;
use crate::service::{Chunk, IgnoredEmbedding, Token, WeightedToken};

/// Longest prompt. Every prompt that people write is far shorter; it bounds what the tokenizer is given.
const MAX_PROMPT_BYTES: usize = 64 << 10;
/// Tokens from which on a part of a prompt may be cut at the end of a chunk; a shorter one moves to the next.
const CUT_FROM: usize = 8;
/// What starts the name of an embedding.
const EMBEDDING: &str = "embedding:";

/// What one text encoder wants of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRules {
    /// Positions of a chunk; 77 for every published encoder.
    pub length: usize,
    /// What fills a chunk behind its end.
    pub pad: u32,
    /// What the encoder is called in files of embeddings for several ones.
    pub key: &'static str,
    /// Numbers per row.
    pub width: u64,
}

/// A prompt for one text encoder.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptTokens {
    /// At least one.
    pub chunks: Vec<Chunk>,
    /// Embeddings that the prompt names and that are left out of it.
    pub ignored: Vec<IgnoredEmbedding>,
}

impl Tokenizer {
    /// Makes chunks of `prompt` as ComfyUI does: weights by parentheses (see [`segments`]), and, where `embeddings`
    /// are given, `embedding:name` after a space, a new line or a parenthesis.
    ///
    /// A part of fewer than eight tokens (between parentheses, or an embedding) is not cut where a chunk ends.
    ///
    /// # Errors
    /// [`ModelError::Prompt`] for a prompt that is longer than 64 KiB or nested too deep, or for chunks of fewer than
    /// three positions. An embedding that cannot be had is no error.
    pub fn chunks(
        &self,
        prompt: &str,
        rules: &ChunkRules,
        embeddings: Option<&Embeddings>,
    ) -> Result<PromptTokens, ModelError> {
        if prompt.len() > MAX_PROMPT_BYTES {
            let reason = format!("it has {} bytes; at most {MAX_PROMPT_BYTES} are taken", prompt.len());
            return Err(ModelError::Prompt { reason });
        }
        if rules.length < 3 {
            let reason = format!("chunks of {} positions have no place for text", rules.length);
            return Err(ModelError::Prompt { reason });
        }
        let mut parts = Parts { tokenizer: self, rules, embeddings, groups: Vec::new(), ignored: Vec::new() };
        for segment in segments(prompt)? {
            parts.segment(&segment.text, segment.weight as f32);
        }
        Ok(PromptTokens { chunks: fill(parts.groups, rules), ignored: parts.ignored })
    }
}

/// Groups of tokens that belong together, as they are found.
struct Parts<'a> {
    tokenizer: &'a Tokenizer,
    rules: &'a ChunkRules,
    embeddings: Option<&'a Embeddings>,
    groups: Vec<Vec<WeightedToken>>,
    ignored: Vec<IgnoredEmbedding>,
}

impl Parts<'_> {
    fn segment(&mut self, text: &str, weight: f32) {
        let mut rest = text;
        while let Some(at) = next_embedding(rest) {
            let (before, after) = rest.split_at(at);
            self.part(before, weight);
            // Without the space or new line.
            rest = after.get(1..).unwrap_or_default();
        }
        self.part(rest, weight);
    }

    /// A part that names an embedding at its start at most.
    fn part(&mut self, text: &str, weight: f32) {
        match (text.strip_prefix(EMBEDDING), self.embeddings) {
            (Some(named), Some(embeddings)) => {
                let after = self.embedding(embeddings, named, weight);
                self.words(&after, weight);
            }
            _ => self.words(text, weight),
        }
    }

    fn words(&mut self, text: &str, weight: f32) {
        let ids = self.tokenizer.encode(text);
        self.group(ids.into_iter().map(Token::Id), weight);
    }

    /// Takes the embedding that `named` starts with; what remains of `named` is text.
    fn embedding(&mut self, embeddings: &Embeddings, named: &str, weight: f32) -> String {
        let named = named.trim_start();
        let (name, after) = named.split_once(char::is_whitespace).unwrap_or((named, ""));
        // A comma may be part of a file's name, but hardly ever is.
        let shorter = name.trim_matches(',');
        let behind = name.get(shorter.len()..).unwrap_or_default();
        let mut last = Ok(None);
        for (name, behind) in [(name, ""), (shorter, behind)] {
            last = embeddings.rows(name, self.rules.key, self.rules.width);
            match last {
                Ok(Some(rows)) => {
                    self.group(rows.into_iter().map(Token::Vector), weight);
                    return format!("{behind} {after}");
                }
                Ok(None) => {}
                // There is such a file; no other name will do better.
                Err(_) => break,
            }
        }
        let reason = match last {
            Err(error) => Error::from(error).to_string(),
            Ok(_) => "there is no such file in the folders for embeddings".to_owned(),
        };
        self.ignored.push(IgnoredEmbedding { name: shorter.to_owned(), reason });
        format!("{behind} {after}")
    }

    fn group(&mut self, tokens: impl Iterator<Item = Token>, weight: f32) {
        let group: Vec<_> = tokens.map(|token| WeightedToken { token, weight }).collect();
        if !group.is_empty() {
            self.groups.push(group);
        }
    }
}

/// Where the space before the next embedding is.
fn next_embedding(text: &str) -> Option<usize> {
    text.match_indices(EMBEDDING).find_map(|(at, _)| {
        let before = at.checked_sub(1)?;
        matches!(text.as_bytes().get(before), Some(b' ' | b'\n')).then_some(before)
    })
}

/// Lays groups out in chunks.
fn fill(groups: Vec<Vec<WeightedToken>>, rules: &ChunkRules) -> Vec<Chunk> {
    // Each chunk keeps a place for the mark at its end.
    let most = rules.length - 1;
    let mut done = Vec::new();
    let mut chunk = vec![mark(START)];
    for group in groups {
        let may_cut = group.len() >= CUT_FROM.min(most);
        let mut left = group.into_iter();
        while left.len() > 0 {
            let free = most.saturating_sub(chunk.len());
            if left.len() <= free {
                chunk.extend(left.by_ref());
            } else {
                if may_cut {
                    chunk.extend(left.by_ref().take(free));
                }
                done.push(close(std::mem::replace(&mut chunk, vec![mark(START)]), rules));
            }
        }
    }
    done.push(close(chunk, rules));
    done
}

fn close(mut chunk: Chunk, rules: &ChunkRules) -> Chunk {
    chunk.push(mark(END));
    chunk.resize(rules.length, mark(rules.pad));
    chunk
}

fn mark(id: u32) -> WeightedToken {
    WeightedToken { token: Token::Id(id), weight: 1.0 }
}

#[cfg(test)]
#[path = "chunk_tests.rs"]
mod tests;
