//! Legacy handles in the process that opens them.

use super::{BLOCK, LAZY_PEER_ACCESS, rules, said, said_and};
use crate::peer::{Peer, Stage};
use crate::wire::{Answer, Ask};

rules![
    open_in_exporting_process,
    open_with_other_flags,
    open_without_context,
    open_again,
    open_after_owner_freed,
    open_after_owner_ended,
    bytes_cross_both_ways,
    range_after_import,
    closed_as_often_as_opened,
    close_once_too_often,
    close_of_own_memory,
    close_leaves_others_alone,
    free_of_imported_memory,
    memory_after_close,
];

/// Memory of one process, and another in which it may be opened.
struct Shared {
    owner: Peer,
    importer: Peer,
    pointer: u64,
    handle: Vec<u8>,
}

impl Shared {
    fn new(stage: &Stage) -> Self {
        let (owner, importer) = (stage.peer(), stage.peer());
        let pointer = owner.get(Ask::Alloc { bytes: BLOCK });
        let handle = owner.bytes(Ask::Export { pointer });
        Self { owner, importer, pointer, handle }
    }

    fn ask_open(&self) -> Answer {
        self.importer.ask(open(&self.handle))
    }

    fn open(&self) -> u64 {
        self.importer.get(open(&self.handle))
    }
}

fn open(handle: &[u8]) -> Ask {
    Ask::Open { handle: handle.to_vec(), flags: LAZY_PEER_ACCESS }
}

fn open_in_exporting_process(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    said(&shared.owner.ask(open(&shared.handle)))
}

fn open_with_other_flags(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    said(&shared.importer.ask(Ask::Open { handle: shared.handle.clone(), flags: 0 }))
}

fn open_without_context(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    shared.importer.ok(Ask::NoContext);
    said(&shared.ask_open())
}

fn open_again(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let first = shared.open();
    let second = shared.ask_open();
    said_and(&second, second.numbers == [first], "the same pointer")
}

fn open_after_owner_freed(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    shared.owner.ok(Ask::Free { pointer: shared.pointer });
    said(&shared.ask_open())
}

fn open_after_owner_ended(stage: &Stage) -> String {
    let Shared { owner, importer, handle, .. } = Shared::new(stage);
    owner.kill();
    said(&importer.ask(open(&handle)))
}

fn bytes_cross_both_ways(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    shared.owner.ok(Ask::Write { pointer: shared.pointer + 4096, bytes: vec![7; 64] });
    let seen = shared.importer.ask(Ask::Read { pointer: there + 4096, bytes: 64 });
    shared.importer.ok(Ask::Write { pointer: there + BLOCK as u64 - 64, bytes: vec![9; 64] });
    let back = shared.owner.bytes(Ask::Read { pointer: shared.pointer + BLOCK as u64 - 64, bytes: 64 });
    said_and(&seen, seen.bytes == [7; 64] && back == [9; 64], "both see what the other wrote")
}

fn range_after_import(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    let range = shared.importer.ask(Ask::Range { pointer: there + 4096 });
    said_and(&range, range.numbers == [there, BLOCK as u64], "base and size of the allocation")
}

fn closed_as_often_as_opened(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    shared.open();
    shared.owner.ok(Ask::Write { pointer: shared.pointer, bytes: vec![3; 64] });
    let closed = shared.importer.ask(Ask::Close { pointer: there });
    let seen = shared.importer.bytes(Ask::Read { pointer: there, bytes: 64 });
    said_and(&closed, seen == [3; 64], "still mapped after one close of two")
}

fn close_once_too_often(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    shared.importer.ok(Ask::Close { pointer: there });
    said(&shared.importer.ask(Ask::Close { pointer: there }))
}

fn close_of_own_memory(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    said(&shared.owner.ask(Ask::Close { pointer: shared.pointer }))
}

fn close_leaves_others_alone(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    let third = stage.peer();
    let elsewhere = third.get(open(&shared.handle));
    shared.owner.ok(Ask::Write { pointer: shared.pointer, bytes: vec![5; 64] });
    let closed = shared.importer.ask(Ask::Close { pointer: there });
    let seen = third.bytes(Ask::Read { pointer: elsewhere, bytes: 64 });
    let own = shared.owner.bytes(Ask::Read { pointer: shared.pointer, bytes: 64 });
    said_and(&closed, seen == [5; 64] && own == [5; 64], "owner and other importers read on")
}

fn free_of_imported_memory(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    said(&shared.importer.ask(Ask::Free { pointer: there }))
}

fn memory_after_close(stage: &Stage) -> String {
    let shared = Shared::new(stage);
    let there = shared.open();
    shared.importer.ok(Ask::Close { pointer: there });
    said(&shared.importer.ask(Ask::Range { pointer: there }))
}
