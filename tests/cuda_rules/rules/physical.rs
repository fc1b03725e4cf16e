//! Memory of `cuMemCreate`: ranges, access, and crossing as a file descriptor.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::{BLOCK, rules, said, said_and};
use crate::peer::{Peer, Stage};
use crate::wire::Ask;

rules![
    vmm_create_of_odd_size,
    vmm_export_not_asked_for,
    vmm_bytes_cross_both_ways,
    vmm_file_may_be_closed_after_import,
    vmm_import_of_another_file,
    vmm_reader_reads,
    vmm_reader_cannot_write,
    vmm_outlives_its_exporter,
    vmm_release_while_mapped,
    vmm_unmap_of_a_part,
    vmm_unmap_twice,
    vmm_map_over_mapping,
    vmm_map_outside_reservation,
    vmm_range_freed_while_mapped,
    vmm_taken_down_in_order,
    vmm_free_as_plain_memory,
];

/// Memory of one process, mapped there.
struct Mapped {
    peer: Peer,
    handle: u64,
    pointer: u64,
}

impl Mapped {
    fn new(stage: &Stage) -> Self {
        let peer = stage.peer();
        let handle = peer.get(Ask::Create { bytes: BLOCK, exportable: true });
        let pointer = map(&peer, handle, true);
        Self { peer, handle, pointer }
    }

    /// The same memory in another process.
    fn import(&self, stage: &Stage, writable: bool) -> (Peer, u64) {
        let other = stage.peer();
        let (_, file) = self.peer.ok_with(Ask::ExportFile { handle: self.handle }, None);
        let file = file.expect("an export gives a descriptor");
        let handle = other.ok_with(Ask::ImportFile, Some(&file)).0.numbers[0];
        let pointer = map(&other, handle, writable);
        (other, pointer)
    }
}

fn map(peer: &Peer, handle: u64, writable: bool) -> u64 {
    let pointer = peer.get(Ask::Reserve { bytes: BLOCK });
    peer.ok(Ask::Map { pointer, bytes: BLOCK, handle });
    peer.ok(Ask::Access { pointer, bytes: BLOCK, writable });
    pointer
}

fn vmm_create_of_odd_size(stage: &Stage) -> String {
    said(&stage.peer().ask(Ask::Create { bytes: 4097, exportable: true }))
}

fn vmm_export_not_asked_for(stage: &Stage) -> String {
    let peer = stage.peer();
    let handle = peer.get(Ask::Create { bytes: BLOCK, exportable: false });
    said(&peer.ask(Ask::ExportFile { handle }))
}

fn vmm_bytes_cross_both_ways(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    let (other, there) = own.import(stage, true);
    own.peer.ok(Ask::Write { pointer: own.pointer, bytes: vec![7; 64] });
    let seen = other.ask(Ask::Read { pointer: there, bytes: 64 });
    other.ok(Ask::Write { pointer: there + 4096, bytes: vec![9; 64] });
    let back = own.peer.bytes(Ask::Read { pointer: own.pointer + 4096, bytes: 64 });
    said_and(&seen, seen.bytes == [7; 64] && back == [9; 64], "both see what the other wrote")
}

fn vmm_file_may_be_closed_after_import(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    own.peer.ok(Ask::Write { pointer: own.pointer, bytes: vec![4; 64] });
    // Neither the exporter nor the importer keeps a descriptor here.
    let (other, there) = own.import(stage, true);
    let seen = other.ask(Ask::Read { pointer: there, bytes: 64 });
    said_and(&seen, seen.bytes == [4; 64], "the exporter's bytes")
}

fn vmm_import_of_another_file(stage: &Stage) -> String {
    let file = OwnedFd::from(File::open("/dev/null").expect("every system has it"));
    said(&stage.peer().exchange(Ask::ImportFile, Some(&file)).0)
}

fn vmm_reader_reads(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    let (other, there) = own.import(stage, false);
    own.peer.ok(Ask::Write { pointer: own.pointer, bytes: vec![6; 64] });
    let seen = other.ask(Ask::Read { pointer: there, bytes: 64 });
    said_and(&seen, seen.bytes == [6; 64], "the exporter's bytes")
}

fn vmm_reader_cannot_write(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    let (other, there) = own.import(stage, false);
    let refused = other.ask(Ask::Write { pointer: there, bytes: vec![6; 64] });
    let kept = own.peer.bytes(Ask::Read { pointer: own.pointer, bytes: 64 });
    said_and(&refused, kept != [6; 64], "the memory unchanged")
}

fn vmm_outlives_its_exporter(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    own.peer.ok(Ask::Write { pointer: own.pointer, bytes: vec![8; 64] });
    let (other, there) = own.import(stage, true);
    own.peer.kill();
    let seen = other.ask(Ask::Read { pointer: there, bytes: 64 });
    said_and(&seen, seen.bytes == [8; 64], "the exporter's bytes")
}

fn vmm_release_while_mapped(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    own.peer.ok(Ask::Write { pointer: own.pointer, bytes: vec![2; 64] });
    let released = own.peer.ask(Ask::Release { handle: own.handle });
    let seen = own.peer.bytes(Ask::Read { pointer: own.pointer, bytes: 64 });
    said_and(&released, seen == [2; 64], "the mapping stays")
}

fn vmm_unmap_of_a_part(stage: &Stage) -> String {
    let peer = stage.peer();
    let handle = peer.get(Ask::Create { bytes: 2 * BLOCK, exportable: true });
    let pointer = peer.get(Ask::Reserve { bytes: 2 * BLOCK });
    peer.ok(Ask::Map { pointer, bytes: 2 * BLOCK, handle });
    said(&peer.ask(Ask::Unmap { pointer, bytes: BLOCK }))
}

fn vmm_unmap_twice(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    own.peer.ok(Ask::Unmap { pointer: own.pointer, bytes: BLOCK });
    said(&own.peer.ask(Ask::Unmap { pointer: own.pointer, bytes: BLOCK }))
}

fn vmm_map_over_mapping(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    said(&own.peer.ask(Ask::Map { pointer: own.pointer, bytes: BLOCK, handle: own.handle }))
}

fn vmm_map_outside_reservation(stage: &Stage) -> String {
    let peer = stage.peer();
    let handle = peer.get(Ask::Create { bytes: 2 * BLOCK, exportable: true });
    let pointer = peer.get(Ask::Reserve { bytes: BLOCK });
    said(&peer.ask(Ask::Map { pointer, bytes: 2 * BLOCK, handle }))
}

fn vmm_range_freed_while_mapped(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    said(&own.peer.ask(Ask::FreeRange { pointer: own.pointer, bytes: BLOCK }))
}

fn vmm_taken_down_in_order(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    own.peer.ok(Ask::Unmap { pointer: own.pointer, bytes: BLOCK });
    own.peer.ok(Ask::Release { handle: own.handle });
    said(&own.peer.ask(Ask::FreeRange { pointer: own.pointer, bytes: BLOCK }))
}

fn vmm_free_as_plain_memory(stage: &Stage) -> String {
    let own = Mapped::new(stage);
    said(&own.peer.ask(Ask::Free { pointer: own.pointer }))
}
