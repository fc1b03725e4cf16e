use std::fmt;
use std::time::Duration;

use crate::id::GpuUuid;

/// How one call waits.
#[derive(Clone, Copy, Default)]
pub struct CallOptions<'a> {
    /// How long the answer may take; the request is taken back then. `None`: as long as it takes.
    pub timeout: Option<Duration>,
    /// Asked about ten times a second while waiting; `true` takes the request back.
    pub interrupted: Option<&'a dyn Fn() -> bool>,
    /// Where the result goes.
    pub result: ResultPlace,
    /// What it comes in where it is for a GPU that shares no memory.
    pub unshared: Unshared,
}

/// What a result for a GPU that shares no memory comes in. The rung says whether it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Unshared {
    /// Host memory, as any other result there.
    #[default]
    Host,
    /// Memory to pass through, page-locked where the driver allows it: for who has [`copy_to_gpu`](super::Tensor::copy_to_gpu) copy the
    /// result at once, and reads it in no other way. Host memory where the session shares none.
    Staging,
}

/// Where the result of a call goes. On a GPU without shared memory it comes as [`CallOptions::unshared`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ResultPlace {
    /// Where the input came from.
    #[default]
    LikeInput,
    /// Host memory.
    Host,
    /// Memory of this GPU.
    Gpu(GpuUuid),
}

impl fmt::Debug for CallOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallOptions").field("timeout", &self.timeout).finish_non_exhaustive()
    }
}
