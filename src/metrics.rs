//! Every metric of a broker: its name, unit and labels. A label has few values, all known here or to the broker itself:
//! no names, no words of peers.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use crate::service::{CacheVerdict, Rung, Service};

/// What every name begins with.
const PREFIX: &str = "luna_broker";

type Count = Gauge<u64, AtomicU64>;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabels {
    rung: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct VerdictLabels {
    verdict: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CrossingLabels {
    device: Arc<str>,
    rung: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeviceLabels {
    device: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServiceLabels {
    service: &'static str,
    device: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EvictionLabels {
    service: &'static str,
    device: Arc<str>,
    reason: &'static str,
}

/// Why a model was unloaded that nobody asked to unload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    /// Another needed its place.
    Room,
    /// Nobody had used it for long.
    Idle,
}

impl Reason {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Room => "room",
            Self::Idle => "idle",
        }
    }
}

/// Models that were unloaded although nobody asked for that, counted by whoever unloads them.
#[derive(Debug, Clone, Default)]
pub(crate) struct Evictions(Family<EvictionLabels, Counter>);

impl Evictions {
    pub(crate) fn count(&self, service: Service, device: &str, why: Reason) {
        let labels = EvictionLabels { service: service.name(), device: device.into(), reason: why.name() };
        self.0.get_or_create(&labels).inc();
    }
}

/// What a broker counts from its start on.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Requests answered, faults included.
    pub(crate) requests: Counter,
    /// Faults among them.
    pub(crate) faults: Counter,
    /// Connections that ended before they became sessions.
    pub(crate) refused: Counter,
    /// Sessions that ended without a goodbye.
    pub(crate) sessions_lost: Counter,
    pub(crate) evictions: Evictions,
    rung_failures: Family<FailureLabels, Counter>,
    block_cache: Family<VerdictLabels, Counter>,
    block_cache_seconds: Family<VerdictLabels, Counter<f64, AtomicU64>>,
}

impl Metrics {
    /// A rung was tried and could not be had, or worked once and then no more.
    pub(crate) fn rung_failed(&self, rung: Rung, code: &'static str) {
        self.rung_failures.get_or_create(&FailureLabels { rung: rung.name(), code }).inc();
    }

    /// A step of a run with a block cache was left out, or computed for this reason, in so much time.
    pub(crate) fn block_cache(&self, verdict: CacheVerdict, took: Duration) {
        let labels = VerdictLabels { verdict: verdict.name() };
        self.block_cache.get_or_create(&labels).inc();
        self.block_cache_seconds.get_or_create(&labels).inc_by(took.as_secs_f64());
    }

    /// Everything in the text format of OpenMetrics, which Prometheus reads. To a reader of its own older format, as in
    /// node_exporter, the samples are the same and gauges are gauges, but counters have no type: it looks for a TYPE line
    /// with `_total` in the name. No type of metric is used that it does not know.
    pub(crate) fn text(&self, now: Scrape) -> String {
        let mut registry = Registry::with_prefix(PREFIX);
        let counters = [
            ("requests", "Requests answered, faults included", &self.requests),
            ("faults", "Requests answered with a fault", &self.faults),
            ("refused_connections", "Connections that ended before they became sessions", &self.refused),
            ("lost_sessions", "Sessions that ended without a goodbye", &self.sessions_lost),
        ];
        for (name, help, counter) in counters {
            registry.register(name, help, counter.clone());
        }
        let help = "Rungs that were tried and could not be had, or worked no more, by what stopped them";
        registry.register("rung_failures", help, self.rung_failures.clone());
        let help = "Steps of runs with a block cache: left out (hit), or computed and why";
        registry.register("block_cache_steps", help, self.block_cache.clone());
        let help = "Seconds that these steps took; the mean of computed ones beside that of hits is the speed-up";
        registry.register("block_cache_step_seconds", help, self.block_cache_seconds.clone());
        let help = "Models that were unloaded because others needed their place, or nobody had used them for long";
        registry.register("model_evictions", help, self.evictions.0.clone());
        now.register(&mut registry);
        let mut text = String::new();
        // Writing to a string cannot fail.
        _ = text::encode(&mut text, &registry);
        text
    }
}

/// What a lane does at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaneNow {
    /// Requests waiting.
    pub(crate) queued: u64,
    /// Most requests that may wait.
    pub(crate) capacity: u64,
    /// Requests running.
    pub(crate) running: u64,
    /// Requests it has run.
    pub(crate) completed: u64,
    /// How often it ran some, one or several at once.
    pub(crate) batches: u64,
}

/// Weights that clients map at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WeightsNow {
    /// Sets of tensors.
    pub(crate) sets: u64,
    /// Their size.
    pub(crate) bytes: u64,
    /// What copies for each session would take beyond that.
    pub(crate) saved_bytes: u64,
    /// Sessions that hold a set, once for each set.
    pub(crate) holds: u64,
}

/// A broker's state at one moment. Made anew for each text, so that what is gone leaves no series behind.
#[derive(Debug, Default)]
pub(crate) struct Scrape {
    build: Family<BuildLabels, Count>,
    uptime: Gauge<f64, AtomicU64>,
    crossings: Family<CrossingLabels, Count>,
    quarantined: Count,
    leases: Count,
    input_slots: Count,
    leased: Count,
    arenas: Family<DeviceLabels, Count>,
    models: Family<ServiceLabels, Count>,
    model_bytes: Family<ServiceLabels, Count>,
    weight_sets: Family<DeviceLabels, Count>,
    weights: Family<DeviceLabels, Count>,
    weights_saved: Family<DeviceLabels, Count>,
    weight_holds: Family<DeviceLabels, Count>,
    permits_expired: Counter,
    lane_queued: Family<ServiceLabels, Count>,
    lane_capacity: Family<ServiceLabels, Count>,
    lane_running: Family<ServiceLabels, Count>,
    lane_completed: Family<ServiceLabels, Counter>,
    lane_batches: Family<ServiceLabels, Counter>,
    runs: Count,
    adapters: Count,
}

impl Scrape {
    pub(crate) fn new(version: &str, uptime_s: f64) -> Self {
        let scrape = Self::default();
        scrape.build.get_or_create(&BuildLabels { version: version.to_owned() }).set(1);
        scrape.uptime.set(uptime_s);
        scrape
    }

    /// A session's tensors of `device` cross on `rung`, for the reason of that name.
    pub(crate) fn crossing(&self, device: &str, rung: Rung, reason: &'static str) {
        self.crossings.get_or_create(&CrossingLabels { device: device.into(), rung: rung.name(), reason }).inc();
    }

    /// A session that is over and whose GPU memory waits for the end of its process.
    pub(crate) fn quarantined_session(&self) {
        self.quarantined.inc();
    }

    /// What one session holds.
    pub(crate) fn holding(&self, leases: u64, input_slots: u64, bytes: u64) {
        self.leases.inc_by(leases);
        self.input_slots.inc_by(input_slots);
        self.leased.inc_by(bytes);
    }

    /// Arenas on `device`.
    pub(crate) fn arenas(&self, device: &str, bytes: u64) {
        self.arenas.get_or_create(&DeviceLabels { device: device.into() }).inc_by(bytes);
    }

    /// A model in memory.
    pub(crate) fn model(&self, service: Service, device: &str, bytes: u64) {
        let labels = ServiceLabels { service: service.name(), device: device.into() };
        self.models.get_or_create(&labels).inc();
        self.model_bytes.get_or_create(&labels).inc_by(bytes);
    }

    /// Weights that clients map, on `device`.
    pub(crate) fn weights(&self, device: &str, now: &WeightsNow) {
        let labels = DeviceLabels { device: device.into() };
        self.weight_sets.get_or_create(&labels).inc_by(now.sets);
        self.weights.get_or_create(&labels).inc_by(now.bytes);
        self.weights_saved.get_or_create(&labels).inc_by(now.saved_bytes);
        self.weight_holds.get_or_create(&labels).inc_by(now.holds);
    }

    /// Permits that were not given back in time.
    pub(crate) fn permits_expired(&self, count: u64) {
        self.permits_expired.inc_by(count);
    }

    /// Sampling runs that are open.
    pub(crate) fn runs(&self, count: u64) {
        self.runs.set(count);
    }

    /// Bytes of adapters put together for models.
    pub(crate) fn adapters(&self, bytes: u64) {
        self.adapters.set(bytes);
    }

    /// A lane.
    pub(crate) fn lane(&self, service: Service, device: &str, now: &LaneNow) {
        let labels = ServiceLabels { service: service.name(), device: device.into() };
        self.lane_queued.get_or_create(&labels).set(now.queued);
        self.lane_capacity.get_or_create(&labels).set(now.capacity);
        self.lane_running.get_or_create(&labels).set(now.running);
        self.lane_completed.get_or_create(&labels).inc_by(now.completed);
        self.lane_batches.get_or_create(&labels).inc_by(now.batches);
    }

    fn register(self, registry: &mut Registry) {
        registry.register("build_info", "Always 1; the label has the version", self.build);
        registry.register_with_unit("uptime", "Time since the start", Unit::Seconds, self.uptime);
        let help = "Sessions, once for each device that tensors cross from, by the rung in use and why";
        registry.register("sessions", help, self.crossings);
        let help = "Sessions that are over and whose GPU memory waits for the end of their process";
        registry.register("quarantined_sessions", help, self.quarantined);
        registry.register("leases", "Tensors that sessions hold", self.leases);
        registry.register("input_slots", "Slots that sessions keep for their next inputs", self.input_slots);
        registry.register_with_unit("leased", "Size of leases and input slots", Unit::Bytes, self.leased);
        let help = "Size of tensor arenas; on the host, pages that were never used cost nothing";
        registry.register_with_unit("arena", help, Unit::Bytes, self.arenas);
        registry.register("models_loaded", "Models whose weights are in memory", self.models);
        registry.register_with_unit("model", "Size of their weights", Unit::Bytes, self.model_bytes);
        registry.register("weight_sets", "Sets of weights for clients to map", self.weight_sets);
        registry.register_with_unit("weights", "Size of these sets", Unit::Bytes, self.weights);
        let help = "What sessions beyond the first of each set would take with copies of their own";
        registry.register_with_unit("weights_saved", help, Unit::Bytes, self.weights_saved);
        registry.register("weight_holders", "Sessions that hold a set, once for each set", self.weight_holds);
        let help = "Permits whose holders did not give the lane back in time";
        registry.register("expired_permits", help, self.permits_expired);
        registry.register(
            "lane_queued",
            "Requests that wait in a lane, for their turn or their input",
            self.lane_queued,
        );
        registry.register("lane_capacity", "Requests that may wait in a lane for their turn", self.lane_capacity);
        registry.register("lane_busy", "Whether a request runs in a lane, 0 or 1", self.lane_running);
        registry.register("lane_completed", "Requests that a lane has run", self.lane_completed);
        let help = "How often a lane ran requests, one or several at once";
        registry.register("lane_batches", help, self.lane_batches);
        registry.register("runs", "Sampling runs that are open", self.runs);
        let help = "Size of adapters put together for models";
        registry.register_with_unit("adapters", help, Unit::Bytes, self.adapters);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// The samples of a text by name and labels, its lines checked against the format.
    fn samples(text: &str) -> BTreeMap<String, f64> {
        let mut samples = BTreeMap::new();
        let (mut family, mut kind) = ("", "");
        let lines = text.strip_suffix("# EOF\n").expect("the text ends with its mark");
        for line in lines.lines() {
            let words: Vec<&str> = line.splitn(4, ' ').collect();
            match words[..] {
                ["#", "HELP", name, help] => {
                    assert!(name.starts_with("luna_broker_") && help.ends_with('.'), "{line}");
                    family = name;
                }
                ["#", "TYPE", name, named] => {
                    assert_eq!(name, family, "{line}");
                    assert!(["gauge", "counter"].contains(&named), "a type that only one format knows: {line}");
                    kind = named;
                }
                ["#", "UNIT", name, unit] => assert!(name == family && name.ends_with(&format!("_{unit}")), "{line}"),
                _ => {
                    let (series, value) = line.rsplit_once(' ').unwrap();
                    let name = series.split('{').next().unwrap();
                    assert_eq!(name.strip_suffix("_total").unwrap_or(name), family, "{line}");
                    assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
                    assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
                }
            }
        }
        samples
    }

    #[test]
    fn what_was_counted_stays_and_what_is_gone_leaves_no_series() {
        let metrics = Metrics::default();
        metrics.requests.inc();
        metrics.rung_failed(Rung::CudaIpc, "open");
        let busy = Scrape::new("0.1.0", 1.5);
        busy.crossing("cpu", Rung::Shm, "sealed_memory_probed");
        busy.crossing("cpu", Rung::Shm, "sealed_memory_probed");
        let first = samples(&metrics.text(busy));
        let shm = r#"luna_broker_sessions{device="cpu",rung="shm",reason="sealed_memory_probed"}"#;
        let failures = r#"luna_broker_rung_failures_total{rung="cuda-ipc",code="open"}"#;
        assert_eq!((first[shm], first[failures], first["luna_broker_requests_total"]), (2.0, 1.0, 1.0));
        metrics.requests.inc();
        metrics.faults.inc();
        metrics.rung_failed(Rung::CudaIpc, "open");
        let second = samples(&metrics.text(Scrape::new("0.1.0", 2.5)));
        assert_eq!(second.get(shm), None);
        assert_eq!((second[failures], second["luna_broker_requests_total"]), (2.0, 2.0));
        assert_eq!((second["luna_broker_faults_total"], second["luna_broker_refused_connections_total"]), (1.0, 0.0));
        assert_eq!((first["luna_broker_uptime_seconds"], second["luna_broker_uptime_seconds"]), (1.5, 2.5));
    }

    #[test]
    fn sizes_are_summed_over_sessions_and_models_of_one_place() {
        let scrape = Scrape::new("0.1.0", 0.0);
        scrape.holding(2, 1, 100);
        scrape.holding(1, 0, 50);
        scrape.quarantined_session();
        scrape.arenas("cpu", 1000);
        scrape.arenas("cpu", 24);
        scrape.model(Service::Vae, "cpu", 300);
        scrape.model(Service::Vae, "cpu", 5);
        scrape.weights("cpu", &WeightsNow { sets: 1, bytes: 70, saved_bytes: 140, holds: 3 });
        scrape.weights("cpu", &WeightsNow { sets: 1, bytes: 7, saved_bytes: 0, holds: 1 });
        scrape.lane(Service::Vae, "cpu", &LaneNow { queued: 3, capacity: 64, running: 1, completed: 9, batches: 7 });
        let found = samples(&Metrics::default().text(scrape));
        let of = |name: &str| found[&format!("luna_broker_{name}")];
        assert_eq!((of("leases"), of("input_slots"), of("leased_bytes")), (3.0, 1.0, 150.0));
        assert_eq!((of(r#"arena_bytes{device="cpu"}"#), of("quarantined_sessions")), (1024.0, 1.0));
        let weights = |name: &str| of(&format!(r#"{name}{{device="cpu"}}"#));
        assert_eq!((weights("weight_sets"), weights("weights_bytes")), (2.0, 77.0));
        assert_eq!((weights("weights_saved_bytes"), weights("weight_holders")), (140.0, 4.0));
        let vae = |name: &str| of(&format!(r#"{name}{{service="vae",device="cpu"}}"#));
        assert_eq!((vae("models_loaded"), vae("model_bytes")), (2.0, 305.0));
        assert_eq!((vae("lane_queued"), vae("lane_capacity"), vae("lane_busy")), (3.0, 64.0, 1.0));
        assert_eq!((vae("lane_completed_total"), vae("lane_batches_total")), (9.0, 7.0));
        assert_eq!(of(r#"build_info{version="0.1.0"}"#), 1.0);
    }
}
