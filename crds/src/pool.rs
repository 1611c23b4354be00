//! Pools: kinds of nodes, in the order in which they are tried.

use crate::period::Period;
use k8s_openapi::api::core::v1::Toleration;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Duration;

// No doc comment: it would replace that of the fields of this type.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Capacity {
    OnPrem,
    Spot,
    OnDemand,
}

impl Capacity {
    /// As it is written in specs, labels and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OnPrem => "OnPrem",
            Self::Spot => "Spot",
            Self::OnDemand => "OnDemand",
        }
    }
}

/// Nodes of one kind.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// Name of the pool, unique in the list.
    #[schemars(length(min = 1, max = 63), regex(pattern = "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Whether its nodes are our own (OnPrem), may be reclaimed at any time (Spot), or are rented for as long as we want (OnDemand).
    pub capacity: Capacity,
    /// Labels of its nodes; absent: every node.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints of its nodes that our pods tolerate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "crate::schema::tolerations")]
    pub tolerations: Vec<Toleration>,
    /// Most pods of this object in the pool; absent: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max: Option<u32>,
    /// How long before a node goes its provider says so; our pods get this long to leave. Absent: 30s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<Period>,
    /// Price of one of its nodes for an hour, in any currency that is the same for all pools. Costs in status and metrics follow from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub hourly_price: Option<f64>,
}

impl Pool {
    /// The pool that stands for every node, where a spec names none.
    pub fn any_node() -> Self {
        Self {
            name: "any".to_owned(),
            capacity: Capacity::OnPrem,
            node_selector: BTreeMap::new(),
            tolerations: Vec::new(),
            max: None,
            notice: None,
            hourly_price: None,
        }
    }

    /// The warning that a node of this pool gives.
    pub fn notice(&self) -> Duration {
        self.notice.map_or(Duration::from_secs(30), Period::get)
    }

    /// The pools of a spec, in order; never empty.
    pub fn of(pools: &[Self]) -> Vec<Self> {
        match pools {
            [] => vec![Self::any_node()],
            some => some.to_vec(),
        }
    }
}
