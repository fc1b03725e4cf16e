//! Mistakes in ordering must show on the substitute: a wait that is left out yields old bytes.

use crate::peer::Stage;
use crate::wire::Ask;

const BYTES: usize = 2 << 20;
const SHARED_EVENT: u32 = 6;

/// The owner fills its memory, which was zeroes, and records an event, both on a slow stream; the reader copies, having
/// waited for the event or not.
fn byte_read(wait: bool) -> u8 {
    let stage = Stage::substitute();
    // Long against the few calls between the fill and the copy, even on a busy machine.
    let owner = stage.peer_with(&[("SUBSTITUTE_CUDA_DELAY_MS", "1000")]);
    let reader = stage.peer();
    let pointer = owner.get(Ask::Alloc { bytes: BYTES });
    let there = reader.get(Ask::Open { handle: owner.bytes(Ask::Export { pointer }), flags: 1 });
    let result = reader.get(Ask::Alloc { bytes: BYTES });
    let event = owner.get(Ask::Event { flags: SHARED_EVENT });
    let opened = reader.get(Ask::OpenEvent { handle: owner.bytes(Ask::ExportEvent { event }) });
    let (writing, reading) = (owner.get(Ask::Stream), reader.get(Ask::Stream));

    owner.ok(Ask::Fill { pointer, value: 2, bytes: BYTES, stream: writing });
    owner.ok(Ask::Record { event, stream: writing });
    if wait {
        reader.ok(Ask::Wait { stream: reading, event: opened });
    }
    reader.ok(Ask::Copy { to: result, from: there, bytes: 64, stream: reading });
    reader.ok(Ask::Synchronize { stream: reading });
    reader.bytes(Ask::Read { pointer: result, bytes: 1 })[0]
}

#[test]
fn a_wait_left_out_reads_old_bytes() {
    assert_eq!(byte_read(false), 0);
}

#[test]
fn a_wait_reads_new_bytes() {
    assert_eq!(byte_read(true), 2);
}
