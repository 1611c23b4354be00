//! What the operator relies on of an API server. One suite for every server: the simulated one
//! ([`crate::api_server`]) in the unit tests, a real one in the cluster suite.

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, ServiceAccount};
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, PostParams,
    Preconditions, WatchEvent, WatchParams,
};
use kube::{Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::fmt::Debug;
use std::time::Duration;
use tokio::time::Instant;

/// The real one's controllers take so long at most.
const SOON: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A bound pod whose kubelet does nothing is still there after its deletion.
const GRACE_SECONDS: i64 = 600;

/// Runs all cases in a namespace of their own: each with what became of it.
pub async fn run(client: Client) -> Vec<(&'static str, Result<()>)> {
    let namespace = match make_namespace(&client).await {
        Ok(namespace) => namespace,
        Err(error) => return vec![("a namespace is made", Err(error))],
    };
    let on = Server { client: client.clone(), namespace: namespace.clone() };
    let results = vec![
        ("a name is taken once, and has to be one", on.a_name_is_taken_once().await),
        ("what is not there is told", on.what_is_not_there_is_told().await),
        ("a record is swapped by one writer", on.a_record_is_swapped_by_one_writer().await),
        ("a merge patch changes what it names", on.a_merge_patch_changes_what_it_names().await),
        ("an apply owns its fields", on.an_apply_owns_its_fields().await),
        ("a status is written apart", on.a_status_is_written_apart().await),
        ("a deletion asks for whom it is", on.a_deletion_asks_for_whom_it_is().await),
        ("a finalizer holds what is deleted", on.a_finalizer_holds_what_is_deleted().await),
        ("a bound pod is given its time", on.a_bound_pod_is_given_its_time().await),
        ("what belongs to nobody goes", on.what_belongs_to_nobody_goes().await),
        ("a watch tells what a list has not", on.a_watch_tells_what_a_list_has_not().await),
        ("a lease is held by its version", on.a_lease_is_held_by_its_version().await),
    ];
    // What is left goes with it.
    let _ = Api::<Namespace>::all(client).delete(&namespace, &DeleteParams::default()).await;
    results
}

async fn make_namespace(client: &Client) -> Result<String> {
    let namespace: Namespace = serde_json::from_value(json!({"metadata": {"generateName": "conformance-"}}))?;
    let made = Api::all(client.clone()).create(&PostParams::default(), &namespace).await?;
    Ok(made.name_any())
}

struct Server {
    client: Client,
    namespace: String,
}

impl Server {
    fn api<K>(&self) -> Api<K>
    where
        K: Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    fn trainings(&self) -> Api<DynamicObject> {
        let kind = GroupVersionKind::gvk("vicuna.dev", "v1alpha1", "VicunaTraining");
        Api::namespaced_with(self.client.clone(), &self.namespace, &ApiResource::from_gvk(&kind))
    }

    async fn a_name_is_taken_once(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let made = create(&maps, map("taken", json!({"a": "1"}))?).await?;
        ensure!(made.uid().is_some() && made.resource_version().is_some() && made.creation_timestamp().is_some());
        refused(create(&maps, map("taken", json!({}))?).await, 409, "AlreadyExists")?;
        ensure!(maps.get("taken").await?.data == made.data, "the first one stays");
        refused(create(&maps, map("Not_A_Name", json!({}))?).await, 422, "Invalid")
    }

    async fn what_is_not_there_is_told(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        ensure!(maps.get_opt("missing").await?.is_none());
        refused(maps.delete("missing", &DeleteParams::default()).await, 404, "NotFound")?;
        let patch = json!({"metadata": {"annotations": {"a": "b"}}});
        refused(maps.patch("missing", &PatchParams::default(), &Patch::Merge(&patch)).await, 404, "NotFound")?;
        let absent = map("missing", json!({}))?;
        refused(maps.replace("missing", &PostParams::default(), &absent).await, 404, "NotFound")?;
        let elsewhere: Api<ConfigMap> = Api::namespaced(self.client.clone(), "conformance-nowhere");
        refused(create(&elsewhere, map("m", json!({}))?).await, 404, "NotFound")
    }

    async fn a_record_is_swapped_by_one_writer(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let first = create(&maps, map("record", json!({"record": "1"}))?).await?;
        let swap = |version: Option<String>, text: &str| {
            let mut next = map("record", json!({"record": text}));
            if let Ok(next) = &mut next {
                next.metadata.resource_version = version;
            }
            next
        };
        let second = maps.replace("record", &PostParams::default(), &swap(first.resource_version(), "2")?).await?;
        ensure!(second.resource_version() != first.resource_version() && second.uid() == first.uid());
        let late = maps.replace("record", &PostParams::default(), &swap(first.resource_version(), "3")?).await;
        refused(late, 409, "Conflict")?;
        let read = maps.get("record").await?;
        ensure!(read.data == second.data && read.resource_version() == second.resource_version());
        let same = maps.replace("record", &PostParams::default(), &swap(second.resource_version(), "2")?).await?;
        ensure!(same.resource_version() == second.resource_version(), "what changes nothing is no new version");
        Ok(())
    }

    async fn a_merge_patch_changes_what_it_names(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let made = create(&maps, map("merged", json!({"keep": "1", "drop": "2"}))?).await?;
        let patch = json!({
            "metadata": {"uid": made.uid(), "annotations": {"vicuna.dev/a": "b"}},
            "data": {"drop": null, "add": "3"},
        });
        let merged = maps.patch("merged", &PatchParams::default(), &Patch::Merge(&patch)).await?;
        ensure!(json!(merged.data) == json!({"keep": "1", "add": "3"}), "{:?}", merged.data);
        ensure!(merged.annotations().get("vicuna.dev/a").is_some_and(|value| value == "b"));
        let namesake = json!({"metadata": {"uid": "00000000-0000-4000-8000-ffffffffffff"}, "data": {"keep": "9"}});
        refused(maps.patch("merged", &PatchParams::default(), &Patch::Merge(&namesake)).await, 422, "Invalid")
    }

    async fn an_apply_owns_its_fields(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let (ours, theirs) = (PatchParams::apply("ours"), PatchParams::apply("theirs"));
        let applied = |data: Value| map("applied", data);
        let made = maps.patch("applied", &ours, &Patch::Apply(applied(json!({"a": "1", "b": "1"}))?)).await?;
        let again = maps.patch("applied", &ours, &Patch::Apply(applied(json!({"a": "1", "b": "1"}))?)).await?;
        ensure!(made.resource_version() == again.resource_version(), "what changes nothing is no new version");
        let other = json!({"data": {"c": "1"}});
        maps.patch("applied", &PatchParams::default(), &Patch::Merge(&other)).await?;
        let fewer = maps.patch("applied", &ours, &Patch::Apply(applied(json!({"a": "2"}))?)).await?;
        ensure!(json!(fewer.data) == json!({"a": "2", "c": "1"}), "ours goes, others' stays: {:?}", fewer.data);
        let contested = applied(json!({"a": "3"}))?;
        refused(maps.patch("applied", &theirs, &Patch::Apply(&contested)).await, 409, "Conflict")?;
        let forced = maps.patch("applied", &theirs.force(), &Patch::Apply(&contested)).await?;
        ensure!(forced.data.is_some_and(|data| data["a"] == "3"));
        refused(maps.patch("applied", &ours, &Patch::Apply(applied(json!({"a": "4"}))?)).await, 409, "Conflict")
    }

    async fn a_status_is_written_apart(&self) -> Result<()> {
        let trainings = self.trainings();
        let made = create(&trainings, training("apart")?).await?;
        ensure!(made.metadata.generation == Some(1) && made.data["status"].is_null());
        let apply = PatchParams::apply("operator").force();
        let status = |uid: Option<String>, conditions: &[&str]| {
            let conditions: Vec<Value> = conditions.iter().map(|kind| condition(kind)).collect();
            json!({
                "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining", "metadata": {"uid": uid},
                "spec": {"workers": {"max": 7}}, "status": {"conditions": conditions},
            })
        };
        let both = status(made.uid(), &["Running", "Progressing"]);
        let told = trainings.patch_status("apart", &apply, &Patch::Apply(&both)).await?;
        ensure!(told.data["spec"] == made.data["spec"], "the status alone is written");
        ensure!(told.metadata.generation == Some(1) && told.resource_version() != made.resource_version());
        let one = trainings.patch_status("apart", &apply, &Patch::Apply(&status(made.uid(), &["Running"]))).await?;
        ensure!(
            one.data["status"]["conditions"].as_array().is_some_and(|all| all.len() == 1),
            "{}",
            one.data["status"]
        );
        let asked = json!({"spec": {"suspend": true}, "status": {"conditions": []}});
        let asked = trainings.patch("apart", &PatchParams::default(), &Patch::Merge(&asked)).await?;
        ensure!(asked.metadata.generation == Some(2), "what is asked for is counted");
        ensure!(asked.data["status"] == one.data["status"], "and the status stays");
        let namesake = status(Some("00000000-0000-4000-8000-ffffffffffff".to_owned()), &[]);
        let taken = trainings.patch_status("apart", &apply, &Patch::Apply(&namesake)).await?;
        ensure!(taken.uid() == made.uid(), "nobody looks at the uid that comes with a status");
        let without = json!({"apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining"});
        let without = trainings.patch_status("apart", &apply, &Patch::Apply(&without)).await?;
        ensure!(without.data["status"]["conditions"].is_null(), "what is not applied any more is gone");
        let absent = trainings.patch_status("missing", &apply, &Patch::Apply(&status(None, &[]))).await;
        refused(absent, 404, "NotFound")?;
        trainings.delete("apart", &DeleteParams::default()).await?;
        gone(&trainings, "apart").await
    }

    async fn a_deletion_asks_for_whom_it_is(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let made = create(&maps, map("asked", json!({}))?).await?;
        let only = |uid: Option<String>| DeleteParams {
            preconditions: Some(Preconditions { uid, ..Preconditions::default() }),
            ..DeleteParams::default()
        };
        let namesake = only(Some("00000000-0000-4000-8000-ffffffffffff".to_owned()));
        refused(maps.delete("asked", &namesake).await, 409, "Conflict")?;
        maps.delete("asked", &only(made.uid())).await?;
        gone(&maps, "asked").await
    }

    async fn a_finalizer_holds_what_is_deleted(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let mut held = map("held", json!({}))?;
        held.metadata.finalizers = Some(vec!["vicuna.dev/test".to_owned()]);
        create(&maps, held).await?;
        maps.delete("held", &DeleteParams::default()).await?;
        ensure!(maps.get("held").await?.metadata.deletion_timestamp.is_some());
        let free = json!({"metadata": {"finalizers": null}});
        maps.patch("held", &PatchParams::default(), &Patch::Merge(&free)).await?;
        gone(&maps, "held").await
    }

    async fn a_bound_pod_is_given_its_time(&self) -> Result<()> {
        let account: ServiceAccount = serde_json::from_value(json!({"metadata": {"name": "runner"}}))?;
        create(&self.api::<ServiceAccount>(), account).await?;
        let pods = self.api::<Pod>();
        create(&pods, pod("unbound", None)?).await?;
        pods.delete("unbound", &DeleteParams::default()).await?;
        gone(&pods, "unbound").await?;
        let bound = create(&pods, pod("bound", Some("conformance-no-node"))?).await?;
        ensure!(bound.status.and_then(|status| status.phase).is_some_and(|phase| phase == "Pending"));
        pods.delete("bound", &DeleteParams::default()).await?;
        let leaving = pods.get("bound").await?.metadata;
        ensure!(leaving.deletion_timestamp.is_some() && leaving.deletion_grace_period_seconds == Some(GRACE_SECONDS));
        let at_once = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        pods.delete("bound", &at_once).await?;
        gone(&pods, "bound").await
    }

    async fn what_belongs_to_nobody_goes(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let owner = create(&maps, map("owner", json!({}))?).await?;
        let mut owned = map("owned", json!({}))?;
        owned.metadata.owner_references = owner.owner_ref(&()).map(|reference| vec![reference]);
        create(&maps, owned).await?;
        maps.delete("owner", &DeleteParams::default()).await?;
        gone(&maps, "owned").await
    }

    async fn a_watch_tells_what_a_list_has_not(&self) -> Result<()> {
        let maps = self.api::<ConfigMap>();
        let labelled = |name: &str, label: &str| {
            map(name, json!({})).map(|mut map| {
                map.metadata.labels = Some([("watched".to_owned(), label.to_owned())].into());
                map
            })
        };
        create(&maps, labelled("seen-before", "yes")?).await?;
        create(&maps, labelled("unseen", "no")?).await?;
        let listed = maps.list(&ListParams::default().labels("watched=yes")).await?;
        ensure!(listed.items.iter().map(ResourceExt::name_any).eq(["seen-before"]));
        let since = listed.metadata.resource_version.context("a list without a version")?;
        create(&maps, labelled("seen", "yes")?).await?;
        let set = |value: &str| json!({"metadata": {"labels": {"watched": value}}, "data": {"value": value}});
        let change = json!({"data": {"a": "1"}});
        maps.patch("seen", &PatchParams::default(), &Patch::Merge(&change)).await?;
        maps.patch("seen-before", &PatchParams::default(), &Patch::Merge(&set("no"))).await?;
        maps.patch("unseen", &PatchParams::default(), &Patch::Merge(&set("yes"))).await?;
        maps.delete("seen", &DeleteParams::default()).await?;
        let watched = WatchParams::default().labels("watched=yes").timeout(30);
        let events = maps.watch(&watched, &since).await?;
        let told: Vec<String> = events.take(5).map_ok(word).try_collect().await?;
        let expected =
            ["added seen", "modified seen", "deleted seen-before", "added unseen", "deleted seen"].map(str::to_owned);
        ensure!(told == expected, "{told:?}");
        Ok(())
    }

    async fn a_lease_is_held_by_its_version(&self) -> Result<()> {
        let leases = self.api::<Lease>();
        let lease = |holder: &str, version: Option<String>| {
            serde_json::from_value::<Lease>(json!({
                "metadata": {"name": "leader", "resourceVersion": version},
                "spec": {"holderIdentity": holder, "leaseDurationSeconds": 15},
            }))
        };
        let first = create(&leases, lease("one", None)?).await?;
        let version = first.resource_version();
        let taken = leases.replace("leader", &PostParams::default(), &lease("two", version.clone())?).await?;
        refused(leases.replace("leader", &PostParams::default(), &lease("three", version)?).await, 409, "Conflict")?;
        ensure!(leases.get("leader").await?.spec == taken.spec);
        Ok(())
    }
}

async fn create<K>(api: &Api<K>, object: K) -> Result<K, kube::Error>
where
    K: Clone + DeserializeOwned + Debug + Serialize,
{
    let parameters = PostParams { field_manager: Some("conformance".to_owned()), ..PostParams::default() };
    api.create(&parameters, &object).await
}

/// Waits until it is.
async fn gone<K: Clone + DeserializeOwned + Debug>(api: &Api<K>, name: &str) -> Result<()> {
    let until = Instant::now() + SOON;
    while api.get_opt(name).await?.is_some() {
        if Instant::now() >= until {
            bail!("{name} is still there");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

fn refused<T>(result: Result<T, kube::Error>, code: u16, reason: &str) -> Result<()> {
    match result {
        Ok(_) => bail!("it was done, and should have been refused with {code} {reason}"),
        Err(kube::Error::Api(status)) if status.code == code && status.reason == reason => Ok(()),
        Err(error) => Err(error).context(format!("{code} {reason} was expected")),
    }
}

fn word(event: WatchEvent<ConfigMap>) -> String {
    match event {
        WatchEvent::Added(map) => format!("added {}", map.name_any()),
        WatchEvent::Modified(map) => format!("modified {}", map.name_any()),
        WatchEvent::Deleted(map) => format!("deleted {}", map.name_any()),
        WatchEvent::Bookmark(_) => "bookmark".to_owned(),
        WatchEvent::Error(error) => format!("error {error:?}"),
    }
}

fn map(name: &str, data: Value) -> Result<ConfigMap, serde_json::Error> {
    serde_json::from_value(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}))
}

fn pod(name: &str, node: Option<&str>) -> Result<Pod, serde_json::Error> {
    serde_json::from_value(json!({
        "metadata": {"name": name},
        "spec": {
            "nodeName": node,
            "nodeSelector": {"vicuna.dev/conformance": "nowhere"},
            "serviceAccountName": "runner",
            "automountServiceAccountToken": false,
            "terminationGracePeriodSeconds": GRACE_SECONDS,
            "containers": [{"name": "main", "image": "none"}],
        },
    }))
}

/// One with which no operator does anything.
fn training(name: &str) -> Result<DynamicObject, serde_json::Error> {
    serde_json::from_value(json!({
        "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining",
        "metadata": {"name": name},
        "spec": {
            "managedBy": "vicuna.dev/conformance",
            "model": {"from": "s3://bucket/model"},
            "dataset": [{"from": "s3://bucket/data.json"}],
            "recipe": {"globalBatch": 8, "microBatch": 1, "steps": 10},
            "workers": {"min": 1, "max": 2},
            "checkpoint": {"to": "s3://bucket/run"},
        },
    }))
}

fn condition(kind: &str) -> Value {
    json!({
        "type": kind, "status": "True", "reason": "Test", "message": "of a test",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    })
}
