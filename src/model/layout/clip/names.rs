use super::super::super::ModelFile;

/// How the layers are called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// As in transformers; query, key and value apart.
    Transformers,
    /// As in OpenCLIP; query, key and value in one.
    OpenClip,
}

/// Where in a file a text encoder is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Root {
    pub(crate) naming: Naming,
    /// What its names start with, `text_model.` of transformers included where it is there.
    pub(crate) inner: String,
    /// What the projection's name starts with.
    pub(crate) outer: String,
}

/// The text encoders of `file`, found by their tables of tokens whatever comes before those.
pub(crate) fn roots(file: &ModelFile) -> Vec<Root> {
    file.tensors().filter_map(|(name, _)| root(file, name)).collect()
}

fn root(file: &ModelFile, name: &str) -> Option<Root> {
    if let Some(inner) = name.strip_suffix("embeddings.token_embedding.weight") {
        let outer = inner.strip_suffix("text_model.").unwrap_or(inner);
        return Some(Root { naming: Naming::Transformers, inner: inner.to_owned(), outer: outer.to_owned() });
    }
    let inner = name.strip_suffix("token_embedding.weight")?;
    // Other models have tables of tokens too, but not beside this.
    file.tensor(&format!("{inner}positional_embedding"))?;
    Some(Root { naming: Naming::OpenClip, inner: inner.to_owned(), outer: inner.to_owned() })
}

impl Root {
    pub(crate) fn tokens(&self) -> String {
        match self.naming {
            Naming::Transformers => format!("{}embeddings.token_embedding.weight", self.inner),
            Naming::OpenClip => format!("{}token_embedding.weight", self.inner),
        }
    }

    pub(crate) fn positions(&self) -> String {
        match self.naming {
            Naming::Transformers => format!("{}embeddings.position_embedding.weight", self.inner),
            Naming::OpenClip => format!("{}positional_embedding", self.inner),
        }
    }

    /// Numbers 0, 1, 2 … that some files store; nothing needs them.
    pub(crate) fn position_ids(&self) -> String {
        format!("{}embeddings.position_ids", self.inner)
    }

    pub(crate) fn block(&self, at: usize) -> String {
        match self.naming {
            Naming::Transformers => format!("{}encoder.layers.{at}", self.inner),
            Naming::OpenClip => format!("{}transformer.resblocks.{at}", self.inner),
        }
    }

    pub(crate) fn norm1(&self, block: &str) -> String {
        match self.naming {
            Naming::Transformers => format!("{block}.layer_norm1"),
            Naming::OpenClip => format!("{block}.ln_1"),
        }
    }

    pub(crate) fn norm2(&self, block: &str) -> String {
        match self.naming {
            Naming::Transformers => format!("{block}.layer_norm2"),
            Naming::OpenClip => format!("{block}.ln_2"),
        }
    }

    pub(crate) fn out(&self, block: &str) -> String {
        match self.naming {
            Naming::Transformers => format!("{block}.self_attn.out_proj"),
            Naming::OpenClip => format!("{block}.attn.out_proj"),
        }
    }

    pub(crate) fn fc1(&self, block: &str) -> String {
        match self.naming {
            Naming::Transformers => format!("{block}.mlp.fc1"),
            Naming::OpenClip => format!("{block}.mlp.c_fc"),
        }
    }

    pub(crate) fn fc2(&self, block: &str) -> String {
        match self.naming {
            Naming::Transformers => format!("{block}.mlp.fc2"),
            Naming::OpenClip => format!("{block}.mlp.c_proj"),
        }
    }

    pub(crate) fn norm_out(&self) -> String {
        match self.naming {
            Naming::Transformers => format!("{}final_layer_norm", self.inner),
            Naming::OpenClip => format!("{}ln_final", self.inner),
        }
    }

    /// Starts of names that only this text encoder's layers have: what is found there and not used was not understood.
    pub(crate) fn territory(&self) -> Vec<String> {
        let parts: &[&str] = match self.naming {
            Naming::Transformers => &["embeddings.", "encoder.", "head."],
            Naming::OpenClip => &["transformer."],
        };
        parts.iter().map(|part| format!("{}{part}", self.inner)).collect()
    }
}
