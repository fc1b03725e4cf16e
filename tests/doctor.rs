//! `luna-broker doctor` beside real brokers, on the substitute driver and without any: what it finds, and what it says
//! to do about it.
#![cfg(all(target_os = "linux", feature = "cli", feature = "cuda"))]

#[path = "support/cuda.rs"]
mod cuda;
#[path = "support/process.rs"]
mod process;
#[path = "support/mod.rs"]
mod support;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::cuda::SubstituteCuda;
use crate::process::{BrokerProcess, serve_command};
use crate::support::Place;

const BINARY: &str = env!("CARGO_BIN_EXE_luna-broker");

/// A machine with the substitute driver, and where its broker listens.
struct Clinic {
    cuda: SubstituteCuda,
    place: Place,
}

impl Clinic {
    fn new() -> Self {
        Self { cuda: SubstituteCuda::new(), place: Place::new() }
    }

    fn broker(&self, device: &str, settings: &[(&str, &str)]) -> BrokerProcess {
        let mut command = serve_command(&self.place.socket(), &["--device", device]);
        command.envs(self.cuda.environment()).envs(settings.iter().copied());
        BrokerProcess::launch(command).unwrap_or_else(|said| panic!("the broker does not serve: {said}"))
    }

    /// The command, on this machine, with nothing in its environment that the test did not set.
    fn command(&self, settings: &[(&str, &str)]) -> Command {
        let mut command = Command::new(BINARY);
        command.env_clear().envs(self.cuda.environment()).envs(settings.iter().copied());
        command.args(["doctor", "--json", "--socket", &self.place.socket()]);
        command
    }

    fn examine(&self, settings: &[(&str, &str)]) -> Diagnosis {
        Diagnosis::of(self.command(settings))
    }
}

/// What the command printed.
#[derive(Debug)]
struct Diagnosis {
    code: i32,
    findings: Vec<Value>,
    process: u32,
}

impl Diagnosis {
    fn of(mut command: Command) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let process = child.id();
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!said.contains("panicked"), "{said}");
        let findings = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
        Self { code: output.status.code().expect("nobody killed it"), findings, process }
    }

    /// The one finding of a check whose name begins so.
    fn finding(&self, check: &str) -> Finding<'_> {
        let of = |finding: &&Value| finding["check"].as_str().is_some_and(|name| name.starts_with(check));
        let found: Vec<&Value> = self.findings.iter().filter(of).collect();
        let [finding] = found[..] else { panic!("{check} is not one of {:#?}", self.findings) };
        let text = |field: &str| finding[field].as_str().unwrap_or_else(|| panic!("{finding} has no {field}"));
        Finding { verdict: text("verdict"), found: text("found"), remedy: text("remedy") }
    }

    fn gpus_rung(&self) -> Finding<'_> {
        self.finding("this process -> GPU-")
    }

    fn has(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding["check"] == check)
    }
}

#[derive(Debug)]
struct Finding<'d> {
    verdict: &'d str,
    found: &'d str,
    remedy: &'d str,
}

impl Finding<'_> {
    #[track_caller]
    fn is_ok(&self, found: &str) {
        assert!(self.verdict == "ok" && self.found.contains(found) && self.remedy.is_empty(), "no {found:?}: {self:?}");
    }

    #[track_caller]
    fn is(&self, verdict: &str, found: &str, remedy: &str) {
        let fits = self.verdict == verdict && self.found.contains(found) && self.remedy.contains(remedy);
        assert!(fits, "not {verdict}, {found:?}, {remedy:?}: {self:?}");
    }
}

#[test]
fn broker_and_worker_on_one_gpu_have_nothing_to_improve_and_leave_nothing_behind() {
    let clinic = Clinic::new();
    let broker = clinic.broker("cuda", &[]);
    let diagnosis = clinic.examine(&[]);
    assert_eq!(diagnosis.code, 0);
    diagnosis.finding("driver").is_ok("CUDA 13.0, 1 GPU");
    diagnosis.finding("gpu 0").is_ok("substitute, GPU-");
    diagnosis.finding("events").is_ok("supported");
    diagnosis.finding("descriptors").is_ok("file descriptors");
    diagnosis.finding("namespace").is_ok("the same");
    diagnosis.finding("broker").is_ok(&format!("process {}, 0 other sessions, models on GPU-", broker.pid()));
    diagnosis.finding("this process -> cpu").is_ok("shm: sealed memory passed the probe");
    diagnosis.gpus_rung().is_ok("cuda-ipc: GPU memory passed the probe (");
    diagnosis.finding("mps").is("note", "off", "ends all");
    if diagnosis.has("container") {
        diagnosis.finding("container").is_ok("container");
    }
    // The question itself is no connection that was lost.
    let status = support::client_at(&clinic.place).status().unwrap();
    assert_eq!((status.refused, status.sessions_lost), (0, 0));
    let left: Vec<_> = clinic.cuda.leaks(diagnosis.process).into_iter().filter(|(_, count)| *count > 0).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn people_read_lines_and_programs_read_a_list() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cpu", &[]);
    let mut command = Command::new(BINARY);
    command.env_clear().envs(clinic.cuda.environment()).args(["doctor", "--socket", &clinic.place.socket()]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    let listed = clinic.examine(&[]).findings;
    let remedies = listed.iter().filter(|finding| finding["remedy"] != "").count();
    assert!(remedies > 0);
    assert_eq!(text.lines().filter(|line| line.trim_start().starts_with("remedy: ")).count(), remedies);
    assert_eq!(text.lines().count(), listed.len() + remedies);
    assert!(listed.iter().all(|finding| finding.as_object().is_some_and(|finding| finding.len() == 4)));
}

#[test]
fn a_broker_on_the_cpu_is_told_how_to_start_on_the_gpu() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cpu", &[]);
    let diagnosis = clinic.examine(&[]);
    assert_eq!(diagnosis.code, 0);
    diagnosis.finding("broker").is_ok("models on the CPU");
    diagnosis.gpus_rung().is("note", "shm: no GPU memory is shared", "serve --device GPU-");
}

#[test]
fn a_process_without_a_gpu_is_told_what_hides_it() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cuda", &[]);
    let none = clinic.examine(&[("SUBSTITUTE_CUDA_NO_DEVICE", "1")]);
    assert_eq!(none.code, 0);
    none.finding("driver").is("note", "cuInit answers 100 CUDA_ERROR_NO_DEVICE", "");
    assert!(!none.finding("driver").remedy.is_empty());
    none.finding("this process -> cpu").is_ok("shm");
    assert!(!none.has("gpu 0") && !none.has("mps"), "{none:?}");
    let wrong = clinic.examine(&[("CUDA_VISIBLE_DEVICES", "7")]);
    wrong.finding("driver").is("note", "CUDA_VISIBLE_DEVICES=7 names no GPU", "unset CUDA_VISIBLE_DEVICES");
    let empty = clinic.examine(&[("CUDA_VISIBLE_DEVICES", "")]);
    empty.finding("driver").is("note", "CUDA_VISIBLE_DEVICES= is empty", "unset CUDA_VISIBLE_DEVICES");
    let half = clinic.examine(&[("CUDA_VISIBLE_DEVICES", "0,7")]);
    half.finding("visible").is("note", "takes 1", "nvidia-smi -L");
    half.gpus_rung().is_ok("cuda-ipc");
}

#[test]
fn an_instance_of_a_divided_gpu_is_told_what_it_shares() {
    let clinic = Clinic::new();
    let diagnosis = clinic.examine(&[("SUBSTITUTE_CUDA_DEVICES", "NVIDIA Test MIG 1g.18gb")]);
    diagnosis.finding("mig").is("note", "do not share memory", "same instance");
}

#[test]
fn handles_that_are_refused_are_told_with_the_code() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cuda", &[("SUBSTITUTE_CUDA_VMM", "refused")]);
    let diagnosis = clinic.examine(&[("SUBSTITUTE_CUDA_IPC", "refused")]);
    assert_eq!(diagnosis.code, 0);
    diagnosis.gpus_rung().is(
        "note",
        "shm: better rungs failed: [cuda-ipc: open: cuIpcOpenMemHandle_v2 answers 400",
        "log",
    );
    diagnosis.finding("this process -> cpu").is_ok("shm");
}

#[test]
fn a_broker_on_another_gpu_is_told_with_and_without_a_way_between_them() {
    let clinic = Clinic::new();
    let two = ("SUBSTITUTE_CUDA_DEVICES", "alpha,beta");
    let broker = clinic.broker("cuda:0", &[two]);
    let hidden = clinic.examine(&[two, ("CUDA_VISIBLE_DEVICES", "1")]);
    hidden.gpus_rung().is("note", "does not reach", "CUDA_VISIBLE_DEVICES");
    assert_eq!(hidden.code, 0);
    let both = clinic.examine(&[two]);
    let of = |name: &str| {
        let gpu = both.findings.iter().find(|finding| finding["found"].as_str().unwrap().starts_with(name)).unwrap();
        gpu["found"].as_str().unwrap().split(", ").nth(1).unwrap().to_owned()
    };
    let (alpha, beta) = (of("alpha"), of("beta"));
    both.finding("broker").is_ok(&format!("models on {alpha}"));
    both.finding(&format!("this process -> {alpha}")).is_ok("cuda-ipc");
    both.finding(&format!("this process -> {beta}")).is("note", "shm", &format!("work on the broker's GPU {alpha}"));
    both.finding(&format!("this process -> {beta}")).is("note", "; page-locked", "work on the broker's GPU");
    let slow = clinic.examine(&[two, ("SUBSTITUTE_CUDA_HOST_REGISTER", "refused")]);
    let finding = slow.finding(&format!("this process -> {beta}"));
    finding.is("note", "; not page-locked: cuMemHostRegister_v2 answers 801", "work on the broker's GPU");
    drop(broker);
    let reaching = ("SUBSTITUTE_CUDA_P2P", "1");
    let _broker = clinic.broker("cuda:0", &[two, reaching]);
    let peer = clinic.examine(&[two, reaching, ("CUDA_VISIBLE_DEVICES", "1")]);
    peer.gpus_rung().is("note", "peer: GPU memory passed the probe", &format!("work on {alpha}"));
}

/// The rest of a command line that runs in a PID namespace of its own; nothing where this user may not make one.
fn unshared(command: &Command) -> Option<Command> {
    let unshare = ["--pid", "--fork", "--kill-child"];
    let allowed = Command::new("unshare").args(unshare).arg("true").stderr(Stdio::null()).status();
    if !allowed.is_ok_and(|status| status.success()) {
        eprintln!("skipped: unshare --pid is not there or not allowed");
        return None;
    }
    let mut apart = Command::new("unshare");
    apart.args(unshare).arg("--").arg(command.get_program()).args(command.get_args());
    let variables = command.get_envs().filter_map(|(name, value)| Some((name, value?)));
    apart.envs(
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect::<Vec<(OsString, OsString)>>(),
    );
    Some(apart)
}

#[test]
fn another_pid_namespace_is_told_from_both_sides_and_descriptors_cross_it() {
    let clinic = Clinic::new();
    let apart = ("SUBSTITUTE_CUDA_PID_NAMESPACE", "container");
    let broker = clinic.broker("cuda", &[]);
    let Some(mut inner) = unshared(&clinic.command(&[apart])) else { return };
    inner.env("PATH", "/usr/bin:/bin");
    let diagnosis = Diagnosis::of(inner);
    diagnosis.finding("namespace").is("note", "another PID namespace", "--pid=container:BROKER");
    diagnosis.gpus_rung().is(
        "note",
        "cuda-vmm: better rungs failed: [cuda-ipc: open: ",
        "share the broker's PID namespace",
    );
    assert!(diagnosis.gpus_rung().found.contains("each side waits"), "{diagnosis:?}");
    drop(broker);
    let mut command = serve_command(&clinic.place.socket(), &["--device", "cuda"]);
    command.envs(clinic.cuda.environment()).envs([apart, ("SUBSTITUTE_CUDA_VMM", "refused")]);
    let Some(inner) = unshared(&command) else { return };
    let _broker = BrokerProcess::launch(inner).unwrap_or_else(|said| panic!("the broker does not serve: {said}"));
    // The broker has no number for a client outside of its namespace, and serves it.
    let status = support::client_at(&clinic.place).status().unwrap();
    assert_eq!(status.sessions.iter().map(|session| session.pid).collect::<Vec<_>>(), [None]);
    let diagnosis = clinic.examine(&[]);
    diagnosis.finding("namespace").is("note", "another PID namespace", "--pid=container:BROKER");
    diagnosis.gpus_rung().is("note", "shm: better rungs failed: ", "share the broker's PID namespace");
}

#[test]
fn a_library_that_is_no_driver_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let other = maps.split_whitespace().find(|word| word.contains("/libc.so")).expect("the C library is loaded");
    for name in ["libcuda.so", "libcuda.so.1"] {
        std::os::unix::fs::symlink(other, folder.path().join(name)).unwrap();
    }
    let clinic = Clinic::new();
    let diagnosis = clinic.examine(&[("LD_LIBRARY_PATH", &folder.path().to_string_lossy())]);
    diagnosis.finding("driver").is("fail", "no function cuInit", "install NVIDIA's driver");
}

#[test]
fn without_a_driver_work_goes_on_through_host_memory() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cpu", &[]);
    let diagnosis = clinic.examine(&[("LD_LIBRARY_PATH", "")]);
    assert_eq!(diagnosis.code, 0);
    diagnosis.finding("this process -> cpu").is_ok("shm");
    if diagnosis.finding("driver").verdict == "ok" {
        eprintln!("skipped: this machine has a driver");
        return;
    }
    diagnosis.finding("driver").is("note", "there is no libcuda", "nothing to do without an NVIDIA GPU");
}

#[test]
fn a_broker_that_is_not_there_ends_with_the_code_of_a_lost_connection() {
    let clinic = Clinic::new();
    let absent = clinic.examine(&[]);
    assert_eq!(absent.code, 3);
    absent.finding("broker").is("fail", "there is no socket at ", "luna-broker serve");
    absent.finding("driver").is_ok("1 GPU");
    clinic.broker("cpu", &[]).kill();
    let dead = clinic.examine(&[]);
    assert_eq!(dead.code, 3);
    dead.finding("broker").is("fail", "was killed", "replaces the socket");
    std::fs::remove_file(clinic.place.socket()).unwrap();
    std::fs::write(clinic.place.socket(), "").unwrap();
    clinic.examine(&[]).finding("broker").is("fail", "is not a socket", "LUNA_BROKER");
}

#[test]
fn another_users_broker_is_refused_by_name() {
    const NOBODY: u32 = 65534;
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can act as two users");
        return;
    }
    let clinic = Clinic::new();
    let open = |path: &std::path::Path| {
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    };
    open(clinic.place.folder.path());
    let mut command = serve_command(&clinic.place.socket(), &[]);
    let _broker = BrokerProcess::launch({
        command.uid(NOBODY).gid(NOBODY);
        command
    })
    .unwrap_or_else(|said| panic!("the broker does not serve: {said}"));
    let diagnosis = clinic.examine(&[]);
    assert_eq!(diagnosis.code, 4);
    diagnosis.finding("broker").is("fail", "belongs to user 65534, not to user 0", "of your own");
}

#[test]
fn a_broker_that_hangs_and_a_gpu_that_hangs_are_given_up() {
    let clinic = Clinic::new();
    let broker = clinic.broker("cuda", &[]);
    let hurried = |settings| {
        let mut command = clinic.command(settings);
        command.args(["--timeout", "2"]);
        Diagnosis::of(command)
    };
    let stuck = hurried(&[("SUBSTITUTE_CUDA_DELAY_MS", "600000")]);
    assert_eq!(stuck.code, 0);
    stuck.gpus_rung().is("fail", "within 2 s", "");
    stuck.finding("this process -> cpu").is_ok("shm");
    let process = Pid::from_raw(broker.pid().cast_signed()).unwrap();
    kill_process(process, Signal::STOP).unwrap();
    let hung = hurried(&[]);
    kill_process(process, Signal::CONT).unwrap();
    assert_eq!(hung.code, 6);
    hung.finding("broker").is("fail", "", "");
}

#[test]
fn a_forced_rung_is_told_and_one_that_does_not_exist_is_the_obstacle() {
    let clinic = Clinic::new();
    let _broker = clinic.broker("cuda", &[]);
    let forced = clinic.examine(&[("LUNA_BROKER_TRANSPORT", "inline")]);
    assert_eq!(forced.code, 0);
    forced.finding("transport").is("note", "LUNA_BROKER_TRANSPORT=inline", "unset");
    forced.finding("this process -> cpu").is("note", "inline: forced", "unset");
    let wrong = clinic.examine(&[("LUNA_BROKER_TRANSPORT", "pigeon")]);
    assert_eq!(wrong.code, 2);
    wrong.finding("broker").is("fail", "pigeon", "");
}
