//! What runs leave behind in the broker's process.

use luna_broker::service::{AdapterMode, RunSettings};

use crate::process::{BrokerProcess, serve_command};
use crate::support::{Place, client_at, eventually};
use crate::{Scene, difference, values};

/// Runs before memory is looked at: allocators and caches are filled then, and stacks give way to others.
const WARM_UP: usize = 30;
const RUNS: usize = 50;
const STEPS: usize = 20;
/// Room for some stacks of the model's size, but not for those of all runs.
const ADAPTER_BYTES: u64 = 16 << 20;
/// More than an allocator's noise, and less than a stack for each run takes.
const GROWTH: u64 = 24 << 20;

/// Memory of the process's own, which no file gives.
fn anonymous_bytes(broker: &BrokerProcess) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", broker.pid())).unwrap();
    let line = rollup.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().unwrap();
    kibibytes * 1024
}

#[test]
fn runs_with_ever_new_stacks_leave_memory_flat() {
    let Some(scene) = Scene::of("sd15") else { return };
    let place = Place::new();
    let mut command = serve_command(&place.socket(), &["--adapter-bytes", &ADAPTER_BYTES.to_string()]);
    // Unused memory goes back at once, so that what is left is in use.
    command.env("MALLOC_TRIM_THRESHOLD_", "0");
    let broker = BrokerProcess::launch(command).unwrap_or_else(|said| panic!("the broker does not serve: {said}"));
    let client = client_at(&place);
    let plain = values(&scene.unet(&client).step(&scene.input()).unwrap());
    let mut made = 0;
    let mut paint = |runs: std::ops::Range<usize>| {
        for number in runs {
            // A strength that no other run has, so that each needs a stack of its own.
            let adapters = scene.stack(&format!("difference@{}", 0.5 + number as f64 / 1000.0), AdapterMode::Merged);
            let run = scene.unet(&client).run(RunSettings { adapters, ..RunSettings::default() }).unwrap();
            for step in 0..STEPS {
                let mut input = scene.step();
                if step > 0 {
                    (input.context, input.y) = (None, None);
                }
                let got = values(&run.step(&input, &[0, 1]).unwrap());
                assert!(difference(&got, &plain) > 1e-3, "run {number} has its adapters");
            }
            let stacks = client.status().unwrap().stacks;
            made += stacks.iter().map(|stack| stack.bytes).max().unwrap_or(0);
            assert!(stacks.iter().map(|stack| stack.bytes).sum::<u64>() <= ADAPTER_BYTES, "{stacks:?}");
        }
    };
    paint(0..WARM_UP);
    let before = anonymous_bytes(&broker);
    paint(WARM_UP..WARM_UP + RUNS);
    assert!(made > 2 * GROWTH, "what would be kept of {made} bytes could be seen");
    eventually("the end of all runs", || client.status().unwrap().runs.is_empty());
    let after = anonymous_bytes(&broker);
    assert!(after <= before + GROWTH, "{before} bytes before, {after} after {RUNS} runs");
    assert_eq!(values(&scene.unet(&client).step(&scene.input()).unwrap()), plain, "the model is as it was");
}
