//! The names that requests give in `model`.

use kube::ResourceExt;
use kube::runtime::reflector::ObjectRef;
use vicuna_crds::VicunaServing;

/// The model's own: `namespace/serving`.
pub fn public_name(serving: &VicunaServing) -> String {
    format!("{}/{}", serving.namespace().unwrap_or_default(), serving.name_any())
}

/// One of its adapters': `namespace/serving:adapter`, which no other serving can have.
pub fn adapter_name(serving: &VicunaServing, adapter: &str) -> String {
    format!("{}:{adapter}", public_name(serving))
}

/// All that its workers answer to.
pub fn public_names(serving: &VicunaServing) -> Vec<String> {
    let adapters = serving.spec.model.adapters.iter().map(|adapter| adapter_name(serving, &adapter.name));
    std::iter::once(public_name(serving)).chain(adapters).collect()
}

/// The serving that a public name is of.
pub fn serving_of(name: &str) -> Option<ObjectRef<VicunaServing>> {
    let (namespace, rest) = name.split_once('/')?;
    let serving = rest.split_once(':').map_or(rest, |(serving, _)| serving);
    Some(ObjectRef::new(serving).within(namespace))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::plan::tests::observed;

    #[test]
    fn every_public_name_leads_back_to_its_serving() {
        let mut serving = (*observed(serde_json::json!({ "replicas": 1 })).serving).clone();
        let adapter = serde_json::json!([{ "name": "a", "from": { "uri": "s3://b/a" } }]);
        serving.spec.model.adapters = serde_json::from_value(adapter).unwrap();
        let names = public_names(&serving);
        assert_eq!(names, ["n/s", "n/s:a"]);
        for name in names {
            assert_eq!(serving_of(&name), Some(ObjectRef::new("s").within("n")), "{name}");
        }
        assert_eq!(serving_of("nothing"), None);
    }
}
