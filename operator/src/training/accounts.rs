//! What a training has had and what it made of it: time for which its pods held nodes, the part of it
//! that advanced the model, and what it cost. Kept in the status, so that a new leader goes on with it.

use super::observe::{Observed, PodView};
use super::time::unix_ms;
use crate::coordinator::membership::Millis;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;
use std::time::Duration;
use vicuna_crds::training::{Cost, VicunaTrainingStatus, WorkerTime};
use vicuna_crds::{Capacity, Period, Pool};

const HOUR_MS: f64 = 3_600_000.0;
/// Weight of the newest step in the mean time of a step.
const NEWEST: f64 = 0.2;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Accounts {
    held_ms: u64,
    advanced_ms: u64,
    cost: BTreeMap<String, f64>,
    on_demand_equivalent: f64,
    until_ms: Millis,
    /// The furthest step that was ever reached: what is made again does not advance the model.
    step: u64,
    /// Mean time of a step.
    step_ms: Option<f64>,
}

impl Accounts {
    pub fn recall(status: &VicunaTrainingStatus) -> Self {
        let time = status.worker_time.clone().unwrap_or_default();
        let cost = status.cost.clone().unwrap_or_default();
        let until = time.until.as_ref().and_then(unix_ms);
        Self {
            held_ms: time.held_seconds.saturating_mul(1000),
            advanced_ms: time.advanced_seconds.saturating_mul(1000),
            cost: cost.pools,
            on_demand_equivalent: cost.on_demand_equivalent.unwrap_or(0.0),
            until_ms: until.unwrap_or(0),
            step: status.progress.as_ref().map_or(0, |progress| progress.step),
            step_ms: None,
        }
    }

    /// Adds what has happened since the last count.
    pub fn count(&mut self, observed: &Observed, now: Millis) {
        let on_demand = on_demand_price(&observed.pools);
        let mut counted = false;
        for pod in &observed.pods {
            let held_ms = self.newly_held(pod, now);
            if held_ms == 0 {
                continue;
            }
            counted = true;
            self.held_ms += held_ms;
            let node_hours = held_ms as f64 / HOUR_MS * pod.share;
            let price = observed.pools.iter().find(|pool| pool.name == pod.pool).and_then(|pool| pool.hourly_price);
            if let Some(price) = price {
                *self.cost.entry(pod.pool.clone()).or_default() += price * node_hours;
            }
            self.on_demand_equivalent += on_demand.unwrap_or(0.0) * node_hours;
        }
        // Without pods nothing changes, and nothing is to be written.
        if counted {
            self.until_ms = now;
        }
        self.advance(observed);
    }

    fn newly_held(&self, pod: &PodView, now: Millis) -> u64 {
        let Some(from) = pod.scheduled_at_ms else { return 0 };
        let to = pod.ended.as_ref().and_then(|end| end.at_ms).unwrap_or(now).min(now);
        to.saturating_sub(from.max(self.until_ms))
    }

    fn advance(&mut self, observed: &Observed) {
        let Some(report) = &observed.report else { return };
        let Some(last) = report.progress.as_ref().filter(|last| last.step > self.step) else { return };
        let last_ms = (last.step_seconds * 1000.0).clamp(0.0, 1e9);
        let step_ms = self.step_ms.map_or(last_ms, |mean| mean + NEWEST * (last_ms - mean));
        self.step_ms = Some(step_ms);
        let steps = last.step - self.step;
        self.step = last.step;
        let ranks = report.members.len().max(1) as f64;
        let advanced_ms = (steps as f64 * step_ms * ranks) as u64;
        self.advanced_ms = (self.advanced_ms + advanced_ms).min(self.held_ms);
    }

    /// Share of the held time that advanced the model.
    pub fn goodput(&self) -> Option<f64> {
        (self.held_ms > 0).then(|| rounded(self.advanced_ms as f64 / self.held_ms as f64, 1e3))
    }

    pub fn worker_time(&self) -> Option<WorkerTime> {
        (self.held_ms > 0).then(|| WorkerTime {
            held_seconds: self.held_ms / 1000,
            advanced_seconds: self.advanced_ms / 1000,
            until: i64::try_from(self.until_ms / 1000).ok().and_then(|at| Timestamp::from_second(at).ok()).map(Time),
        })
    }

    /// `None` where no pool has a price.
    pub fn cost(&self, pools: &[Pool]) -> Option<Cost> {
        let priced = !self.cost.is_empty() || pools.iter().any(|pool| pool.hourly_price.is_some());
        let money = |amount: f64| rounded(amount, 1e6);
        priced.then(|| Cost {
            estimated: money(self.cost.values().sum()),
            on_demand_equivalent: on_demand_price(pools).map(|_| money(self.on_demand_equivalent)),
            pools: self.cost.iter().map(|(pool, amount)| (pool.clone(), money(*amount))).collect(),
        })
    }

    /// How long the steps to come take at the present speed.
    pub fn remaining(&self, step: u64, steps: u64) -> Option<Period> {
        let left = steps.saturating_sub(step);
        let seconds = self.step_ms? * left as f64 / 1000.0;
        (steps > 0).then(|| Period::from(Duration::from_secs(seconds.clamp(0.0, 1e9).round() as u64)))
    }
}

fn on_demand_price(pools: &[Pool]) -> Option<f64> {
    pools.iter().filter(|pool| pool.capacity == Capacity::OnDemand).find_map(|pool| pool.hourly_price)
}

fn rounded(value: f64, places: f64) -> f64 {
    (value * places).round() / places
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::tests::{observed, pool, step_report};

    const HOUR: Millis = 3_600_000;

    /// Two pools with prices, and a pod on half a spot node since `HOUR`.
    fn with_prices() -> Observed {
        let mut seen = observed();
        seen.pools = vec![pool("spot", "Spot", Some(1.0)), pool("ondemand", "OnDemand", Some(3.0))];
        seen.pod("t-spot-0", |pod| {
            pod.scheduled_at_ms = Some(HOUR);
            pod.share = 0.5;
        })
    }

    #[test]
    fn time_and_cost_are_counted_once_however_often_one_looks() {
        let seen = with_prices();
        let mut accounts = Accounts::default();
        for now in [HOUR, 2 * HOUR, 2 * HOUR, 3 * HOUR] {
            accounts.count(&seen, now);
        }
        assert_eq!(accounts.worker_time().unwrap().held_seconds, 7200);
        let cost = accounts.cost(&seen.pools).unwrap();
        assert_eq!((cost.estimated, cost.on_demand_equivalent), (1.0, Some(3.0)));
        assert_eq!(cost.pools, [("spot".to_owned(), 1.0)].into());
    }

    #[test]
    fn a_new_leader_goes_on_counting_from_the_status() {
        let seen = with_prices();
        let mut before = Accounts::default();
        before.count(&seen, 2 * HOUR);
        let status = VicunaTrainingStatus {
            worker_time: before.worker_time(),
            cost: before.cost(&seen.pools),
            ..VicunaTrainingStatus::default()
        };
        let mut after = Accounts::recall(&status);
        after.count(&seen, 3 * HOUR);
        assert_eq!(after.worker_time().unwrap().held_seconds, 7200, "also the time without a leader counts");
        assert_eq!(after.cost(&seen.pools).unwrap().estimated, 1.0);
    }

    #[test]
    fn steps_that_are_made_again_do_not_advance_the_model() {
        let seen = with_prices();
        let mut accounts = Accounts::default();
        let mut at = |step, now| {
            let seen = seen.clone().reported(|report| report.progress = Some(step_report(step)));
            accounts.count(&seen, now);
            accounts.worker_time().map(|time| time.advanced_seconds)
        };
        // A step takes 2 s.
        assert_eq!(at(10, HOUR + 40_000), Some(20));
        assert_eq!(at(5, HOUR + 60_000), Some(20));
        assert_eq!(at(11, HOUR + 80_000), Some(22));
        assert_eq!(accounts.goodput(), Some(0.275));
        assert_eq!(accounts.remaining(11, 100).unwrap().to_string(), "2m58s");
    }

    #[test]
    fn what_ended_holds_no_node_and_without_prices_there_is_no_cost() {
        let mut seen = with_prices();
        seen.pods[0].ended = Some(super::super::observe::End { at_ms: Some(HOUR + 1_000), ..Default::default() });
        let mut accounts = Accounts::default();
        accounts.count(&seen, 2 * HOUR);
        accounts.count(&seen, 3 * HOUR);
        assert_eq!(accounts.worker_time().unwrap().held_seconds, 1);
        seen.pools = vec![pool("spot", "Spot", None)];
        assert_eq!(Accounts::default().cost(&seen.pools), None);
    }
}
