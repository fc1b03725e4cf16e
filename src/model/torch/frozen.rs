use std::ops::Deref;

/// Tensors that nobody writes to any more: any thread may read them.
#[derive(Debug)]
pub(super) struct Frozen<T>(T);

impl<T> Frozen<T> {
    /// From here on `tensors` are only read.
    pub(super) fn new(tensors: T) -> Self {
        Self(tensors)
    }
}

// SAFETY: what keeps a tensor from being shared is that it can be written to behind a shared reference, by way of a clone
// that names the same memory. Executors read weights and stacks and write to none; the library lets any number of threads
// read a tensor: its reference counts are atomic, and without gradients, which are never wanted of these, nothing is filled
// in lazily.
unsafe impl<T: Send> Sync for Frozen<T> {}

impl<T> Deref for Frozen<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}
