//! Tests in which two processes play: a broker's part and a client's, or one process that needs settings of its own.
//!
//! The test starts itself again, once for each role, and the copies find their role in the environment. They are
//! connected by a socket that each finds at its standard input.
//!
//! With `LUNA_BROKER_REAL_CUDA=1` the processes find the machine's own driver. A play that needs what only the
//! substitute can do is then skipped, and says so; leaks are not counted.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use luna_broker::device::RegionHandle;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use rustix::process::Signal;

use crate::cuda::{SubstituteCuda, is_real, live};

/// Names the role to a test that was started again.
const VARIABLE: &str = "LUNA_BROKER_TEST_ROLE";

/// Slows the substitute's streams down, so that mistakes in ordering show. A play without it is a play all the same.
const DELAY: &str = "SUBSTITUTE_CUDA_DELAY_MS";
/// On a real driver the process is given a namespace of its own, where the system lets us.
const PID_NAMESPACE: &str = "SUBSTITUTE_CUDA_PID_NAMESPACE";
/// Of the system's tools; its arguments come before those of the program it starts.
const IN_PID_NAMESPACE: [&str; 4] = ["unshare", "--pid", "--fork", "--kill-child"];

/// Who a setting is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Broker,
    Client,
}

/// Where a test plays: its processes find the substitute driver, with the settings made here.
#[derive(Debug, Default)]
pub struct Stage {
    settings: Vec<(Option<Role>, &'static str, String)>,
    /// Whether the driver does not get as far as counting, or does not take back any more, what it holds.
    is_unaccounted: bool,
    /// Whose process is killed in the play.
    killed: Vec<Role>,
    needs_substitute: Option<&'static str>,
}

impl Stage {
    pub fn new() -> Self {
        Self::default()
    }

    /// A variable for every process.
    pub fn set(mut self, name: &'static str, value: impl ToString) -> Self {
        self.settings.push((None, name, value.to_string()));
        self
    }

    /// A variable for one of the two processes.
    pub fn set_for(mut self, role: Role, name: &'static str, value: impl ToString) -> Self {
        self.settings.push((Some(role), name, value.to_string()));
        self
    }

    /// The driver will not start, or will break: what is left tells nothing.
    pub fn unaccounted(mut self) -> Self {
        self.is_unaccounted = true;
        self
    }

    /// The process of this role is killed in the play.
    pub fn killed(mut self, role: Role) -> Self {
        self.killed.push(role);
        self
    }

    /// The play cannot be given on a real driver, for this reason. Settings of the substitute's say so by themselves.
    pub fn only_on_the_substitute(mut self, why: &'static str) -> Self {
        self.needs_substitute = Some(why);
        self
    }

    /// Plays one part, the broker's. Nothing of the driver's may be left when it ends.
    pub fn alone(self, play: impl FnOnce()) {
        match role() {
            Some(_) => {
                play();
                self.clear();
            }
            None => self.run([(Role::Broker, None)]),
        }
    }

    /// Plays two parts, each in a process of its own. Nothing of the driver's may be left when they end.
    pub fn two(self, broker: impl FnOnce(Peer), client: impl FnOnce(Peer)) {
        match role() {
            Some(Role::Broker) => {
                broker(Peer::of_this_process());
                self.clear();
            }
            Some(Role::Client) => {
                client(Peer::of_this_process());
                self.clear();
            }
            None => {
                let (left, right) = UnixStream::pair().unwrap();
                self.run([(Role::Broker, Some(left)), (Role::Client, Some(right))]);
            }
        }
    }

    /// Threads that give memory back when nobody waits for it any more have their time; what is left then is told by the
    /// driver's account.
    fn clear(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !is_real() && !self.is_unaccounted && live() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn run<const N: usize>(self, parts: [(Role, Option<UnixStream>); N]) {
        if let Some(need) = self.missing() {
            eprintln!("skipped on a real driver: {need}");
            return;
        }
        let cuda = (!is_real()).then(SubstituteCuda::new);
        let processes = parts.map(|(role, socket)| (role, self.start(cuda.as_ref(), role, socket)));
        let ends = processes.map(|(role, mut child)| (role, child.id(), child.wait().unwrap()));
        for (role, _, end) in ends {
            assert!(end.success() || self.was_to_be_killed(role, end), "the {role:?} failed, see above: {end}");
        }
        let accounted = |role| !self.is_unaccounted && !self.killed.contains(&role);
        for (role, process, _) in ends.into_iter().filter(|(role, ..)| accounted(*role)) {
            let Some(cuda) = &cuda else { continue };
            let left: Vec<_> = cuda.leaks(process).into_iter().filter(|(_, count)| *count > 0).collect();
            assert!(left.is_empty(), "the {role:?} left {left:?}");
        }
    }

    fn was_to_be_killed(&self, role: Role, end: ExitStatus) -> bool {
        self.killed.contains(&role) && end.signal() == Some(Signal::KILL.as_raw())
    }

    /// What this play needs and cannot have.
    fn missing(&self) -> Option<String> {
        if !is_real() {
            return None;
        }
        if let Some(why) = self.needs_substitute {
            return Some(why.to_owned());
        }
        if self.settings.iter().any(|(_, name, _)| *name == PID_NAMESPACE) && !can_make_namespaces() {
            return Some("the system does not let this user make a PID namespace".to_owned());
        }
        let names =
            self.settings.iter().map(|(_, name, _)| *name).filter(|name| ![DELAY, PID_NAMESPACE].contains(name));
        let mut faults = names.filter(|name| name.starts_with("SUBSTITUTE_CUDA_") || *name == "LD_LIBRARY_PATH");
        faults.next().map(|name| format!("{name} is set, which only the substitute can play"))
    }

    fn start(&self, cuda: Option<&SubstituteCuda>, role: Role, socket: Option<UnixStream>) -> Child {
        let settings: Vec<_> = self.settings.iter().filter(|(of, ..)| of.is_none_or(|of| of == role)).collect();
        let is_apart = cuda.is_none() && settings.iter().any(|(_, name, _)| *name == PID_NAMESPACE);
        let mut command = again(role, if is_apart { &IN_PID_NAMESPACE } else { &[] });
        if let Some(cuda) = cuda {
            command.envs(cuda.environment()).env("SUBSTITUTE_CUDA_DIRTY", "1");
        }
        command.envs(settings.iter().map(|(_, name, value)| (name, value)));
        command.stdin(socket.map_or_else(Stdio::null, |socket| OwnedFd::from(socket).into()));
        command.spawn().unwrap()
    }
}

fn can_make_namespaces() -> bool {
    let [program, arguments @ ..] = IN_PID_NAMESPACE;
    let mut command = Command::new(program);
    command.args(arguments).arg("true").stderr(Stdio::null());
    command.status().is_ok_and(|end| end.success())
}

fn role() -> Option<Role> {
    match std::env::var(VARIABLE).ok()?.as_str() {
        "Broker" => Some(Role::Broker),
        _ => Some(Role::Client),
    }
}

/// The command that starts the calling test once more, through another program where one is given.
fn again(role: Role, through: &[&str]) -> Command {
    let thread = std::thread::current();
    let test = thread.name().expect("the harness names a test's thread after the test");
    let this = std::env::current_exe().unwrap();
    let mut command = match through {
        [] => Command::new(this),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments).arg(this);
            command
        }
    };
    command.args([test, "--exact", "--nocapture"]).env(VARIABLE, format!("{role:?}")).stdout(Stdio::null());
    command
}

/// The process that plays the other role.
#[derive(Debug)]
pub struct Peer(UnixStream);

impl Peer {
    fn of_this_process() -> Self {
        let stream = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
        Self(stream)
    }

    pub fn say(&self, bytes: &[u8]) {
        (&self.0).write_all(&(bytes.len() as u64).to_le_bytes()).expect("the other process listens");
        (&self.0).write_all(bytes).expect("the other process listens");
    }

    /// What the other process says; `None` when it is gone.
    pub fn listen(&self) -> Option<Vec<u8>> {
        let mut length = [0; 8];
        (&self.0).read_exact(&mut length).ok()?;
        let mut bytes = vec![0; u64::from_le_bytes(length) as usize];
        (&self.0).read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    pub fn hear(&self) -> Vec<u8> {
        self.listen().expect("the other process failed")
    }

    pub fn say_number(&self, number: u64) {
        self.say(&number.to_le_bytes());
    }

    pub fn hear_number(&self) -> u64 {
        u64::from_le_bytes(self.hear().try_into().expect("a number"))
    }

    /// Both processes are here.
    pub fn meet(&self) {
        self.say(b"here");
        assert_eq!(self.hear(), b"here");
    }

    pub fn hand_over(&self, handle: RegionHandle) {
        match handle {
            RegionHandle::CudaIpc(handle) => self.say(&handle),
            RegionHandle::Fd(fd) => self.hand_over_fd(b"memory", &fd),
            RegionHandle::CudaVmm(fd) => self.hand_over_fd(b"cuda", &fd),
            other => panic!("{other:?} does not cross processes"),
        }
    }

    fn hand_over_fd(&self, kind: &[u8], fd: &OwnedFd) {
        self.say(kind);
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&fds)));
        rustix::net::sendmsg(&self.0, &[IoSlice::new(b"!")], &mut rights, SendFlags::empty()).unwrap();
    }

    pub fn receive(&self) -> RegionHandle {
        match self.hear().as_slice() {
            b"memory" => RegionHandle::Fd(self.receive_fd()),
            b"cuda" => RegionHandle::CudaVmm(self.receive_fd()),
            handle => RegionHandle::CudaIpc(handle.try_into().expect("a handle")),
        }
    }

    fn receive_fd(&self) -> OwnedFd {
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut data = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(&self.0, &mut data, &mut rights, RecvFlags::CMSG_CLOEXEC).unwrap();
        let mut fds = rights.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        fds.next().and_then(|mut fds| fds.next()).expect("a descriptor")
    }
}
