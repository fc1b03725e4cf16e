use std::collections::HashMap;

use super::names::{DIFFUSERS_RES, DIFFUSERS_STEMS};
use super::tree::{Input, Unet};

impl<T> Unet<T> {
    /// What diffusers calls each layer, by id. A layer that models of different families call differently has a name of
    /// each.
    pub(crate) fn diffusers_stems(&self) -> Vec<Vec<String>> {
        let places = self.diffusers_places();
        self.stems.iter().map(|stem| names(&places, stem)).collect()
    }

    /// Blocks, and layers that diffusers keeps beside them: the single file's name, diffusers'.
    fn diffusers_places(&self) -> HashMap<String, String> {
        let mut places = HashMap::new();
        for (ours, theirs) in [(0, "resnets.0"), (1, "attentions.0"), (2, "resnets.1")] {
            places.insert(format!("middle_block.{ours}"), format!("mid_block.{theirs}"));
        }
        let mut add = |ours: String, theirs: String| places.insert(ours, theirs);
        let (mut level, mut block) = (0, 0);
        for (at, input) in (1..).zip(&self.inputs) {
            match input {
                Input::Block(_) => {
                    add(format!("input_blocks.{at}.0"), format!("down_blocks.{level}.resnets.{block}"));
                    add(format!("input_blocks.{at}.1"), format!("down_blocks.{level}.attentions.{block}"));
                    block += 1;
                }
                Input::Down(_) => {
                    add(format!("input_blocks.{at}.0.op"), format!("down_blocks.{level}.downsamplers.0.conv"));
                    (level, block) = (level + 1, 0);
                }
            }
        }
        (level, block) = (0, 0);
        for (at, output) in self.outputs.iter().enumerate() {
            add(format!("output_blocks.{at}.0"), format!("up_blocks.{level}.resnets.{block}"));
            add(format!("output_blocks.{at}.1"), format!("up_blocks.{level}.attentions.{block}"));
            block += 1;
            if output.up.is_some() {
                let after = 1 + usize::from(output.block.transformer.is_some());
                add(format!("output_blocks.{at}.{after}.conv"), format!("up_blocks.{level}.upsamplers.0.conv"));
                (level, block) = (level + 1, 0);
            }
        }
        places
    }
}

fn names(places: &HashMap<String, String>, stem: &str) -> Vec<String> {
    let outside = DIFFUSERS_STEMS.iter().filter(|(_, ours)| *ours == stem);
    let found: Vec<String> = outside.map(|(theirs, _)| (*theirs).to_owned()).collect();
    if !found.is_empty() {
        return found;
    }
    // The longest place first: a layer beside a block may be called like a part of one.
    let ends = std::iter::once(stem.len()).chain(stem.rmatch_indices('.').map(|(end, _)| end));
    for (place, rest) in ends.filter_map(|end| stem.split_at_checked(end)) {
        let Some(theirs) = places.get(place) else { continue };
        let rest = rest.strip_prefix('.').unwrap_or(rest);
        let own = DIFFUSERS_RES.iter().find(|(_, ours)| theirs.contains("resnets.") && *ours == rest);
        return match (rest, own) {
            ("", _) => vec![theirs.clone()],
            (_, Some((own, _))) => vec![format!("{theirs}.{own}")],
            (_, None) => vec![format!("{theirs}.{rest}")],
        };
    }
    Vec::new()
}
