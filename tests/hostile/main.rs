//! Peers that break every rule: each gets an error that says which, the broker lives, and nobody else notices.
#![cfg(all(target_os = "linux", feature = "cli"))]

#[path = "../support/process.rs"]
mod process;
#[path = "../support/raw.rs"]
mod raw;
#[path = "../support/scene.rs"]
mod scene;
#[path = "../support/mod.rs"]
mod support;
#[cfg(feature = "torch")]
#[path = "../support/tiny.rs"]
mod tiny;

mod descriptors;
mod files;
mod frames;
mod fuzz;
mod negotiation;

use luna_broker::{ErrorKind, Fault};

/// What a fault must be.
struct Expected {
    kind: ErrorKind,
    /// Each of these is in the message.
    says: &'static [&'static str],
    /// Whether there is something to be done about it.
    remedy: bool,
}

impl Expected {
    const fn new(kind: ErrorKind, says: &'static [&'static str]) -> Self {
        Self { kind, says, remedy: false }
    }

    const fn with_remedy(mut self) -> Self {
        self.remedy = true;
        self
    }

    fn check(&self, case: &str, fault: &Fault) {
        eprintln!("{case}: {:?}: {fault}", fault.kind);
        assert_eq!(fault.kind, self.kind, "{case}: {fault}");
        for part in self.says {
            assert!(fault.message.contains(part), "{case} does not say {part:?}: {fault}");
        }
        assert!(!self.remedy || !fault.remedy.is_empty(), "{case} says nothing to do: {fault}");
    }
}
