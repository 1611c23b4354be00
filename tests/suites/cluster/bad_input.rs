//! Bad input ends in a sentence that says what, where and what to do, and recovers when the cause is gone.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vicuna_tests::cluster::repository;
use vicuna_tests::product::{self, Images, Objects};

use crate::fixture::{Fixture, NAMESPACE, SOON, TRAINED, put_folder, serving, tiny_model, training};

pub fn an_impossible_spec_is_rejected_with_a_sentence(fixture: &Fixture) -> Result<()> {
    let edits: [(&str, Value, &str); 6] = [
        ("/spec/recipe/globalBatch", json!(15), "globalBatch must be a multiple of microBatch"),
        ("/spec/workers/min", json!(3), "workers.min must not be above workers.max"),
        ("/spec/recipe/epochs", json!(2), "exactly one of epochs and steps"),
        ("/spec/recipe/lora", json!({"rank": 4}), "lora is for the methods LoRA and QLoRA"),
        ("/spec/recipe/lora", json!({"targets": ["all-linear", "q_proj"]}), "name it alone"),
        ("/spec/model/from", json!("hf://some/model"), "s3://"),
    ];
    for (path, value, sentence) in edits {
        let mut object = training("impossible", 10);
        set(&mut object, path, value)?;
        let error = fixture.apply(&object).err().with_context(|| format!("{path} was accepted"))?;
        ensure!(format!("{error:#}").contains(sentence), "{path}: expected {sentence:?} in: {error:#}");
    }
    let adapter = |name: &str, uri: &str| json!({"name": name, "from": {"uri": uri}});
    for (adapters, sentence) in [
        (json!([adapter("a", "s3://vicuna/models/tiny")]), "An adapter's from must not be that of the model"),
        (json!([adapter("a", "s3://b/x"), adapter("a", "s3://b/y")]), "duplicate entries"),
        (json!([adapter("a:b", "s3://b/x")]), "should match"),
        (json!([{"name": "a", "from": {}}]), "exactly one of uri and trainingRef"),
    ] {
        let mut object = serving("impossible", "s3://vicuna/models/tiny");
        object["spec"]["model"]["adapters"] = adapters;
        let error = fixture.apply(&object).err().with_context(|| format!("accepted: {object}"))?;
        ensure!(format!("{error:#}").contains(sentence), "expected {sentence:?} in: {error:#}");
    }
    Ok(())
}

/// By the schemas and the CEL rules of the real API server; nothing is made.
pub fn every_sample_is_accepted(fixture: &Fixture) -> Result<()> {
    let mut seen = 0;
    for entry in std::fs::read_dir(repository().join("manifests/samples"))? {
        let path = entry?.path();
        let is_sample = path.extension().is_some_and(|it| it == "yaml") && !path.ends_with("kustomization.yaml");
        if !is_sample {
            continue;
        }
        let mut command = fixture.cluster.kubectl().command()?;
        command.args(["create", "--dry-run=server", "--validate=strict", "--filename"]).arg(&path);
        let output = command.output()?;
        ensure!(output.status.success(), "{}: {}", path.display(), String::from_utf8_lossy(&output.stderr));
        seen += 1;
    }
    ensure!(seen > 0, "there are no samples");
    Ok(())
}

pub fn a_missing_dataset_is_told_and_recovers(fixture: &Fixture) -> Result<()> {
    let mut object = training("no-data", 5);
    set(&mut object, "/spec/dataset/0/from", json!("s3://vicuna/datasets/late.json"))?;
    fixture.apply(&object)?;
    let told = blocked(fixture, "no-data")?;
    ensure!(told.contains("late.json"), "the message does not name the object: {told}");
    fixture.bucket.put("datasets/late.json", &sample_data())?;
    finish(fixture, "no-data")
}

pub fn refused_credentials_are_told_and_recover(fixture: &Fixture) -> Result<()> {
    let s3 = fixture.cluster.s3()?;
    let secret = |key: &str| {
        json!({
            "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "mistyped", "namespace": NAMESPACE},
            "stringData": {"AWS_ACCESS_KEY_ID": s3.access_key, "AWS_SECRET_ACCESS_KEY": key,
                "AWS_ENDPOINT_URL": s3.pod_endpoint, "AWS_REGION": s3.region},
        })
    };
    fixture.apply(&secret("wrong"))?;
    let mut object = training("refused", 5);
    set(&mut object, "/spec/checkpoint/credentials/name", json!("mistyped"))?;
    fixture.apply(&object)?;
    let told = blocked(fixture, "refused")?;
    ensure!(!told.contains("wrong"), "the message shows the key: {told}");
    ensure!(told.to_lowercase().contains("credentials") || told.contains("key"), "not about credentials: {told}");
    fixture.apply(&secret(&s3.secret_key))?;
    finish(fixture, "refused")
}

pub fn a_missing_bucket_is_told(fixture: &Fixture) -> Result<()> {
    let mut object = training("no-bucket", 5);
    set(&mut object, "/spec/checkpoint/to", json!("s3://nowhere/trainings/no-bucket"))?;
    fixture.apply(&object)?;
    let told = blocked(fixture, "no-bucket")?;
    ensure!(told.contains("nowhere"), "the message does not name the bucket: {told}");
    fixture.delete("vicunatraining", "no-bucket")
}

pub fn a_pod_that_fits_nowhere_is_told(fixture: &Fixture) -> Result<()> {
    let mut object = training("nowhere", 5);
    set(
        &mut object,
        "/spec/pools",
        json!([{"name": "moon", "capacity": "Spot", "nodeSelector": {"vicuna.dev/capacity": "moon"}}]),
    )?;
    fixture.apply(&object)?;
    let condition = fixture.objects.wait("vicunatraining", "nowhere", SOON, |vt| {
        not_running(vt).is_some_and(|told| told["reason"] == "Unschedulable")
    })?;
    let told = not_running(&condition).context("the condition is gone")?["message"].to_string();
    ensure!(told.contains("moon"), "the message does not name the pool: {told}");
    fixture.wait_for_event("nowhere", "Unschedulable")?;
    fixture.delete("vicunatraining", "nowhere")
}

pub fn a_missing_secret_is_told_and_recovers(fixture: &Fixture) -> Result<()> {
    let mut train = training("no-secret", 5);
    set(&mut train, "/spec/checkpoint/credentials/name", json!("late"))?;
    let mut serve = serving("no-secret", "s3://vicuna/models/tiny");
    set(&mut serve, "/spec/model/credentials/name", json!("late"))?;
    fixture.apply(&train)?;
    fixture.apply(&serve)?;
    let told = blocked_by(fixture, "no-secret", "PodMisconfigured")?;
    ensure!(told.contains("late"), "the message does not name the Secret: {told}");
    unready(fixture, "no-secret", "SecretMissing", "late")?;
    product::storage_secret(&fixture.cluster, NAMESPACE, "late")?;
    serves(fixture, "no-secret")?;
    finish(fixture, "no-secret")
}

/// The administrator has mistyped the runtime image, and corrects it.
pub fn an_image_that_cannot_be_pulled_is_told_and_recovers(fixture: &Fixture) -> Result<()> {
    let Images { operator, runtime } = &fixture.images;
    let absent = "127.0.0.1:1/runtime:absent";
    product::install_operator(&fixture.cluster, &operator.reference, absent)?;
    let told = without_an_image(fixture, absent);
    // Whatever came of it: the other cases need the image.
    product::install_operator(&fixture.cluster, &operator.reference, &runtime.reference)?;
    told?;
    serves(fixture, "no-image")?;
    finish(fixture, "no-image")
}

fn without_an_image(fixture: &Fixture, absent: &str) -> Result<()> {
    fixture.apply(&training("no-image", 5))?;
    fixture.apply(&serving("no-image", "s3://vicuna/models/tiny"))?;
    let told = blocked_by(fixture, "no-image", "ImagePullFailed")?;
    ensure!(told.contains(absent), "the message does not name the image: {told}");
    unready(fixture, "no-image", "ImagePullFailed", absent)
}

/// Torn safetensors are trained, a torn GGUF is served.
pub fn an_unreadable_model_is_told_and_recovers(fixture: &Fixture) -> Result<()> {
    let whole = [tiny_model().join("model.safetensors"), product::smollm2()?];
    let keys = ["models/torn/model.safetensors", "models/torn.gguf"];
    put_folder(&fixture.bucket, &tiny_model(), "models/torn")?;
    for (file, key) in whole.iter().zip(keys) {
        fixture.bucket.put(key, &torn(file)?)?;
    }
    let mut train = training("torn-model", 5);
    set(&mut train, "/spec/model/from", json!("s3://vicuna/models/torn"))?;
    fixture.apply(&train)?;
    fixture.apply(&serving("torn-model", "s3://vicuna/models/torn.gguf"))?;
    let told = blocked_by(fixture, "torn-model", "ModelUnreadable")?;
    ensure!(told.contains("models/torn"), "the message does not name the model: {told}");
    unready(fixture, "torn-model", "ModelUnavailable", "models/torn.gguf")?;
    for (file, key) in whole.iter().zip(keys) {
        fixture.bucket.put(key, file)?;
    }
    serves(fixture, "torn-model")?;
    finish(fixture, "torn-model")
}

/// A file without its second half, as an upload that broke off leaves it.
fn torn(file: &Path) -> Result<PathBuf> {
    let whole = std::fs::read(file)?;
    let torn = repository().join("target/torn");
    std::fs::write(&torn, &whole[..whole.len() / 2])?;
    Ok(torn)
}

/// Waits until a serving's condition Ready is False for that reason and its message names `culprit`; an Event tells it,
/// too. (A worker that still fetches its model is not ready either.)
fn unready(fixture: &Fixture, name: &str, reason: &str, culprit: &str) -> Result<()> {
    let told = |vs: &Value| {
        let ready = Objects::condition_of(vs, "Ready").filter(|ready| ready["status"] == "False");
        ready.is_some_and(|ready| {
            ready["reason"] == reason && ready["message"].as_str().is_some_and(|message| message.contains(culprit))
        })
    };
    fixture.objects.wait("vicunaserving", name, SOON, told)?;
    fixture.wait_for_event(name, reason).map(drop)
}

/// The serving's worker answers; then the serving goes.
fn serves(fixture: &Fixture, name: &str) -> Result<()> {
    fixture.objects.wait("vicunaserving", name, SOON, |vs| Objects::condition(vs, "Ready", "True"))?;
    fixture.delete("vicunaserving", name)
}

/// As [`blocked`], for this reason.
fn blocked_by(fixture: &Fixture, name: &str, reason: &str) -> Result<String> {
    let told = |vt: &Value| {
        let condition = not_running(vt).filter(|condition| condition["reason"] == reason)?;
        let is_blocked = vt["status"]["state"] == "Blocked";
        is_blocked.then(|| condition["message"].as_str().unwrap_or_default().to_owned())
    };
    let object = fixture.objects.wait("vicunatraining", name, SOON, |vt| told(vt).is_some())?;
    fixture.wait_for_event(name, reason)?;
    told(&object).context("the condition is gone")
}

/// Waits for the state Blocked and gives the message of the condition that says why; an Event says the same.
fn blocked(fixture: &Fixture, name: &str) -> Result<String> {
    let object = fixture.objects.wait("vicunatraining", name, SOON, |vt| vt["status"]["state"] == "Blocked")?;
    let condition = not_running(&object).context("no condition says what is in the way")?;
    let reason = condition["reason"].as_str().context("a condition without a reason")?;
    fixture.wait_for_event(name, reason)?;
    Ok(condition["message"].as_str().unwrap_or_default().to_owned())
}

fn not_running(object: &Value) -> Option<&Value> {
    ["Admitted", "Progressing", "Running"]
        .iter()
        .filter_map(|kind| Objects::condition_of(object, kind))
        .find(|condition| condition["status"] == "False")
}

/// The training completes, and has spent no retry.
fn finish(fixture: &Fixture, name: &str) -> Result<()> {
    let done =
        fixture.objects.wait("vicunatraining", name, TRAINED, |vt| Objects::condition(vt, "Finished", "True"))?;
    ensure!(Objects::condition(&done, "Complete", "True"), "not complete: {:#}", done["status"]);
    ensure!(
        done["status"]["restarts"]["application"].as_u64().unwrap_or(0) == 0,
        "a retry was spent: {:#}",
        done["status"]
    );
    fixture.delete("vicunatraining", name)
}

fn sample_data() -> std::path::PathBuf {
    repository().join(Path::new("manifests/samples/data/conversations.json"))
}

/// Sets a value that exists or is new in an existing object.
pub fn set(object: &mut Value, pointer: &str, value: Value) -> Result<()> {
    let (parent, name) = pointer.rsplit_once('/').context("not a pointer")?;
    object.pointer_mut(parent).with_context(|| format!("no {parent}"))?[name] = value;
    Ok(())
}
