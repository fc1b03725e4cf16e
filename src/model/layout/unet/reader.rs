use std::collections::BTreeSet;

use super::super::super::header::quote;
use super::super::super::{ModelError, StoredTensor};
use super::{Layer, LayerId, Names};
use crate::tensor::DType;

/// Groups of every normalisation over channels.
pub(super) const GROUPS: u64 = 32;

/// Takes layers by their stem, with the shape they must have, and numbers them.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    names: &'a Names<'a>,
    stems: Vec<String>,
    taken: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(names: &'a Names<'a>) -> Self {
        Self { names, stems: Vec::new(), taken: BTreeSet::new() }
    }

    /// Whether the layer `stem` is there.
    pub(super) fn has(&self, stem: &str) -> bool {
        self.names.tensor(&format!("{stem}.weight")).is_some()
    }

    /// Whether there is anything below `root`.
    pub(super) fn below(&self, root: &str) -> bool {
        self.names.below(&format!("{root}."))
    }

    /// Extents of the weight of `stem`; none where there is no such layer.
    pub(super) fn rank(&self, stem: &str) -> usize {
        self.names.tensor(&format!("{stem}.weight")).map_or(0, |stored| stored.shape.len())
    }

    /// A convolution with square kernels of `kernel`. Extents that are not given may be any.
    pub(super) fn conv(
        &mut self,
        stem: &str,
        out: Option<u64>,
        inner: Option<u64>,
        kernel: u64,
    ) -> Result<Layer<StoredTensor>, ModelError> {
        self.layer(stem, &[out, inner, Some(kernel), Some(kernel)], true)
    }

    /// A linear layer with a bias.
    pub(super) fn linear(
        &mut self,
        stem: &str,
        out: Option<u64>,
        inner: Option<u64>,
    ) -> Result<Layer<StoredTensor>, ModelError> {
        self.layer(stem, &[out, inner], true)
    }

    /// A linear layer without one.
    pub(super) fn unbiased(
        &mut self,
        stem: &str,
        out: u64,
        inner: Option<u64>,
    ) -> Result<Layer<StoredTensor>, ModelError> {
        self.layer(stem, &[Some(out), inner], false)
    }

    /// A normalisation over `channels` in groups.
    pub(super) fn group_norm(&mut self, stem: &str, channels: u64) -> Result<Layer<StoredTensor>, ModelError> {
        if !channels.is_multiple_of(GROUPS) {
            return Err(self.unsupported(format!("{channels} channels in {GROUPS} groups, in layer {}", quote(stem))));
        }
        self.layer(stem, &[Some(channels)], true)
    }

    /// A normalisation over the last dimension.
    pub(super) fn layer_norm(&mut self, stem: &str, channels: u64) -> Result<Layer<StoredTensor>, ModelError> {
        self.layer(stem, &[Some(channels)], true)
    }

    /// The stems of all layers taken, by id.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] where the file has a tensor that no layer took.
    pub(super) fn finish(self) -> Result<Vec<String>, ModelError> {
        match self.names.all().find(|(name, _)| !self.taken.contains(*name)) {
            Some((_, stored)) => Err(self.unsupported(format!("a UNet with {}", quote(stored)))),
            None => Ok(self.stems),
        }
    }

    /// The error for a UNet that is recognised but not one that is run.
    pub(super) fn unsupported(&self, what: impl Into<String>) -> ModelError {
        self.names.unsupported(what)
    }

    fn layer(&mut self, stem: &str, shape: &[Option<u64>], biased: bool) -> Result<Layer<StoredTensor>, ModelError> {
        let weight = self.take(&format!("{stem}.weight"), shape)?;
        let bias = match biased {
            true => {
                let rows = weight.shape.first().map(|&rows| rows as u64);
                Some(self.take(&format!("{stem}.bias"), &[rows])?)
            }
            false => None,
        };
        let id = LayerId(self.stems.len());
        self.stems.push(stem.to_owned());
        Ok(Layer { id, weight, bias })
    }

    fn take(&mut self, name: &str, shape: &[Option<u64>]) -> Result<StoredTensor, ModelError> {
        let stored = self
            .names
            .tensor(name)
            .ok_or_else(|| self.unsupported(format!("a UNet without a tensor {}", self.names.shown(name))))?;
        let fits = |(&extent, wanted): (&usize, &Option<u64>)| {
            extent > 0 && wanted.is_none_or(|wanted| wanted == extent as u64)
        };
        if stored.shape.len() != shape.len() || !stored.shape.iter().zip(shape).all(fits) {
            let any = |extent: &Option<u64>| extent.map_or("any".to_owned(), |extent| extent.to_string());
            let expected: Vec<String> = shape.iter().map(any).collect();
            let shown = self.names.shown(name);
            return Err(self.unsupported(format!(
                "shape {:?} of {shown} (expected [{}])",
                stored.shape,
                expected.join(", ")
            )));
        }
        if !stored.element().is_some_and(DType::is_float) {
            return Err(self.unsupported(format!("element type {} of {}", stored.dtype, self.names.shown(name))));
        }
        self.taken.insert(name.to_owned());
        Ok(stored.clone())
    }
}

impl Layer<StoredTensor> {
    /// Channels out; the reader made sure that there is a first dimension.
    pub(crate) fn rows(&self) -> u64 {
        self.weight.shape.first().map_or(0, |&extent| extent as u64)
    }

    /// Channels in; the reader made sure that there is a second dimension where there should be.
    pub(crate) fn columns(&self) -> u64 {
        self.weight.shape.get(1).map_or(0, |&extent| extent as u64)
    }
}
