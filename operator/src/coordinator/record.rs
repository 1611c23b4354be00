//! The record of a training's membership: one ConfigMap, swapped before any rank hears of a
//! generation, so that two leaders cannot issue one.

use super::manifest::{Base, Manifest};
use serde::{Deserialize, Serialize};

/// Who may train, and from where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub generation: u64,
    /// In rank order.
    pub members: Vec<Member>,
    pub base_step: u64,
    /// Absent: the base model, or memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Manifest>,
    /// The base step is in the members' memory.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_memory: bool,
    /// What decides the last bits on every rank of this training, as they say; empty: not known yet.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub numerics_class: String,
    /// Where generations started, for the void rule.
    #[serde(default)]
    pub history: Vec<Base>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finish: Option<Finish>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Member {
    pub pod_uid: String,
    pub pod_name: String,
    pub node: String,
    /// `ip:port` where peers reach it.
    pub address: String,
}

/// The result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finish {
    pub step: u64,
    pub uri: String,
    pub digest: String,
    pub loss: f64,
}
