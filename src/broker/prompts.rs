use std::path::PathBuf;
use std::sync::OnceLock;

use crate::model::ModelError;
use crate::model::clip::{ClipFacts, ClipKind, TextEncoders};
use crate::model::text::{Embeddings, Tokenizer};
use crate::service::{Chunk, ClipPrompt, ClipText, IgnoredEmbedding};

/// More embeddings than anybody misspells in one prompt; bounds what an answer says of them.
const MAX_IGNORED: usize = 64;

/// Turns words into tokens, on the thread of the session that sent them.
#[derive(Debug)]
pub(super) struct Prompts {
    /// Made with the first prompt in words.
    tokenizer: OnceLock<Tokenizer>,
    embeddings: Embeddings,
}

/// A prompt in tokens.
#[derive(Debug)]
pub(super) struct Tokenized {
    pub(super) prompts: Vec<ClipPrompt>,
    pub(super) ignored: Vec<IgnoredEmbedding>,
}

impl Prompts {
    pub(super) fn new(embedding_folders: Vec<PathBuf>) -> Self {
        Self { tokenizer: OnceLock::new(), embeddings: Embeddings::new(embedding_folders) }
    }

    /// The tokens of `text` for each encoder of `set`.
    ///
    /// # Errors
    /// As [`Tokenizer::chunks`]; [`ModelError::Prompt`] for a text for CLIP-G where that is not in the set.
    pub(super) fn tokenize(&self, set: &TextEncoders, text: &ClipText) -> Result<Tokenized, ModelError> {
        let ClipText { text, text_g } = text;
        if text_g.is_some() && set.get(ClipKind::G).is_none() {
            let reason = "it has a text for clip_g, which is not loaded".to_owned();
            return Err(ModelError::Prompt { reason });
        }
        let mut done = Tokenized { prompts: Vec::new(), ignored: Vec::new() };
        for facts in set.encoders() {
            let own = text_g.as_deref().filter(|_| facts.kind == ClipKind::G);
            let chunks = self.chunks(own.unwrap_or(text), facts, &mut done.ignored)?;
            done.prompts.push(ClipPrompt { kind: facts.kind, chunks });
        }
        if text_g.is_some() {
            self.fill_up(set, &mut done)?;
        }
        Ok(done)
    }

    /// Different texts need not be equally long: whatever is told to one encoder alone is kept beside an empty prompt for
    /// the other.
    fn fill_up(&self, set: &TextEncoders, done: &mut Tokenized) -> Result<(), ModelError> {
        let most = done.prompts.iter().map(|prompt| prompt.chunks.len()).max().unwrap_or(0);
        for (prompt, facts) in done.prompts.iter_mut().zip(set.encoders()) {
            if prompt.chunks.len() < most {
                let empty = self.chunks("", facts, &mut done.ignored)?;
                let empty = empty.into_iter().cycle().take(most - prompt.chunks.len());
                prompt.chunks.extend(empty);
            }
        }
        Ok(())
    }

    fn chunks(
        &self,
        text: &str,
        facts: &ClipFacts,
        ignored: &mut Vec<IgnoredEmbedding>,
    ) -> Result<Vec<Chunk>, ModelError> {
        let tokenizer = self.tokenizer.get_or_init(Tokenizer::new);
        let tokens = tokenizer.chunks(text, &facts.rules(), Some(&self.embeddings))?;
        for one in tokens.ignored {
            // Each encoder looks for it.
            if ignored.len() < MAX_IGNORED && !ignored.contains(&one) {
                ignored.push(one);
            }
        }
        Ok(tokens.chunks)
    }
}
