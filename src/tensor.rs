//! Element types, shapes, strides, and the checked arithmetic over them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind};

mod cast;
mod copy;
mod digest;
pub(crate) mod parallel;

pub use cast::{CastRule, CastRuleError, MAX_PREFIXES};
pub use copy::copy_dense;
pub use digest::digest_tensors;
pub(crate) use digest::{Digested, digest_of};

/// More dimensions than any tensor of the supported models has; bounds every loop over a peer's shape.
pub const MAX_RANK: usize = 8;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DType {
    /// Boolean, one byte, 0 or 1.
    Bool,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 64-bit integer.
    U64,
    /// Signed 64-bit integer.
    I64,
    /// 8-bit float with 4 bits of exponent, 3 of mantissa and no infinities; weights only.
    #[serde(rename = "f8_e4m3fn")]
    F8E4M3Fn,
    /// 8-bit float with 5 bits of exponent and 2 of mantissa; weights only.
    #[serde(rename = "f8_e5m2")]
    F8E5M2,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// IEEE single precision.
    F32,
    /// IEEE double precision.
    F64,
}

impl DType {
    /// Bytes per element.
    #[must_use]
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::Bool | Self::U8 | Self::I8 | Self::F8E4M3Fn | Self::F8E5M2 => 1,
            Self::U16 | Self::I16 | Self::F16 | Self::Bf16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Whether elements are floating-point numbers that can be computed with: those of 8 bits are only stored.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }

    /// Whether elements are floating-point numbers of 8 bits.
    #[must_use]
    pub const fn is_float8(self) -> bool {
        matches!(self, Self::F8E4M3Fn | Self::F8E5M2)
    }

    /// Every element type.
    pub const ALL: [Self; 15] = [
        Self::Bool,
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::U64,
        Self::I64,
        Self::F8E4M3Fn,
        Self::F8E5M2,
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::F64,
    ];

    /// The element type of that name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// The name used in messages and in `status`, as torch spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bool => "bool",
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::U16 => "uint16",
            Self::I16 => "int16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::U64 => "uint64",
            Self::I64 => "int64",
            Self::F8E4M3Fn => "float8_e4m3fn",
            Self::F8E5M2 => "float8_e5m2",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is wrong with a tensor description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorError {
    /// More than [`MAX_RANK`] dimensions.
    #[error("a tensor has {rank} dimensions; at most {MAX_RANK} are supported")]
    RankTooHigh {
        /// The number of dimensions.
        rank: usize,
    },
    /// Shape and strides differ in length.
    #[error("shape has {shape} dimensions but strides have {strides}")]
    StrideCount {
        /// Dimensions of the shape.
        shape: usize,
        /// Dimensions of the strides.
        strides: usize,
    },
    /// The byte size does not fit in 63 bits.
    #[error("tensor of shape {shape} is larger than the address space")]
    TooLarge {
        /// The offending shape.
        shape: Dims,
    },
    /// The memory behind the description is shorter than what it describes.
    #[error("tensor of shape {shape} {dtype} spans {needed} bytes, but {available} bytes are there")]
    OutOfBounds {
        /// The described shape.
        shape: Dims,
        /// The described element type.
        dtype: DType,
        /// Bytes from the first to one past the last element.
        needed: usize,
        /// Bytes available.
        available: usize,
    },
    /// The operation takes another kind of tensor.
    #[error("{tensor}: expected {expected}, got {shape} {dtype}")]
    Unexpected {
        /// Name of the argument.
        tensor: &'static str,
        /// What the operation takes.
        expected: String,
        /// What came.
        shape: Dims,
        /// Element type of what came.
        dtype: DType,
    },
}

/// Up to [`MAX_RANK`] extents, inline: a shape or strides, in elements.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Dims {
    rank: u8,
    extents: [u64; MAX_RANK],
}

impl Dims {
    /// The extents of `values`.
    ///
    /// # Errors
    /// [`TensorError::RankTooHigh`] for more than [`MAX_RANK`] values.
    pub fn new(values: &[u64]) -> Result<Self, TensorError> {
        let mut extents = [0; MAX_RANK];
        extents.get_mut(..values.len()).ok_or(TensorError::RankTooHigh { rank: values.len() })?.copy_from_slice(values);
        Ok(Self { rank: values.len() as u8, extents })
    }

    /// The extents of a fixed-size array; the compiler refuses more than [`MAX_RANK`].
    #[must_use]
    pub fn of<const N: usize>(values: [u64; N]) -> Self {
        const { assert!(N <= MAX_RANK) };
        let mut extents = [0; MAX_RANK];
        extents[..N].copy_from_slice(&values);
        Self { rank: N as u8, extents }
    }

    /// The extents as a slice.
    #[must_use]
    pub fn as_slice(&self) -> &[u64] {
        &self.extents[..usize::from(self.rank)]
    }

    /// Number of dimensions.
    #[must_use]
    pub fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    /// Strides of a dense row-major tensor of this shape.
    #[must_use]
    pub fn contiguous_strides(&self) -> Self {
        let order: [usize; MAX_RANK] = std::array::from_fn(|at| at);
        self.dense_strides(&order[..self.rank()])
    }

    /// Strides of a dense tensor whose dimensions lie in memory in `order`, outermost first.
    fn dense_strides(&self, order: &[usize]) -> Self {
        let mut strides = *self;
        let mut next = 1u64;
        for &dim in order.iter().rev() {
            strides.extents[dim] = next;
            next = next.saturating_mul(self.extents[dim].max(1));
        }
        strides
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.as_slice()).finish()
    }
}

impl fmt::Display for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

impl Serialize for Dims {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.as_slice())
    }
}

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Extents;
        impl<'de> serde::de::Visitor<'de> for Extents {
            type Value = Dims;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_RANK} extents")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
                let mut dims = Dims { rank: 0, extents: [0; MAX_RANK] };
                while let Some(extent) = seq.next_element()? {
                    let Some(place) = dims.extents.get_mut(usize::from(dims.rank)) else {
                        return Err(serde::de::Error::invalid_length(MAX_RANK + 1, &self));
                    };
                    *place = extent;
                    dims.rank += 1;
                }
                Ok(dims)
            }
        }
        deserializer.deserialize_seq(Extents)
    }
}

/// Element type, shape and strides of a tensor; strides are in elements and never negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorMeta {
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Dims,
    /// Distance between neighbours in each dimension, in elements.
    pub strides: Dims,
}

impl TensorMeta {
    /// A dense row-major tensor.
    #[must_use]
    pub fn contiguous(dtype: DType, shape: Dims) -> Self {
        Self { dtype, shape, strides: shape.contiguous_strides() }
    }

    /// A tensor with the given strides.
    ///
    /// # Errors
    /// [`TensorError::StrideCount`] where shape and strides differ in length, [`TensorError::TooLarge`]
    /// where the last element lies beyond the address space.
    pub fn strided(dtype: DType, shape: Dims, strides: Dims) -> Result<Self, TensorError> {
        let meta = Self { dtype, shape, strides };
        meta.validate()?;
        Ok(meta)
    }

    /// Checks a description that came from a peer.
    ///
    /// # Errors
    /// As [`TensorMeta::strided`].
    pub fn validate(&self) -> Result<(), TensorError> {
        if self.shape.rank() != self.strides.rank() {
            return Err(TensorError::StrideCount { shape: self.shape.rank(), strides: self.strides.rank() });
        }
        self.span_bytes().map(|_| ())?;
        self.size_bytes().map(|_| ())
    }

    /// Number of elements.
    ///
    /// # Errors
    /// [`TensorError::TooLarge`] on overflow.
    pub fn elements(&self) -> Result<usize, TensorError> {
        self.shape
            .as_slice()
            .iter()
            .try_fold(1u64, |product, &extent| product.checked_mul(extent))
            .and_then(|elements| isize::try_from(elements).ok())
            .map(isize::unsigned_abs)
            .ok_or(TensorError::TooLarge { shape: self.shape })
    }

    /// Bytes of the elements alone.
    ///
    /// # Errors
    /// [`TensorError::TooLarge`] on overflow.
    pub fn size_bytes(&self) -> Result<usize, TensorError> {
        self.elements()?
            .checked_mul(self.dtype.size_bytes())
            .filter(|&bytes| isize::try_from(bytes).is_ok())
            .ok_or(TensorError::TooLarge { shape: self.shape })
    }

    /// Bytes from the first to one past the last element, gaps included; 0 for an empty tensor.
    ///
    /// # Errors
    /// [`TensorError::TooLarge`] on overflow.
    pub fn span_bytes(&self) -> Result<usize, TensorError> {
        if self.shape.as_slice().contains(&0) {
            return Ok(0);
        }
        self.shape
            .as_slice()
            .iter()
            .zip(self.strides.as_slice())
            .try_fold(0u64, |last, (&extent, &stride)| {
                (extent - 1).checked_mul(stride).and_then(|step| last.checked_add(step))
            })
            .and_then(|last| last.checked_add(1))
            .and_then(|elements| elements.checked_mul(self.dtype.size_bytes() as u64))
            .and_then(|bytes| isize::try_from(bytes).ok())
            .map(isize::unsigned_abs)
            .ok_or(TensorError::TooLarge { shape: self.shape })
    }

    /// Whether the elements fill their span without gaps or overlaps, in any order of dimensions.
    #[must_use]
    pub fn is_dense(&self) -> bool {
        let dense = self.densified();
        self.shape
            .as_slice()
            .iter()
            .zip(self.strides.as_slice().iter().zip(dense.strides.as_slice()))
            .all(|(&extent, (have, want))| extent <= 1 || have == want)
    }

    /// Whether elements lie one after the other in the order of their indices. Where a dimension has one element, or the
    /// tensor none, its stride does not matter.
    #[must_use]
    pub fn is_row_major(&self) -> bool {
        let wanted = self.shape.contiguous_strides();
        let extents = self.shape.as_slice();
        let mut dims = extents.iter().zip(self.strides.as_slice().iter().zip(wanted.as_slice()));
        extents.contains(&0) || dims.all(|(&extent, (have, want))| extent == 1 || have == want)
    }

    /// The dense description with the same order of dimensions in memory: what a copy of this tensor looks like.
    ///
    /// Overlapping dimensions (stride 0) become real ones.
    #[must_use]
    pub fn densified(&self) -> Self {
        let extent = |dim: usize| self.shape.as_slice()[dim];
        let stride = |dim: usize| self.strides.as_slice()[dim];
        let mut order: [usize; MAX_RANK] = std::array::from_fn(|at| at);
        let order = &mut order[..self.shape.rank()];
        // A dimension of one element, or a repeated one, has no place in memory: it goes outermost.
        order.sort_by_key(|&dim| {
            let placed = extent(dim) > 1 && stride(dim) > 0;
            (placed, std::cmp::Reverse(if placed { stride(dim) } else { 0 }))
        });
        let mut placed = order.iter().filter(|&&dim| extent(dim) > 1);
        if placed.by_ref().is_sorted() {
            return Self::contiguous(self.dtype, self.shape);
        }
        Self { strides: self.shape.dense_strides(order), ..*self }
    }

    /// Whether `bytes` hold everything this description reaches.
    ///
    /// # Errors
    /// [`TensorError::OutOfBounds`], or as [`TensorMeta::span_bytes`].
    pub fn check_fits(&self, available: usize) -> Result<(), TensorError> {
        let needed = self.span_bytes()?;
        if needed > available {
            return Err(TensorError::OutOfBounds { shape: self.shape, dtype: self.dtype, needed, available });
        }
        Ok(())
    }
}

impl From<TensorError> for Error {
    fn from(error: TensorError) -> Self {
        Self::caused(ErrorKind::InvalidTensor, "", error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strided(shape: &[u64], strides: &[u64]) -> TensorMeta {
        TensorMeta::strided(DType::F32, Dims::new(shape).unwrap(), Dims::new(strides).unwrap()).unwrap()
    }

    #[test]
    fn spans_count_gaps_and_empty_tensors_span_nothing() {
        assert_eq!(strided(&[2, 3], &[3, 1]).span_bytes().unwrap(), 24);
        assert_eq!(strided(&[2, 3], &[10, 2]).span_bytes().unwrap(), (10 + 4 + 1) * 4);
        assert_eq!(strided(&[0, 3], &[3, 1]).span_bytes().unwrap(), 0);
        assert_eq!(strided(&[], &[]).span_bytes().unwrap(), 4);
    }

    #[test]
    fn sizes_beyond_the_address_space_are_errors_and_never_wrap() {
        let shape = Dims::of([1 << 32, 1 << 32]);
        let meta = TensorMeta { dtype: DType::F32, shape, strides: shape.contiguous_strides() };
        assert_eq!(meta.validate(), Err(TensorError::TooLarge { shape }));
        let far = TensorMeta { dtype: DType::U8, shape: Dims::of([2]), strides: Dims::of([u64::MAX]) };
        assert!(far.validate().is_err());
    }

    #[test]
    fn a_dense_copy_keeps_the_order_of_dimensions_in_memory() {
        let channels_last = strided(&[1, 3, 8, 4], &[96, 1, 12, 3]);
        assert!(channels_last.is_dense());
        assert_eq!(channels_last.densified().strides.as_slice()[1..], [1, 12, 3]);
        let sliced = strided(&[2, 3, 8, 4], &[960, 1, 60, 3]);
        assert!(!sliced.is_dense());
        assert_eq!(sliced.densified().strides.as_slice(), [96, 1, 12, 3]);
        let expanded = strided(&[5, 4], &[0, 1]);
        assert!(!expanded.is_dense());
        assert_eq!(expanded.densified().strides.as_slice(), [4, 1]);
        let ones = strided(&[4, 1], &[1, 1]);
        assert_eq!(ones.densified().strides.as_slice(), [1, 1]);
    }

    #[test]
    fn nine_dimensions_are_refused() {
        assert_eq!(Dims::new(&[1; 9]), Err(TensorError::RankTooHigh { rank: 9 }));
    }
}
