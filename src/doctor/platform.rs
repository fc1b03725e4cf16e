use super::finding::Finding;
use super::system::{Mps, System};
use crate::config::TRANSPORT_VARIABLE;

/// What this build can do.
pub(super) fn build() -> Finding {
    let version = env!("CARGO_PKG_VERSION");
    if cfg!(not(unix)) {
        return Finding::note(
            "build",
            format!("{version}; GPU memory is shared between processes on Linux only"),
            "tensors cross through host memory here",
        );
    }
    if cfg!(not(feature = "cuda")) {
        return Finding::note(
            "build",
            format!("{version}, without the feature cuda: tensors of GPUs cross through host memory"),
            "build with the feature cuda to share GPU memory; it needs no CUDA toolkit",
        );
    }
    let executors = if cfg!(feature = "torch") { "with executors" } else { "without executors" };
    Finding::ok("build", format!("{version}, with CUDA, {executors}"))
}

/// Settings and systems on which less works than elsewhere.
pub(super) fn surroundings(system: &System) -> Vec<Finding> {
    let mut findings = Vec::new();
    if system.is_wsl() {
        findings.push(Finding::note(
            "wsl",
            "this is WSL2: handles of GPU memory do not open in other processes here",
            "for GPU memory without copies run broker and workers on Linux itself; here they share host memory",
        ));
    }
    if let Some(rung) = system.variable(TRANSPORT_VARIABLE).filter(|rung| !rung.is_empty()) {
        findings.push(Finding::note(
            "transport",
            format!("{TRANSPORT_VARIABLE}={rung} forces a rung"),
            format!("unset {TRANSPORT_VARIABLE} for the best that works"),
        ));
    }
    findings
}

/// Whether kernels of several workers overlap on one GPU. Nothing to say of a machine without GPUs and without MPS.
pub(super) fn mps(system: &System, has_gpu: bool) -> Option<Finding> {
    match system.mps() {
        Mps::On(why) => Some(Finding::note(
            "mps",
            format!(
                "on ({why}): kernels of several workers on one GPU may run at once; a fault of one client then ends \
                 all of them"
            ),
            "start broker and workers all with MPS or all without it; to do without: echo quit | nvidia-cuda-mps-control",
        )),
        Mps::Unserved(folder) => Some(Finding::note(
            "mps",
            format!("off: CUDA_MPS_PIPE_DIRECTORY names {folder}, where no control daemon listens"),
            "start it with nvidia-cuda-mps-control -d and the same variable, or unset the variable",
        )),
        Mps::Off if has_gpu => Some(Finding::note(
            "mps",
            "off: kernels of several workers on one GPU take turns",
            "nvidia-cuda-mps-control -d before broker and workers lets them overlap; a fault of one client then ends \
             all of them",
        )),
        Mps::Off => None,
    }
}

/// What a container must share with the broker's. `falls_short`: something does not cross as well as it could.
pub(super) fn container(system: &System, falls_short: bool) -> Option<Finding> {
    let whose = system.container()?;
    let found = format!("this process runs in a container ({whose})");
    if !falls_short {
        return Some(Finding::ok("container", found));
    }
    Some(Finding::note(
        "container",
        found,
        "a broker outside it is reached where the folder of its socket is a volume here; its GPU memory where the \
         same GPU is in both (--gpus), best with --pid=container:BROKER and --ipc=container:BROKER",
    ))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::system::fake::Machine;
    use super::*;

    #[test]
    fn the_build_says_whether_it_has_cuda() {
        let build = build();
        let has_cuda = cfg!(all(feature = "cuda", unix));
        assert_eq!(build.verdict == Verdict::Ok, has_cuda, "{build:?}");
        assert_eq!(build.remedy.is_empty(), has_cuda, "{build:?}");
    }

    #[test]
    fn wsl_is_named_with_what_does_not_work_there() {
        let findings = surroundings(&Machine::new().with("/dev/dxg", "").system);
        assert_eq!(findings.len(), 1);
        assert_eq!((findings[0].check.as_str(), findings[0].verdict), ("wsl", Verdict::Note));
        assert!(findings[0].remedy.contains("Linux itself"), "{}", findings[0].remedy);
        assert_eq!(surroundings(&Machine::new().system), []);
    }

    #[test]
    fn a_forced_rung_is_told() {
        let forced = |value| surroundings(&Machine::new().with_variable(TRANSPORT_VARIABLE, value).system);
        assert!(forced("inline")[0].found.contains("LUNA_BROKER_TRANSPORT=inline"));
        assert_eq!(forced(""), []);
    }

    #[test]
    fn mps_is_told_on_or_off_with_what_a_fault_does() {
        let on = mps(&Machine::new().with("/tmp/nvidia-mps/control", "").system, true).unwrap();
        assert!(on.found.starts_with("on (") && on.found.contains("ends all"), "{on:?}");
        let off = mps(&Machine::new().system, true).unwrap();
        assert!(off.found.starts_with("off") && off.remedy.contains("ends all"), "{off:?}");
        let unserved = Machine::new().with_variable("CUDA_MPS_PIPE_DIRECTORY", "/run/mps");
        let unserved = mps(&unserved.system, false).unwrap();
        assert!(unserved.found.starts_with("off") && unserved.found.contains("/run/mps"), "{unserved:?}");
        assert_eq!(mps(&Machine::new().system, false), None);
    }

    #[test]
    fn a_container_is_told_what_to_share_where_something_falls_short() {
        let docker = Machine::new().with("/.dockerenv", "");
        let short = container(&docker.system, true).unwrap();
        for flag in ["--gpus", "--pid=", "--ipc=", "volume"] {
            assert!(short.remedy.contains(flag), "{}", short.remedy);
        }
        assert_eq!(container(&docker.system, false).unwrap().verdict, Verdict::Ok);
        assert_eq!(container(&Machine::new().system, true), None);
    }
}
