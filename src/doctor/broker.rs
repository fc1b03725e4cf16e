//! The way to a broker, and which namespaces it shares with this process.

use std::fs;
use std::io;

use parking_lot::Mutex;

use super::finding::Finding;
use super::system::System;
use crate::client::{Client, SessionInfo};
use crate::config::{ADDRESS_VARIABLE, ClientConfig};
use crate::error::Error;
use crate::protocol::Status;
use crate::transport::{Connection, LocalConnection, Peer, TransportError};

/// A broker that answers.
#[derive(Debug)]
pub(super) struct Reached {
    pub(super) client: Client,
    /// The process behind the socket, as this process's system tells.
    pub(super) peer: Peer,
    pub(super) session: SessionInfo,
    pub(super) status: Status,
}

/// What is where the socket should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Nothing,
    /// Something that nobody can listen on.
    File,
    Socket,
    /// Something that this user may not look at.
    Hidden,
}

/// Connects and asks for the status.
///
/// # Errors
/// Why there is no broker that answers, with what to do about it.
pub(super) fn reach(address: &str, config: ClientConfig) -> Result<Reached, Error> {
    let connection = LocalConnection::connect(address).map_err(|error| unreached(address, place(address), error))?;
    let peer = connection.peer();
    // A connection of its own for the question would be counted by the broker as one that it lost.
    let first = Mutex::new(Some(connection));
    let target = address.to_owned();
    let client = Client::over(config, move || match first.lock().take() {
        Some(connection) => Ok(connection),
        None => Ok(LocalConnection::connect(&target)?),
    })?;
    let status = client.status()?;
    Ok(Reached { session: client.session(), client, peer, status })
}

fn place(address: &str) -> Place {
    match fs::metadata(address) {
        Ok(found) if found.is_file() || found.is_dir() => Place::File,
        Ok(_) => Place::Socket,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Place::Hidden,
        Err(_) => Place::Nothing,
    }
}

/// Why nobody answers at `address`. The kind stays that of every other call to such a socket.
fn unreached(address: &str, place: Place, error: TransportError) -> Error {
    let TransportError::NoListener { cause, .. } = &error else { return error.into() };
    let (message, remedy) = match (cause.kind(), place) {
        (io::ErrorKind::PermissionDenied, _) | (_, Place::Hidden) => (
            format!("this user may not connect to {address}: it is another user's"),
            format!("start a broker of your own, or name its socket with {ADDRESS_VARIABLE}"),
        ),
        (_, Place::File) => (
            format!("{address} is not a socket"),
            format!("name the socket that the broker prints when it starts, with {ADDRESS_VARIABLE}"),
        ),
        (io::ErrorKind::ConnectionRefused, Place::Socket) => (
            format!("nobody listens on the socket {address}: its broker was killed"),
            "start a broker there with luna-broker serve, which replaces the socket".to_owned(),
        ),
        (_, Place::Nothing) => (
            format!("there is no socket at {address}"),
            format!("start a broker with luna-broker serve, or name its socket with {ADDRESS_VARIABLE}"),
        ),
        _ => return error.into(),
    };
    Error::new(error.kind(), message, remedy)
}

/// The broker that answered.
pub(super) fn answered(reached: &Reached, address: &str) -> Vec<Finding> {
    let Reached { session, status, .. } = reached;
    let others = status.sessions.iter().filter(|other| other.id != session.id).count();
    let plural = if others == 1 { "" } else { "s" };
    let on = brokers_gpu(status).unwrap_or_else(|| "the CPU".to_owned());
    let mut findings = vec![Finding::ok(
        "broker",
        format!(
            "{} at {address}, process {}, {others} other session{plural}, models on {on}",
            session.broker_version, status.pid
        ),
    )];
    let own = env!("CARGO_PKG_VERSION");
    if session.broker_version != own {
        findings.push(Finding::note(
            "version",
            format!("the broker is {}, this process has {own}", session.broker_version),
            "install the same version on both sides",
        ));
    }
    findings
}

/// The GPU that the broker's models run on; `None` for the CPU.
pub(super) fn brokers_gpu(status: &Status) -> Option<String> {
    status.lanes.iter().map(|lane| &lane.device).find(|device| *device != "cpu").cloned()
}

/// Kinds of namespaces in which the broker has another than this process. `None` where the system does not tell; on Linux
/// it tells the number of every process that this one's PID namespace shows.
pub(super) fn other_namespaces(system: &System, peer: Peer, told: u32) -> Option<Vec<&'static str>> {
    let Some(pid) = peer.pid else { return cfg!(target_os = "linux").then(|| vec!["PID"]) };
    let differs = |kind| Some(system.namespace("self", kind)? != system.namespace(&pid.to_string(), kind)?);
    // A process in a namespace below this one calls itself by another number than it has here.
    let pids = pid != told || differs("pid") == Some(true);
    let kinds = [("PID", pids), ("IPC", differs("ipc") == Some(true))];
    Some(kinds.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect())
}

/// Whether handles of GPU memory can cross from the broker at all.
pub(super) fn namespaces(others: &[&'static str]) -> Finding {
    if others.is_empty() {
        return Finding::ok("namespace", "the same as the broker's");
    }
    Finding::note(
        "namespace",
        format!(
            "this process is in another {} namespace than the broker: handles of GPU memory and events do not cross, \
             file descriptors do",
            others.join(" and ")
        ),
        "memory is shared all the same where the rungs below are cuda-vmm and shm; for the best order of GPU work start \
         the container with --pid=container:BROKER --ipc=container:BROKER",
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::error::ErrorKind;

    fn no_listener(kind: io::ErrorKind) -> TransportError {
        TransportError::NoListener { address: "/run/x.sock".to_owned(), cause: kind.into() }
    }

    #[test]
    fn each_reason_for_silence_has_its_own_remedy() {
        let of = |kind, place| {
            let error = unreached("/run/x.sock", place, no_listener(kind));
            assert_eq!(error.kind(), ErrorKind::ConnectionLost);
            (error.message().to_owned(), error.remedy().to_owned())
        };
        let (found, remedy) = of(io::ErrorKind::NotFound, Place::Nothing);
        assert!(found.contains("no socket at /run/x.sock") && remedy.contains("serve"), "{found} {remedy}");
        let (found, remedy) = of(io::ErrorKind::ConnectionRefused, Place::Socket);
        assert!(found.contains("killed") && remedy.contains("replaces"), "{found} {remedy}");
        let (found, remedy) = of(io::ErrorKind::ConnectionRefused, Place::File);
        assert!(found.contains("is not a socket") && remedy.contains("prints"), "{found} {remedy}");
        for foreign in [(io::ErrorKind::PermissionDenied, Place::Socket), (io::ErrorKind::Other, Place::Hidden)] {
            let (found, remedy) = of(foreign.0, foreign.1);
            assert!(found.contains("another user's") && remedy.contains("of your own"), "{found} {remedy}");
        }
        let (found, _) = of(io::ErrorKind::TimedOut, Place::Socket);
        assert!(found.contains("/run/x.sock"), "{found}");
        let owned = TransportError::ForeignOwner { address: "/run/x.sock".to_owned(), owner: 1001, user: 1000 };
        let owned = unreached("/run/x.sock", Place::Socket, owned);
        assert_eq!(owned.kind(), ErrorKind::Refused);
        assert!(owned.message().contains("1001") && owned.remedy().contains("of your own"), "{owned}");
    }

    #[cfg(unix)]
    #[test]
    fn what_is_at_an_address_is_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
        assert_eq!(place(&at("nothing")), Place::Nothing);
        fs::write(at("file"), "").unwrap();
        assert_eq!(place(&at("file")), Place::File);
        assert_eq!(place(&folder.path().to_string_lossy()), Place::File);
        drop(std::os::unix::net::UnixListener::bind(at("socket")).unwrap());
        assert_eq!(place(&at("socket")), Place::Socket);
        let dead = reach(&at("socket"), ClientConfig::default()).unwrap_err();
        assert!(dead.message().contains("killed"), "{dead}");
    }

    #[cfg(unix)]
    #[test]
    fn namespaces_are_compared_by_their_names_and_by_what_the_broker_calls_itself() {
        use super::super::system::fake::Machine;
        let machine = |pid: &str, ipc: &str| {
            let machine =
                Machine::new().with_namespace("self", "pid", "pid:[1]").with_namespace("self", "ipc", "ipc:[1]");
            machine.with_namespace("77", "pid", pid).with_namespace("77", "ipc", ipc)
        };
        let peer = |pid| Peer { pid, uid: None };
        let of = |machine: &Machine, pid, told| other_namespaces(&machine.system, peer(pid), told);
        let same = machine("pid:[1]", "ipc:[1]");
        assert_eq!(of(&same, Some(77), 77), Some(vec![]));
        assert_eq!(of(&same, Some(77), 1), Some(vec!["PID"]));
        assert_eq!(of(&same, None, 77), cfg!(target_os = "linux").then(|| vec!["PID"]));
        assert_eq!(of(&machine("pid:[2]", "ipc:[1]"), Some(77), 77), Some(vec!["PID"]));
        assert_eq!(of(&machine("pid:[2]", "ipc:[2]"), Some(77), 7), Some(vec!["PID", "IPC"]));
        // A system that does not show the broker's namespaces: its number is all there is.
        assert_eq!(of(&Machine::new(), Some(77), 77), Some(vec![]));
    }

    #[test]
    fn another_namespace_is_told_with_the_flags_that_share_it() {
        let note = namespaces(&["PID"]);
        assert_eq!(note.verdict, Verdict::Note);
        assert!(note.found.contains("another PID namespace") && note.remedy.contains("--pid="), "{note:?}");
        assert_eq!(namespaces(&[]).verdict, Verdict::Ok);
    }
}
