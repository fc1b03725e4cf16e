//! A peer that speaks bytes: everything a client may send, and everything it must not.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use luna_broker::Fault;
use luna_broker::device::{Device, HostDevice, Region, RegionHandle, Span};
use luna_broker::id::{Epoch, LeaseRef, RequestId};
use luna_broker::protocol::{
    ArenaHandle, ArenaOffer, ClientMessage, Descriptor, Features, Hello, NONCE_BYTES, Operation, Outcome,
    PROTOCOL_VERSION, ProbeAnswer, ProbeOutcome, Release, Reply, Request, ServerMessage, SlotPlace, TensorSource,
    VaeRequest, Welcome, codec,
};
use luna_broker::service::{Tiling, VaeCall, VaeOperation};
use luna_broker::tensor::TensorMeta;
use luna_broker::transport::{
    Attachment, Connection, FrameReader, LocalConnection, TransportError, Wait, begin_frame, finish_frame,
};

/// Longer than the broker ever needs for an answer.
const PATIENCE: Duration = Duration::from_secs(20);

/// A connection without a client around it.
pub struct Raw {
    connection: LocalConnection,
    reader: FrameReader,
    next: u64,
}

/// A decode without tiles.
pub const DECODE: VaeCall = VaeCall { operation: VaeOperation::Decode, tiling: Tiling::Auto };

/// A first message that any broker accepts.
pub fn hello(features: Features) -> Hello {
    let (name, gpus) = ("raw".to_owned(), Vec::new());
    Hello { version: PROTOCOL_VERSION, features, name, pid: std::process::id(), gpus, forced: None }
}

/// `message` as a frame that announces `payload` bytes behind it.
pub fn frame(message: &ClientMessage, payload: u64) -> Vec<u8> {
    let mut frame = Vec::new();
    begin_frame(&mut frame);
    codec::encode(message, &mut frame).expect("a message within the limit");
    finish_frame(&mut frame, payload);
    frame
}

/// A request for `operation` that waits as long as it takes.
pub fn request(id: u64, operation: Operation) -> ClientMessage {
    ClientMessage::Request(Request { id: RequestId(id), timeout_ms: None, releases: Vec::new(), operation })
}

/// A decode of the tensor in `input`.
pub fn decode(model: &str, input: TensorSource) -> Operation {
    Operation::Vae(VaeRequest { model: model.to_owned(), call: DECODE, input, result: SlotPlace::Host })
}

impl Raw {
    pub fn connect(socket: &str) -> Self {
        let connection = LocalConnection::connect(socket).expect("the broker listens");
        Self { connection, reader: FrameReader::new(codec::MAX_MESSAGE_BYTES, 1 << 32), next: 1000 }
    }

    /// Connected and negotiated, with bytes behind frames and no shared memory.
    pub fn inline(socket: &str) -> Self {
        let mut raw = Self::connect(socket);
        raw.send(&ClientMessage::Hello(hello(Features(0))));
        assert!(matches!(raw.receive(), Ok(ServerMessage::Welcome(Welcome { probe: None, .. }))));
        assert!(matches!(raw.receive(), Ok(ServerMessage::Accepted(_))));
        raw
    }

    /// Connected and welcomed: an arena is offered and its probe not yet answered.
    pub fn welcomed(socket: &str) -> (Self, Welcome, OwnedFd) {
        let mut raw = Self::connect(socket);
        raw.send(&ClientMessage::Hello(hello(Features::HANDLES)));
        let Ok(ServerMessage::Welcome(welcome)) = raw.receive() else {
            panic!("the broker did not welcome the client")
        };
        let Some(Attachment::Fd(fd)) = raw.reader.take_attachments(1).pop() else { panic!("no descriptor came") };
        (raw, welcome, fd)
    }

    /// Connected and negotiated, with sealed memory.
    pub fn shared(socket: &str) -> (Self, Shared) {
        let (mut raw, welcome, fd) = Self::welcomed(socket);
        let probe = welcome.probe.expect("an arena is offered");
        let shared = Shared { epoch: welcome.epoch, region: map(&probe.arena, fd) };
        let (mut read, wrote) = ([0; NONCE_BYTES], [7; NONCE_BYTES]);
        shared.span(probe.read_at).read(&mut read).unwrap();
        shared.span(probe.write_at).write(&wrote).unwrap();
        let outcome = ProbeOutcome::Mapped { read, wrote };
        raw.send(&ClientMessage::Probed(ProbeAnswer { outcome }));
        assert!(matches!(raw.receive(), Ok(ServerMessage::Accepted(_))));
        (raw, shared)
    }

    pub fn bytes(&self, bytes: &[u8]) {
        self.try_bytes(bytes, Wait::Block).expect("the broker takes the bytes");
    }

    /// Sends all of `bytes`, or as much as there is room for; how many.
    pub fn try_bytes(&self, bytes: &[u8], wait: Wait) -> Result<usize, std::io::Error> {
        let mut sent = 0;
        while sent < bytes.len() {
            sent += self.connection.write(&[IoSlice::new(&bytes[sent..])], &mut Vec::new(), wait)?;
        }
        Ok(sent)
    }

    /// Sends `bytes` with handles beside them.
    pub fn bytes_with(&self, bytes: &[u8], fds: Vec<OwnedFd>) -> std::io::Result<()> {
        let mut attachments = fds.into_iter().map(Attachment::Fd).collect();
        let sent = self.connection.write(&[IoSlice::new(bytes)], &mut attachments, Wait::Block)?;
        assert_eq!(sent, bytes.len(), "a short message leaves in one piece");
        Ok(())
    }

    pub fn send(&self, message: &ClientMessage) {
        self.bytes(&frame(message, 0));
    }

    pub fn receive(&mut self) -> Result<ServerMessage, TransportError> {
        self.reader.next(&self.connection, Some(PATIENCE))?;
        Ok(codec::decode(self.reader.message()).expect("the broker speaks the protocol"))
    }

    /// The next reply, whatever it answers.
    pub fn reply(&mut self) -> Reply {
        match self.receive() {
            Ok(ServerMessage::Reply(reply)) => reply,
            other => panic!("a reply was due, not {other:?}"),
        }
    }

    /// Sends a request with `payload` behind it and returns what comes of it.
    pub fn ask(&mut self, operation: Operation, payload: &[u8]) -> Outcome {
        self.next += 1;
        self.bytes(&frame(&request(self.next, operation), payload.len() as u64));
        self.bytes(payload);
        let reply = self.reply();
        assert_eq!(reply.id, RequestId(self.next));
        reply.outcome
    }

    /// The handle that came beside the last message.
    pub fn take_fd(&mut self) -> OwnedFd {
        let Some(Attachment::Fd(fd)) = self.reader.take_attachments(1).pop() else { panic!("no descriptor came") };
        fd
    }

    /// As [`Raw::ask`], for what must fail.
    pub fn fault(&mut self, operation: Operation, payload: &[u8]) -> Fault {
        match self.ask(operation, payload) {
            Outcome::Fault(fault) => fault,
            other => panic!("a fault was due, not {other:?}"),
        }
    }

    /// The fault with which the broker ends the session; nothing may follow it.
    pub fn refusal(&mut self) -> Fault {
        loop {
            match self.receive() {
                Ok(ServerMessage::Refused(fault)) => {
                    assert!(matches!(self.receive(), Err(TransportError::Closed)), "the connection is closed");
                    return fault;
                }
                // Answers to what was asked before.
                Ok(ServerMessage::Reply(_) | ServerMessage::Welcome(_) | ServerMessage::Accepted(_)) => {}
                other => panic!("a refusal was due, not {other:?}"),
            }
        }
    }

    /// A slot for an input.
    pub fn allocate(&mut self, size_bytes: u64) -> Descriptor {
        match self.ask(Operation::Allocate { place: SlotPlace::Host, size_bytes, kept: false }, &[]) {
            Outcome::Allocated { descriptor } => descriptor,
            other => panic!("a slot was due, not {other:?}"),
        }
    }

    /// Gives a lease back and waits until the broker has seen it.
    pub fn release(&mut self, lease: LeaseRef) {
        self.send(&ClientMessage::Release(vec![Release { lease, sequence: 0 }]));
        assert_eq!(self.ask(Operation::Ping, &[]), Outcome::Done);
    }

    /// Ends the connection without a goodbye.
    pub fn close(&self) {
        self.connection.close();
    }
}

/// The session's first arena, mapped.
pub struct Shared {
    pub epoch: Epoch,
    pub region: Arc<dyn Region>,
}

impl Shared {
    fn span(&self, offset: u64) -> Span {
        Span::new(Arc::clone(&self.region), offset as usize, NONCE_BYTES).expect("inside the arena")
    }

    /// Writes `bytes` where `descriptor` points and returns it with the description `meta`.
    pub fn fill(&self, descriptor: Descriptor, meta: TensorMeta, bytes: &[u8]) -> Descriptor {
        let span = Span::new(Arc::clone(&self.region), descriptor.offset as usize, bytes.len()).expect("inside");
        span.write(bytes).unwrap();
        Descriptor { meta, ..descriptor }
    }
}

fn map(offer: &ArenaOffer, fd: OwnedFd) -> Arc<dyn Region> {
    assert_eq!(offer.handle, ArenaHandle::Attached);
    HostDevice::default().import(RegionHandle::Fd(fd), offer.size_bytes as usize).expect("the arena can be mapped")
}
