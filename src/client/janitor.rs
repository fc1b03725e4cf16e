use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::link::Link;
use super::memory::Retired;

/// Long enough for a busy client's next request to take the releases along; short enough that an idle client's
/// memory is back before anybody looks.
const PATIENCE: Duration = Duration::from_millis(20);

/// Gives back the leases of a client that sends no further request, and drops the arenas of a session that is over.
/// Sleeps while there is nothing to do; ends with the sender of `retired`, once everything is dropped.
pub(super) fn run(link: &Weak<Link>, rings: &Receiver<()>, retired: &Receiver<Retired>) {
    loop {
        crossbeam_channel::select! {
            recv(rings) -> ring => if ring.is_err() { return },
            recv(retired) -> arenas => match arenas {
                Ok(arenas) => {
                    drop(arenas);
                    continue;
                }
                Err(_) => return,
            },
        }
        match retired.recv_timeout(PATIENCE) {
            Err(RecvTimeoutError::Timeout) => {}
            Ok(arenas) => {
                drop(arenas);
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let Some(link) = Weak::upgrade(link) else { return };
        Arc::as_ref(&link).release_now();
    }
}
