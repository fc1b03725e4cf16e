use std::ops::Range;
use std::sync::Arc;

use tch::{TchError, Tensor};

use super::super::super::layout::unet::Layer;
use super::super::super::{ModelError, ModelFile};
use super::WHAT;
use super::stack::{LayerPatch, LowRank, Replaced, Stack};

/// Groups of every normalisation over channels.
const GROUPS: i64 = 32;

/// Which rows of a batch run with which adapters. Rows that no group names run with the model as it is.
///
/// The model itself is never modified: a row's result is the same whatever other rows bring.
#[derive(Debug, Clone, Default)]
pub struct Patches {
    /// By first row, without overlap.
    groups: Vec<Group>,
}

/// Neighbouring rows of one request.
#[derive(Debug, Clone)]
struct Group {
    rows: Range<i64>,
    stack: Arc<Stack>,
}

impl Patches {
    /// No adapters.
    #[must_use]
    pub const fn none() -> Self {
        Self { groups: Vec::new() }
    }

    /// Gives `rows` rows from `first_row` on the adapters of `stack`. Groups are added in the order of their rows.
    ///
    /// # Errors
    /// [`ModelError::Executor`] for rows that another group has or that lie before it.
    pub fn add(&mut self, first_row: u32, rows: u32, stack: Arc<Stack>) -> Result<(), ModelError> {
        let rows = i64::from(first_row)..i64::from(first_row) + i64::from(rows);
        let free_from = self.groups.last().map_or(0, |group| group.rows.end);
        if rows.is_empty() || rows.start < free_from {
            let cause = format!("adapters for rows {rows:?} after those for rows up to {free_from}");
            return Err(ModelError::Executor { what: WHAT, cause });
        }
        self.groups.push(Group { rows, stack });
        Ok(())
    }

    /// Whether no row has adapters.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Checks that all groups are of a batch of `rows` and made for `model`.
    pub(super) fn check(&self, rows: i64, model: &Arc<ModelFile>) -> Result<(), ModelError> {
        let cause = if self.groups.last().is_some_and(|group| group.rows.end > rows) {
            "adapters for rows that the batch does not have"
        } else if self.groups.iter().any(|group| !group.stack.is_for(model)) {
            "adapters that were put together for another model"
        } else {
            return Ok(());
        };
        Err(ModelError::Executor { what: WHAT, cause: cause.to_owned() })
    }

    /// The patches of a batch made of these rows of this one, in that order.
    pub(super) fn select(&self, rows: &[i64]) -> Self {
        let mut groups: Vec<Group> = Vec::new();
        for (at, row) in (0i64..).zip(rows) {
            let Some(group) = self.groups.iter().find(|group| group.rows.contains(row)) else { continue };
            match groups.last_mut() {
                Some(last) if last.rows.end == at && Arc::ptr_eq(&last.stack, &group.stack) => last.rows.end = at + 1,
                _ => groups.push(Group { rows: at..at + 1, stack: Arc::clone(&group.stack) }),
            }
        }
        Self { groups }
    }

    /// A linear layer on `[B, …, in]`.
    pub(super) fn linear(&self, layer: &Layer<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
        self.run(Operation::Linear, layer, x)
    }

    /// A convolution; the caller chose stride and padding.
    pub(super) fn conv(
        &self,
        layer: &Layer<Tensor>,
        x: &Tensor,
        stride: i64,
        padding: i64,
    ) -> Result<Tensor, TchError> {
        self.run(Operation::Conv { stride, padding }, layer, x)
    }

    /// A normalisation over channels in groups.
    pub(super) fn group_norm(&self, layer: &Layer<Tensor>, x: &Tensor, eps: f64) -> Result<Tensor, TchError> {
        self.run(Operation::GroupNorm { eps }, layer, x)
    }

    /// A normalisation over the last dimension.
    pub(super) fn layer_norm(&self, layer: &Layer<Tensor>, x: &Tensor, eps: f64) -> Result<Tensor, TchError> {
        self.run(Operation::LayerNorm { eps }, layer, x)
    }

    /// Every layer's call goes through here.
    fn run(&self, operation: Operation, layer: &Layer<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
        let changes = |group| change(group, layer);
        if !self.groups.iter().any(|group| changes(group).is_some()) {
            return operation.run(x, &layer.weight, layer.bias.as_ref());
        }
        let y = self.with_own_weights(operation, layer, x)?;
        for group in &self.groups {
            let Some(change) = changes(group) else { continue };
            let (first, rows) = (group.rows.start, group.rows.end - group.rows.start);
            let source = x.f_narrow(0, first, rows)?;
            for path in &change.low_rank {
                let side = operation.side(&source, path)?;
                let _ = y.f_narrow(0, first, rows)?.f_add_(&side)?;
            }
        }
        Ok(y)
    }

    /// The layer with each group's own weights where it has some, side paths left out.
    fn with_own_weights(&self, operation: Operation, layer: &Layer<Tensor>, x: &Tensor) -> Result<Tensor, TchError> {
        let replaced = |group| change(group, layer).and_then(|change| change.replaced.as_ref());
        let plain = |x: &Tensor| operation.run(x, &layer.weight, layer.bias.as_ref());
        if !self.groups.iter().any(|group| replaced(group).is_some()) {
            return plain(x);
        }
        let all = x.size().first().copied().unwrap_or(0);
        let mut parts = Vec::new();
        let mut done = 0;
        for group in &self.groups {
            let Some(Replaced { weight, bias }) = replaced(group) else { continue };
            let Range { start, end } = group.rows;
            if start > done {
                parts.push(plain(&x.f_narrow(0, done, start - done)?)?);
            }
            parts.push(operation.run(&x.f_narrow(0, start, end - start)?, weight, bias.as_ref())?);
            done = end;
        }
        if done < all {
            parts.push(plain(&x.f_narrow(0, done, all - done)?)?);
        }
        match parts.len() {
            // One request's stack for all rows.
            1 => Ok(parts.swap_remove(0)),
            _ => Tensor::f_cat(&parts, 0),
        }
    }
}

fn change<'a>(group: &'a Group, layer: &Layer<Tensor>) -> Option<&'a LayerPatch> {
    group.stack.layer(layer.id)
}

/// What a layer does with its weights.
#[derive(Debug, Clone, Copy)]
enum Operation {
    Linear,
    Conv { stride: i64, padding: i64 },
    GroupNorm { eps: f64 },
    LayerNorm { eps: f64 },
}

impl Operation {
    fn run(self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, TchError> {
        match self {
            Self::Linear => x.f_linear(weight, bias),
            Self::Conv { stride, padding } => x.f_conv2d(weight, bias, [stride, stride], [padding, padding], [1, 1], 1),
            Self::GroupNorm { eps } => x.f_group_norm(GROUPS, Some(weight), bias, eps, true),
            Self::LayerNorm { eps } => x.f_layer_norm(weight.size(), Some(weight), bias, eps, true),
        }
    }

    /// What a side path adds. Normalisations have none: a stack is refused that brings one.
    fn side(self, x: &Tensor, LowRank { down, up }: &LowRank) -> Result<Tensor, TchError> {
        let none = None::<&Tensor>;
        match self {
            Self::Conv { stride, padding } => {
                let narrow = x.f_conv2d(down, none, [stride, stride], [padding, padding], [1, 1], 1)?;
                narrow.f_conv2d(up, none, [1, 1], [0, 0], [1, 1], 1)
            }
            Self::Linear | Self::GroupNorm { .. } | Self::LayerNorm { .. } => {
                x.f_linear(down, none)?.f_linear(up, none)
            }
        }
    }
}
