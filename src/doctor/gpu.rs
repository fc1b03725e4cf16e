//! Judges what the CUDA driver tells.

use super::finding::Finding;
use super::system::System;
use crate::device::NoDriver;
use crate::id::GpuUuid;

/// A driver that works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Driven {
    pub(super) version: (u32, u32),
    pub(super) gpus: Vec<GpuFacts>,
}

/// One GPU as this process sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GpuFacts {
    pub(super) uuid: GpuUuid,
    pub(super) ordinal: i32,
    pub(super) name: String,
    pub(super) memory_bytes: u64,
    pub(super) compute: Option<(u32, u32)>,
    pub(super) is_mig: bool,
    pub(super) is_integrated: bool,
    /// Absent where the driver does not know the question.
    pub(super) events: Option<bool>,
    pub(super) descriptors: Option<bool>,
}

/// The variable that hides and reorders GPUs.
const VISIBLE: &str = "CUDA_VISIBLE_DEVICES";

const CHECK: &str = "driver";

/// The driver and its GPUs.
pub(super) fn findings(driver: &Result<Driven, NoDriver>, system: &System) -> Vec<Finding> {
    match driver {
        Ok(driven) => found(driven, system),
        // The build says it already.
        Err(NoDriver::NotBuilt) => Vec::new(),
        Err(missing) => vec![absent(missing, system)],
    }
}

fn found(Driven { version: (major, minor), gpus }: &Driven, system: &System) -> Vec<Finding> {
    let plural = if gpus.len() == 1 { "" } else { "s" };
    let mut findings = vec![Finding::ok(CHECK, format!("CUDA {major}.{minor}, {} GPU{plural}", gpus.len()))];
    findings.extend(visibility(gpus.len(), system));
    findings.extend(gpus.iter().map(|gpu| {
        let compute = gpu.compute.map_or_else(String::new, |(major, minor)| format!(", compute {major}.{minor}"));
        let gibibytes = gpu.memory_bytes as f64 / f64::from(1 << 30);
        Finding::ok(format!("gpu {}", gpu.ordinal), format!("{}, {}, {gibibytes:.0} GiB{compute}", gpu.name, gpu.uuid))
    }));
    findings.push(ability(
        gpus,
        "events",
        |gpu| gpu.events,
        ["interprocess events are supported", "interprocess events are not supported"],
        "nothing to do: each side waits for its GPU work before it tells the other, which is slower",
    ));
    findings.push(ability(
        gpus,
        "descriptors",
        |gpu| gpu.descriptors,
        ["memory can be handed over as file descriptors", "memory cannot be handed over as file descriptors"],
        "keep broker and workers in one PID namespace: only handles are left, which do not cross namespaces",
    ));
    findings.extend(gpus.iter().filter(|gpu| gpu.is_mig).map(|gpu| {
        Finding::note(
            "mig",
            format!("gpu {} is an instance of a divided GPU; instances do not share memory", gpu.ordinal),
            format!("give broker and workers the same instance, with {VISIBLE}=MIG-… as nvidia-smi -L prints it"),
        )
    }));
    findings.extend(gpus.iter().filter(|gpu| gpu.is_integrated).map(|gpu| {
        Finding::note(
            "integrated",
            format!("gpu {} uses the machine's own memory, of which no handle can be made", gpu.ordinal),
            "nothing to do: its tensors cross through shared host memory",
        )
    }));
    findings
}

/// One finding for all GPUs, or for those that lack something.
fn ability(
    gpus: &[GpuFacts],
    check: &str,
    of: impl Fn(&GpuFacts) -> Option<bool>,
    [has, lacks]: [&str; 2],
    remedy: &str,
) -> Finding {
    let those = |answer| gpus.iter().filter(move |gpu| of(gpu) == answer).map(|gpu| gpu.ordinal.to_string());
    let lacking: Vec<String> = those(Some(false)).collect();
    if lacking.len() == gpus.len() {
        return Finding::note(check, lacks, remedy);
    }
    if !lacking.is_empty() {
        return Finding::note(check, format!("{lacks} by gpu {}", lacking.join(", ")), remedy);
    }
    Finding::ok(check, has)
}

/// Whether every entry of the variable names a GPU: the driver silently ends the list at the first that does not.
fn visibility(seen: usize, system: &System) -> Option<Finding> {
    let list = system.variable(VISIBLE)?;
    let named = list.split(',').filter(|entry| !entry.trim().is_empty()).count();
    if named <= seen {
        return Some(Finding::ok("visible", format!("{VISIBLE}={list}")));
    }
    Some(Finding::note(
        "visible",
        format!("{VISIBLE}={list} has {named} entries, of which the driver takes {seen}"),
        "an entry that names no GPU, or one twice, ends the list: correct it, see nvidia-smi -L",
    ))
}

/// No driver at all is normal on a machine without a GPU; one that is there and does not work is not.
fn absent(missing: &NoDriver, system: &System) -> Finding {
    let found = format!("no CUDA: {missing}");
    match missing {
        NoDriver::NoLibrary if system.has_kernel_driver() => Finding::fail(
            CHECK,
            format!("{found}, while the kernel has NVIDIA's driver"),
            "install the driver's libcuda; in a container, start it with --gpus all and \
             NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        ),
        NoDriver::NoLibrary => Finding::note(
            CHECK,
            found,
            "nothing to do without an NVIDIA GPU; with one, install its driver, and in a container add --gpus all",
        ),
        NoDriver::NoFunction { .. } => {
            Finding::fail(CHECK, found + &loaded(system), "install NVIDIA's driver 530 or newer, with its own libcuda")
        }
        NoDriver::NoGpu | NoDriver::NoStart { code: NO_DEVICE, .. } => no_device(found, system),
        NoDriver::NoStart { code, .. } => Finding::fail(CHECK, found + &loaded(system), start_remedy(*code)),
        NoDriver::NoAnswer { .. } | NoDriver::NotBuilt => Finding::fail(CHECK, found, SEE_SMI),
    }
}

fn loaded(system: &System) -> String {
    system.libcuda().map_or_else(String::new, |file| format!(" ({file})"))
}

fn no_device(found: String, system: &System) -> Finding {
    if let Some(list) = system.variable(VISIBLE) {
        let what = if list.trim().is_empty() { "is empty and hides every GPU" } else { "names no GPU of this machine" };
        return Finding::note(
            CHECK,
            format!("{found}; {VISIBLE}={list} {what}"),
            format!("unset {VISIBLE}, or name a GPU that nvidia-smi -L prints"),
        );
    }
    if system.container().is_some() {
        return Finding::note(CHECK, found, "start the container with --gpus all, or with the GPU it is to use");
    }
    Finding::note(CHECK, found, "see whether nvidia-smi -L prints a GPU, and whether this user may open /dev/nvidia*")
}

const NO_DEVICE: u32 = 100;
const SEE_SMI: &str = "see what nvidia-smi says; the machine's log has the driver's own words";

/// What helps against a code of `cuInit`.
fn start_remedy(code: u32) -> &'static str {
    match code {
        34 => "this is the toolkit's stub and no driver: take its folder out of LD_LIBRARY_PATH",
        46 => "the GPU is kept for another process: nvidia-smi -c DEFAULT lets several use it",
        304 => "this user must be able to open /dev/nvidia*; in a container, start it with --gpus all",
        802 => "start the driver's daemons (nvidia-fabricmanager where GPUs are connected by switches)",
        803 => {
            "the kernel's driver and libcuda are of different versions: restart the machine after an update; in a \
             container use the libcuda of the machine"
        }
        804 => "take the libcuda for forward compatibility out of the search path: this GPU does not support it",
        805..=810 => "restart the MPS control daemon, or stop it to do without",
        999 => "load the kernel module nvidia_uvm anew (often needed after a suspend), or restart the machine",
        _ => SEE_SMI,
    }
}

#[cfg(test)]
pub(super) mod fake {
    use super::*;

    pub(in crate::doctor) fn gpu(ordinal: u8) -> GpuFacts {
        GpuFacts {
            uuid: GpuUuid([ordinal + 1; 16]),
            ordinal: i32::from(ordinal),
            name: "NVIDIA Test".to_owned(),
            memory_bytes: 139 << 30,
            compute: Some((9, 0)),
            is_mig: false,
            is_integrated: false,
            events: Some(true),
            descriptors: Some(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::super::system::fake::Machine;
    use super::fake::gpu;
    use super::*;

    fn of(gpus: Vec<GpuFacts>, machine: &Machine) -> Vec<Finding> {
        findings(&Ok(Driven { version: (13, 0), gpus }), &machine.system)
    }

    fn named<'f>(findings: &'f [Finding], check: &str) -> &'f Finding {
        findings.iter().find(|finding| finding.check == check).unwrap_or_else(|| panic!("no {check} in {findings:?}"))
    }

    fn missing(missing: NoDriver, machine: &Machine) -> Finding {
        let mut findings = findings(&Err(missing), &machine.system);
        assert_eq!(findings.len(), 1);
        findings.remove(0)
    }

    fn no_start(code: u32) -> NoDriver {
        NoDriver::NoStart { code, name: "CUDA_ERROR_TEST".to_owned() }
    }

    #[test]
    fn a_driver_that_works_is_told_with_its_gpus() {
        let findings = of(vec![gpu(0), gpu(1)], &Machine::new());
        assert!(findings.iter().all(|finding| finding.verdict == Verdict::Ok), "{findings:?}");
        assert_eq!(named(&findings, "driver").found, "CUDA 13.0, 2 GPUs");
        let expected = format!("NVIDIA Test, {}, 139 GiB, compute 9.0", gpu(1).uuid);
        assert_eq!(named(&findings, "gpu 1").found, expected);
        assert_eq!(findings.len(), 5);
    }

    #[test]
    fn what_a_gpu_lacks_is_told_with_its_number() {
        let lame = GpuFacts { events: Some(false), descriptors: Some(false), ..gpu(1) };
        let findings = of(vec![gpu(0), lame.clone()], &Machine::new());
        assert!(named(&findings, "events").found.ends_with("gpu 1"));
        assert!(named(&findings, "descriptors").remedy.contains("PID namespace"));
        assert_eq!(named(&of(vec![lame], &Machine::new()), "events").found, "interprocess events are not supported");
        let silent = GpuFacts { events: None, ..gpu(0) };
        assert_eq!(named(&of(vec![silent], &Machine::new()), "events").verdict, Verdict::Ok);
    }

    #[test]
    fn divided_and_integrated_gpus_are_told_what_they_do_not_share() {
        let findings = of(vec![GpuFacts { is_mig: true, ..gpu(0) }], &Machine::new());
        assert!(named(&findings, "mig").found.contains("instances do not share"));
        assert!(named(&findings, "mig").remedy.contains("same instance"));
        let findings = of(vec![GpuFacts { is_integrated: true, ..gpu(0) }], &Machine::new());
        assert!(named(&findings, "integrated").remedy.contains("host memory"));
    }

    #[test]
    fn an_entry_that_names_no_gpu_is_noticed() {
        let visible = |list| {
            let findings = of(vec![gpu(0)], &Machine::new().with_variable(VISIBLE, list));
            named(&findings, "visible").clone()
        };
        assert_eq!(visible("0").verdict, Verdict::Ok);
        let short = visible("0,7");
        assert_eq!(short.verdict, Verdict::Note);
        assert!(short.found.contains("0,7") && short.found.contains("takes 1"), "{short:?}");
    }

    #[test]
    fn a_missing_library_is_a_failure_only_where_the_kernel_has_the_driver() {
        let without = missing(NoDriver::NoLibrary, &Machine::new());
        assert_eq!(without.verdict, Verdict::Note);
        assert!(without.remedy.contains("nothing to do without"), "{without:?}");
        let half = missing(NoDriver::NoLibrary, &Machine::new().with("/proc/driver/nvidia/version", "570"));
        assert_eq!(half.verdict, Verdict::Fail);
        assert!(half.remedy.contains("NVIDIA_DRIVER_CAPABILITIES"), "{half:?}");
    }

    #[test]
    fn a_stub_is_named_with_its_file() {
        let maps = "7f02-7f03 r-xp 0 08:01 13  /opt/cuda/stubs/libcuda.so\n";
        let stub = missing(no_start(34), &Machine::new().with("/proc/self/maps", maps));
        assert_eq!(stub.verdict, Verdict::Fail);
        assert!(stub.found.contains("34 CUDA_ERROR_TEST (/opt/cuda/stubs/libcuda.so)"), "{stub:?}");
        assert!(stub.remedy.contains("LD_LIBRARY_PATH"), "{stub:?}");
    }

    #[test]
    fn a_driver_that_does_not_start_is_told_with_its_code_and_a_remedy_of_its_own() {
        let remedies = [
            (46, "-c DEFAULT"),
            (304, "/dev/nvidia*"),
            (802, "fabricmanager"),
            (803, "versions"),
            (804, "forward compatibility"),
            (805, "MPS"),
            (999, "nvidia_uvm"),
            (12345, "nvidia-smi"),
        ];
        for (code, word) in remedies {
            let finding = missing(no_start(code), &Machine::new());
            assert_eq!(finding.verdict, Verdict::Fail);
            assert!(finding.found.contains(&code.to_string()) && finding.remedy.contains(word), "{finding:?}");
        }
    }

    #[test]
    fn no_device_names_the_variable_that_hides_them_all() {
        for without in [NoDriver::NoGpu, no_start(NO_DEVICE)] {
            let empty = missing(without.clone(), &Machine::new().with_variable(VISIBLE, ""));
            assert_eq!(empty.verdict, Verdict::Note);
            assert!(empty.found.contains("CUDA_VISIBLE_DEVICES= is empty"), "{empty:?}");
            let wrong = missing(without.clone(), &Machine::new().with_variable(VISIBLE, "7"));
            assert!(wrong.found.contains("CUDA_VISIBLE_DEVICES=7 names no GPU"), "{wrong:?}");
            assert!(wrong.remedy.contains("unset CUDA_VISIBLE_DEVICES"), "{wrong:?}");
            let boxed = missing(without.clone(), &Machine::new().with("/.dockerenv", ""));
            assert!(boxed.remedy.contains("--gpus"), "{boxed:?}");
            assert!(missing(without, &Machine::new()).remedy.contains("nvidia-smi -L"));
        }
    }

    #[test]
    fn other_failures_of_the_driver_are_told_too() {
        let lacking = missing(NoDriver::NoFunction { name: "cuInit" }, &Machine::new());
        assert!(lacking.found.contains("cuInit") && lacking.verdict == Verdict::Fail, "{lacking:?}");
        let answer = "cuDeviceGetCount answers 3 X".to_owned();
        assert!(missing(NoDriver::NoAnswer { answer }, &Machine::new()).found.contains("answers 3 X"));
        assert_eq!(findings(&Err(NoDriver::NotBuilt), &Machine::new().system), []);
    }
}
