//! What the definitions promise to users and to the API server.

#![allow(clippy::unwrap_used, clippy::panic)]

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{CustomResourceDefinition, JSONSchemaProps};
use serde_json::json;
use std::path::Path;
use vicuna_crds::training::{Method, Schedule};
use vicuna_crds::{Capacity, Pool, VicunaServing, VicunaTraining, definition};

fn schema(crd: &CustomResourceDefinition) -> &JSONSchemaProps {
    let version = &crd.spec.versions[0];
    version.schema.as_ref().unwrap().open_api_v3_schema.as_ref().unwrap()
}

fn property<'a>(schema: &'a JSONSchemaProps, path: &str) -> &'a JSONSchemaProps {
    path.split('.').fold(schema, |at, name| {
        let properties = at.properties.as_ref();
        properties.and_then(|p| p.get(name)).unwrap_or_else(|| panic!("no {name} of {path}"))
    })
}

fn rules(schema: &JSONSchemaProps) -> Vec<String> {
    let rules = schema.x_kubernetes_validations.iter().flatten();
    rules.filter_map(|rule| rule.message.clone()).collect()
}

/// Every schema below `schema` with its path.
fn walk(path: &str, schema: &JSONSchemaProps, see: &mut dyn FnMut(&str, &JSONSchemaProps)) {
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        JSONSchemaPropsOrArray::Schema as Items, JSONSchemaPropsOrBool::Schema as Values,
    };
    see(path, schema);
    for (name, child) in schema.properties.iter().flatten() {
        walk(&format!("{path}.{name}"), child, see);
    }
    if let Some(Items(items)) = &schema.items {
        walk(&format!("{path}[]"), items, see);
    }
    if let Some(Values(values)) = &schema.additional_properties {
        walk(&format!("{path}{{}}"), values, see);
    }
}

#[test]
fn the_yaml_is_what_the_types_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in definition::files().unwrap() {
        let chart = root.join("../charts/vicuna-operator-crds/templates");
        for (path, expected) in
            [(root.join("yaml").join(&name), text.clone()), (chart.join(&name), definition::as_chart_template(&text))]
        {
            let found = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                found == expected,
                "{} is stale: run `cargo run --release -p vicuna-crds --bin crdgen`",
                path.display()
            );
        }
    }
}

#[test]
fn every_field_is_described() {
    for crd in definition::all() {
        let mut missing = Vec::new();
        walk("", schema(&crd), &mut |path, at| {
            let ours = path.starts_with(".spec.") || path.starts_with(".status.");
            let named = !path.ends_with("[]") && !path.ends_with("{}");
            if ours && named && at.description.as_deref().is_none_or(str::is_empty) {
                missing.push(path.to_owned());
            }
        });
        assert!(missing.is_empty(), "no description: {missing:?}");
    }
}

#[test]
fn an_optional_choice_keeps_its_own_description() {
    let [serving, training] = definition::all().try_into().unwrap();
    let template = property(schema(&training), "spec.model.template");
    assert_eq!(
        template.description.as_deref(),
        Some("How a conversation is written as text; absent: the model's own template.")
    );
    let choices: Vec<_> = template.enum_.iter().flatten().filter_map(|v| v.0.as_str()).collect();
    assert_eq!(choices, ["vicuna_v0", "vicuna_v1.1", "llama-2", "llama-3", "chatml"]);
    let state = property(schema(&training), "status.state");
    assert_eq!(state.description.as_deref(), Some("The conditions in one word."));
    let served = property(schema(&serving), "spec.model.template");
    assert_eq!(served.description, template.description);
}

#[test]
fn the_schemas_are_structural() {
    for crd in definition::all() {
        walk("", schema(&crd), &mut |path, at| {
            let typed = at.type_.is_some() || at.x_kubernetes_int_or_string == Some(true);
            assert!(typed, "{path} has no type");
            assert!(at.one_of.is_none(), "{path} has oneOf");
            assert!(at.ref_path.is_none(), "{path} has a reference");
            let any_of = at.any_of.is_some();
            assert!(!any_of || at.x_kubernetes_int_or_string == Some(true), "{path} has anyOf");
            let format = at.format.as_deref();
            assert!(
                matches!(format, None | Some("int32" | "int64" | "double" | "date-time")),
                "{path} has a format that Kubernetes does not know: {format:?}"
            );
        });
    }
}

#[test]
fn no_field_of_a_status_is_required_except_in_lists() {
    for crd in definition::all() {
        let status = property(schema(&crd), "status");
        walk("status", status, &mut |path, at| {
            let in_list = path.contains("[]");
            assert!(
                in_list || at.required.as_ref().is_none_or(Vec::is_empty),
                "{path} requires {:?}: a partial status could not be applied",
                at.required
            );
        });
    }
}

#[test]
fn conditions_and_pools_are_merged_by_their_keys() {
    for crd in definition::all() {
        let conditions = property(schema(&crd), "status.conditions");
        assert_eq!(conditions.x_kubernetes_list_type.as_deref(), Some("map"));
        assert_eq!(conditions.x_kubernetes_list_map_keys, Some(vec!["type".to_owned()]));
        let pools = property(schema(&crd), "spec.pools");
        assert_eq!(pools.x_kubernetes_list_type.as_deref(), Some("map"));
        assert_eq!(pools.x_kubernetes_list_map_keys, Some(vec!["name".to_owned()]));
    }
}

#[test]
fn every_rule_says_in_a_sentence_what_to_do() {
    let mut count = 0;
    for crd in definition::all() {
        walk("", schema(&crd), &mut |path, at| {
            for rule in at.x_kubernetes_validations.iter().flatten() {
                let message = rule.message.as_deref().unwrap_or_default();
                assert!(
                    message.ends_with(['.', ':']) && message.contains(' '),
                    "{path}: {} has no sentence",
                    rule.rule
                );
                count += 1;
            }
        });
    }
    assert!(count >= 20, "only {count} rules");
}

#[test]
fn what_decides_the_weights_cannot_be_changed() {
    let [_, training] = definition::all().try_into().unwrap();
    let said = rules(property(schema(&training), "spec")).join(" ");
    for part in ["model", "dataset", "recipe", "prepare", "checkpoint.to"] {
        assert!(said.contains(&format!("{part} cannot be changed")), "{said}");
    }
}

#[test]
fn users_find_the_kinds_under_short_names_and_can_scale_them() {
    let [serving, training] = definition::all().try_into().unwrap();
    for (crd, short) in [(&serving, "vs"), (&training, "vt")] {
        assert_eq!(crd.spec.names.short_names, Some(vec![short.to_owned()]));
        let categories = crd.spec.names.categories.as_ref().unwrap();
        assert_eq!(categories, &["all", "vicuna"]);
        let subresources = crd.spec.versions[0].subresources.as_ref().unwrap();
        assert!(subresources.status.is_some());
        let scale = subresources.scale.as_ref().unwrap();
        assert_eq!(scale.label_selector_path.as_deref(), Some(".status.selector"));
    }
}

#[test]
fn only_another_controllers_name_keeps_the_operator_away() {
    let managed_by = |name: Option<&str>| {
        let training: VicunaTraining = serde_json::from_value(json!({
            "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining", "metadata": { "name": "x" },
            "spec": {
                "model": { "from": "s3://b/model" }, "dataset": [{ "from": "s3://b/data.json" }],
                "recipe": { "epochs": 3 }, "workers": { "max": 2 }, "checkpoint": { "to": "s3://b/state" },
                "managedBy": name,
            }
        }))
        .unwrap();
        training.spec.is_managed_elsewhere()
    };
    assert!(!managed_by(None) && !managed_by(Some("vicuna.dev/operator")));
    assert!(managed_by(Some("kueue.x-k8s.io/multikueue")));
}

#[test]
fn columns_point_at_fields_that_exist() {
    for crd in definition::all() {
        for column in crd.spec.versions[0].additional_printer_columns.iter().flatten() {
            let path = column.json_path.trim_start_matches('.');
            if path.starts_with("metadata.") || path.contains("[?") {
                continue;
            }
            property(schema(&crd), path);
        }
    }
}

#[test]
fn a_short_training_is_filled_in_with_the_published_recipe() {
    let training: VicunaTraining = serde_json::from_value(json!({
        "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaTraining", "metadata": { "name": "x" },
        "spec": {
            "model": { "from": "s3://b/model" },
            "dataset": [{ "from": "s3://b/data.json" }],
            "recipe": { "epochs": 3 },
            "workers": { "max": 2 },
            "checkpoint": { "to": "s3://b/state" }
        }
    }))
    .unwrap();
    let spec = training.spec;
    assert_eq!(spec.dataset[0].weight, 1.0);
    assert_eq!(spec.recipe.method, Method::Full);
    assert_eq!(spec.recipe.schedule, Schedule::Cosine);
    assert_eq!((spec.recipe.global_batch, spec.recipe.micro_batch), (128, 1));
    assert_eq!(spec.recipe.learning_rate, 2e-5);
    assert_eq!(spec.recipe.warmup_ratio, 0.03);
    assert_eq!(spec.workers.min, 1);
    assert_eq!(spec.checkpoint.interval.to_string(), "10m");
    let retries = &spec.retries;
    assert_eq!((retries.application, retries.infrastructure, retries.out_of_memory), (3, 20, 2));
    assert_eq!(spec.placement.return_after.get().as_secs(), 600);
    assert_eq!(spec.placement.forming_timeout.get().as_secs(), 300);
    assert_eq!(spec.placement.on_demand_floor, 0);
    assert!(!spec.suspend && !spec.is_managed_elsewhere());
}

#[test]
fn a_short_serving_is_filled_in() {
    let serving: VicunaServing = serde_json::from_value(json!({
        "apiVersion": "vicuna.dev/v1alpha1", "kind": "VicunaServing", "metadata": { "name": "x" },
        "spec": {
            "model": { "from": { "trainingRef": { "name": "t" } } },
            "autoscaling": { "max": 2, "target": { "inFlight": 4 } }
        }
    }))
    .unwrap();
    let autoscaling = serving.spec.autoscaling.unwrap();
    assert_eq!(autoscaling.min, 1);
    assert_eq!(autoscaling.behavior.scale_down.stabilization_window_seconds, 300);
    assert_eq!(serving.spec.drain.timeout.get().as_secs(), 60);
    assert_eq!(serving.spec.worker.slots, 8);
}

#[test]
fn a_spec_without_pools_means_every_node() {
    let pools = Pool::of(&[]);
    assert_eq!(pools.len(), 1);
    assert!(pools[0].node_selector.is_empty());
    assert_eq!(pools[0].capacity, Capacity::OnPrem);
    assert_eq!(pools[0].notice().as_secs(), 30);
}
