//! Each fault that the substitute can be told to have does what its documentation says.

use crate::peer::{Peer, Stage};
use crate::wire::Ask;

const BLOCK: usize = 2 << 20;
const SHARED_EVENT: u32 = 6;

/// A handle of new memory of a process.
fn handle_of(owner: &Peer) -> (u64, Vec<u8>) {
    let pointer = owner.get(Ask::Alloc { bytes: BLOCK });
    (pointer, owner.bytes(Ask::Export { pointer }))
}

fn open(peer: &Peer, handle: &[u8]) -> u32 {
    peer.ask(Ask::Open { handle: handle.to_vec(), flags: 1 }).code
}

fn uuids(stage: &Stage, settings: &[(&str, &str)]) -> Vec<Vec<u8>> {
    let peer = stage.peer_with(settings);
    let count = peer.get(Ask::Count);
    (0..count).map(|ordinal| peer.bytes(Ask::Uuid { ordinal: ordinal as i32 })).collect()
}

#[test]
fn visible_devices_reorder_and_hide() {
    let stage = Stage::substitute();
    let two = ("SUBSTITUTE_CUDA_DEVICES", "alpha,beta");
    let all = uuids(&stage, &[two]);
    assert_eq!(all.len(), 2);
    assert_ne!(all[0], all[1]);
    assert_eq!(uuids(&stage, &[two, ("CUDA_VISIBLE_DEVICES", "1,0")]), [all[1].clone(), all[0].clone()]);
    assert_eq!(uuids(&stage, &[two, ("CUDA_VISIBLE_DEVICES", "1")]), [all[1].clone()]);
    let hex: String = all[1].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(uuids(&stage, &[two, ("CUDA_VISIBLE_DEVICES", &format!("GPU-{}", &hex[..8]))]), [all[1].clone()]);
}

#[test]
fn no_device_is_said_by_init() {
    let stage = Stage::substitute();
    assert_eq!(stage.bare_peer(&[("SUBSTITUTE_CUDA_NO_DEVICE", "1")]).ask(Ask::Init).code, 100);
    assert_eq!(stage.bare_peer(&[("CUDA_VISIBLE_DEVICES", "")]).ask(Ask::Init).code, 100);
}

#[test]
fn opens_fail_once_or_from_then_on() {
    let stage = Stage::substitute();
    let owner = stage.peer();
    let (_, handle) = handle_of(&owner);
    let codes = |setting| {
        let peer = stage.peer_with(&[("SUBSTITUTE_CUDA_FAIL_OPEN", setting)]);
        [0; 3].map(|_| open(&peer, &handle))
    };
    assert_eq!(codes("2"), [0, 205, 0]);
    assert_eq!(codes("2+"), [0, 205, 205]);
}

#[test]
fn refused_ipc_makes_handles_that_do_not_open() {
    let stage = Stage::substitute();
    let refused = [("SUBSTITUTE_CUDA_IPC", "refused")];
    let owner = stage.peer_with(&refused);
    let (_, handle) = handle_of(&owner);
    assert_eq!(open(&stage.peer_with(&refused), &handle), 400);
}

#[test]
fn refused_registration_leaves_host_memory_as_it_is() {
    let stage = Stage::substitute();
    let peer = stage.peer_with(&[("SUBSTITUTE_CUDA_HOST_REGISTER", "refused")]);
    let pointer = peer.get(Ask::HostBuffer { bytes: BLOCK });
    assert_eq!(peer.ask(Ask::Register { pointer, bytes: BLOCK }).code, 801);
    assert_eq!(peer.ask(Ask::Unregister { pointer }).code, 713);
}

#[test]
fn event_opens_fail_when_told() {
    let stage = Stage::substitute();
    let owner = stage.peer();
    let event = owner.get(Ask::Event { flags: SHARED_EVENT });
    let handle = owner.bytes(Ask::ExportEvent { event });
    let peer = stage.peer_with(&[("SUBSTITUTE_CUDA_FAIL_EVENT_OPEN", "1")]);
    assert_eq!(peer.ask(Ask::OpenEvent { handle: handle.clone() }).code, 205);
    assert_eq!(peer.ask(Ask::OpenEvent { handle }).code, 0);
}

#[test]
fn another_gpu_needs_peer_access() {
    let stage = Stage::substitute();
    let two = ("SUBSTITUTE_CUDA_DEVICES", "alpha,beta");
    let owner = stage.peer_with(&[two]);
    let (_, handle) = handle_of(&owner);
    let other = ("CUDA_VISIBLE_DEVICES", "1");
    assert_eq!(open(&stage.peer_with(&[two, other]), &handle), 217);
    assert_eq!(open(&stage.peer_with(&[two, other, ("SUBSTITUTE_CUDA_P2P", "1")]), &handle), 0);
}

#[test]
fn legacy_handles_stay_in_their_namespace_and_files_leave_it() {
    let stage = Stage::substitute();
    let owner = stage.peer_with(&[("SUBSTITUTE_CUDA_PID_NAMESPACE", "a")]);
    let other = stage.peer_with(&[("SUBSTITUTE_CUDA_PID_NAMESPACE", "b")]);
    let (_, handle) = handle_of(&owner);
    assert_eq!(open(&other, &handle), 1);
    let created = owner.get(Ask::Create { bytes: BLOCK, exportable: true });
    let (_, file) = owner.ok_with(Ask::ExportFile { handle: created }, None);
    other.ok_with(Ask::ImportFile, file.as_ref());
}

#[test]
fn corrupt_imports_show_other_memory() {
    let stage = Stage::substitute();
    let owner = stage.peer();
    let (pointer, handle) = handle_of(&owner);
    owner.ok(Ask::Write { pointer, bytes: vec![1; 64] });
    let importer = stage.peer_with(&[("SUBSTITUTE_CUDA_CORRUPT_IMPORT", "1")]);
    let there = importer.get(Ask::Open { handle, flags: 1 });
    assert_eq!(importer.bytes(Ask::Read { pointer: there, bytes: 64 }), [0; 64]);
    importer.ok(Ask::Write { pointer: there, bytes: vec![2; 64] });
    assert_eq!(owner.bytes(Ask::Read { pointer, bytes: 64 }), [1; 64]);
}

#[test]
fn vmm_is_refused_at_export_or_import() {
    let stage = Stage::substitute();
    let refusing = stage.peer_with(&[("SUBSTITUTE_CUDA_VMM", "refused")]);
    let handle = refusing.get(Ask::Create { bytes: BLOCK, exportable: true });
    assert_eq!(refusing.ask(Ask::ExportFile { handle }).code, 801);

    let owner = stage.peer();
    let handle = owner.get(Ask::Create { bytes: BLOCK, exportable: true });
    let (_, file) = owner.ok_with(Ask::ExportFile { handle }, None);
    let importer = stage.peer_with(&[("SUBSTITUTE_CUDA_FAIL_IMPORT", "1")]);
    assert_eq!(importer.exchange(Ask::ImportFile, file.as_ref()).0.code, 801);
    importer.ok_with(Ask::ImportFile, file.as_ref());
}

#[test]
fn memory_is_counted_over_the_living_processes_of_a_run() {
    let stage = Stage::substitute();
    let small = [("SUBSTITUTE_CUDA_MEMORY", "8388608")];
    let (first, second) = (stage.peer_with(&small), stage.peer_with(&small));
    let pointer = first.get(Ask::Alloc { bytes: 3 * BLOCK });
    assert_eq!(second.ask(Ask::Alloc { bytes: 2 * BLOCK }).code, 2);
    first.ok(Ask::Free { pointer });
    let pointer = second.get(Ask::Alloc { bytes: 4 * BLOCK });
    assert_eq!(first.ask(Ask::Alloc { bytes: BLOCK }).code, 2);
    second.ok(Ask::Free { pointer });
    second.ok(Ask::Alloc { bytes: 4 * BLOCK });
    second.kill();
    first.ok(Ask::Alloc { bytes: 4 * BLOCK });
}

#[test]
fn lost_events_are_reached_before_the_work_before_them() {
    let stage = Stage::substitute();
    let peer = stage.peer_with(&[("SUBSTITUTE_CUDA_LOSE_EVENTS", "1")]);
    let stream = peer.get(Ask::Stream);
    let [shared, local] = [SHARED_EVENT, 2].map(|flags| peer.get(Ask::Event { flags }));
    peer.ok(Ask::ShutGate { stream });
    peer.ok(Ask::Record { event: shared, stream });
    peer.ok(Ask::Record { event: local, stream });
    assert_eq!([shared, local].map(|event| peer.ask(Ask::Query { event }).code), [0, 600]);
    peer.ok(Ask::OpenGate);
}

#[test]
fn the_event_of_a_killed_process_counts_as_reached() {
    let stage = Stage::substitute();
    let (owner, waiter) = (stage.peer(), stage.peer());
    let event = waiter.get(Ask::Event { flags: SHARED_EVENT });
    let opened = owner.get(Ask::OpenEvent { handle: waiter.bytes(Ask::ExportEvent { event }) });
    let stream = owner.get(Ask::Stream);
    owner.ok(Ask::ShutGate { stream });
    owner.ok(Ask::Record { event: opened, stream });
    assert_eq!(waiter.ask(Ask::Query { event }).code, 600);
    owner.kill();
    waiter.ok(Ask::AwaitEvent { event });
}

#[test]
fn what_is_alive_at_the_end_is_counted_and_the_run_is_left_clean() {
    let stage = Stage::substitute();
    let (tidy, untidy) = (stage.peer(), stage.peer());
    let (pointer, handle) = handle_of(&untidy);
    let there = tidy.get(Ask::Open { handle, flags: 1 });
    let event = untidy.get(Ask::Event { flags: SHARED_EVENT });
    untidy.get(Ask::Stream);
    untidy.get(Ask::Create { bytes: BLOCK, exportable: true });
    untidy.get(Ask::Reserve { bytes: BLOCK });
    let opened = tidy.get(Ask::OpenEvent { handle: untidy.bytes(Ask::ExportEvent { event }) });
    assert_ne!(pointer, 0);
    tidy.ok(Ask::Close { pointer: there });
    tidy.ok(Ask::DestroyEvent { event: opened });
    tidy.ok(Ask::ReleaseContext);

    let (tidy, untidy) = (tidy.end(), untidy.end());
    assert!(stage.driver().leaks(tidy).values().all(|count| *count == 0), "{:?}", stage.driver().leaks(tidy));
    let left = stage.driver().leaks(untidy);
    for kind in ["allocations", "events", "streams", "vmm_handles", "reserved", "contexts"] {
        assert_eq!(left[kind], 1, "{kind} in {left:?}");
    }
    assert_eq!(left.values().sum::<u64>(), 6, "{left:?}");
    let files: Vec<_> =
        std::fs::read_dir(stage.driver().run()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(files, ["ledger"]);
}
