use std::convert::Infallible;

use super::super::super::StoredTensor;
use super::tree::{Block, Input, Layer, Transformer, Unet};

/// What a block on the way down leaves for one on the way up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Skip {
    /// Channels.
    pub channels: u64,
    /// Times the sides were halved, each time rounded up.
    pub level: usize,
}

impl Skip {
    /// One side of it, for that side of the latent.
    #[must_use]
    pub fn side(&self, latent: u64) -> u64 {
        (0..self.level).fold(latent, |side, _| side.div_ceil(2))
    }
}

impl Unet<StoredTensor> {
    /// Calls `visit` on every layer.
    pub(crate) fn each(&self, mut visit: impl FnMut(&Layer<StoredTensor>)) {
        let mapped = self.try_map(&mut |layer| {
            visit(layer);
            Ok::<_, Infallible>(Layer { id: layer.id, weight: (), bias: None })
        });
        match mapped {
            Ok(_) => {}
        }
    }

    /// Width of a token of the context; the reader made sure that there is attention to one.
    pub(crate) fn context_width(&self) -> u64 {
        let mut blocks = self.transformers().flat_map(|transformer| &transformer.blocks);
        blocks.next().map_or(0, |block| block.cross.key.columns())
    }

    /// Width of the vector beside the context.
    pub(crate) fn vector_width(&self) -> Option<u64> {
        self.label_embed.as_ref().map(|[first, _]| first.columns())
    }

    /// Whether projections into attention are linear layers.
    pub(crate) fn is_linear(&self) -> bool {
        self.transformers().next().is_some_and(|transformer| transformer.linear)
    }

    /// Transformer blocks after each residual block on the way down.
    pub(crate) fn input_depths(&self) -> Vec<usize> {
        let depth = |input: &Input<StoredTensor>| match input {
            Input::Block(block) => Some(block.transformer.as_ref().map_or(0, |transformer| transformer.blocks.len())),
            Input::Down(_) => None,
        };
        self.inputs.iter().filter_map(depth).collect()
    }

    /// What `input_blocks.0` and on leave, in that order. The middle keeps the last one's shape.
    pub(crate) fn skips(&self) -> Vec<Skip> {
        let mut at = Skip { channels: self.conv_in.rows(), level: 0 };
        let mut skips = vec![at];
        for input in &self.inputs {
            at = match input {
                Input::Block(block) => Skip { channels: block.res.conv2.rows(), ..at },
                Input::Down(layer) => Skip { channels: layer.rows(), level: at.level + 1 },
            };
            skips.push(at);
        }
        skips
    }

    /// Most elements alive at once, per row and position of the latent: all skips that are still to be used, and what
    /// the busiest layer holds beside them. Attention is fused, so that no scores are held; the context is not counted.
    pub(crate) fn elements_per_position(&self) -> u64 {
        let skips = self.skips();
        let mut busiest = Busiest { held: 0, most: 0 };
        // The first two are kept to the end: what a cache of the first block compares.
        let kept: u64 = skips.iter().take(2).map(|skip| at_level(skip.channels, skip.level)).sum();
        for (input, pair) in self.inputs.iter().zip(skips.windows(2)) {
            let &[before, after] = pair else { continue };
            busiest.held += at_level(before.channels, before.level);
            match input {
                Input::Block(block) => busiest.block(block, before.channels, before.level),
                Input::Down(_) => busiest.see(after.channels, after.level),
            }
        }
        let Some(&last) = skips.last() else { return busiest.most };
        busiest.held += at_level(last.channels, last.level);
        let (mut channels, mut level) = (last.channels, last.level);
        if let Some(middle) = &self.middle {
            channels = middle.first.conv2.rows();
            busiest.see(last.channels * 2 + channels, level);
            for transformer in middle.rest.iter().map(|(transformer, _)| transformer) {
                busiest.see(transformer.elements(), level);
            }
        }
        for (output, (at, skip)) in self.outputs.iter().zip(skips.iter().enumerate().rev()) {
            let joined = channels + skip.channels;
            // While they are joined, both parts and the whole are there; the skip is still among what is held.
            busiest.see(channels + joined, level);
            if at > 1 {
                busiest.held = busiest.held.saturating_sub(at_level(skip.channels, skip.level));
            }
            busiest.block(&output.block, joined, level);
            channels = output.block.res.conv2.rows();
            if let Some(up) = &output.up {
                level = level.saturating_sub(1);
                busiest.see(channels + up.rows(), level);
                channels = up.rows();
            }
        }
        busiest.most.max(kept)
    }
}

/// The running maximum.
struct Busiest {
    /// Skips, per position of the latent.
    held: u64,
    most: u64,
}

impl Busiest {
    /// `channels` of activations at `level` beside what is held.
    fn see(&mut self, channels: u64, level: usize) {
        self.most = self.most.max(self.held.saturating_add(at_level(channels, level)));
    }

    /// A residual block holds its input, the normalised copy and a result, or two results beside its input.
    fn block(&mut self, block: &Block<StoredTensor>, channels: u64, level: usize) {
        let (inner, out) = (block.res.conv1.rows(), block.res.conv2.rows());
        self.see((2 * channels + inner).max(channels + inner + out).max(channels + 2 * out), level);
        if let Some(transformer) = &block.transformer {
            self.see(transformer.elements(), level);
        }
    }
}

impl Transformer<StoredTensor> {
    /// Input, sequence, normalised copy, three projections and the result of attention; or input and sequence beside
    /// the widened values and one half of them again.
    fn elements(&self) -> u64 {
        let channels = self.norm.rows();
        let wide = self.blocks.iter().map(|block| block.feed_forward.widen.rows()).max().unwrap_or(0);
        (7 * channels).max(2 * channels + wide + wide / 2).max(3 * channels + wide)
    }
}

/// Elements per position of the latent of `channels` at a resolution halved `level` times in each direction.
fn at_level(channels: u64, level: usize) -> u64 {
    channels.div_ceil(1u64.checked_shl(2 * level as u32).unwrap_or(u64::MAX))
}
