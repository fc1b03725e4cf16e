//! Brokers and clients as processes of their own, and what a process holds.
#![allow(dead_code, unreachable_pub, reason = "each test file uses its own part")]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};

/// Longer than any machine takes to start a process that links libtorch.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a client process writes before an answer, so that the test harness's own words are not taken for one.
const MARK: &str = "> ";

/// Names the socket to a test that runs as a client process.
const VARIABLE: &str = "LUNA_BROKER_TEST_CLIENT";

/// The `luna-broker` binary, serving. Killed when dropped.
pub struct BrokerProcess {
    child: Child,
    said: Arc<Mutex<String>>,
}

/// The command that serves at `socket`; for tests that change it before they start it. One thread computes: tests that
/// run side by side would otherwise wait for each other's.
pub fn serve_command(socket: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_luna-broker"));
    command
        .args(["serve", "--bench-models", "--threads", "1", "--socket", socket])
        .args(arguments)
        .env_remove("LUNA_BROKER_LOG");
    command
}

impl BrokerProcess {
    /// Starts a broker at `socket` and waits until it serves.
    pub fn start(socket: &str, arguments: &[&str]) -> Self {
        Self::launch(serve_command(socket, arguments))
            .unwrap_or_else(|said| panic!("the broker does not serve: {said}"))
    }

    /// Starts `command` and waits until it serves; what it said where it ends instead.
    pub fn launch(mut command: Command) -> Result<Self, String> {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().expect("standard error is a pipe");
        let said = Arc::new(Mutex::new(String::new()));
        let (serving, ready) = unbounded();
        let heard = Arc::clone(&said);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let announced = line.contains("luna-broker is serving");
                *heard.lock() += &(line + "\n");
                if announced {
                    _ = serving.send(());
                }
            }
        });
        let broker = Self { child, said };
        match ready.recv_timeout(PATIENCE) {
            Ok(()) => Ok(broker),
            Err(_) => Err(broker.said.lock().clone()),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// SIGKILL; the process is gone when this returns.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; does not wait.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// What it has written to standard error so far.
    pub fn said(&self) -> String {
        self.said.lock().clone()
    }

    /// Mappings of files that no longer have a name.
    pub fn mapped_but_deleted(&self) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().filter(|line| line.ends_with(".safetensors (deleted)")).count()
    }

    /// Mappings of the file of that name.
    pub fn mappings_of(&self, name: &str) -> usize {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().filter(|line| line.ends_with(name)).count()
    }

    pub fn footprint(&self) -> Footprint {
        Footprint::of(self.pid())
    }
}

impl Drop for BrokerProcess {
    fn drop(&mut self) {
        // Gone already where the test ended it.
        _ = self.child.kill();
        _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the broker said:\n{}", self.said.lock());
        }
    }
}

/// A client in a process of its own: this test binary again, running the test `client_process`. Killed when dropped.
pub struct ClientProcess {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl ClientProcess {
    /// Starts one that will talk to `socket` when told to.
    pub fn start(socket: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["client_process", "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env(VARIABLE, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().expect("standard input is a pipe");
        let stdout = child.stdout.take().expect("standard output is a pipe");
        let (tell, answers) = unbounded();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(answer) = line.strip_prefix(MARK) {
                    _ = tell.send(answer.to_owned());
                }
            }
        });
        Self { child, stdin, answers }
    }

    /// Tells the process to do something; its answer is heard later.
    pub fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// The next answer; `None` where the process ended instead.
    pub fn hear(&self) -> Option<String> {
        self.answers.recv_timeout(PATIENCE).ok()
    }

    pub fn ask(&mut self, command: &str) -> String {
        self.tell(command);
        self.hear().unwrap_or_else(|| panic!("the client process did not answer {command:?}"))
    }

    /// SIGKILL; the process is gone when this returns.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for ClientProcess {
    fn drop(&mut self) {
        // Gone already where the test killed it.
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// The client process's side: `obey` answers each command that comes on standard input.
pub fn obey_commands(mut obey: impl FnMut(&str, &[&str]) -> String) {
    let Ok(socket) = std::env::var(VARIABLE) else {
        eprintln!("skipped: other tests run this one in a process of its own and set {VARIABLE}");
        return;
    };
    // The harness has begun a line of its own.
    println!();
    for line in std::io::stdin().lines().map_while(Result::ok) {
        let words: Vec<&str> = line.split_whitespace().collect();
        answer(&obey(&socket, &words));
    }
}

/// Says something to whoever started this client process.
pub fn answer(text: &str) {
    println!("{MARK}{text}");
}

/// What a process holds at one moment, as the kernel counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    pub threads: usize,
    pub descriptors: usize,
    /// Mappings of shared tensor memory.
    pub arenas: usize,
    pub mappings: usize,
}

impl Footprint {
    pub fn of(pid: u32) -> Self {
        let entries = |folder: &str| std::fs::read_dir(format!("/proc/{pid}/{folder}")).map_or(0, Iterator::count);
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
        Self {
            threads: entries("task"),
            descriptors: entries("fd"),
            arenas: maps.lines().filter(|line| line.contains("memfd:luna-broker")).count(),
            mappings: maps.lines().count(),
        }
    }

    /// Whether nothing that belongs to sessions is left beyond what was there at `before`. Other mappings are the
    /// allocator's and the thread library's, which keep some for later.
    pub fn is_back_to(&self, before: &Self) -> bool {
        self.threads <= before.threads && self.descriptors <= before.descriptors && self.arenas <= before.arenas
    }
}

/// Objects in `/dev/shm` that a broker of any process made.
pub fn named_segments() -> usize {
    let entries = std::fs::read_dir("/dev/shm").unwrap().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("luna-broker")).count()
}
