use super::responder::SessionLink;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Phase, ServerMessage};
use crate::transport::Peer;

/// Tells a peer that is still there why there is no session; one that is gone is not told.
pub(super) fn refuse_or_ignore(link: &SessionLink, error: Error) {
    let gone = matches!(error.kind(), ErrorKind::ConnectionLost | ErrorKind::Io);
    if !gone && link.machine.lock().phase() == Phase::Closed {
        let fault = error.into_fault();
        link.outbox.post(None, |_| ServerMessage::Refused(fault));
    }
}

/// Workers of one user trust each other with their tensors; nobody else gets in.
///
/// # Errors
/// [`ErrorKind::Refused`] for a process of another user.
pub(super) fn admit(peer: Peer) -> Result<()> {
    #[cfg(unix)]
    {
        let owner = rustix::process::geteuid().as_raw();
        if peer.uid != Some(owner) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("this broker belongs to user {owner} and serves no process of user {:?}", peer.uid),
                "start a broker of your own",
            ));
        }
    }
    #[cfg(not(unix))]
    let _ = peer;
    Ok(())
}
