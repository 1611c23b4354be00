//! What is asked of each model, counted once a request, whether it runs or waits.

use crate::metrics::Metrics;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Demand {
    pub unfinished: u32,
    pub queued: u32,
}

/// All requests that are not ended.
pub struct Loads {
    demand: Mutex<HashMap<String, Demand>>,
    metrics: Metrics,
}

impl Loads {
    pub fn new(metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { demand: Mutex::default(), metrics })
    }

    /// A request came; it counts until the ticket is dropped.
    pub fn take(self: &Arc<Self>, model: &str) -> Ticket {
        let mut demand = self.demand.lock();
        let entry = demand.entry(model.to_owned()).or_default();
        entry.unfinished += 1;
        entry.queued += 1;
        self.metrics.in_flight.with_label_values(&[model]).inc();
        Ticket {
            loads: self.clone(),
            model: model.to_owned(),
            arrived: Instant::now(),
            started: false,
            cold: false,
            first_token: false,
            code: CLIENT_WENT_AWAY,
        }
    }

    pub fn demand(&self, model: &str) -> Demand {
        self.demand.lock().get(model).copied().unwrap_or_default()
    }

    pub fn unfinished(&self) -> usize {
        let demand = self.demand.lock();
        demand.values().map(|demand| demand.unfinished as usize).sum()
    }
}

const CLIENT_WENT_AWAY: u16 = 499;

/// One request in the counts.
pub struct Ticket {
    loads: Arc<Loads>,
    model: String,
    arrived: Instant,
    started: bool,
    /// No worker had the model when it came.
    cold: bool,
    first_token: bool,
    code: u16,
}

impl Ticket {
    /// It has to wait for the model itself.
    pub fn is_cold(&mut self) {
        self.cold = true;
    }

    /// A worker has one of its choices.
    pub fn started(&mut self) {
        if self.leaves_queue() {
            let (metrics, seconds) = (&self.loads.metrics, self.arrived.elapsed().as_secs_f64());
            let model = [self.model.as_str()];
            metrics.queue_seconds.with_label_values(&model).observe(seconds);
            if self.cold {
                metrics.cold_start_seconds.with_label_values(&model).observe(seconds);
            }
        }
    }

    /// Whether that is new.
    fn leaves_queue(&mut self) -> bool {
        let new = !std::mem::replace(&mut self.started, true);
        if new {
            self.change(|demand| demand.queued -= 1);
        }
        new
    }

    pub fn first_token(&mut self, at: Instant) {
        if !std::mem::replace(&mut self.first_token, true) {
            let seconds = at.duration_since(self.arrived).as_secs_f64();
            self.loads.metrics.time_to_first_token_seconds.with_label_values(&[&self.model]).observe(seconds);
        }
    }

    /// How it ended: a status of HTTP, also where a stream had begun.
    pub fn ended(&mut self, code: u16) {
        self.code = code;
    }

    fn change(&self, change: impl FnOnce(&mut Demand)) {
        let mut demands = self.loads.demand.lock();
        if let Some(demand) = demands.get_mut(&self.model) {
            change(demand);
            if demand.unfinished == 0 {
                demands.remove(&self.model);
            }
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leaves_queue();
        self.change(|demand| demand.unfinished -= 1);
        let metrics = &self.loads.metrics;
        metrics.in_flight.with_label_values(&[&self.model]).dec();
        let code = self.code.to_string();
        metrics.requests.with_label_values(&[self.model.as_str(), &code]).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_counts_once_from_its_arrival_to_its_end() {
        let metrics = Metrics::new().unwrap();
        let loads = Loads::new(metrics.clone());
        let mut first = loads.take("a/b");
        let second = loads.take("a/b");
        first.started();
        first.started();
        let demand = Demand { unfinished: 2, queued: 1 };
        assert_eq!(loads.demand("a/b"), demand);
        first.ended(200);
        drop(first);
        drop(second);
        assert_eq!(loads.demand("a/b"), Demand::default());
        let text = String::from_utf8(metrics.render().unwrap()).unwrap();
        assert!(text.contains("vicuna_gateway_requests_total{code=\"200\",model=\"a/b\"} 1"), "{text}");
        assert!(text.contains("vicuna_gateway_requests_total{code=\"499\",model=\"a/b\"} 1"), "{text}");
    }
}
