use std::collections::BTreeMap;

use super::super::state::State;
use super::diverged::Diverged;
use super::loading::Weights;
use super::set::Known;
use crate::id::{ContentDigest, SessionId, WeightSetId};
use crate::metrics::WeightsNow;
use crate::model::weights::WeightPlan;
use crate::protocol::{HolderReport, WeightReport, WeightState};

/// A session as its weights' reports speak of it.
struct Holder {
    name: String,
    pid: Option<u32>,
}

impl Weights {
    /// Device and size of each set, without a look at any process.
    pub(in crate::broker) fn each_set(&self, mut visit: impl FnMut(&str, &WeightsNow)) {
        for known in self.lock().table.sets() {
            let bytes = known.set.plan.size_bytes;
            let holds = known.by_session().len() as u64;
            let saved_bytes = saved_bytes(bytes, holds);
            visit(&known.set.place.name(), &WeightsNow { sets: 1, bytes, saved_bytes, holds });
        }
    }

    /// All sets, and those on their way.
    pub(in crate::broker) fn reports(&self, state: &State) -> Vec<WeightReport> {
        let holders: BTreeMap<SessionId, Holder> = state
            .sessions
            .all()
            .iter()
            .filter_map(|link| Some((link.id(), Holder { name: link.open.get()?.name.clone(), pid: link.peer.pid })))
            .collect();
        let inner = self.lock();
        let mut reports: Vec<(WeightReport, Option<u64>)> =
            inner.table.sets().map(|known| (report(known, &holders), known.set.memory.inode)).collect();
        let loading = Self::loads(&inner).map(|wanted| WeightReport {
            id: WeightSetId(0),
            names: Vec::new(),
            path: wanted.origin.shown(),
            content: ContentDigest([0; 32]),
            dtypes: dtypes(&wanted.plan),
            device: wanted.place.name(),
            bytes: wanted.plan.size_bytes,
            saved_bytes: 0,
            state: WeightState::Loading,
            holders: Vec::new(),
        });
        reports.extend(loading.map(|report| (report, None)));
        drop(inner);
        // Looking at other processes takes its time: nobody waits for it.
        let mut diverged = Diverged::default();
        let mut look = |(mut report, inode): (WeightReport, Option<u64>)| {
            if let Some(inode) = inode {
                for holder in &mut report.holders {
                    holder.diverged_bytes = holder.pid.and_then(|pid| diverged.of(pid, inode));
                }
            }
            report
        };
        reports.into_iter().map(&mut look).collect()
    }
}

/// What sessions beyond the first would take with copies of their own.
fn saved_bytes(bytes: u64, sessions: u64) -> u64 {
    bytes.saturating_mul(sessions.saturating_sub(1))
}

fn report(known: &Known, sessions: &BTreeMap<SessionId, Holder>) -> WeightReport {
    let set = &known.set;
    let by_session = known.by_session();
    let holders = by_session.iter().map(|(session, attachments)| HolderReport {
        session: *session,
        name: sessions.get(session).map(|holder| holder.name.clone()).unwrap_or_default(),
        pid: sessions.get(session).and_then(|holder| holder.pid),
        attachments: *attachments,
        diverged_bytes: None,
    });
    let path = known.files.first().map(|file| file.path().to_string_lossy().into_owned());
    WeightReport {
        id: set.id,
        names: known.published.iter().chain(known.variant_of.keys()).chain(&known.names).cloned().collect(),
        path: path.unwrap_or_default(),
        content: set.content,
        dtypes: dtypes(&set.plan),
        device: set.place.name(),
        bytes: set.plan.size_bytes,
        saved_bytes: saved_bytes(set.plan.size_bytes, by_session.len() as u64),
        state: known.state,
        holders: holders.collect(),
    }
}

fn dtypes(plan: &WeightPlan) -> Vec<(String, u64)> {
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for tensor in &plan.tensors {
        *counts.entry(tensor.meta.dtype.name()).or_default() += 1;
    }
    counts.into_iter().map(|(name, count)| (name.to_owned(), count)).collect()
}
