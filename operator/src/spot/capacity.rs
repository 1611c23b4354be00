//! What a pod asks for, and which share of a node that is.

use k8s_openapi::api::core::v1::{Node, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

type Quantities = BTreeMap<String, Quantity>;

/// What one pod asks for. Whole numbers, so that it can be a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Size {
    pub cpu_milli: u64,
    pub memory_bytes: u64,
    /// Devices of any kind.
    pub devices: u64,
}

impl Size {
    /// What the scheduler sets aside: requests, or else limits.
    pub fn of(resources: Option<&ResourceRequirements>) -> Self {
        let Some(resources) = resources else { return Self::default() };
        let mut asked = resources.limits.clone().unwrap_or_default();
        asked.extend(resources.requests.clone().unwrap_or_default());
        Self::from_quantities(&asked)
    }

    /// What a node has for pods.
    pub fn of_node(node: &Node) -> Self {
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        allocatable.map(Self::from_quantities).unwrap_or_default()
    }

    fn from_quantities(quantities: &Quantities) -> Self {
        let mut size = Self::default();
        for (name, quantity) in quantities {
            let Some(amount) = amount(&quantity.0) else { continue };
            match name.as_str() {
                "cpu" => size.cpu_milli = (amount * 1000.0).round() as u64,
                "memory" => size.memory_bytes = amount as u64,
                // Extended resources have a domain: nvidia.com/gpu.
                name if name.contains('/') => size.devices += amount as u64,
                _ => {}
            }
        }
        size
    }

    /// Whether it is at least as large in every respect.
    pub fn covers(&self, other: &Self) -> bool {
        self.cpu_milli >= other.cpu_milli && self.memory_bytes >= other.memory_bytes && self.devices >= other.devices
    }

    /// The share of `node` that is of no use to others: the largest over CPU, memory and devices.
    /// A pod that asks for nothing, or a node of unknown size, counts as a whole node.
    pub fn share_of(&self, node: &Self) -> f64 {
        let part = |asked: u64, there: u64| if there > 0 { asked as f64 / there as f64 } else { 0.0 };
        let share = part(self.cpu_milli, node.cpu_milli)
            .max(part(self.memory_bytes, node.memory_bytes))
            .max(part(self.devices, node.devices));
        if share > 0.0 { share.min(1.0) } else { 1.0 }
    }
}

/// The amount that a quantity such as `250m`, `4Gi` or `1e3` stands for.
fn amount(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 15] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("n", 1e-9),
        ("u", 1e-6),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let with_suffix = SUFFIXES.iter().find_map(|(suffix, factor)| {
        let number: f64 = text.strip_suffix(suffix)?.parse().ok()?;
        Some(number * factor)
    });
    with_suffix.or_else(|| text.parse().ok()).filter(|amount: &f64| amount.is_finite() && *amount >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn size(value: serde_json::Value) -> Size {
        Size::of(Some(&serde_json::from_value(value).unwrap()))
    }

    #[test]
    fn quantities_are_read_as_kubernetes_writes_them() {
        let cases = [("250m", 0.25), ("2", 2.0), ("4Gi", 4.294_967_296e9), ("1e3", 1000.0), ("128M", 1.28e8)];
        for (text, expected) in cases {
            assert_eq!(amount(text), Some(expected), "{text}");
        }
        for text in ["", "many", "-1", "1Xi"] {
            assert_eq!(amount(text), None, "{text}");
        }
    }

    #[test]
    fn requests_count_before_limits() {
        let asked = size(json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "2", "memory": "1Gi"}}));
        assert_eq!(asked, Size { cpu_milli: 500, memory_bytes: 1 << 30, devices: 0 });
    }

    #[test]
    fn the_share_is_that_of_the_scarcest_resource() {
        let node = Size { cpu_milli: 8_000, memory_bytes: 64 << 30, devices: 8 };
        let pod = size(json!({"limits": {"cpu": "1", "memory": "8Gi", "nvidia.com/gpu": "4"}}));
        assert_eq!(pod.share_of(&node), 0.5);
        assert_eq!(Size::default().share_of(&node), 1.0);
        assert_eq!(pod.share_of(&Size::default()), 1.0);
    }

    #[test]
    fn a_larger_pod_covers_a_smaller_one_only() {
        let small = Size { cpu_milli: 1, memory_bytes: 1, devices: 1 };
        let large = Size { cpu_milli: 2, memory_bytes: 2, devices: 1 };
        let other = Size { cpu_milli: 3, memory_bytes: 0, devices: 0 };
        assert!(large.covers(&small) && large.covers(&large));
        assert!(!small.covers(&large) && !other.covers(&small));
    }
}
