//! Events, and the order they give to work of two processes.

use super::{BLOCK, LAZY_PEER_ACCESS, rules, said, said_and};
use crate::peer::{Peer, Stage};
use crate::wire::Ask;

rules![
    interprocess_event_with_timing,
    event_handle_of_local_event,
    event_open_in_exporting_process,
    query_of_unrecorded_event,
    query_of_pending_event,
    query_of_event_recorded_again,
    wait_on_legacy_and_per_thread_streams,
    event_orders_work_of_two_processes,
    importer_may_record,
    wait_before_record,
    destroy_of_imported_event,
];

const DISABLE_TIMING: u32 = 2;
const INTERPROCESS: u32 = 4;
const SHARED: u32 = DISABLE_TIMING | INTERPROCESS;

/// One event in two processes, each with a stream.
struct SharedEvent {
    owner: Peer,
    other: Peer,
    event: u64,
    opened: u64,
    stream: u64,
    other_stream: u64,
}

impl SharedEvent {
    fn new(stage: &Stage) -> Self {
        let (owner, other) = (stage.peer(), stage.peer());
        let event = owner.get(Ask::Event { flags: SHARED });
        let handle = owner.bytes(Ask::ExportEvent { event });
        let opened = other.get(Ask::OpenEvent { handle });
        let (stream, other_stream) = (owner.get(Ask::Stream), other.get(Ask::Stream));
        Self { owner, other, event, opened, stream, other_stream }
    }
}

fn interprocess_event_with_timing(stage: &Stage) -> String {
    said(&stage.peer().ask(Ask::Event { flags: INTERPROCESS }))
}

fn event_handle_of_local_event(stage: &Stage) -> String {
    let peer = stage.peer();
    let event = peer.get(Ask::Event { flags: DISABLE_TIMING });
    said(&peer.ask(Ask::ExportEvent { event }))
}

fn event_open_in_exporting_process(stage: &Stage) -> String {
    let peer = stage.peer();
    let event = peer.get(Ask::Event { flags: SHARED });
    let handle = peer.bytes(Ask::ExportEvent { event });
    said(&peer.ask(Ask::OpenEvent { handle }))
}

fn query_of_unrecorded_event(stage: &Stage) -> String {
    let peer = stage.peer();
    let event = peer.get(Ask::Event { flags: SHARED });
    said(&peer.ask(Ask::Query { event }))
}

fn query_of_pending_event(stage: &Stage) -> String {
    let shared = SharedEvent::new(stage);
    shared.owner.ok(Ask::ShutGate { stream: shared.stream });
    shared.owner.ok(Ask::Record { event: shared.event, stream: shared.stream });
    let pending = shared.other.ask(Ask::Query { event: shared.opened });
    shared.owner.ok(Ask::OpenGate);
    shared.other.ok(Ask::AwaitEvent { event: shared.opened });
    let done = shared.other.ask(Ask::Query { event: shared.opened });
    said_and(&pending, done.code == 0, "reached once the work before it is done")
}

fn query_of_event_recorded_again(stage: &Stage) -> String {
    let shared = SharedEvent::new(stage);
    shared.owner.ok(Ask::Record { event: shared.event, stream: shared.stream });
    shared.other.ok(Ask::AwaitEvent { event: shared.opened });
    shared.owner.ok(Ask::ShutGate { stream: shared.stream });
    shared.owner.ok(Ask::Record { event: shared.event, stream: shared.stream });
    let pending = shared.other.ask(Ask::Query { event: shared.opened });
    shared.owner.ok(Ask::OpenGate);
    said(&pending)
}

fn wait_on_legacy_and_per_thread_streams(stage: &Stage) -> String {
    let shared = SharedEvent::new(stage);
    shared.owner.ok(Ask::Record { event: shared.event, stream: shared.stream });
    let waits = [0, 1, 2].map(|stream| shared.other.ask(Ask::Wait { stream, event: shared.opened }));
    let drained = [0, 1, 2].map(|stream| shared.other.ask(Ask::Synchronize { stream }).code);
    let all = waits.iter().all(|wait| wait.code == 0) && drained == [0; 3];
    said_and(&waits[0], all, "0, 1 and 2 are streams")
}

/// What the importer copies out of the owner's memory, having waited for the owner's event or not.
fn hand_over(stage: &Stage, wait_before_record: bool) -> (String, u8) {
    let shared = SharedEvent::new(stage);
    let pointer = shared.owner.get(Ask::Alloc { bytes: BLOCK });
    let handle = shared.owner.bytes(Ask::Export { pointer });
    let there = shared.other.get(Ask::Open { handle, flags: LAZY_PEER_ACCESS });
    let result = shared.other.get(Ask::Alloc { bytes: BLOCK });
    shared.owner.ok(Ask::Write { pointer, bytes: vec![1; 64] });

    let wait = Ask::Wait { stream: shared.other_stream, event: shared.opened };
    let copy = Ask::Copy { to: result, from: there, bytes: 64, stream: shared.other_stream };
    shared.owner.ok(Ask::ShutGate { stream: shared.stream });
    shared.owner.ok(Ask::Fill { pointer, value: 2, bytes: BLOCK, stream: shared.stream });
    let record = Ask::Record { event: shared.event, stream: shared.stream };
    let waited = if wait_before_record {
        let waited = shared.other.ask(wait);
        shared.owner.ok(record);
        shared.other.ok(copy);
        // Would not return before the gate opens if the wait were for the later record.
        shared.other.ok(Ask::Synchronize { stream: shared.other_stream });
        shared.owner.ok(Ask::OpenGate);
        waited
    } else {
        shared.owner.ok(record);
        let waited = shared.other.ask(wait);
        shared.other.ok(copy);
        shared.owner.ok(Ask::OpenGate);
        shared.other.ok(Ask::Synchronize { stream: shared.other_stream });
        waited
    };
    (said(&waited), shared.other.bytes(Ask::Read { pointer: result, bytes: 1 })[0])
}

fn event_orders_work_of_two_processes(stage: &Stage) -> String {
    let (waited, byte) = hand_over(stage, false);
    format!("{waited}; {}", if byte == 2 { "the new bytes" } else { "the old bytes" })
}

fn wait_before_record(stage: &Stage) -> String {
    let (waited, byte) = hand_over(stage, true);
    format!("{waited}; {}", if byte == 2 { "the new bytes" } else { "the old bytes" })
}

fn importer_may_record(stage: &Stage) -> String {
    let shared = SharedEvent::new(stage);
    shared.other.ok(Ask::ShutGate { stream: shared.other_stream });
    let recorded = shared.other.ask(Ask::Record { event: shared.opened, stream: shared.other_stream });
    let pending = shared.owner.ask(Ask::Query { event: shared.event });
    shared.other.ok(Ask::OpenGate);
    shared.owner.ok(Ask::AwaitEvent { event: shared.event });
    said_and(&recorded, pending.code == 600, "the owner waits for it")
}

fn destroy_of_imported_event(stage: &Stage) -> String {
    let shared = SharedEvent::new(stage);
    let destroyed = shared.other.ask(Ask::DestroyEvent { event: shared.opened });
    shared.owner.ok(Ask::Record { event: shared.event, stream: shared.stream });
    let used = shared.owner.ask(Ask::AwaitEvent { event: shared.event });
    said_and(&destroyed, used.code == 0, "the owner uses it on")
}
