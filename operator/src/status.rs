//! How both controllers write a status.

use kube::api::{Api, Patch, PatchParams};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;

/// Applies `status` to the very object that it is about; `false` if that is not there any more. The API server does not look at
/// the uid of a status that is applied: where a namesake has taken the object's place, what was written is taken away again,
/// so that it does not begin with another's end.
pub async fn apply<K>(api: &Api<K>, about: &K, manager: &str, status: &impl Serialize) -> Result<bool, kube::Error>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Serialize + Debug,
{
    let (name, parameters) = (about.name_any(), PatchParams::apply(manager).force());
    let nothing = json!({"apiVersion": K::api_version(&()), "kind": K::kind(&())});
    let mut all = nothing.clone();
    all["status"] = serde_json::to_value(status).map_err(kube::Error::SerdeError)?;
    let write = async |patch: &Value| match api.patch_status(&name, &parameters, &Patch::Apply(patch)).await {
        Ok(written) => Ok(Some(written)),
        Err(kube::Error::Api(refused)) if refused.code == 404 => Ok(None),
        Err(error) => Err(error),
    };
    match write(&all).await? {
        Some(written) if written.uid() == about.uid() => Ok(true),
        Some(_) => write(&nothing).await.map(|_| false),
        None => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::api::{DeleteParams, PostParams};
    use vicuna_crds::VicunaTraining;
    use vicuna_tests::api_server::ApiServer;

    #[tokio::test]
    async fn a_namesake_does_not_get_the_status_of_what_was_there_before() {
        let api: Api<VicunaTraining> = Api::namespaced(ApiServer::new(0).client(), "default");
        let training = crate::training::tests::training("t");
        let mut fresh = training.clone();
        fresh.metadata.uid = None;
        fresh.metadata.namespace = Some("default".to_owned());
        let first = api.create(&PostParams::default(), &fresh).await.unwrap();
        let status = json!({"selector": "a=b"});
        assert!(apply(&api, &first, "operator", &status).await.unwrap());
        api.delete("t", &DeleteParams::default()).await.unwrap();
        assert!(!apply(&api, &first, "operator", &status).await.unwrap(), "it is gone");
        let second = api.create(&PostParams::default(), &fresh).await.unwrap();
        assert_ne!(first.uid(), second.uid());
        assert!(!apply(&api, &first, "operator", &status).await.unwrap());
        assert_eq!(api.get("t").await.unwrap().status.and_then(|status| status.selector), None);
    }
}
