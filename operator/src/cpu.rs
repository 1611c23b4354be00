//! CPUs of a container, as numbers of threads.

use k8s_openapi::api::core::v1::ResourceRequirements;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use std::collections::BTreeMap;

/// What VICUNA_THREADS may say.
const MOST: u64 = 1024;

/// Whole CPUs that a container may use, by its limit or else its request, 1 to 1024; `None` where it names neither.
pub fn threads(resources: Option<&ResourceRequirements>) -> Option<u64> {
    let resources = resources?;
    let of = |list: &Option<BTreeMap<String, Quantity>>| list.as_ref()?.get("cpu").and_then(|cpus| whole(&cpus.0));
    of(&resources.limits).or_else(|| of(&resources.requests)).map(|cpus| cpus.clamp(1, MOST))
}

fn whole(text: &str) -> Option<u64> {
    if let Some(milli) = text.strip_suffix('m') {
        return milli.parse::<u64>().ok().map(|milli| milli / 1000);
    }
    text.parse::<f64>().ok().filter(|cpus| (0.0..1e6).contains(cpus)).map(|cpus| cpus as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn of(resources: serde_json::Value) -> Option<u64> {
        threads(Some(&serde_json::from_value(resources).unwrap()))
    }

    #[test]
    fn the_limit_counts_before_the_request_and_part_of_a_cpu_is_one_thread() {
        assert_eq!(of(json!({ "limits": { "cpu": "4" }, "requests": { "cpu": "2" } })), Some(4));
        assert_eq!(of(json!({ "limits": { "memory": "1Gi" }, "requests": { "cpu": "2500m" } })), Some(2));
        assert_eq!(of(json!({ "requests": { "cpu": "0.5" } })), Some(1));
        assert_eq!(of(json!({ "requests": { "cpu": "200m" } })), Some(1));
    }

    #[test]
    fn without_a_number_of_cpus_nothing_is_known() {
        assert_eq!(of(json!({ "limits": { "memory": "1Gi" } })), None);
        assert_eq!(whole("many"), None);
        assert_eq!(threads(None), None);
    }
}
