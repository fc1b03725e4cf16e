use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::responder::SessionLink;
use super::state::State;
use crate::lane::LaneCounts;
use crate::protocol::{LaneReport, RunStatus, SessionReport, Status};
use crate::service::Service;

impl State {
    pub(super) fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.clock.uptime_s(),
            address: self.address.clone(),
            sessions: self.session_reports(),
            models: self.registry.reports(),
            weights: self.weights.reports(self),
            lanes: self.lane_reports(),
            runs: self.run_statuses(),
            stacks: self.adapters.reports(),
            requests: self.metrics.requests.get(),
            faults: self.metrics.faults.get(),
            refused: self.metrics.refused.get(),
            sessions_lost: self.metrics.sessions_lost.get(),
        }
    }

    pub(super) fn session_reports(&self) -> Vec<SessionReport> {
        self.sessions.all().iter().filter_map(|link| session_report(link)).collect()
    }

    pub(super) fn run_statuses(&self) -> Vec<RunStatus> {
        let sessions = self.sessions.all();
        let of = |link: &Arc<SessionLink>| link.open.get().map(|open| open.runs.statuses(link.id()));
        sessions.iter().filter_map(of).flatten().collect()
    }

    pub(super) fn lane_reports(&self) -> Vec<LaneReport> {
        let report = |(service, counts, permitted): (Service, LaneCounts, _)| {
            Some(LaneReport {
                service,
                device: self.registry.device(service)?.to_owned(),
                queued: counts.queued as u64,
                capacity: counts.capacity as u64,
                busy: counts.busy,
                completed: counts.completed,
                batches: counts.batches,
                permitted,
            })
        };
        let lanes = [
            (Service::Vae, self.vae_lane.counts(), self.permits.holder()),
            (Service::Unet, self.unet_lane.counts(), None),
            (Service::Clip, self.clip_lane.counts(), None),
        ];
        lanes.into_iter().filter_map(report).collect()
    }
}

fn session_report(link: &SessionLink) -> Option<SessionReport> {
    let open = link.open.get()?;
    let memory = open.memories.counts();
    let mut rungs = vec![open.rung.clone()];
    rungs.extend(open.memories.gpu_rungs());
    Some(SessionReport {
        id: link.id(),
        name: open.name.clone(),
        pid: link.peer.pid,
        uid: link.peer.uid,
        rungs,
        leases: memory.leases,
        input_slots: memory.input_slots,
        leased_bytes: memory.leased_bytes,
        arena_bytes: memory.arena_bytes,
        in_flight: link.machine.lock().in_flight() as u64,
        requests: link.answered.load(Ordering::Relaxed),
        quarantined: link.quarantined.load(Ordering::Relaxed),
    })
}
