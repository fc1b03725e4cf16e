use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::adapters::Adapters;
use super::clock::Clock;
use super::gpu::BrokerGpu;
use super::jobs::{ClipWork, UnetWork, VaeWork};
use super::permits::Permits;
use super::prompts::Prompts;
use super::registry::Registry;
use super::responder::SessionLink;
use super::weights::Weights;
use crate::config::BrokerConfig;
use crate::id::{Epoch, SessionId};
use crate::lane::Lane;
use crate::metrics::Metrics;

/// What every session and lane of one broker shares.
#[derive(Debug)]
pub(super) struct State {
    pub(super) config: BrokerConfig,
    pub(super) address: String,
    pub(super) epoch: Epoch,
    pub(super) clock: Clock,
    pub(super) registry: Arc<Registry>,
    pub(super) vae_lane: Lane<VaeWork>,
    pub(super) unet_lane: Lane<UnetWork>,
    pub(super) clip_lane: Lane<ClipWork>,
    pub(super) prompts: Prompts,
    pub(super) permits: Arc<Permits>,
    pub(super) weights: Arc<Weights>,
    pub(super) adapters: Arc<Adapters>,
    /// Bytes of the model being loaded that are in place.
    pub(super) loading: Arc<AtomicU64>,
    /// Outlives the state: a session is counted until nothing of it is left.
    pub(super) sessions: Arc<Sessions>,
    pub(super) metrics: Metrics,
    pub(super) arena_ids: Arc<AtomicU32>,
    /// Absent on the CPU.
    pub(super) gpu: Option<BrokerGpu>,
    pub(super) stopping: AtomicBool,
}

/// The connections being served, negotiated or not.
#[derive(Debug, Default)]
pub(super) struct Sessions {
    next: AtomicU64,
    open: Mutex<HashMap<SessionId, Member>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Member {
    link: Arc<SessionLink>,
    /// Decided once, when it came.
    has_room: bool,
}

impl Sessions {
    pub(super) fn next_id(&self) -> SessionId {
        SessionId(self.next.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Adds a connection; whether it is one of the `limit` that are served. One that is not stays until it has been
    /// told, and takes nobody's place.
    pub(super) fn add(&self, link: &Arc<SessionLink>, limit: usize) -> bool {
        let mut open = self.open.lock();
        // A session that only waits for its process to end serves nobody.
        let is_served = |member: &&Member| member.has_room && !member.link.quarantined.load(Ordering::Relaxed);
        let has_room = open.values().filter(is_served).count() < limit;
        open.insert(link.id(), Member { link: Arc::clone(link), has_room });
        has_room
    }

    pub(super) fn remove(&self, id: SessionId) {
        self.open.lock().remove(&id);
        self.changed.notify_all();
    }

    /// The sessions at this moment, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<SessionLink>> {
        let mut all: Vec<_> = self.open.lock().values().map(|member| Arc::clone(&member.link)).collect();
        all.sort_by_key(|link| link.id());
        all
    }

    /// Waits until no session is left, or `limit` has passed.
    pub(super) fn wait_empty(&self, limit: std::time::Duration) {
        let deadline = std::time::Instant::now() + limit;
        let mut open = self.open.lock();
        while !open.is_empty() {
            if self.changed.wait_until(&mut open, deadline).timed_out() {
                tracing::warn!(left = open.len(), "sessions were still open when the broker stopped");
                return;
            }
        }
    }
}
