use std::fmt::Debug;

use super::{DeviceError, Span, StreamRef};

/// Keeps GPU work of two processes in order without a CPU that waits: each side marks its own work, and the other
/// side's streams wait for the mark.
pub trait Order: Debug + Send + Sync {
    /// Marks everything enqueued on `stream` so far. The mark's number goes to the peer after this returned.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`]; no mark is made then.
    fn record(&self, stream: StreamRef) -> Result<u64, DeviceError>;

    /// Work enqueued on `stream` from now on waits for the peer's mark `sequence`; 0 is nothing to wait for.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where the peer has not made the mark, [`DeviceError::Cuda`].
    fn wait(&self, sequence: u64, stream: StreamRef) -> Result<(), DeviceError>;

    /// The newest own mark; 0 before the first.
    fn recorded(&self) -> u64;

    /// Whether the GPU has passed an own mark.
    ///
    /// # Errors
    /// [`DeviceError::NotRecorded`] where the mark was not made, [`DeviceError::Cuda`].
    fn passed_own(&self, sequence: u64) -> Result<bool, DeviceError>;

    /// Whether the GPU has passed a mark of the peer's.
    ///
    /// # Errors
    /// As [`Order::passed_own`].
    fn passed_peers(&self, sequence: u64) -> Result<bool, DeviceError>;

    /// Blocks the calling thread until a mark of the peer's has passed.
    ///
    /// # Errors
    /// As [`Order::passed_own`].
    fn synchronize_peers(&self, sequence: u64) -> Result<(), DeviceError>;

    /// Blocks the calling thread until an own mark has passed.
    ///
    /// # Errors
    /// As [`Order::passed_own`].
    fn synchronize_own(&self, sequence: u64) -> Result<(), DeviceError>;
}

/// A stream of one GPU that copies can be added to.
pub trait CopyStream: Debug + Send + Sync {
    /// The stream.
    fn handle(&self) -> StreamRef;

    /// Copies the bytes of `from` to the start of `to`. Within GPU memory the copy is enqueued; with host memory on
    /// either side it is done on return.
    ///
    /// # Errors
    /// [`DeviceError::OutOfBounds`] where they do not fit, [`DeviceError::Cuda`].
    fn copy(&self, from: &Span, to: &Span) -> Result<(), DeviceError>;

    /// Blocks until the stream has run everything enqueued so far.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`] where the GPU failed, also at work enqueued before.
    fn synchronize(&self) -> Result<(), DeviceError>;
}
