//! Who may use which bytes. Pure: no memory is touched here, only offsets.

mod ledger;
mod slots;

pub use ledger::{Grant, Ledger, LedgerError, Pin};
pub use slots::SlotAllocator;
