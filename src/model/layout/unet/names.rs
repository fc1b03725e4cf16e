use std::collections::{BTreeMap, HashMap};

use super::super::super::header::quote;
use super::super::super::{ModelError, ModelFile, StoredTensor};

/// What a UNet's tensors are called under in a checkpoint.
const PREFIX: &str = "model.diffusion_model.";
/// Tensors that say what a model was trained for and that nothing computes with.
const MARKERS: [&str; 6] = ["v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"];
/// What names start with in a single-file UNet.
const ROOTS: [&str; 6] = ["input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out."];
/// What names start with in a diffusers UNet.
const DIFFUSERS_ROOTS: [&str; 9] = [
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "conv_in.",
    "conv_norm_out.",
    "conv_out.",
    "time_embedding.",
    "add_embedding.",
    "class_embedding.",
];
/// Layers that are called otherwise in diffusers and are not in a block: its name, the single file's.
pub(super) const DIFFUSERS_STEMS: [(&str, &str); 9] = [
    ("conv_in", "input_blocks.0.0"),
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("class_embedding.linear_1", "label_emb.0.0"),
    ("class_embedding.linear_2", "label_emb.0.2"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
];
/// Layers of a residual block: diffusers' name, the single file's.
pub(super) const DIFFUSERS_RES: [(&str, &str); 6] = [
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
];
/// Parts of names that tell of something this tree does not describe, and what it is. The first that is there is named.
const FOREIGN: [(&str, &str); 14] = [
    ("time_stack.", "a video model (layers over time)"),
    ("time_mixer.", "a video model (layers over time)"),
    ("temporal_transformer_block", "a video model (layers over time)"),
    ("temp_convs.", "a video model (layers over time)"),
    ("motion_modules.", "a video model (layers over time)"),
    ("input_hint_block.", "a ControlNet"),
    ("controlnet_", "a ControlNet"),
    ("joint_blocks.", "a diffusion transformer (SD3)"),
    ("double_blocks.", "a diffusion transformer (Flux)"),
    ("single_transformer_blocks.", "a diffusion transformer (Flux)"),
    ("double_layers.", "a diffusion transformer (AuraFlow)"),
    ("cap_embedder.", "a diffusion transformer (Lumina)"),
    ("adaln_single.", "a diffusion transformer (PixArt)"),
    ("pos_embed.proj.", "a diffusion transformer"),
];

/// A UNet's tensors by the names they have in a single-file checkpoint, without prefix.
#[derive(Debug)]
pub(crate) struct Names<'a> {
    pub(super) file: &'a ModelFile,
    prefix: &'static str,
    found: BTreeMap<String, Stored<'a>>,
}

/// A tensor, and what the file calls it.
#[derive(Debug, Clone, Copy)]
struct Stored<'a> {
    name: &'a str,
    tensor: &'a StoredTensor,
}

impl<'a> Names<'a> {
    /// The names of the UNet in `file`.
    ///
    /// # Errors
    /// [`ModelError::MissingPart`] where there is none, [`ModelError::Unsupported`] where there is something like it.
    pub(crate) fn of(file: &'a ModelFile) -> Result<Self, ModelError> {
        let mut names = Self { file, prefix: "", found: BTreeMap::new() };
        let below = |prefix: &str| file.tensors().any(|(name, _)| name.starts_with(prefix));
        if below(PREFIX) {
            names.prefix = PREFIX;
            names.fill(|name| name.strip_prefix(PREFIX).map(str::to_owned));
        } else if below("input_blocks.") || below("output_blocks.") {
            names.fill(|name| begins(&ROOTS, name).then(|| name.to_owned()));
        } else if below("down_blocks.") && below("conv_in.") {
            let stems = diffusers_stems(file);
            names.fill(|name| begins(&DIFFUSERS_ROOTS, name).then(|| renamed(&stems, name)));
        }
        names.refuse_foreign()?;
        if names.found.is_empty() {
            return Err(ModelError::MissingPart { path: file.path().to_owned(), part: "UNet", found: file.summary() });
        }
        if !names.below("input_blocks.") && !names.below("output_blocks.") {
            let first = names.found.values().next().map_or("", |stored| stored.name);
            return Err(
                names.unsupported(format!("a diffusion model with {} (not a UNet of this family)", quote(first)))
            );
        }
        Ok(names)
    }

    /// Whether the file says `marker`, beside the UNet or among its tensors.
    pub(crate) fn has_marker(file: &ModelFile, marker: &str) -> bool {
        file.tensor(marker).or_else(|| file.tensor(&format!("{PREFIX}{marker}"))).is_some()
    }

    /// The tensor of that name.
    pub(super) fn tensor(&self, name: &str) -> Option<&'a StoredTensor> {
        self.found.get(name).map(|stored| stored.tensor)
    }

    /// Whether any tensor's name starts so.
    pub(super) fn below(&self, start: &str) -> bool {
        let next = self.found.range::<str, _>((std::ops::Bound::Included(start), std::ops::Bound::Unbounded)).next();
        next.is_some_and(|(name, _)| name.starts_with(start))
    }

    /// All names, with what the file calls each.
    pub(super) fn all(&self) -> impl Iterator<Item = (&str, &'a str)> {
        self.found.iter().map(|(name, stored)| (name.as_str(), stored.name))
    }

    /// A name as a message shows it. What a diffusers file lacks is told by its name in single files.
    pub(super) fn shown(&self, name: &str) -> String {
        match self.found.get(name) {
            Some(stored) => quote(stored.name),
            None => quote(&format!("{}{name}", self.prefix)),
        }
    }

    /// The error for a UNet that is recognised but not one that is run.
    pub(super) fn unsupported(&self, what: impl Into<String>) -> ModelError {
        ModelError::Unsupported { path: self.file.path().to_owned(), what: what.into() }
    }

    fn fill(&mut self, mut canonical: impl FnMut(&str) -> Option<String>) {
        for (name, tensor) in self.file.tensors() {
            if let Some(own) = canonical(name).filter(|own| !MARKERS.contains(&own.as_str())) {
                self.found.insert(own, Stored { name, tensor });
            }
        }
    }

    /// Names what the tree has no place for. A file without a prefix is looked at as a whole.
    fn refuse_foreign(&self) -> Result<(), ModelError> {
        let all = self.file.tensors().map(|(name, _)| name);
        let candidates: Vec<&str> = all.filter(|name| name.starts_with(self.prefix)).collect();
        for (part, what) in FOREIGN {
            if let Some(name) = candidates.iter().find(|name| names_part(name, part)) {
                return Err(self.unsupported(format!("{what}, by its tensor {}", quote(name))));
            }
        }
        // A class label where there should be a vector.
        if let Some(name) = candidates.iter().find(|name| name.strip_prefix(self.prefix) == Some("label_emb.weight")) {
            return Err(
                self.unsupported(format!("a UNet told its noise level, as the x4 upscaler is, by {}", quote(name)))
            );
        }
        Ok(())
    }
}

/// Whether a name has a component that starts with `part`.
fn names_part(name: &str, part: &str) -> bool {
    name.match_indices(part).any(|(at, _)| at == 0 || name.as_bytes().get(at - 1) == Some(&b'.'))
}

fn begins(roots: &[&str], name: &str) -> bool {
    roots.iter().any(|root| name.starts_with(root))
}

/// Stems of diffusers blocks and layers that are called otherwise, with the single file's, by the numbers of blocks
/// that `file` has at each level.
fn diffusers_stems(file: &ModelFile) -> HashMap<String, String> {
    let has = |stem: &str| file.tensor(&format!("{stem}.weight")).is_some();
    let mut stems: HashMap<String, String> =
        DIFFUSERS_STEMS.map(|(theirs, ours)| (theirs.to_owned(), ours.to_owned())).into();
    let mut rename = |theirs: String, ours: String| stems.insert(theirs, ours);
    for (theirs, ours) in [("resnets.0", 0), ("attentions.0", 1), ("resnets.1", 2)] {
        rename(format!("mid_block.{theirs}"), format!("middle_block.{ours}"));
    }
    let mut at = 1;
    for level in (0..).take_while(|level| has(&format!("down_blocks.{level}.resnets.0.conv1"))) {
        let root = format!("down_blocks.{level}");
        for block in (0..).take_while(|block| has(&format!("{root}.resnets.{block}.conv1"))) {
            rename(format!("{root}.resnets.{block}"), format!("input_blocks.{at}.0"));
            rename(format!("{root}.attentions.{block}"), format!("input_blocks.{at}.1"));
            at += 1;
        }
        if has(&format!("{root}.downsamplers.0.conv")) {
            rename(format!("{root}.downsamplers.0.conv"), format!("input_blocks.{at}.0.op"));
            at += 1;
        }
    }
    at = 0;
    for level in (0..).take_while(|level| has(&format!("up_blocks.{level}.resnets.0.conv1"))) {
        let root = format!("up_blocks.{level}");
        for block in (0..).take_while(|block| has(&format!("{root}.resnets.{block}.conv1"))) {
            rename(format!("{root}.resnets.{block}"), format!("output_blocks.{at}.0"));
            rename(format!("{root}.attentions.{block}"), format!("output_blocks.{at}.1"));
            let after_attention = usize::from(has(&format!("{root}.attentions.{block}.norm")));
            let up = format!("output_blocks.{at}.{}.conv", 1 + after_attention);
            // The last block of the level is the one that keeps it.
            rename(format!("{root}.upsamplers.0.conv"), up);
            at += 1;
        }
    }
    stems
}

/// A diffusers name as single files have it; one that no stem fits stays as it is, and is then refused by name.
fn renamed(stems: &HashMap<String, String>, name: &str) -> String {
    for (end, _) in name.match_indices('.').collect::<Vec<_>>().into_iter().rev() {
        let (stem, rest) = (&name[..end], &name[end + 1..]);
        let Some(ours) = stems.get(stem) else { continue };
        let (layer, part) = rest.rsplit_once('.').unwrap_or(("", rest));
        return match DIFFUSERS_RES.iter().find(|(theirs, _)| stem.contains("resnets.") && *theirs == layer) {
            Some((_, own)) => format!("{ours}.{own}.{part}"),
            None => format!("{ours}.{rest}"),
        };
    }
    name.to_owned()
}
