//! Kubernetes Events: what happened and what to do about it, on the object that it concerns.

use crate::config::{Config, MANAGER};
use crate::leader::Leadership;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Events that wait to be sent, at most; further ones are dropped.
const MAX_WAITING: usize = 256;
/// Events remembered so that they are not repeated, at most.
const MAX_REMEMBERED: usize = 1024;
/// The same text about the same object is sent again after so long.
const REPEAT_AFTER: Duration = Duration::from_secs(300);
/// The API server's limit on a note, in bytes.
const MAX_NOTE: usize = 1024;

/// Sends Events without making anybody wait. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    queue: mpsc::Sender<(Event, ObjectReference)>,
    sent: Arc<Mutex<HashMap<(String, String), Instant>>>,
}

impl Events {
    /// Starts the task that sends them.
    pub fn start(client: kube::Client, config: &Config, leadership: Leadership) -> Self {
        let (queue, waiting) = mpsc::channel(MAX_WAITING);
        let reporter = Reporter { controller: MANAGER.to_owned(), instance: Some(config.pod_name.clone()) };
        tokio::spawn(send_all(client, reporter, waiting, leadership));
        Self { queue, sent: Arc::default() }
    }

    /// Something went as it should. `reason` and `action` are in PascalCase, `note` is for people.
    pub fn normal(&self, about: &ObjectReference, reason: &str, action: &str, note: impl Into<String>) {
        self.publish(EventType::Normal, about, reason, action, note.into());
    }

    /// Something is in the way: `note` says what, where, and what to do.
    pub fn warning(&self, about: &ObjectReference, reason: &str, action: &str, note: impl Into<String>) {
        self.publish(EventType::Warning, about, reason, action, note.into());
    }

    fn publish(&self, type_: EventType, about: &ObjectReference, reason: &str, action: &str, note: String) {
        let key = (about.uid.clone().unwrap_or_default(), format!("{reason}\n{note}"));
        if !self.is_new(key, Instant::now()) {
            return;
        }
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(shortened(note)),
            action: action.to_owned(),
            secondary: None,
        };
        if self.queue.try_send((event, about.clone())).is_err() {
            tracing::warn!(reason, "too many events wait to be sent: this one is dropped");
        }
    }

    fn is_new(&self, key: (String, String), now: Instant) -> bool {
        let mut sent = self.sent.lock();
        if sent.len() >= MAX_REMEMBERED {
            sent.retain(|_, at| now.duration_since(*at) < REPEAT_AFTER);
        }
        if sent.len() >= MAX_REMEMBERED {
            sent.clear();
        }
        let fresh = sent.get(&key).is_none_or(|at| now.duration_since(*at) >= REPEAT_AFTER);
        if fresh {
            sent.insert(key, now);
        }
        fresh
    }
}

async fn send_all(
    client: kube::Client,
    reporter: Reporter,
    mut waiting: mpsc::Receiver<(Event, ObjectReference)>,
    leadership: Leadership,
) {
    while let Some((event, about)) = waiting.recv().await {
        if !leadership.is_held() {
            continue;
        }
        // A recorder merges events of one reason and keeps the first note only; repetitions are kept
        // back here already, so each event gets a recorder that remembers nothing.
        let recorder = Recorder::new(client.clone(), reporter.clone());
        if let Err(error) = recorder.publish(&event, &about).await {
            tracing::warn!(%error, reason = event.reason, "an event was not recorded");
        }
    }
}

fn shortened(mut note: String) -> String {
    if note.len() > MAX_NOTE {
        let mut end = MAX_NOTE - '…'.len_utf8();
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_event_is_sent_once_in_five_minutes() {
        let (queue, _waiting) = mpsc::channel(1);
        let events = Events { queue, sent: Arc::default() };
        let key = || ("uid".to_owned(), "Reason\nnote".to_owned());
        let now = Instant::now();
        assert!(events.is_new(key(), now));
        assert!(!events.is_new(key(), now + REPEAT_AFTER / 2));
        assert!(events.is_new(key(), now + REPEAT_AFTER));
        for index in 0..3 * MAX_REMEMBERED {
            events.is_new((index.to_string(), String::new()), now);
        }
        assert!(events.sent.lock().len() <= MAX_REMEMBERED);
    }

    #[test]
    fn long_notes_are_cut_at_a_character() {
        let note = shortened("ä".repeat(1000));
        assert!(note.len() <= MAX_NOTE && note.ends_with('…'));
        assert_eq!(shortened("short".to_owned()), "short");
    }
}
