use std::time::Instant;

use super::super::gpu::BrokerGpu;
use super::super::jobs::VaeWork;
use super::super::responder::Responder;
use super::Session;
use crate::error::{Error, ErrorKind, Result};
use crate::id::GpuUuid;
use crate::protocol::{GpuTarget, MAX_TABLE_BYTES, PublishRequest, Rung, decode_table};
use crate::service::Service;
use crate::transport::{Connection, TransportError};

impl Session {
    /// Where weights go for this client: absent for host memory.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where no memory can be handed to it.
    pub(super) fn weights_place(&self, target: Option<GpuTarget>) -> Result<Option<GpuUuid>> {
        let open = self.link.open.get();
        let rung = open.map_or(Rung::Inline, |open| open.rung.rung);
        if let Some(target) = target {
            self.memories()?.shared_gpu(target)?;
            return Ok(self.state.gpu.as_ref().map(BrokerGpu::uuid));
        }
        let hands_over = self.connection.abilities().descriptors || self.connection.abilities().same_process;
        if rung == Rung::Inline || !hands_over || !cfg!(target_os = "linux") {
            let message = format!("this session is on the rung {rung}, where no memory can be mapped by both sides");
            return Err(Error::new(
                ErrorKind::Unsupported,
                message,
                "run the worker on the broker's machine, on Linux",
            ));
        }
        Ok(None)
    }

    /// # Errors
    /// What ends the session: the table behind the request did not come.
    pub(super) fn publish(&mut self, responder: Responder, request: PublishRequest) -> Result<()> {
        let mut table = vec![0; self.reader.payload_length().min(MAX_TABLE_BYTES)];
        if let Err(error) = self.reader.read_payload(&self.connection, &mut table) {
            return match error {
                error @ TransportError::FrameTooLong { .. } => {
                    responder.fail(error);
                    Ok(())
                }
                error => Err(error.into()),
            };
        }
        let entries = self.weights_place(None).and_then(|_| Ok(decode_table(&table)?));
        match entries {
            Ok(entries) => {
                let is_file = self.state.registry.locate(&request.name).is_ok_and(|path| path.is_file());
                self.state.weights.publish(responder, request, entries, is_file);
            }
            Err(error) => responder.fail(error),
        }
        Ok(())
    }

    pub(super) fn permit(&self, responder: Responder, deadline: Option<Instant>, bytes: u64) {
        if let Err(error) = self.state.registry.placement(Service::Vae) {
            return responder.fail(error);
        }
        let budget = self.state.config.vae_budget_bytes;
        if bytes > budget {
            let message = format!("{bytes} bytes of working memory were asked for; one call may use {budget}");
            return responder.fail(Error::new(ErrorKind::OutOfMemory, message, "work in tiles, or raise --vae-budget"));
        }
        if let Err(error) = self.state.weights.check(self.link.id()) {
            return responder.fail(error);
        }
        let (session, request) = (responder.session(), responder.request());
        let job = self.state.permits.ask(responder, self.state.config.permit_patience);
        self.submit(session, request, deadline, VaeWork::Permit(job));
    }
}
