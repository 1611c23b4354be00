//! What gateways say is asked of each model. The coordinator's gRPC service writes it, the autoscaler
//! of `serving/` reads it. Demand is unfinished requests at gateways, so that each is counted once.

use parking_lot::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};
use tokio::sync::broadcast;
use vicuna_protocol::coordinator::{LoadReport, ModelLoad};

/// Gateways kept at most; a report of one more replaces the oldest.
const MAX_GATEWAYS: usize = 64;
/// Models kept of one gateway's report, at most.
const MAX_MODELS: usize = 2048;
/// Names that a reader of [`Loads::woken`] may be behind.
const MAX_WOKEN: usize = 1024;
/// Worker names kept of one model and gateway, at most.
const MAX_WORKERS: usize = 4096;

/// A gateway that has not reported for so long is stale: its numbers may be too low.
pub const STALE_AFTER: Duration = Duration::from_secs(10);
/// A gateway that has not reported for so long is gone.
pub const FORGET_AFTER: Duration = Duration::from_secs(120);

/// What is asked of one model, summed over gateways.
#[derive(Clone, Debug, PartialEq)]
pub struct Demand {
    /// Requests taken and not yet ended, on a worker or queued.
    pub unfinished: u32,
    /// Those of `unfinished` that no worker has yet.
    pub queued: u32,
    pub tokens_per_second: f64,
    /// Pod names of workers that at least one gateway can use.
    pub workers: BTreeSet<String>,
    /// When the gateway that has been silent longest reported last.
    pub reported_at: Instant,
    /// Gateways that count here.
    pub gateways: usize,
    /// Those of them that are silent for longer than [`STALE_AFTER`]: do not scale down on this demand
    /// while there are any.
    pub stale_gateways: usize,
}

/// The table of the last report of each gateway.
#[derive(Debug, Default)]
pub struct Loads {
    gateways: Mutex<HashMap<String, Reported>>,
    /// Models that are served, and when their reconciler last said so.
    served: Mutex<HashMap<String, Instant>>,
    woken: Woken,
}

/// Names for which requests have begun to wait.
#[derive(Debug)]
struct Woken(broadcast::Sender<String>);

impl Default for Woken {
    fn default() -> Self {
        Self(broadcast::channel(MAX_WOKEN).0)
    }
}

#[derive(Debug)]
struct Reported {
    at: Instant,
    models: HashMap<String, ModelLoad>,
}

impl Loads {
    /// The demand for all these names together, which the same workers serve. `None`: no gateway has
    /// reported yet, so nothing is known; a model that no gateway names has a demand of zero.
    pub fn demand(&self, models: &[impl AsRef<str>]) -> Option<Demand> {
        self.demand_at(models, Instant::now())
    }

    /// [`Loads::demand`] at a given time.
    pub fn demand_at(&self, models: &[impl AsRef<str>], now: Instant) -> Option<Demand> {
        let mut gateways = self.gateways.lock();
        gateways.retain(|_, reported| now.duration_since(reported.at) < FORGET_AFTER);
        let reported_at = gateways.values().map(|reported| reported.at).min()?;
        let mut demand = Demand {
            unfinished: 0,
            queued: 0,
            tokens_per_second: 0.0,
            workers: BTreeSet::new(),
            reported_at,
            gateways: gateways.len(),
            stale_gateways: 0,
        };
        for reported in gateways.values() {
            demand.add(reported, models, now);
        }
        Some(demand)
    }

    /// Takes one gateway's report in place of its last one.
    pub fn record(&self, report: LoadReport, now: Instant) {
        let mut gateways = self.gateways.lock();
        gateways.retain(|_, reported| now.duration_since(reported.at) < FORGET_AFTER);
        if gateways.len() >= MAX_GATEWAYS && !gateways.contains_key(&report.gateway) {
            let oldest = gateways.iter().min_by_key(|(_, reported)| reported.at);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                gateways.remove(&oldest);
            }
        }
        let models: HashMap<String, ModelLoad> =
            report.models.into_iter().take(MAX_MODELS).map(|load| (load.model.clone(), load)).collect();
        let before = gateways.get(&report.gateway);
        let waited =
            |model: &str| before.and_then(|before| before.models.get(model)).is_some_and(|load| load.queued > 0);
        for load in models.values().filter(|load| load.queued > 0 && !waited(&load.model)) {
            // Nobody reads while nobody leads.
            let _ = self.woken.0.send(load.model.clone());
        }
        gateways.insert(report.gateway, Reported { at: now, models });
    }

    /// The names for which requests begin to wait at a gateway, from now on.
    pub fn woken(&self) -> broadcast::Receiver<String> {
        self.woken.0.subscribe()
    }

    /// A model is served, whether it has workers or not; said at every look at it.
    pub fn serve(&self, model: &str, now: Instant) {
        let mut served = self.served.lock();
        served.retain(|_, said| now.duration_since(*said) < FORGET_AFTER);
        if served.len() < MAX_MODELS || served.contains_key(model) {
            served.insert(model.to_owned(), now);
        }
    }

    /// The models that are served, for gateways, which otherwise only know those with workers.
    pub fn served(&self, now: Instant) -> Vec<String> {
        let served = self.served.lock();
        let fresh = served.iter().filter(|(_, said)| now.duration_since(**said) < FORGET_AFTER);
        fresh.map(|(model, _)| model.clone()).collect()
    }

    /// Drops a gateway whose pod is known to be gone.
    pub fn forget(&self, gateway: &str) {
        self.gateways.lock().remove(gateway);
    }

    /// The gateways that have reported lately.
    pub fn gateways(&self) -> Vec<String> {
        self.gateways.lock().keys().cloned().collect()
    }
}

impl Demand {
    fn add(&mut self, reported: &Reported, models: &[impl AsRef<str>], now: Instant) {
        let stale = now.duration_since(reported.at) > STALE_AFTER;
        self.stale_gateways += usize::from(stale);
        for load in models.iter().filter_map(|model| reported.models.get(model.as_ref())) {
            self.unfinished = self.unfinished.saturating_add(load.unfinished);
            self.queued = self.queued.saturating_add(load.queued);
            if !stale {
                self.tokens_per_second += load.tokens_per_second;
                self.workers.extend(load.workers.iter().take(MAX_WORKERS).cloned());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(gateway: &str, unfinished: u32, worker: &str) -> LoadReport {
        LoadReport {
            gateway: gateway.to_owned(),
            models: vec![ModelLoad {
                model: "ns/m".to_owned(),
                unfinished,
                queued: 1,
                workers: vec![worker.to_owned()],
                tokens_per_second: 10.0,
                resumes: 0,
            }],
        }
    }

    #[test]
    fn nothing_is_known_before_a_gateway_reports() {
        assert_eq!(Loads::default().demand(&["ns/m"]), None);
    }

    #[test]
    fn each_gateway_counts_once_with_its_last_report() {
        let loads = Loads::default();
        let now = Instant::now();
        loads.record(report("a", 7, "w1"), now);
        loads.record(report("a", 3, "w1"), now);
        loads.record(report("b", 4, "w1"), now);
        let demand = loads.demand_at(&["ns/m"], now).unwrap();
        assert_eq!((demand.unfinished, demand.queued), (7, 2));
        assert_eq!(demand.workers.len(), 1);
        assert_eq!(loads.demand_at(&["ns/other"], now).unwrap().unfinished, 0);
    }

    #[test]
    fn names_that_the_same_workers_serve_are_asked_for_together() {
        let loads = Loads::default();
        let now = Instant::now();
        let mut both = report("a", 7, "w1");
        both.models.push(ModelLoad { model: "ns/m:x".to_owned(), unfinished: 2, ..both.models[0].clone() });
        loads.record(both, now);
        let demand = loads.demand_at(&["ns/m", "ns/m:x", "ns/m:y"], now).unwrap();
        assert_eq!((demand.unfinished, demand.workers.len(), demand.gateways), (9, 1, 1));
    }

    #[test]
    fn a_silent_gateway_is_marked_then_forgotten() {
        let loads = Loads::default();
        let start = Instant::now();
        loads.record(report("a", 5, "w1"), start);
        let later = start + STALE_AFTER + Duration::from_secs(1);
        loads.record(report("b", 1, "w2"), later);
        let demand = loads.demand_at(&["ns/m"], later).unwrap();
        assert_eq!((demand.gateways, demand.stale_gateways), (2, 1));
        assert_eq!(demand.unfinished, 6);
        assert_eq!(demand.reported_at, start);
        let demand = loads.demand_at(&["ns/m"], start + FORGET_AFTER).unwrap();
        assert_eq!((demand.gateways, demand.unfinished), (1, 1));
    }

    #[test]
    fn a_model_is_served_as_long_as_its_reconciler_says_so() {
        let loads = Loads::default();
        let start = Instant::now();
        loads.serve("ns/m", start);
        loads.serve("ns/m", start + Duration::from_secs(30));
        assert_eq!(loads.served(start + FORGET_AFTER), ["ns/m"]);
        assert!(loads.served(start + FORGET_AFTER + Duration::from_secs(30)).is_empty());
    }

    #[test]
    fn the_first_request_that_waits_is_told_at_once_and_once() {
        let (loads, now) = (Loads::default(), Instant::now());
        let mut woken = loads.woken();
        let with = |queued| {
            let mut report = report("a", queued, "w");
            report.models[0].queued = queued;
            report
        };
        for queued in [0, 1, 3, 0] {
            loads.record(with(queued), now);
        }
        assert_eq!(woken.try_recv().unwrap(), "ns/m");
        assert!(woken.try_recv().is_err());
        loads.record(with(2), now);
        assert_eq!(woken.try_recv().unwrap(), "ns/m");
    }

    #[test]
    fn the_table_is_bounded() {
        let loads = Loads::default();
        let now = Instant::now();
        for index in 0..2 * MAX_GATEWAYS {
            loads.record(report(&format!("g{index}"), 1, "w"), now);
        }
        assert_eq!(loads.gateways().len(), MAX_GATEWAYS);
    }
}
