//! Local sockets: Unix domain sockets, named pipes on Windows.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;

pub use system::{LocalConnection, LocalListener, default_address};

pub(super) use system::own_uid;

use std::time::Duration;

/// How long a peer may leave its socket unread before it is given up.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
