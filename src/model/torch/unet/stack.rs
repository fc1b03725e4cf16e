use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use super::super::super::{LayerId, ModelError, ModelFile};
use super::super::failed;
use super::super::frozen::Frozen;
use super::WHAT;

/// What a request's adapters change in one layer.
#[derive(Debug, Default)]
pub struct LayerPatch {
    /// Added to what the layer gives, in any order: addition commutes.
    pub low_rank: Vec<LowRank>,
    /// Used instead of the model's own weights; side paths are added to what these give.
    pub replaced: Option<Replaced>,
}

/// A side path of low rank: `up · down · x` is added to what the layer gives. Strength and alpha are folded into `up`.
#[derive(Debug)]
pub struct LowRank {
    /// `[rank, in]`; of a convolution `[rank, in, k, k]`, run with the layer's own stride and padding.
    pub down: Tensor,
    /// `[out, rank]`; of a convolution `[out, rank, 1, 1]`.
    pub up: Tensor,
}

/// A private copy of a layer's weights.
#[derive(Debug)]
pub struct Replaced {
    /// In the shape of the layer's own.
    pub weight: Tensor,
    /// In place of the layer's own; one where the layer has none.
    pub bias: Option<Tensor>,
}

/// All that one request's adapters change in one model, checked against it: in its element type, on its device.
#[derive(Debug)]
pub struct Stack {
    /// By the layers' ids.
    layers: Frozen<Vec<Option<LayerPatch>>>,
    /// The model it was checked against.
    model: Arc<ModelFile>,
    size_bytes: u64,
}

impl Stack {
    /// Bytes of all its tensors.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// What changes in a layer.
    pub(super) fn layer(&self, id: LayerId) -> Option<&LayerPatch> {
        self.layers.get(id.0)?.as_ref()
    }

    /// Whether it was checked against that model.
    pub(super) fn is_for(&self, model: &Arc<ModelFile>) -> bool {
        Arc::ptr_eq(&self.model, model)
    }
}

/// A layer as adapters are checked against it.
pub(super) struct Slot<'a> {
    pub(super) stem: &'a str,
    pub(super) weight: &'a Tensor,
}

/// Puts a stack together.
pub(super) struct StackBuilder {
    layers: Vec<Option<LayerPatch>>,
    model: Arc<ModelFile>,
    size_bytes: u64,
    kind: Kind,
    device: Device,
}

impl StackBuilder {
    pub(super) fn new(model: &Arc<ModelFile>, layers: usize, kind: Kind, device: Device) -> Self {
        let layers = (0..layers).map(|_| None).collect();
        Self { layers, model: Arc::clone(model), size_bytes: 0, kind, device }
    }

    pub(super) fn finish(self) -> Stack {
        let Self { layers, model, size_bytes, .. } = self;
        Stack { layers: Frozen::new(layers), model, size_bytes }
    }

    /// Takes up a change of the layer `id`, which is `slot`.
    pub(super) fn add(&mut self, id: LayerId, slot: &Slot<'_>, change: LayerPatch) -> Result<(), ModelError> {
        let mut checked = LayerPatch::default();
        for path in change.low_rank {
            check_low_rank(slot, &path)?;
            checked.low_rank.push(LowRank { down: self.take(&path.down)?, up: self.take(&path.up)? });
        }
        if let Some(replaced) = change.replaced {
            check_replaced(slot, &replaced)?;
            let bias = replaced.bias.map(|bias| self.take(&bias)).transpose()?;
            checked.replaced = Some(Replaced { weight: self.take(&replaced.weight)?, bias });
        }
        match self.layers.get_mut(id.0) {
            Some(place @ None) => *place = Some(checked),
            _ => return Err(misfit(slot, "it is changed twice, or is not one of the model's".to_owned())),
        }
        Ok(())
    }

    fn take(&mut self, tensor: &Tensor) -> Result<Tensor, ModelError> {
        let moved = tensor.f_to_device(self.device).and_then(|there| there.f_to_kind(self.kind));
        let own = moved.and_then(|own| own.f_contiguous()).map_err(failed(WHAT))?;
        self.size_bytes += own.numel() as u64 * self.kind.elt_size_in_bytes() as u64;
        Ok(own)
    }
}

fn check_low_rank(slot: &Slot<'_>, path: &LowRank) -> Result<(), ModelError> {
    let (down, up) = (shape(slot, &path.down)?, shape(slot, &path.up)?);
    let fits = match (slot.weight.size().as_slice(), down.as_slice(), up.as_slice()) {
        (&[out, inner], &[rank, columns], &[rows, columns_up]) => {
            rank > 0 && (inner, out, rank) == (columns, rows, columns_up)
        }
        (&[out, inner, height, width], &[rank, columns, tall, wide], &[rows, columns_up, 1, 1]) => {
            rank > 0 && (inner, height, width, out, rank) == (columns, tall, wide, rows, columns_up)
        }
        _ => false,
    };
    match fits {
        true => Ok(()),
        false => Err(misfit(slot, format!("a side path of {down:?} and {up:?} beside {:?}", slot.weight.size()))),
    }
}

fn check_replaced(slot: &Slot<'_>, replaced: &Replaced) -> Result<(), ModelError> {
    let (weight, own) = (shape(slot, &replaced.weight)?, slot.weight.size());
    if weight != own {
        return Err(misfit(slot, format!("a weight of {weight:?} instead of {own:?}")));
    }
    if let Some(bias) = &replaced.bias {
        let bias = shape(slot, bias)?;
        if own.get(..1) != Some(bias.as_slice()) {
            return Err(misfit(slot, format!("a bias of {bias:?} for a weight of {own:?}")));
        }
    }
    Ok(())
}

/// The shape of a tensor of floating-point numbers.
fn shape(slot: &Slot<'_>, tensor: &Tensor) -> Result<Vec<i64>, ModelError> {
    let kind = tensor.defined().then(|| tensor.f_kind()).transpose();
    match kind {
        Ok(Some(Kind::Float | Kind::Half | Kind::BFloat16 | Kind::Double)) => Ok(tensor.size()),
        Ok(kind) => Err(misfit(slot, format!("its elements are {kind:?}"))),
        Err(error) => Err(misfit(slot, failed_words(&error))),
    }
}

fn failed_words(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn misfit(slot: &Slot<'_>, reason: String) -> ModelError {
    ModelError::Adapter { layer: slot.stem.to_owned(), reason }
}
