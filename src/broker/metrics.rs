use super::state::State;
use crate::metrics::{LaneNow, Scrape};
use crate::protocol::SessionReport;

/// A device of a client's that the broker knows nothing of. Not its UUID: clients could fill a database with those they
/// make up.
const OTHER_GPU: &str = "other_gpu";

/// The host's memory, as `status` calls it.
const HOST: &str = "cpu";

impl State {
    /// What `status` tells of this process, as numbers for monitoring. Asked for often, so it looks at no other process, as
    /// the reports of weights do.
    pub(super) fn metrics_text(&self) -> String {
        let gpu = self.gpu.as_ref().map(|gpu| (gpu.uuid().to_string(), gpu.arena_bytes()));
        let scrape = Scrape::new(env!("CARGO_PKG_VERSION"), self.clock.uptime_s());
        for session in &self.session_reports() {
            add_session(&scrape, session, gpu.as_ref().map(|(uuid, _)| uuid.as_str()));
        }
        if let Some((uuid, bytes)) = &gpu {
            scrape.arenas(uuid, *bytes);
        }
        for model in self.registry.known_reports().iter().filter(|model| model.loaded) {
            scrape.model(model.service, &model.device, model.bytes);
        }
        self.weights.each_set(|device, now| scrape.weights(device, now));
        scrape.permits_expired(self.permits.expired());
        for lane in &self.lane_reports() {
            let now = LaneNow {
                queued: lane.queued,
                capacity: lane.capacity,
                running: u64::from(lane.busy),
                completed: lane.completed,
                batches: lane.batches,
            };
            scrape.lane(lane.service, &lane.device, &now);
        }
        scrape.runs(self.run_statuses().len() as u64);
        scrape.adapters(self.adapters.bytes());
        self.metrics.text(scrape)
    }
}

fn add_session(scrape: &Scrape, session: &SessionReport, gpu: Option<&str>) {
    // What a session holds counts as long as it does: also while only the end of its process is waited for.
    scrape.holding(session.leases, session.input_slots, session.leased_bytes);
    scrape.arenas(HOST, session.arena_bytes);
    if session.quarantined {
        return scrape.quarantined_session();
    }
    for rung in &session.rungs {
        let is_known = rung.device == HOST || Some(rung.device.as_str()) == gpu;
        let device = if is_known { rung.device.as_str() } else { OTHER_GPU };
        scrape.crossing(device, rung.rung, rung.reason.name());
    }
}
