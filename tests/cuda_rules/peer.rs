//! Processes that call the driver for a test. They are this same program, told by its environment to serve.

use std::cell::RefCell;
use std::env;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cudarc::driver::sys;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::cuda::SubstituteCuda;
use crate::driver::Calls;
use crate::wire::{Answer, Ask, receive, send};

const ROLE: &str = "LUNA_BROKER_CUDA_PEER";
/// Longer than any call takes that is not stuck.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn is_peer() -> bool {
    env::var_os(ROLE).is_some()
}

pub(crate) fn has_driver() -> bool {
    // SAFETY: opening the library runs only its loader code, and nothing of the driver is called yet.
    unsafe { sys::is_culib_present() }
}

/// Answers on standard input, a socket, until the test closes it.
pub(crate) fn serve() {
    assert!(has_driver(), "no CUDA driver is on the search path");
    let input = std::io::stdin();
    let mut calls = Calls::default();
    while let Some((ask, file)) = receive::<Ask>(input.as_fd()).expect("the socket to the test works") {
        let (answer, file) = calls.answer(ask, file);
        send(input.as_fd(), &answer, file.as_ref()).expect("the socket to the test works");
    }
}

/// Which driver the processes of one test see.
pub(crate) struct Stage {
    substitute: Option<SubstituteCuda>,
}

impl Stage {
    pub(crate) fn real() -> Self {
        Self { substitute: None }
    }

    pub(crate) fn substitute() -> Self {
        Self { substitute: Some(SubstituteCuda::new()) }
    }

    /// A process with the driver initialised and the first device's context current.
    pub(crate) fn peer(&self) -> Peer {
        self.peer_with(&[])
    }

    pub(crate) fn peer_with(&self, settings: &[(&str, &str)]) -> Peer {
        let peer = self.bare_peer(settings);
        peer.ok(Ask::Init);
        peer.ok(Ask::Context);
        peer
    }

    /// A process that has not called the driver yet.
    pub(crate) fn bare_peer(&self, settings: &[(&str, &str)]) -> Peer {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets can be made");
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE)).expect("a socket takes a time limit");
        let test = env::current_exe().expect("a test knows its own path");
        let found = self.substitute.as_ref().map_or_else(Vec::new, SubstituteCuda::environment);
        let settings = settings.iter().map(|(name, value)| (*name, OsString::from(value)));
        let child = Command::new(test)
            .args(["--exact", "serve_as_a_peer", "--nocapture"])
            .env(ROLE, "1")
            .envs(found.into_iter().chain(settings))
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .expect("this program can be started again");
        Peer { child: RefCell::new(child), socket: Some(socket) }
    }

    pub(crate) fn driver(&self) -> &SubstituteCuda {
        self.substitute.as_ref().expect("only tests of the substitute ask")
    }
}

/// Dropped, it is killed, which is what a test that failed half-way wants.
pub(crate) struct Peer {
    child: RefCell<Child>,
    socket: Option<OwnedFd>,
}

impl Peer {
    pub(crate) fn ask(&self, ask: Ask) -> Answer {
        self.exchange(ask, None).0
    }

    pub(crate) fn exchange(&self, ask: Ask, file: Option<&OwnedFd>) -> (Answer, Option<OwnedFd>) {
        let asked = format!("{ask:?}");
        let socket = self.socket.as_ref().expect("a peer that has ended is gone").as_fd();
        send(socket, &ask, file).unwrap_or_else(|error| panic!("the peer cannot be asked {asked}: {error}"));
        let answer = receive(socket).unwrap_or_else(|error| panic!("the peer does not answer {asked}: {error}"));
        answer.unwrap_or_else(|| panic!("the peer died of {asked}"))
    }

    /// What only prepares a rule and must succeed.
    pub(crate) fn ok(&self, ask: Ask) -> Answer {
        self.ok_with(ask, None).0
    }

    pub(crate) fn ok_with(&self, ask: Ask, file: Option<&OwnedFd>) -> (Answer, Option<OwnedFd>) {
        let asked = format!("{ask:?}");
        let (answer, file) = self.exchange(ask, file);
        assert_eq!(answer.code, 0, "{asked} is answered with {}", answer.name);
        (answer, file)
    }

    /// The first number of an answer that must be a success: a pointer or a handle.
    pub(crate) fn get(&self, ask: Ask) -> u64 {
        self.ok(ask).numbers[0]
    }

    pub(crate) fn bytes(&self, ask: Ask) -> Vec<u8> {
        self.ok(ask).bytes
    }

    pub(crate) fn kill(self) {
        drop(self);
    }

    /// Lets it return from `main` and gives its process number.
    pub(crate) fn end(mut self) -> u32 {
        self.socket = None;
        let child = self.child.get_mut();
        let status = child.wait().expect("a child can be waited for");
        assert!(status.success(), "the peer ended with {status}");
        child.id()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let child = self.child.get_mut();
        // Both fail only for a process that has ended already.
        let _ = child.kill();
        let _ = child.wait();
    }
}
