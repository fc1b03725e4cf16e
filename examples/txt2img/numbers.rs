use luna_broker::client::{Input, Tensor};
use luna_broker::tensor::{DType, Dims, TensorMeta};

/// float32 numbers in the shape of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Numbers {
    shape: Vec<u64>,
    bytes: Vec<u8>,
}

impl Numbers {
    pub(crate) fn new(shape: &[u64], floats: &[f32]) -> Self {
        Self { shape: shape.to_vec(), bytes: floats.iter().flat_map(|value| value.to_ne_bytes()).collect() }
    }

    /// Those of a result, which may go back to the broker after that.
    pub(crate) fn of(tensor: &Tensor) -> luna_broker::Result<Self> {
        Ok(Self::new(tensor.meta().shape.as_slice(), &tensor.floats()?))
    }

    pub(crate) fn shape(&self) -> &[u64] {
        &self.shape
    }

    pub(crate) fn floats(&self) -> Vec<f32> {
        self.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect()
    }

    pub(crate) fn input(&self) -> luna_broker::Result<Input<'_>> {
        Input::new(TensorMeta::contiguous(DType::F32, Dims::new(&self.shape)?), &self.bytes)
    }

    /// Two of one row and of one size as two rows.
    pub(crate) fn joined(first: &Self, second: &Self) -> Self {
        let shape = std::iter::once(2).chain(first.shape.iter().copied().skip(1)).collect();
        Self { shape, bytes: [first.bytes.as_slice(), &second.bytes].concat() }
    }

    /// A context `[1, tokens, width]` so often behind itself that it has so many tokens. That changes nothing: attention
    /// is an average.
    pub(crate) fn repeated(&self, tokens: u64) -> Self {
        let mut shape = self.shape.clone();
        let times = shape.get(1).map_or(1, |own| tokens / own);
        shape.iter_mut().skip(1).take(1).for_each(|own| *own *= times);
        Self { shape, bytes: self.bytes.repeat(times as usize) }
    }
}
