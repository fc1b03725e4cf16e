use crate::model::header::quote;
use crate::model::{ModelError, ModelFile};
use crate::tensor::{CastRule, DType, Dims, TensorError, TensorMeta};

/// Where each tensor of a set lies in the one region that holds them all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightPlan {
    /// Sorted by key, which is also their order in the region.
    pub tensors: Vec<PlannedTensor>,
    /// Bytes of the region: a positive multiple of the alignment.
    pub size_bytes: u64,
}

/// One tensor of a [`WeightPlan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedTensor {
    /// The tensor's name, as the source has it.
    pub key: String,
    /// Element type in the source.
    pub stored: DType,
    /// Element type, shape and strides in the region; always contiguous.
    pub meta: TensorMeta,
    /// Bytes from the start of the region; a multiple of the alignment.
    pub offset: u64,
}

impl WeightPlan {
    /// The layout of the tensors of `file` under `rule`, each at a multiple of `alignment` bytes. The same keys, types,
    /// shapes, rule and alignment always give the same layout.
    ///
    /// # Errors
    /// [`ModelError::CastTarget`] for a rule that asks for what nothing is converted to, [`ModelError::ElementType`] for
    /// elements that do not fill whole bytes or that no tensor can be made of, [`ModelError::WeightShape`] for more
    /// dimensions than tensors have or a set beyond the address space, [`ModelError::EmptySet`].
    pub fn of_file(file: &ModelFile, rule: &CastRule, alignment: u64) -> Result<Self, ModelError> {
        if let Some(wanted) = rule.impossible() {
            return Err(ModelError::CastTarget { wanted });
        }
        let described = file_tensors(file)?;
        let wanted = described.into_iter().map(|(key, stored, shape)| {
            let meta = TensorMeta::contiguous(rule.wanted(&key, stored), shape);
            (key, stored, meta)
        });
        lay_out(wanted.collect(), alignment)
    }

    /// The layout of `tensors` that are not in a file: they become contiguous in the region and keep their types.
    ///
    /// # Errors
    /// [`ModelError::DuplicateTensor`], [`ModelError::EmptySet`], [`ModelError::WeightShape`].
    pub fn of_tensors(
        tensors: impl IntoIterator<Item = (String, TensorMeta)>,
        alignment: u64,
    ) -> Result<Self, ModelError> {
        let described = tensors.into_iter().map(|(key, meta)| (key, meta.dtype, meta));
        lay_out(described.collect(), alignment)
    }

    /// The layout of the same tensors under `rule`, at multiples of `alignment` bytes.
    ///
    /// # Errors
    /// [`ModelError::CastTarget`] for a rule that asks for what nothing is converted to, [`ModelError::WeightShape`] for
    /// a set that would not fit into the address space.
    pub fn recast(&self, rule: &CastRule, alignment: u64) -> Result<Self, ModelError> {
        if let Some(wanted) = rule.impossible() {
            return Err(ModelError::CastTarget { wanted });
        }
        let described = self.tensors.iter().map(|tensor| {
            let stored = tensor.meta.dtype;
            let meta = TensorMeta::contiguous(rule.wanted(&tensor.key, stored), tensor.meta.shape);
            (tensor.key.clone(), stored, meta)
        });
        lay_out(described.collect(), alignment)
    }

    /// Whether the tensors are as `rule` wants those of the source.
    #[must_use]
    pub fn follows(&self, rule: &CastRule) -> bool {
        self.tensors.iter().all(|tensor| rule.wanted(&tensor.key, tensor.stored) == tensor.meta.dtype)
    }

    /// Whether `rule` leaves the tensors as they are in the region.
    #[must_use]
    pub fn is_untouched_by(&self, rule: &CastRule) -> bool {
        self.tensors.iter().all(|tensor| rule.wanted(&tensor.key, tensor.meta.dtype) == tensor.meta.dtype)
    }

    /// Whether a region that is filled by one plan is laid out as by the other, whatever the sources' element types.
    #[must_use]
    pub fn is_laid_out_like(&self, other: &Self) -> bool {
        let is_like = |(one, two): (&PlannedTensor, &PlannedTensor)| {
            one.key == two.key && one.meta == two.meta && one.offset == two.offset
        };
        self.size_bytes == other.size_bytes
            && self.tensors.len() == other.tensors.len()
            && self.tensors.iter().zip(&other.tensors).all(is_like)
    }

    /// The tensor called `key`.
    #[must_use]
    pub fn tensor(&self, key: &str) -> Option<&PlannedTensor> {
        let at = self.tensors.binary_search_by(|tensor| tensor.key.as_str().cmp(key)).ok()?;
        self.tensors.get(at)
    }
}

/// Name, element type and shape of each tensor of `file`, sorted by name.
///
/// # Errors
/// As [`WeightPlan::of_file`], for what is wrong with the file alone.
pub(super) fn file_tensors(file: &ModelFile) -> Result<Vec<(String, DType, Dims)>, ModelError> {
    let describe = |(key, stored): (&str, &crate::model::StoredTensor)| {
        let dtype = stored.element().ok_or_else(|| ModelError::ElementType {
            path: file.path().to_owned(),
            tensor: quote(key),
            stored: format!("{:?}", stored.dtype),
        })?;
        let extents: Vec<u64> = stored.shape.iter().map(|&extent| extent as u64).collect();
        let shape = Dims::new(&extents)
            .map_err(|cause| ModelError::WeightShape { tensor: quote(key), cause: Box::new(cause) })?;
        Ok((key.to_owned(), dtype, shape))
    };
    file.tensors().map(describe).collect()
}

fn lay_out(mut described: Vec<(String, DType, TensorMeta)>, alignment: u64) -> Result<WeightPlan, ModelError> {
    if described.is_empty() {
        return Err(ModelError::EmptySet);
    }
    let alignment = alignment.max(1);
    described.sort_by(|(one, ..), (other, ..)| one.cmp(other));
    let mut tensors: Vec<PlannedTensor> = Vec::with_capacity(described.len());
    let mut end = 0u64;
    for (key, stored, meta) in described {
        if tensors.last().is_some_and(|last| last.key == key) {
            return Err(ModelError::DuplicateTensor { tensor: quote(&key) });
        }
        let refuse = |cause| ModelError::WeightShape { tensor: quote(&key), cause: Box::new(cause) };
        let meta = TensorMeta::contiguous(meta.dtype, meta.shape);
        let size_bytes = meta.size_bytes().map_err(refuse)? as u64;
        let offset = end.checked_next_multiple_of(alignment);
        // The end is rounded here already, so that the size of the region is known to be possible, too.
        let last = offset.and_then(|offset| offset.checked_add(size_bytes)).filter(|&last| {
            last.checked_next_multiple_of(alignment).is_some_and(|rounded| isize::try_from(rounded).is_ok())
        });
        let (Some(offset), Some(last)) = (offset, last) else {
            return Err(refuse(TensorError::TooLarge { shape: meta.shape }));
        };
        tensors.push(PlannedTensor { key, stored, meta, offset });
        end = last;
    }
    let size_bytes = end.next_multiple_of(alignment).max(alignment);
    Ok(WeightPlan { tensors, size_bytes })
}
