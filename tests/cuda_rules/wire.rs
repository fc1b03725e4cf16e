//! What a test asks of a peer process: one driver call each, nearly always with its arguments as they are.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize, Debug)]
pub(crate) enum Ask {
    Init,
    Count,
    Uuid {
        ordinal: i32,
    },
    /// Retains the primary context of the first device and makes it current.
    Context,
    NoContext,
    ReleaseContext,
    Alloc {
        bytes: usize,
    },
    AllocOrdered {
        bytes: usize,
    },
    AllocHost {
        bytes: usize,
    },
    Free {
        pointer: u64,
    },
    FreeHost {
        pointer: u64,
    },
    Range {
        pointer: u64,
    },
    /// Host memory of the peer itself, of this size; kept until the peer ends.
    HostBuffer {
        bytes: usize,
    },
    Register {
        pointer: u64,
        bytes: usize,
    },
    Unregister {
        pointer: u64,
    },
    Export {
        pointer: u64,
    },
    Open {
        handle: Vec<u8>,
        flags: u32,
    },
    Close {
        pointer: u64,
    },
    Write {
        pointer: u64,
        bytes: Vec<u8>,
    },
    Read {
        pointer: u64,
        bytes: usize,
    },
    /// A stream that does not wait for the legacy one.
    Stream,
    DestroyStream {
        stream: u64,
    },
    Synchronize {
        stream: u64,
    },
    /// Work of the stream from here on waits for `OpenGate`.
    ShutGate {
        stream: u64,
    },
    OpenGate,
    Fill {
        pointer: u64,
        value: u8,
        bytes: usize,
        stream: u64,
    },
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
        stream: u64,
    },
    Event {
        flags: u32,
    },
    DestroyEvent {
        event: u64,
    },
    ExportEvent {
        event: u64,
    },
    OpenEvent {
        handle: Vec<u8>,
    },
    Record {
        event: u64,
        stream: u64,
    },
    Wait {
        stream: u64,
        event: u64,
    },
    Query {
        event: u64,
    },
    AwaitEvent {
        event: u64,
    },
    Create {
        bytes: usize,
        exportable: bool,
    },
    Release {
        handle: u64,
    },
    Reserve {
        bytes: usize,
    },
    FreeRange {
        pointer: u64,
        bytes: usize,
    },
    Map {
        pointer: u64,
        bytes: usize,
        handle: u64,
    },
    Unmap {
        pointer: u64,
        bytes: usize,
    },
    Access {
        pointer: u64,
        bytes: usize,
        writable: bool,
    },
    /// The answer brings a descriptor.
    ExportFile {
        handle: u64,
    },
    /// Comes with a descriptor.
    ImportFile,
}

/// What the driver said.
#[derive(Serialize, Deserialize, Default, Debug)]
pub(crate) struct Answer {
    pub(crate) code: u32,
    /// Of the code, in the driver's words.
    pub(crate) name: String,
    pub(crate) numbers: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

/// Larger than any message: the most that a rule reads or writes is 64 bytes.
const LARGEST: usize = 4096;

pub(crate) fn send(socket: BorrowedFd<'_>, message: &impl Serialize, file: Option<&OwnedFd>) -> rustix::io::Result<()> {
    let text = serde_json::to_vec(message).expect("messages are plain data");
    let files = file.map(AsFd::as_fd);
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut attached = SendAncillaryBuffer::new(&mut space);
    if let Some(file) = files.as_slice().first() {
        assert!(attached.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(file))), "there is room for one");
    }
    sendmsg(socket, &[IoSlice::new(&text)], &mut attached, SendFlags::NOSIGNAL).map(|_| ())
}

/// `None` when the other end is closed.
pub(crate) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> rustix::io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut text = [0; LARGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut attached = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut attached, RecvFlags::CMSG_CLOEXEC)?.bytes;
    if got == 0 {
        return Ok(None);
    }
    let file = attached.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    let message = serde_json::from_slice(&text[..got]).expect("both ends are this program");
    Ok(Some((message, file)))
}
