//! Contexts, allocations and host memory of one process.

use super::{BLOCK, rules, said, said_and};
use crate::peer::Stage;
use crate::wire::Ask;

rules![
    call_before_init,
    alloc_without_context,
    alloc_of_nothing,
    range_of_interior_pointer,
    range_of_freed_pointer,
    free_of_interior_pointer,
    free_twice,
    copy_to_freed_memory,
    register_twice,
    register_of_nothing,
    register_over_registered,
    unregister_twice,
    unregister_of_unregistered,
    free_of_ordered_memory,
];

fn call_before_init(stage: &Stage) -> String {
    said(&stage.bare_peer(&[]).ask(Ask::Count))
}

fn alloc_without_context(stage: &Stage) -> String {
    let peer = stage.peer();
    peer.ok(Ask::NoContext);
    said(&peer.ask(Ask::Alloc { bytes: BLOCK }))
}

fn alloc_of_nothing(stage: &Stage) -> String {
    said(&stage.peer().ask(Ask::Alloc { bytes: 0 }))
}

fn range_of_interior_pointer(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    let range = peer.ask(Ask::Range { pointer: pointer + 4096 });
    said_and(&range, range.numbers == [pointer, BLOCK as u64], "base and size of the allocation")
}

fn range_of_freed_pointer(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: 16 * BLOCK });
    peer.ok(Ask::Free { pointer });
    said(&peer.ask(Ask::Range { pointer }))
}

fn free_of_interior_pointer(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    said(&peer.ask(Ask::Free { pointer: pointer + 512 }))
}

fn free_twice(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: BLOCK });
    peer.ok(Ask::Free { pointer });
    said(&peer.ask(Ask::Free { pointer }))
}

fn copy_to_freed_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::Alloc { bytes: 16 * BLOCK });
    let source = peer.get(Ask::Alloc { bytes: BLOCK });
    let stream = peer.get(Ask::Stream);
    peer.ok(Ask::Free { pointer });
    said(&peer.ask(Ask::Copy { to: pointer, from: source, bytes: 64, stream }))
}

fn register_twice(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::HostBuffer { bytes: BLOCK });
    peer.ok(Ask::Register { pointer, bytes: BLOCK });
    said(&peer.ask(Ask::Register { pointer, bytes: BLOCK }))
}

fn register_of_nothing(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::HostBuffer { bytes: BLOCK });
    said(&peer.ask(Ask::Register { pointer, bytes: 0 }))
}

fn register_over_registered(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::HostBuffer { bytes: 2 * BLOCK });
    peer.ok(Ask::Register { pointer, bytes: BLOCK });
    said(&peer.ask(Ask::Register { pointer, bytes: 2 * BLOCK }))
}

fn unregister_twice(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::HostBuffer { bytes: BLOCK });
    peer.ok(Ask::Register { pointer, bytes: BLOCK });
    peer.ok(Ask::Unregister { pointer });
    said(&peer.ask(Ask::Unregister { pointer }))
}

fn unregister_of_unregistered(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::HostBuffer { bytes: BLOCK });
    said(&peer.ask(Ask::Unregister { pointer }))
}

fn free_of_ordered_memory(stage: &Stage) -> String {
    let peer = stage.peer();
    let pointer = peer.get(Ask::AllocOrdered { bytes: BLOCK });
    said(&peer.ask(Ask::Free { pointer }))
}
