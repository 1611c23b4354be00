//! The record of a training's membership: one ConfigMap, swapped before any rank hears of a
//! generation, so that two leaders cannot issue one.

use super::manifest::{Base, Manifest};
use serde::{Deserialize, Serialize};
use vicuna_protocol::coordinator::form::Purpose;

/// Who may train, and from where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    pub generation: u64,
    /// In rank order.
    pub members: Vec<Member>,
    pub base_step: u64,
    /// What its members came together for, so that a new leader knows; absent: to train.
    #[serde(default, skip_serializing_if = "trains", with = "purpose")]
    pub purpose: Purpose,
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

fn trains(purpose: &Purpose) -> bool {
    *purpose == Purpose::Train
}

/// By its name in the protocol.
mod purpose {
    use super::Purpose;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(purpose: &Purpose, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(purpose.as_str_name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Purpose, D::Error> {
        let name = String::deserialize(deserializer)?;
        Purpose::from_str_name(&name).ok_or_else(|| D::Error::custom(format!("no purpose of a generation: {name:?}")))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_from_before_purposes_is_of_a_generation_that_trains_and_others_say_theirs() {
        let old = r#"{"generation":3,"members":[],"baseStep":7,"history":[]}"#;
        let record: Record = serde_json::from_str(old).unwrap();
        assert_eq!(record.purpose, Purpose::Train);
        assert_eq!(serde_json::to_string(&record).unwrap(), old, "operators of before read what trains as they did");
        for purpose in [Purpose::Save, Purpose::HandOver] {
            let text = serde_json::to_string(&Record { purpose, ..record.clone() }).unwrap();
            assert_eq!(serde_json::from_str::<Record>(&text).unwrap().purpose, purpose);
        }
    }

    #[test]
    fn a_purpose_that_this_operator_does_not_know_is_said() {
        let text = r#"{"generation":3,"members":[],"baseStep":7,"purpose":"PURPOSE_DANCE","history":[]}"#;
        let error = serde_json::from_str::<Record>(text).unwrap_err().to_string();
        assert!(error.contains("PURPOSE_DANCE"), "{error}");
    }
}
