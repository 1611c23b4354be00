//! The names that requests give in `model`.

use kube::ResourceExt;
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
