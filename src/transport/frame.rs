use std::io::{self, IoSlice};
use std::time::Duration;

use super::{Attachment, Connection, TransportError, Wait};

/// Length of the message (4 bytes) and of the payload behind it (8 bytes), little-endian.
pub const HEADER_BYTES: usize = 12;

/// Holds any ordinary message, so that a frame is one read; also the most payload that is copied twice.
const READ_BYTES: usize = 64 << 10;

/// How long a peer may pause in the middle of a payload where nothing else is asked for.
const PAYLOAD_PATIENCE: Duration = Duration::from_secs(30);

/// More handles than any frame carries: a peer that sends more is not ours.
const MAX_ATTACHMENTS: usize = 16;

/// What precedes a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameHeader {
    /// Bytes of the message.
    pub message: usize,
    /// Bytes behind the message.
    pub payload: u64,
}

impl FrameHeader {
    fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, payload @ ..] = bytes;
        Self { message: u32::from_le_bytes([a, b, c, d]) as usize, payload: u64::from_le_bytes(payload) }
    }
}

/// Empties `frame` and leaves room for the header; the message is appended to it.
pub fn begin_frame(frame: &mut Vec<u8>) {
    frame.clear();
    frame.extend([0; HEADER_BYTES]);
}

/// Writes the header of a frame whose message is complete and that is followed by `payload` bytes.
pub fn finish_frame(frame: &mut [u8], payload: u64) {
    let message = (frame.len().saturating_sub(HEADER_BYTES)) as u32;
    if let Some(header) = frame.first_chunk_mut::<HEADER_BYTES>() {
        header[..4].copy_from_slice(&message.to_le_bytes());
        header[4..].copy_from_slice(&payload.to_le_bytes());
    }
}

/// One frame on its way out; remembers how far it got.
#[derive(Debug, Default)]
pub struct FrameWriter {
    written: usize,
}

impl FrameWriter {
    /// Writes what is left of `frame` and `payload`; `true` when everything is out, `false` where there is no room
    /// now ([`Wait::Never`]).
    ///
    /// # Errors
    /// [`TransportError`]; the stream is unusable then, as part of a frame may be out.
    pub fn write(
        &mut self,
        connection: &dyn Connection,
        frame: &[u8],
        payload: &[u8],
        attachments: &mut Vec<Attachment>,
        wait: Wait,
    ) -> Result<bool, TransportError> {
        let total = frame.len() + payload.len();
        while self.written < total {
            let head = frame.get(self.written..).unwrap_or_default();
            let tail = &payload[self.written.saturating_sub(frame.len())..];
            let parts = [IoSlice::new(head), IoSlice::new(tail)];
            let parts = match (head.is_empty(), tail.is_empty()) {
                (true, _) => &parts[1..],
                (_, true) => &parts[..1],
                _ => &parts[..],
            };
            match connection.write(parts, attachments, wait) {
                Ok(0) => return Err(TransportError::Closed),
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && wait == Wait::Never => return Ok(false),
                Err(error) => return Err(TransportError::from_stream("write", error)),
            }
        }
        Ok(true)
    }
}

/// Takes frames off a connection.
#[derive(Debug)]
pub struct FrameReader {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    max_message: usize,
    max_payload: u64,
    /// Bytes of the current frame's message, still among the bytes read.
    message: usize,
    /// Bytes of the current frame's payload not yet taken.
    payload: u64,
    payload_patience: Duration,
    attachments: Vec<Attachment>,
}

impl FrameReader {
    /// A reader that refuses messages and payloads beyond the limits, in bytes.
    #[must_use]
    pub fn new(max_message: usize, max_payload: u64) -> Self {
        Self {
            bytes: vec![0; READ_BYTES],
            start: 0,
            end: 0,
            max_message,
            max_payload,
            message: 0,
            payload: 0,
            payload_patience: PAYLOAD_PATIENCE,
            attachments: Vec::new(),
        }
    }

    /// Gives a peer up that pauses for longer than `patience` in the middle of a payload. Default 30 s.
    #[must_use]
    pub fn payload_patience(mut self, patience: Duration) -> Self {
        self.payload_patience = patience;
        self
    }

    /// Waits for the next frame; its message is [`FrameReader::message`]. What is left of the current one is dropped.
    ///
    /// # Errors
    /// [`TransportError::TimedOut`] where nothing came within `timeout` (the reader can be asked again),
    /// [`TransportError::Closed`], [`TransportError::FrameTooLong`], [`TransportError::Os`].
    pub fn next(
        &mut self,
        connection: &dyn Connection,
        timeout: Option<Duration>,
    ) -> Result<FrameHeader, TransportError> {
        self.skip_payload(connection)?;
        self.start += std::mem::take(&mut self.message);
        self.fill(connection, HEADER_BYTES, timeout)?;
        let header: [u8; HEADER_BYTES] = std::array::from_fn(|at| self.bytes[self.start + at]);
        let header = FrameHeader::decode(header);
        let too_long = |length, limit| TransportError::FrameTooLong { length, limit };
        if header.message > self.max_message {
            return Err(too_long(header.message as u64, self.max_message as u64));
        }
        if header.payload > self.max_payload {
            return Err(too_long(header.payload, self.max_payload));
        }
        self.fill(connection, HEADER_BYTES + header.message, timeout)?;
        self.start += HEADER_BYTES;
        self.message = header.message;
        self.payload = header.payload;
        Ok(header)
    }

    /// The current frame's message.
    #[must_use]
    pub fn message(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.message]
    }

    /// Bytes of the current frame's payload that were not taken.
    #[must_use]
    pub fn payload_length(&self) -> usize {
        usize::try_from(self.payload).unwrap_or(usize::MAX)
    }

    /// Reads the next `target.len()` bytes of the current frame's payload.
    ///
    /// # Errors
    /// [`TransportError::FrameTooLong`] where the payload is shorter; nothing is read then. As [`FrameReader::next`]
    /// where the bytes do not come; what is left of the payload is still no frame.
    pub fn read_payload(&mut self, connection: &dyn Connection, target: &mut [u8]) -> Result<(), TransportError> {
        if target.len() as u64 > self.payload {
            return Err(TransportError::FrameTooLong { length: target.len() as u64, limit: self.payload });
        }
        let from = self.start + self.message;
        let ready = (self.end - from).min(target.len());
        target[..ready].copy_from_slice(&self.bytes[from..from + ready]);
        // The bytes taken lie behind the message, which stays readable: close the gap.
        self.bytes.copy_within(from + ready..self.end, from);
        self.end -= ready;
        // Counted as they come: what has not been taken when a read fails is skipped, not taken for the next frame.
        self.payload -= ready as u64;
        let mut at = ready;
        while at < target.len() {
            let count = self.read_some(connection, &mut target[at..])?;
            self.payload -= count as u64;
            at += count;
        }
        Ok(())
    }

    /// Takes the next `count` attachments, in order of arrival; fewer where fewer came.
    pub fn take_attachments(&mut self, count: usize) -> Vec<Attachment> {
        let count = count.min(self.attachments.len());
        self.attachments.drain(..count).collect()
    }

    fn skip_payload(&mut self, connection: &dyn Connection) -> Result<(), TransportError> {
        let mut sink = [0; 4096];
        while self.payload > 0 {
            let count = self.payload.min(sink.len() as u64) as usize;
            self.read_payload(connection, &mut sink[..count])?;
        }
        Ok(())
    }

    /// Reads until `wanted` bytes from `start` are there.
    fn fill(
        &mut self,
        connection: &dyn Connection,
        wanted: usize,
        timeout: Option<Duration>,
    ) -> Result<(), TransportError> {
        if self.end - self.start >= wanted {
            return Ok(());
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start + wanted > self.bytes.len() {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            // Bounded by `max_message`, which `next` checked.
            self.bytes.resize(self.bytes.len().max(wanted), 0);
        }
        while self.end - self.start < wanted {
            let count = match connection.read(&mut self.bytes[self.end..], Some(&mut self.attachments), timeout) {
                Ok(0) => return Err(TransportError::Closed),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(TransportError::from_stream("read", error)),
            };
            self.end += count;
            self.attachments.truncate(MAX_ATTACHMENTS);
        }
        Ok(())
    }

    fn read_some(&mut self, connection: &dyn Connection, target: &mut [u8]) -> Result<usize, TransportError> {
        loop {
            match connection.read(target, Some(&mut self.attachments), Some(self.payload_patience)) {
                Ok(0) => return Err(TransportError::Closed),
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(TransportError::from_stream("read", error)),
            }
        }
    }
}
