//! Custom resources as kubectl shows them.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Kubectl, wait_for};

/// A VicunaTraining or VicunaServing of one namespace.
#[derive(Debug, Clone)]
pub struct Objects {
    kubectl: Kubectl,
    namespace: String,
}

/// A value by its path, as `status.progress.step`.
pub fn field<'a>(object: &'a Value, path: &str) -> &'a Value {
    path.split('.').fold(object, |value, name| &value[name])
}

impl Objects {
    pub fn new(kubectl: Kubectl, namespace: &str) -> Self {
        Self { kubectl, namespace: namespace.to_owned() }
    }

    pub fn kubectl(&self) -> &Kubectl {
        &self.kubectl
    }

    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let text = self.kubectl.text(&["get", kind, name, "--namespace", &self.namespace, "--output", "json"])?;
        Ok(serde_json::from_str(&text)?)
    }

    /// The items of a list by label.
    pub fn list(&self, kind: &str, selector: &str) -> Result<Vec<Value>> {
        let words = ["get", kind, "--namespace", &self.namespace, "--selector", selector, "--output", "json"];
        let listed: Value = serde_json::from_str(&self.kubectl.text(&words)?)?;
        Ok(listed["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until `ready` says yes of the object; the error shows the status as it was.
    pub fn wait(&self, kind: &str, name: &str, limit: Duration, ready: impl Fn(&Value) -> bool) -> Result<Value> {
        let mut last = Value::Null;
        wait_for(&format!("{kind}/{name}"), limit, || {
            last = self.get(kind, name)?;
            std::thread::sleep(Duration::from_millis(200));
            Ok(ready(&last).then(|| last.clone()))
        })
        .with_context(|| format!("status of {kind}/{name}: {:#}", last["status"]))
    }

    /// Whether a condition has the given status.
    pub fn condition(object: &Value, kind: &str, status: &str) -> bool {
        Self::condition_of(object, kind).is_some_and(|condition| condition["status"] == status)
    }

    pub fn condition_of<'a>(object: &'a Value, kind: &str) -> Option<&'a Value> {
        object["status"]["conditions"].as_array()?.iter().find(|condition| condition["type"] == kind)
    }
}
