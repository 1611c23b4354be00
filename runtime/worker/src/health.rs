//! What the worker says about itself: readiness with the reason, and the pod's termination message.

use parking_lot::RwLock;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Kubernetes keeps this much of a termination message.
const TERMINATION_MESSAGE_BYTES: usize = 4096;

#[derive(Debug)]
pub struct Health {
    phase: RwLock<Phase>,
    attached: AtomicUsize,
    termination_log: PathBuf,
}

#[derive(Clone, Debug)]
enum Phase {
    Loading(String),
    Unavailable(String),
    Serving,
    Draining,
}

impl Health {
    pub fn new(termination_log: PathBuf) -> Self {
        let phase = RwLock::new(Phase::Loading("the model is being loaded".to_owned()));
        Self { phase, attached: AtomicUsize::new(0), termination_log }
    }

    /// Ready only with a model and a gateway; otherwise why not, in a word for the operator and a sentence.
    pub fn readiness(&self) -> Result<String, (&'static str, String)> {
        match (&*self.phase.read(), self.attached.load(Ordering::Relaxed)) {
            (Phase::Loading(progress), _) => Err(("ModelLoading", progress.clone())),
            (Phase::Unavailable(reason), _) => Err(("ModelUnavailable", reason.clone())),
            (Phase::Draining, _) => Err(("Draining", "draining".to_owned())),
            (Phase::Serving, 0) => Err(("NoGateway", "no gateway is attached".to_owned())),
            (Phase::Serving, attached) => Ok(format!("attached to {attached} gateways")),
        }
    }

    /// Loading goes on; `progress` says how far.
    pub fn loading(&self, progress: String) {
        *self.phase.write() = Phase::Loading(progress);
    }

    /// The model cannot be had for now: shown in readiness, and by Kubernetes should we end.
    pub fn model_unavailable(&self, reason: &str) {
        *self.phase.write() = Phase::Unavailable(reason.to_owned());
        self.leave_message(reason);
    }

    pub fn serving(&self) {
        *self.phase.write() = Phase::Serving;
        self.leave_message("");
    }

    pub fn draining(&self) {
        *self.phase.write() = Phase::Draining;
    }

    pub fn attached(&self) {
        self.attached.fetch_add(1, Ordering::Relaxed);
    }

    pub fn detached(&self) {
        self.attached.fetch_sub(1, Ordering::Relaxed);
    }

    /// Writes the termination message, if Kubernetes has mounted a file for it.
    pub fn leave_message(&self, message: &str) {
        if !self.termination_log.exists() {
            return;
        }
        let end = message.floor_char_boundary(TERMINATION_MESSAGE_BYTES);
        if let Err(error) = std::fs::write(&self.termination_log, &message[..end]) {
            tracing::warn!(%error, path = %self.termination_log.display(), "cannot write the termination message");
        }
    }
}

/// An error and its causes on one line. Many of our messages quote their cause already: those are
/// not said twice.
pub fn explain(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match (text.is_empty(), text.contains(&cause)) {
            (true, _) => cause,
            (_, true) => text,
            _ => format!("{text}: {cause}"),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_ready_with_a_model_and_a_gateway_only() {
        let health = Health::new(PathBuf::from("nowhere"));
        health.attached();
        assert!(health.readiness().unwrap_err().1.contains("being loaded"));
        health.model_unavailable("the bucket does not exist");
        assert_eq!(health.readiness().unwrap_err(), ("ModelUnavailable", "the bucket does not exist".to_owned()));
        health.serving();
        assert!(health.readiness().is_ok());
        health.detached();
        assert_eq!(health.readiness().unwrap_err().1, "no gateway is attached");
        health.attached();
        health.draining();
        assert_eq!(health.readiness().unwrap_err().1, "draining");
    }

    #[test]
    fn a_cause_that_the_message_quotes_is_not_said_twice() {
        let error = anyhow::anyhow!("no such file").context("cannot read x: no such file").context("loading");
        assert_eq!(explain(&error), "loading: cannot read x: no such file");
    }

    #[test]
    fn the_reason_is_left_for_kubernetes_and_taken_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let health = Health::new(file.path().to_owned());
        health.model_unavailable("no such bucket");
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "no such bucket");
        health.serving();
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), "");
    }
}
