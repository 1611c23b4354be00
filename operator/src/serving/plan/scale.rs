//! How many workers: as many as unfinished requests ask for. More at once; fewer only after demand was
//! lower for a while, and only while every gateway reports.

use super::super::observe::Observed;
use std::cmp::Ordering;
use std::collections::VecDeque;
use std::time::{Duration, SystemTime};
use vicuna_crds::serving::Autoscaling;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Workers before this plan.
    pub before: u32,
    pub desired: u32,
    /// Why `desired` is not `before`, or why replicas stay; a sentence.
    pub reason: String,
    pub activity: Activity,
}

/// Whether replicas follow demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Following,
    /// `spec.replicas` says how many.
    Fixed,
    /// No gateway has reported yet.
    NoReports,
    /// A gateway is silent: no scaling down.
    StaleReports,
    /// The model is not there.
    NoModel,
}

/// Recommendations of the stabilisation window that could still be its maximum: each is newer and
/// smaller than the one before, so there are never more than there are worker counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window(VecDeque<(SystemTime, u32)>);

impl Window {
    /// Takes a recommendation and returns the highest one not older than `width`.
    fn highest(&mut self, recommended: u32, width: Duration, now: SystemTime) -> u32 {
        while self.0.back().is_some_and(|(_, value)| *value <= recommended) {
            self.0.pop_back();
        }
        self.0.push_back((now, recommended));
        let old = |at: SystemTime| now.duration_since(at).is_ok_and(|age| age >= width);
        while self.0.len() > 1 && self.0.front().is_some_and(|(at, _)| old(*at)) {
            self.0.pop_front();
        }
        self.0.front().map_or(recommended, |(_, value)| *value)
    }

    fn is_new(&self) -> bool {
        self.0.is_empty()
    }
}

pub fn decide(observed: &Observed, model_known: bool, window: &mut Window, now: SystemTime) -> Decision {
    let spec = &observed.serving.spec;
    let replicas = observed.serving.status.as_ref().and_then(|status| status.replicas.as_ref());
    let before = replicas.map_or(0, |replicas| replicas.desired);
    let decision = |desired, reason, activity| Decision { before, desired, reason, activity };
    if !model_known {
        // What runs from before goes on.
        return decision(before, "the model is not there".to_owned(), Activity::NoModel);
    }
    match (&spec.autoscaling, spec.replicas) {
        (Some(autoscaling), _) => follow(observed, autoscaling, before, window, now),
        (None, replicas) => {
            let desired = replicas.unwrap_or(1);
            decision(desired, format!("spec.replicas is {desired}"), Activity::Fixed)
        }
    }
}

fn follow(
    observed: &Observed,
    autoscaling: &Autoscaling,
    before: u32,
    window: &mut Window,
    now: SystemTime,
) -> Decision {
    let Autoscaling { min, max, target, behavior } = autoscaling;
    let held = before.clamp(*min, *max);
    let Some(demand) = &observed.demand else {
        let reason = bounds_reason(before, held).unwrap_or_else(|| "no gateway has reported yet".to_owned());
        return Decision { before, desired: held, reason, activity: Activity::NoReports };
    };
    let stale = demand.stale_gateways > 0;
    let wanted = demand.unfinished.div_ceil(target.in_flight.max(1)).clamp(*min, *max);
    // A silent gateway may hold requests that we do not see: what is there counts as asked for.
    // So it does right after a change of leader, when lower demand has not been seen for long.
    let recommended = if stale || window.is_new() { wanted.max(held) } else { wanted };
    let width = Duration::from_secs(behavior.scale_down.stabilization_window_seconds.into());
    let highest = window.highest(recommended, width, now);
    let desired = if wanted > held { wanted } else { highest.min(held) };
    Decision {
        before,
        desired,
        reason: bounds_reason(before, desired)
            .filter(|_| desired == held)
            .unwrap_or_else(|| reason(demand.unfinished, target.in_flight, desired, held, width)),
        activity: if stale { Activity::StaleReports } else { Activity::Following },
    }
}

/// Why the spec alone changes the number of workers.
fn bounds_reason(before: u32, held: u32) -> Option<String> {
    match held.cmp(&before) {
        Ordering::Greater => Some(format!("spec.autoscaling.min is {held}")),
        Ordering::Less => Some(format!("spec.autoscaling.max is {held}")),
        Ordering::Equal => None,
    }
}

fn reason(unfinished: u32, in_flight: u32, desired: u32, held: u32, width: Duration) -> String {
    let load = format!("{unfinished} unfinished requests at {in_flight} a worker");
    if desired < held { format!("{load}, demand lower for {} s", width.as_secs()) } else { load }
}

#[cfg(test)]
mod tests {
    use super::super::super::observe::{Life, Observed};
    use super::super::tests::{at, demand, observed, worker};
    use super::*;
    use proptest_free::Lcg;
    use serde_json::json;
    use std::sync::Arc;
    use vicuna_crds::VicunaServingStatus;
    use vicuna_crds::serving::Replicas;

    /// A tiny generator, so that the property test needs no dependency.
    mod proptest_free {
        pub struct Lcg(pub u64);

        impl Lcg {
            pub fn below(&mut self, limit: u64) -> u64 {
                self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                (self.0 >> 33) % limit
            }
        }
    }

    struct Run {
        seen: Observed,
        window: Window,
    }

    impl Run {
        fn new(min: u32, max: u32) -> Self {
            let mut seen = observed(json!({ "autoscaling": {
                "min": min, "max": max, "target": { "inFlight": 4 },
                "behavior": { "scaleDown": { "stabilizationWindowSeconds": 20 } } } }));
            seen.workers = vec![worker("a", "spot", Life::Ready)];
            Self { seen, window: Window::default() }
        }

        /// One reconciliation whose outcome is written to the status.
        fn step(&mut self, unfinished: u32, second: u64) -> Decision {
            self.seen.demand = demand(unfinished);
            self.again(second)
        }

        fn again(&mut self, second: u64) -> Decision {
            let decision = decide(&self.seen, true, &mut self.window, at(second));
            let serving = Arc::make_mut(&mut self.seen.serving);
            serving.status = Some(VicunaServingStatus {
                replicas: Some(Replicas { desired: decision.desired, ..Replicas::default() }),
                ..VicunaServingStatus::default()
            });
            decision
        }
    }

    #[test]
    fn the_first_worker_is_there_before_anybody_asks() {
        let mut run = Run::new(2, 5);
        let decision = run.step(0, 0);
        assert_eq!((decision.desired, decision.reason.as_str()), (2, "spec.autoscaling.min is 2"));
        let mut unknown = Run::new(2, 5);
        unknown.seen.demand = None;
        assert_eq!(unknown.again(0).reason, "spec.autoscaling.min is 2");
    }

    #[test]
    fn more_demand_brings_workers_at_once() {
        let mut run = Run::new(1, 5);
        assert_eq!(run.step(0, 0).desired, 1);
        let decision = run.step(9, 2);
        assert_eq!(decision.desired, 3);
        assert_eq!(decision.reason, "9 unfinished requests at 4 a worker");
        assert_eq!(run.step(1000, 4).desired, 5);
    }

    #[test]
    fn less_demand_lets_workers_go_only_after_the_window() {
        let mut run = Run::new(1, 2);
        assert_eq!(run.step(8, 0).desired, 2);
        for second in 1..20 {
            assert_eq!(run.step(0, second).desired, 2, "at {second} s");
        }
        let decision = run.step(0, 21);
        assert_eq!(decision.desired, 1);
        assert!(decision.reason.contains("demand lower for 20 s"), "{}", decision.reason);
    }

    #[test]
    fn a_burst_in_the_window_starts_it_anew() {
        let mut run = Run::new(1, 2);
        run.step(8, 0);
        run.step(0, 10);
        run.step(8, 15);
        assert_eq!(run.step(0, 30).desired, 2);
        assert_eq!(run.step(0, 36).desired, 1);
    }

    #[test]
    fn at_a_least_of_zero_the_last_worker_goes_and_a_request_brings_one() {
        let mut run = Run::new(0, 2);
        assert_eq!(run.step(0, 0).desired, 0);
        assert_eq!(run.step(1, 1).desired, 1);
        assert_eq!(run.step(0, 15).desired, 1);
        assert_eq!(run.step(0, 36).desired, 0);
    }

    #[test]
    fn without_reports_nothing_changes() {
        let mut run = Run::new(1, 4);
        run.step(12, 0);
        run.seen.demand = None;
        let decision = run.again(100);
        assert_eq!((decision.desired, decision.activity), (3, Activity::NoReports));
    }

    #[test]
    fn a_silent_gateway_forbids_scaling_down_but_not_up() {
        let mut run = Run::new(1, 4);
        run.step(8, 0);
        let mut quiet = demand(0);
        quiet.as_mut().unwrap().stale_gateways = 1;
        run.seen.demand = quiet.clone();
        for second in [10, 40, 80] {
            assert_eq!(run.again(second).desired, 2);
        }
        assert_eq!(run.again(90).activity, Activity::StaleReports);
        run.seen.demand = quiet.map(|quiet| crate::loads::Demand { unfinished: 16, ..quiet });
        assert_eq!(run.again(91).desired, 4);
    }

    #[test]
    fn a_new_leader_waits_a_whole_window_before_it_lets_workers_go() {
        let mut run = Run::new(1, 4);
        run.step(16, 0);
        run.window = Window::default();
        assert_eq!(run.step(0, 100).desired, 4);
        assert_eq!(run.step(0, 110).desired, 4);
        assert_eq!(run.step(0, 121).desired, 1);
    }

    #[test]
    fn the_bounds_of_the_spec_hold_whatever_is_asked() {
        let mut random = Lcg(7);
        let mut run = Run::new(2, 6);
        for second in 0..5000 {
            let unfinished = random.below(60) as u32;
            let decision = run.step(unfinished, second);
            assert!((2..=6).contains(&decision.desired));
            let wanted = unfinished.div_ceil(4).clamp(2, 6);
            assert!(decision.desired >= wanted, "demand is always met within the bounds");
            assert!(run.window.0.len() <= 5, "the window keeps one entry a worker count");
        }
    }

    #[test]
    fn fixed_replicas_are_what_the_spec_says() {
        let mut window = Window::default();
        let decision = decide(&observed(json!({ "replicas": 3 })), true, &mut window, at(0));
        assert_eq!((decision.desired, decision.activity), (3, Activity::Fixed));
    }
}
