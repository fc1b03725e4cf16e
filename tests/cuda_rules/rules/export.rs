//! What may be exported as a legacy handle, and what the handle is.

use super::{BLOCK, LAZY_PEER_ACCESS, rules, said, said_and};
use crate::peer::Stage;
use crate::wire::Ask;

rules![
    export_of_base,
    export_again,
    export_of_interior_pointer,
    export_of_freed_memory,
    export_of_ordered_memory,
    export_of_pinned_host_memory,
    export_of_vmm_memory,
    export_of_imported_memory,
    handle_after_free_and_new_alloc,
];

fn export_of_base(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    said(&peer.ask(Ask::Export { pointer }))
}

fn export_again(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    let first = peer.bytes(Ask::Export { pointer });
    let second = peer.ask(Ask::Export { pointer });
    said_and(&second, second.bytes == first, "the same handle")
}

fn export_of_interior_pointer(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    said(&peer.ask(Ask::Export { pointer: pointer + 512 }))
}

fn export_of_freed_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: 16 * BLOCK });
    peer.ok(Ask::Free { pointer });
    said(&peer.ask(Ask::Export { pointer }))
}

fn export_of_ordered_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::AllocOrdered { bytes: BLOCK });
    said(&peer.ask(Ask::Export { pointer }))
}

fn export_of_pinned_host_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::AllocHost { bytes: BLOCK });
    said(&peer.ask(Ask::Export { pointer }))
}

fn export_of_vmm_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let handle = peer.get(Ask::Create { bytes: BLOCK, exportable: true });
    let pointer = peer.get(Ask::Reserve { bytes: BLOCK });
    peer.ok(Ask::Map { pointer, bytes: BLOCK, handle });
    peer.ok(Ask::Access { pointer, bytes: BLOCK, writable: true });
    said(&peer.ask(Ask::Export { pointer }))
}

fn export_of_imported_memory(stage: &Stage) -> String {
    let (owner, importer) = (stage.peer(), stage.peer());
    let pointer = owner.get(Ask::Alloc { bytes: BLOCK });
    let handle = owner.bytes(Ask::Export { pointer });
    let pointer = importer.get(Ask::Open { handle, flags: LAZY_PEER_ACCESS });
    said(&importer.ask(Ask::Export { pointer }))
}

fn handle_after_free_and_new_alloc(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    let before = peer.bytes(Ask::Export { pointer });
    peer.ok(Ask::Free { pointer });
    // Usually the same address; the rule holds for any.
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    let after = peer.ask(Ask::Export { pointer });
    said_and(&after, after.bytes != before, "another handle")
}
