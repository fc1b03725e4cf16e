use std::collections::BTreeSet;

use super::super::header::quote;
use super::super::{ModelError, ModelFile, StoredTensor};
use crate::tensor::DType;

/// A convolution, or a linear layer where the weight has two dimensions.
#[derive(Debug)]
pub(crate) struct Conv<T> {
    pub(crate) weight: T,
    pub(crate) bias: Option<T>,
}

impl<T> Conv<T> {
    pub(crate) fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Conv<U>, E> {
        Ok(Conv { weight: f(&self.weight)?, bias: self.bias.as_ref().map(f).transpose()? })
    }
}

impl Conv<StoredTensor> {
    /// Channels out; the reader made sure that there is a first dimension.
    pub(crate) fn channels_out(&self) -> u64 {
        self.weight.shape.first().map_or(0, |&extent| extent as u64)
    }

    /// Channels in; the reader made sure that there is a second dimension.
    pub(crate) fn channels_in(&self) -> u64 {
        self.weight.shape.get(1).map_or(0, |&extent| extent as u64)
    }
}

/// A group or layer normalisation with weight and bias.
#[derive(Debug)]
pub(crate) struct Norm<T> {
    pub(crate) weight: T,
    pub(crate) bias: T,
}

impl<T> Norm<T> {
    pub(crate) fn try_map<U, E, F: FnMut(&T) -> Result<U, E>>(&self, f: &mut F) -> Result<Norm<U>, E> {
        Ok(Norm { weight: f(&self.weight)?, bias: f(&self.bias)? })
    }
}

/// Takes tensors out of a file by name, with the shape they must have, and remembers which were taken.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    file: &'a ModelFile,
    /// What is being read, with its article; for messages.
    what: &'static str,
    taken: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(file: &'a ModelFile, what: &'static str) -> Self {
        Self { file, what, taken: BTreeSet::new() }
    }

    /// What is being read, with its article.
    pub(crate) fn what(&self) -> &'static str {
        self.what
    }

    /// Whether the layer `stem` is there.
    pub(crate) fn has(&self, stem: &str) -> bool {
        self.has_tensor(&format!("{stem}.weight"))
    }

    /// Whether there is a tensor called `name`.
    pub(crate) fn has_tensor(&self, name: &str) -> bool {
        self.file.tensor(name).is_some()
    }

    /// A tensor of floating-point numbers in whatever shape.
    pub(crate) fn tensor(&mut self, name: &str) -> Result<StoredTensor, ModelError> {
        self.take(name)
    }

    /// A tensor of exactly this shape.
    pub(crate) fn exact(&mut self, name: &str, shape: &[usize]) -> Result<StoredTensor, ModelError> {
        let stored = self.take(name)?;
        match stored.shape.as_slice() == shape {
            true => Ok(stored),
            false => Err(self.misshapen(name, &stored, &format!("{shape:?}"))),
        }
    }

    /// A normalisation over the last dimension, which has `width` elements.
    pub(crate) fn layer_norm(&mut self, stem: &str, width: usize) -> Result<Norm<StoredTensor>, ModelError> {
        let [weight, bias] = ["weight", "bias"].map(|part| format!("{stem}.{part}"));
        Ok(Norm { weight: self.exact(&weight, &[width])?, bias: self.exact(&bias, &[width])? })
    }

    /// A convolution with square kernels of `kernel`; `channels_in` as the layers before it demand.
    pub(crate) fn conv(
        &mut self,
        stem: &str,
        channels_in: Option<u64>,
        kernel: usize,
    ) -> Result<Conv<StoredTensor>, ModelError> {
        let weight = self.take(&format!("{stem}.weight"))?;
        match *weight.shape.as_slice() {
            [out, inner, height, width]
                if out > 0
                    && channels_in.is_none_or(|wanted| wanted == inner as u64)
                    && inner > 0
                    && (height, width) == (kernel, kernel) => {}
            _ => {
                let inner = channels_in.map_or("any".to_owned(), |channels| channels.to_string());
                return Err(self.misshapen(stem, &weight, &format!("[any, {inner}, {kernel}, {kernel}]")));
            }
        }
        self.with_bias(stem, weight)
    }

    /// A projection of `channels` to themselves: a linear layer or a convolution with kernels of one.
    pub(crate) fn projection(&mut self, stem: &str, channels: u64) -> Result<Conv<StoredTensor>, ModelError> {
        let weight = self.take(&format!("{stem}.weight"))?;
        match *weight.shape.as_slice() {
            [out, inner] | [out, inner, 1, 1] if out as u64 == channels && inner as u64 == channels => {}
            _ => {
                return Err(self.misshapen(stem, &weight, &format!("[{channels}, {channels}] or 1 × 1 kernels of it")));
            }
        }
        self.with_bias(stem, weight)
    }

    /// A normalisation of `channels` in `groups`.
    pub(crate) fn norm(&mut self, stem: &str, channels: u64, groups: u64) -> Result<Norm<StoredTensor>, ModelError> {
        let (weight, bias) = (self.take(&format!("{stem}.weight"))?, self.take(&format!("{stem}.bias"))?);
        for part in [&weight, &bias] {
            if *part.shape.as_slice() != [channels as usize] || !channels.is_multiple_of(groups) {
                let expected = format!("[{channels}], divisible into {groups} groups");
                return Err(self.misshapen(stem, part, &expected));
            }
        }
        Ok(Norm { weight, bias })
    }

    /// Counts a tensor as known that no layer takes.
    pub(crate) fn ignore(&mut self, name: &str) {
        self.taken.insert(name.to_owned());
    }

    /// The first tensor whose name starts with one of `roots` and that no layer took.
    pub(crate) fn left_over(&self, roots: &[String]) -> Option<&'a str> {
        self.file
            .tensors()
            .map(|(name, _)| name)
            .find(|name| roots.iter().any(|root| name.starts_with(root.as_str())) && !self.taken.contains(*name))
    }

    /// The error for a model that is recognised but not supported.
    pub(crate) fn unsupported(&self, what: impl Into<String>) -> ModelError {
        ModelError::Unsupported { path: self.file.path().to_owned(), what: what.into() }
    }

    fn with_bias(&mut self, stem: &str, weight: StoredTensor) -> Result<Conv<StoredTensor>, ModelError> {
        let name = format!("{stem}.bias");
        if self.file.tensor(&name).is_none() {
            return Ok(Conv { weight, bias: None });
        }
        let bias = self.take(&name)?;
        if bias.shape.as_slice() != weight.shape.get(..1).unwrap_or_default() {
            return Err(self.misshapen(stem, &bias, "a bias for each row of the weight"));
        }
        Ok(Conv { weight, bias: Some(bias) })
    }

    fn take(&mut self, name: &str) -> Result<StoredTensor, ModelError> {
        let stored = self
            .file
            .tensor(name)
            .ok_or_else(|| self.unsupported(format!("{} without a tensor {}", self.what, quote(name))))?;
        if !stored.element().is_some_and(DType::is_float) {
            return Err(self.unsupported(format!("element type {} of {}", stored.dtype, quote(name))));
        }
        self.taken.insert(name.to_owned());
        Ok(stored.clone())
    }

    pub(crate) fn misshapen(&self, stem: &str, stored: &StoredTensor, expected: &str) -> ModelError {
        self.unsupported(format!("shape {:?} in layer {} (expected {expected})", stored.shape, quote(stem)))
    }
}
