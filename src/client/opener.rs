use crate::error::{Error, ErrorKind, Result};

/// The process that opened a session. A forked child has copies of all that the session consists of, its socket too, but
/// the session is its parent's: the child neither speaks for it nor gives anything back. Nor does it take a lock, which
/// a thread that the child does not have may have held.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opener {
    process: u32,
}

impl Opener {
    /// This process.
    pub(super) fn this() -> Self {
        Self { process: std::process::id() }
    }

    pub(super) fn is_here(self) -> bool {
        std::process::id() == self.process
    }

    /// # Errors
    /// [`ErrorKind::ConnectionLost`] in a child of the process.
    pub(super) fn check(self) -> Result<()> {
        if self.is_here() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::ConnectionLost,
            format!(
                "this client belongs to process {}, which this one was forked from; nothing was sent",
                self.process
            ),
            "connect in this process, and attach there what it uses",
        ))
    }
}
