use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::ImportedMemory;
use crate::config::ClientConfig;
use crate::device::{Region, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Epoch, SessionId};
use crate::protocol::{
    Accepted, ClientMessage, DeviceRung, Features, Hello, NONCE_BYTES, PROTOCOL_VERSION, ProbeAnswer, ProbeOffer,
    ProbeOutcome, ProtocolError, Rung, ServerMessage, Welcome, codec,
};
use crate::transport::{Connection, FrameReader, FrameWriter, Wait, begin_frame, finish_frame};

/// What negotiation settled.
#[derive(Debug, Clone)]
pub struct SessionInfo {
    /// The session's id at the broker.
    pub id: SessionId,
    /// The broker's life.
    pub epoch: Epoch,
    /// Name the client gave itself.
    pub name: String,
    /// Crate version of the broker.
    pub broker_version: String,
    /// Rung per device, and why.
    pub rungs: Vec<DeviceRung>,
}

impl SessionInfo {
    /// The rung for host tensors.
    #[must_use]
    pub fn host_rung(&self) -> Rung {
        self.rungs.iter().find(|rung| rung.device == "cpu").map_or(Rung::Inline, |rung| rung.rung)
    }
}

/// The negotiation on the client's side.
pub(super) struct Negotiation<'a> {
    pub(super) connection: &'a dyn Connection,
    pub(super) reader: &'a mut FrameReader,
    /// When to give up; absent: never.
    pub(super) deadline: Option<Instant>,
}

impl Negotiation<'_> {
    /// Negotiates a session: hello, probe, rungs.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], [`ErrorKind::Timeout`], [`ErrorKind::ConnectionLost`], [`ErrorKind::Protocol`].
    pub(super) fn run(mut self, config: &ClientConfig, memory: &ImportedMemory) -> Result<SessionInfo> {
        let sent = self.send(&ClientMessage::Hello(self.hello(config)));
        let welcome = match self.receive_after(sent)? {
            ServerMessage::Welcome(welcome) => welcome,
            other => return Err(unexpected(other)),
        };
        let Welcome { epoch, session, broker, probe, .. } = welcome;
        let mut sent = Ok(());
        if let Some(offer) = probe {
            let outcome = self.probe(&offer, memory);
            let arena = offer.arena.arena;
            let opened = self.send(&ClientMessage::Opened { arena });
            sent = opened.and_then(|()| self.send(&ClientMessage::Probed(ProbeAnswer { outcome })));
        }
        match self.receive_after(sent)? {
            ServerMessage::Accepted(Accepted { rungs }) => {
                let name = config.name.clone();
                Ok(SessionInfo { id: session, epoch, name, broker_version: broker, rungs })
            }
            other => Err(unexpected(other)),
        }
    }

    fn hello(&self, config: &ClientConfig) -> Hello {
        let abilities = self.connection.abilities();
        let mut features = Features::NAMED_SEGMENTS;
        if abilities.descriptors && cfg!(target_os = "linux") {
            features = features.union(Features::HANDLES);
        }
        if abilities.same_process {
            features = features.union(Features::SAME_PROCESS);
        }
        Hello {
            version: PROTOCOL_VERSION,
            features,
            name: config.name.clone(),
            pid: std::process::id(),
            // Named with their first tensor: asking the driver now would initialise it in processes that never use it.
            gpus: Vec::new(),
            // Rungs of GPUs are settled with the first tensor of one.
            forced: config.rung.filter(|rung| !rung.is_gpu()),
        }
    }

    /// Maps the offered arena and exchanges nonces through it, by the same path that tensors take.
    fn probe(&mut self, offer: &ProbeOffer, memory: &ImportedMemory) -> ProbeOutcome {
        let attachments = self.reader.take_attachments(1);
        let exchanged = memory
            .import(&offer.arena, attachments.into_iter().next(), None)
            .and_then(|region| exchange(offer, region));
        match exchanged {
            Ok((read, wrote)) => ProbeOutcome::Mapped { read, wrote },
            Err(error) => ProbeOutcome::Failed(error.to_string()),
        }
    }

    fn send(&mut self, message: &ClientMessage) -> Result<()> {
        let mut frame = Vec::new();
        begin_frame(&mut frame);
        codec::encode_named(message, &mut frame)?;
        finish_frame(&mut frame, 0);
        FrameWriter::default().write(self.connection, &frame, &[], &mut Vec::new(), Wait::Block)?;
        Ok(())
    }

    /// The answer to what was sent. A broker that hung up before it took all of it has said why.
    fn receive_after(&mut self, sent: Result<()>) -> Result<ServerMessage> {
        match (self.receive(), sent) {
            (Err(reason), Err(_)) if reason.kind() != ErrorKind::ConnectionLost => Err(reason),
            (_, Err(error)) => Err(error),
            (received, Ok(())) => received,
        }
    }

    fn receive(&mut self) -> Result<ServerMessage> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        self.reader.next(self.connection, left.map(|left| left.max(Duration::from_millis(1))))?;
        match codec::decode(self.reader.message())? {
            ServerMessage::Refused(fault) => Err(fault.into()),
            ServerMessage::Closing => Err(Error::new(
                ErrorKind::ShuttingDown,
                "the broker is stopping and takes no new sessions",
                "connect again once it is back",
            )),
            message => Ok(message),
        }
    }
}

fn exchange(offer: &ProbeOffer, region: Arc<dyn Region>) -> Result<([u8; NONCE_BYTES], [u8; NONCE_BYTES])> {
    let at = |offset: u64| Span::new(Arc::clone(&region), usize::try_from(offset).unwrap_or(usize::MAX), NONCE_BYTES);
    let (mut read, mut wrote) = ([0; NONCE_BYTES], [0; NONCE_BYTES]);
    at(offer.read_at)?.read(&mut read)?;
    getrandom::fill(&mut wrote).map_err(|error| Error::new(ErrorKind::Internal, error.to_string(), ""))?;
    at(offer.write_at)?.write(&wrote)?;
    Ok((read, wrote))
}

fn unexpected(message: ServerMessage) -> Error {
    ProtocolError::Unexpected { message: message.name() }.into()
}
