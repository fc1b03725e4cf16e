use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const ALICE: SessionId = SessionId(1);
const BOB: SessionId = SessionId(2);

fn ledger() -> Ledger {
    let mut ledger = Ledger::new();
    ledger.add_arena(ArenaId(0), 4096, 512);
    ledger
}

#[test]
fn a_released_lease_is_stale_even_when_its_slot_is_in_use_again() {
    let mut ledger = ledger();
    let first = ledger.acquire(ALICE, 512).unwrap();
    ledger.release(ALICE, first.address).unwrap();
    let second = ledger.acquire(ALICE, 512).unwrap();
    assert_eq!(second.offset, first.offset, "the slot is reused");
    assert!(matches!(ledger.release(ALICE, first.address), Err(LedgerError::Stale { .. })));
    assert!(matches!(ledger.pin(ALICE, first.address, first.offset, 1), Err(LedgerError::Stale { .. })));
    assert_eq!(ledger.held(ALICE), (1, 512));
}

#[test]
fn a_lease_can_be_used_by_its_holder_only() {
    let mut ledger = ledger();
    let grant = ledger.acquire(ALICE, 512).unwrap();
    assert!(matches!(ledger.release(BOB, grant.address), Err(LedgerError::NotHolder { .. })));
    assert!(matches!(ledger.pin(BOB, grant.address, grant.offset, 1), Err(LedgerError::NotHolder { .. })));
}

#[test]
fn a_pin_must_lie_inside_its_slot() {
    let mut ledger = ledger();
    ledger.acquire(ALICE, 512).unwrap();
    let grant = ledger.acquire(ALICE, 512).unwrap();
    for (offset, length) in
        [(0, 512), (grant.offset, 513), (grant.offset + 512, 1), (u64::MAX, 2), (grant.offset, u64::MAX)]
    {
        let refused = ledger.pin(ALICE, grant.address, offset, length);
        assert!(matches!(refused, Err(LedgerError::OutOfBounds { .. })), "{offset} {length}");
    }
    let pin = ledger.pin(ALICE, grant.address, grant.offset + 500, 12).unwrap();
    ledger.unpin(pin);
}

#[test]
fn a_slot_released_under_a_running_job_is_reused_only_after_the_job() {
    let mut ledger = ledger();
    let grant = ledger.acquire(ALICE, 4096).unwrap();
    let pin = ledger.pin(ALICE, grant.address, 0, 4096).unwrap();
    ledger.release(ALICE, grant.address).unwrap();
    assert_eq!(ledger.held(ALICE), (0, 0));
    assert_eq!(ledger.acquire(BOB, 1), None, "limbo: neither the old holder's nor free");
    assert!(matches!(ledger.release(ALICE, grant.address), Err(LedgerError::Stale { .. })));
    ledger.unpin(pin);
    assert!(ledger.acquire(BOB, 4096).is_some());
}

#[test]
fn a_dead_session_leaves_nothing_but_what_its_running_jobs_use() {
    let mut ledger = ledger();
    let pinned = ledger.acquire(ALICE, 512).unwrap();
    let pin = ledger.pin(ALICE, pinned.address, pinned.offset, 512).unwrap();
    ledger.acquire(ALICE, 512).unwrap();
    let others = ledger.acquire(BOB, 512).unwrap();
    assert_eq!(ledger.reap(ALICE), 2);
    assert_eq!(ledger.used_bytes(), 1024);
    ledger.unpin(pin);
    assert_eq!(ledger.used_bytes(), 512);
    assert_eq!(ledger.held(BOB), (1, 512));
    ledger.release(BOB, others.address).unwrap();
    assert_eq!(ledger.used_bytes(), 0);
}

#[derive(Debug, Clone)]
enum Step {
    Acquire(u64, u64),
    Release(prop::sample::Index),
    Pin(prop::sample::Index),
    Unpin(prop::sample::Index),
    Reap(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let any_index = any::<prop::sample::Index>;
    prop_oneof![
        4 => (1u64..4, 1u64..2000).prop_map(|(who, length)| Step::Acquire(who, length)),
        3 => any_index().prop_map(Step::Release),
        2 => any_index().prop_map(Step::Pin),
        2 => any_index().prop_map(Step::Unpin),
        1 => (1u64..4).prop_map(Step::Reap),
    ]
}

proptest! {
    /// Against the obvious model: a map from every lease ever granted to its holder and pins.
    #[test]
    fn no_two_live_slots_overlap_and_nothing_is_lost(steps in prop::collection::vec(step(), 1..120)) {
        let mut ledger = ledger();
        ledger.add_arena(ArenaId(1), 8192, 512);
        let mut live: HashMap<LeaseRef, (Grant, Option<SessionId>, u32)> = HashMap::new();
        let mut pins: Vec<Pin> = Vec::new();
        let mut ever: Vec<LeaseRef> = Vec::new();
        for step in steps {
            match step {
                Step::Acquire(who, length) => {
                    if let Some(grant) = ledger.acquire(SessionId(who), length) {
                        prop_assert!(grant.length >= length);
                        for (other, ..) in live.values() {
                            let apart = other.address.arena != grant.address.arena
                                || other.offset + other.length <= grant.offset
                                || grant.offset + grant.length <= other.offset;
                            prop_assert!(apart, "{:?} overlaps {:?}", grant, other);
                        }
                        prop_assert!(!ever.contains(&grant.address), "an address names one use only");
                        ever.push(grant.address);
                        live.insert(grant.address, (grant, Some(SessionId(who)), 0));
                    }
                }
                Step::Release(which) if !ever.is_empty() => {
                    let address = ever[which.index(ever.len())];
                    let holder = live.get(&address).and_then(|entry| entry.1);
                    let released = ledger.release(holder.unwrap_or(ALICE), address);
                    prop_assert_eq!(released.is_ok(), holder.is_some());
                    if let Some(entry) = live.get_mut(&address) { entry.1 = None; }
                }
                Step::Pin(which) if !ever.is_empty() => {
                    let address = ever[which.index(ever.len())];
                    let entry = live.get_mut(&address);
                    let holder = entry.as_ref().and_then(|entry| entry.1);
                    let offset = entry.as_ref().map_or(0, |entry| entry.0.offset);
                    let pinned = ledger.pin(holder.unwrap_or(ALICE), address, offset, 1);
                    prop_assert_eq!(pinned.is_ok(), holder.is_some());
                    if let (Ok(pin), Some(entry)) = (pinned, entry) { entry.2 += 1; pins.push(pin); }
                }
                Step::Unpin(which) if !pins.is_empty() => {
                    let pin = pins.swap_remove(which.index(pins.len()));
                    live.get_mut(&pin.address()).unwrap().2 -= 1;
                    ledger.unpin(pin);
                }
                Step::Reap(who) => {
                    let theirs = live.values_mut().filter(|entry| entry.1 == Some(SessionId(who)));
                    let count = theirs.map(|entry| entry.1 = None).count();
                    prop_assert_eq!(ledger.reap(SessionId(who)), count as u64);
                }
                _ => {}
            }
            live.retain(|_, (_, holder, pins)| holder.is_some() || *pins > 0);
            prop_assert_eq!(ledger.used_bytes(), live.values().map(|(grant, ..)| grant.length).sum::<u64>());
            for who in 1..4 {
                let theirs = live.values().filter(|entry| entry.1 == Some(SessionId(who)));
                let expected = theirs.fold((0, 0), |sum, entry| (sum.0 + 1, sum.1 + entry.0.length));
                prop_assert_eq!(ledger.held(SessionId(who)), expected);
            }
        }
    }
}
