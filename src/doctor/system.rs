use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What the system tells of itself: files below a root and variables, so that a test can stand in for any machine.
/// Systems without these files tell nothing.
#[derive(Debug, Clone)]
pub(super) struct System {
    root: PathBuf,
    variables: HashMap<String, String>,
}

/// Whether work of several processes shares a GPU through NVIDIA's multi-process service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mps {
    Off,
    /// A control daemon runs; where that shows.
    On(String),
    /// A variable names a folder in which no control daemon listens.
    Unserved(String),
}

/// The programs of the multi-process service.
const MPS_PROGRAMS: [&str; 2] = ["nvidia-cuda-mps-control", "nvidia-cuda-mps-server"];

/// Where CUDA looks for the control daemon when told nothing else.
const MPS_FOLDER: &str = "/tmp/nvidia-mps";

/// Words in the name of a control group, and whose they are.
const CONTAINER_GROUPS: [(&str, &str); 6] = [
    ("kubepods", "Kubernetes"),
    ("docker", "Docker"),
    ("libpod", "Podman"),
    ("containerd", "containerd"),
    ("lxc", "LXC"),
    ("garden", "Garden"),
];

impl System {
    pub(super) fn of_this_machine() -> Self {
        let text = |value: std::ffi::OsString| value.to_string_lossy().into_owned();
        let variables = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        Self { root: PathBuf::from("/"), variables }
    }

    /// A variable that is set, to nothing too.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn text(&self, path: &str) -> Option<String> {
        fs::read_to_string(self.path(path)).ok()
    }

    fn exists(&self, path: &str) -> bool {
        self.path(path).exists()
    }

    /// Whether this is Linux below Windows, where CUDA goes through the Windows driver.
    pub(super) fn is_wsl(&self) -> bool {
        let release = self.text("/proc/sys/kernel/osrelease").unwrap_or_default();
        release.to_ascii_lowercase().contains("microsoft") || self.exists("/dev/dxg")
    }

    /// Whose container this process runs in, as far as that shows.
    pub(super) fn container(&self) -> Option<&'static str> {
        if self.exists("/.dockerenv") {
            return Some("Docker");
        }
        if self.exists("/run/.containerenv") {
            return Some("Podman");
        }
        let groups = self.text("/proc/self/cgroup")?;
        CONTAINER_GROUPS.iter().find(|(word, _)| groups.contains(word)).map(|(_, whose)| *whose)
    }

    /// The kernel's name of a namespace of a process, the same for all processes in it.
    pub(super) fn namespace(&self, process: &str, kind: &str) -> Option<String> {
        let link = fs::read_link(self.path(&format!("/proc/{process}/ns/{kind}"))).ok()?;
        Some(link.to_string_lossy().into_owned())
    }

    /// Whether the kernel has NVIDIA's driver.
    pub(super) fn has_kernel_driver(&self) -> bool {
        self.exists("/proc/driver/nvidia/version") || self.exists("/dev/nvidiactl")
    }

    /// The file that this process has loaded as its CUDA driver.
    pub(super) fn libcuda(&self) -> Option<String> {
        let maps = self.text("/proc/self/maps")?;
        let mut files = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
        let is_libcuda =
            |file: &&str| Path::new(file).file_name().is_some_and(|name| is_libcuda(&name.to_string_lossy()));
        files.find(is_libcuda).map(str::to_owned)
    }

    pub(super) fn mps(&self) -> Mps {
        if let Some(program) = self.running_mps() {
            return Mps::On(format!("{program} runs"));
        }
        let set = self.variable("CUDA_MPS_PIPE_DIRECTORY").filter(|folder| !folder.is_empty());
        let folder = set.unwrap_or(MPS_FOLDER);
        if self.exists(&format!("{folder}/control")) {
            return Mps::On(format!("its control daemon listens in {folder}"));
        }
        set.map_or(Mps::Off, |folder| Mps::Unserved(folder.to_owned()))
    }

    fn running_mps(&self) -> Option<&'static str> {
        let processes = fs::read_dir(self.path("/proc")).ok()?;
        processes.flatten().find_map(|process| {
            let is_process = process.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit());
            // The short name is cut to fifteen letters, the same ones for control daemon and server.
            let line = is_process.then(|| fs::read(process.path().join("cmdline")).ok()).flatten()?;
            let program = String::from_utf8_lossy(line.split(|byte| *byte == 0).next()?).into_owned();
            let name = Path::new(&program).file_name()?.to_string_lossy().into_owned();
            MPS_PROGRAMS.into_iter().find(|program| *program == name)
        })
    }
}

fn is_libcuda(name: &str) -> bool {
    name == "libcuda.so" || name.starts_with("libcuda.so.")
}

#[cfg(test)]
pub(super) mod fake {
    use super::*;

    /// A machine that consists of what a test puts there.
    pub(in crate::doctor) struct Machine {
        pub(in crate::doctor) system: System,
        _root: tempfile::TempDir,
    }

    impl Machine {
        pub(in crate::doctor) fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            let system = System { root: root.path().to_owned(), variables: HashMap::new() };
            Self { system, _root: root }
        }

        pub(in crate::doctor) fn with(self, path: &str, text: &str) -> Self {
            let path = self.system.path(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        #[cfg(unix)]
        pub(in crate::doctor) fn with_namespace(self, process: &str, kind: &str, name: &str) -> Self {
            let path = self.system.path(&format!("/proc/{process}/ns/{kind}"));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::os::unix::fs::symlink(name, path).unwrap();
            self
        }

        pub(in crate::doctor) fn with_variable(mut self, name: &str, value: &str) -> Self {
            self.system.variables.insert(name.to_owned(), value.to_owned());
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::fake::Machine;
    use super::*;

    #[test]
    fn a_machine_that_tells_nothing_is_nothing_special() {
        let Machine { system, .. } = &Machine::new();
        assert!(!system.is_wsl() && !system.has_kernel_driver());
        assert_eq!((system.container(), system.libcuda(), system.mps()), (None, None, Mps::Off));
        assert_eq!(system.namespace("self", "pid"), None);
    }

    #[test]
    fn linux_below_windows_is_known_by_its_kernel_or_its_device() {
        let release = |release| Machine::new().with("/proc/sys/kernel/osrelease", release).system.is_wsl();
        assert!(release("5.15.90.1-microsoft-standard-WSL2\n"));
        assert!(!release("6.8.0-40-generic\n"));
        assert!(Machine::new().with("/dev/dxg", "").system.is_wsl());
    }

    #[test]
    fn containers_are_known_by_their_marks() {
        let of = |path, text| Machine::new().with(path, text).system.container();
        assert_eq!(of("/.dockerenv", ""), Some("Docker"));
        assert_eq!(of("/run/.containerenv", "engine=\"podman\""), Some("Podman"));
        assert_eq!(of("/proc/self/cgroup", "0::/kubepods/besteffort/pod1/abc\n"), Some("Kubernetes"));
        assert_eq!(of("/proc/self/cgroup", "0::/user.slice/session-3.scope\n"), None);
    }

    #[test]
    fn mps_is_known_by_its_processes_or_its_pipe() {
        let control = "/usr/bin/nvidia-cuda-mps-control\0-d\0";
        assert!(matches!(Machine::new().with("/proc/77/cmdline", control).system.mps(), Mps::On(_)));
        assert_eq!(Machine::new().with("/proc/77/cmdline", "vim\0nvidia-cuda-mps-control\0").system.mps(), Mps::Off);
        assert!(matches!(Machine::new().with("/tmp/nvidia-mps/control", "").system.mps(), Mps::On(_)));
        let elsewhere = || Machine::new().with_variable("CUDA_MPS_PIPE_DIRECTORY", "/run/mps");
        assert_eq!(elsewhere().system.mps(), Mps::Unserved("/run/mps".to_owned()));
        assert!(
            matches!(elsewhere().with("/run/mps/control", "").system.mps(), Mps::On(why) if why.contains("/run/mps"))
        );
        // The default folder is another daemon's where a variable names one.
        assert!(matches!(elsewhere().with("/tmp/nvidia-mps/control", "").system.mps(), Mps::Unserved(_)));
    }

    #[test]
    fn the_loaded_driver_is_found_among_the_mapped_files() {
        let maps = "7f00-7f01 r--p 00000000 08:01 12  /usr/lib/libc.so.6\n\
                    7f02-7f03 r-xp 00000000 08:01 13  /opt/cuda/lib64/stubs/libcuda.so\n";
        let Machine { system, .. } = &Machine::new().with("/proc/self/maps", maps);
        assert_eq!(system.libcuda().as_deref(), Some("/opt/cuda/lib64/stubs/libcuda.so"));
        let cudart = maps.replace("libcuda.so", "libcudart.so.13");
        assert_eq!(Machine::new().with("/proc/self/maps", &cudart).system.libcuda(), None);
    }
}
