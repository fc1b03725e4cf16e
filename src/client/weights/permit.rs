use std::sync::Arc;

use super::super::connect::Client;
use super::super::input::unexpected_outcome;
use super::super::link::Link;
use super::super::options::CallOptions;
use crate::error::Result;
use crate::id::PermitId;
use crate::protocol::{Operation, Outcome};
use crate::service::Service;

/// A turn in one of the broker's lanes, for work that this process does itself. Dropping it lets the next one go.
#[derive(Debug)]
pub struct Permit {
    link: Arc<Link>,
    id: PermitId,
}

impl Client {
    /// Waits for a turn in a service's lane, first come, first served, together with the work that is sent there. `bytes`
    /// is how much working memory is going to be used.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::OutOfMemory`] for more than one call may use: work in tiles then. [`crate::error::ErrorKind::Busy`] where too many
    /// wait, [`crate::error::ErrorKind::Timeout`], [`crate::error::ErrorKind::Stale`] where attached weights were unloaded by force,
    /// [`crate::error::ErrorKind::ConnectionLost`].
    pub fn permit(&self, service: Service, bytes: u64, options: &CallOptions<'_>) -> Result<Permit> {
        self.with_shared_link(|link| {
            let answer = link.call(Operation::Permit { service, bytes }, &[], options)?;
            match answer.reply.outcome {
                Outcome::Permitted { permit } => Ok(Permit { link, id: permit }),
                _ => Err(unexpected_outcome()),
            }
        })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.link.end_permit(self.id);
    }
}
