use std::sync::{Arc, Weak};
use std::time::Duration;

use crossbeam_channel::Receiver;

use super::link::Link;

/// Long enough for a busy client's next request to take the releases along; short enough that an idle client's
/// memory is back before anybody looks.
const PATIENCE: Duration = Duration::from_millis(20);

/// Gives back the leases of a client that sends no further request. Sleeps while there is nothing to give back.
pub(super) fn run(link: &Weak<Link>, rings: &Receiver<()>, end: &Receiver<()>) {
    loop {
        crossbeam_channel::select! {
            recv(rings) -> ring => if ring.is_err() { return },
            recv(end) -> _ => return,
        }
        match end.recv_timeout(PATIENCE) {
            Err(crossbeam_channel::RecvTimeoutError::Timeout) => {}
            Ok(()) | Err(crossbeam_channel::RecvTimeoutError::Disconnected) => return,
        }
        let Some(link) = Weak::upgrade(link) else { return };
        Arc::as_ref(&link).release_now();
    }
}
