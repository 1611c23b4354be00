//! The CustomResourceDefinitions as they are installed.

use crate::{VicunaServing, VicunaTraining};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::CustomResourceExt;

/// Integer formats that Kubernetes knows; it warns about others, such as Rust's `uint32`.
const KNOWN_INTEGER_FORMATS: [&str; 2] = ["int32", "int64"];

/// All definitions, in the order of their names.
pub fn all() -> Vec<CustomResourceDefinition> {
    [VicunaServing::crd(), VicunaTraining::crd()].map(for_kubernetes).into()
}

/// `<plural>.yaml` and the text of each definition.
pub fn files() -> Result<Vec<(String, String)>, serde_yaml::Error> {
    all()
        .iter()
        .map(|crd| {
            let name = format!("{}.yaml", crd.spec.names.plural);
            Ok((name, serde_yaml::to_string(crd)?))
        })
        .collect()
}

fn for_kubernetes(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.spec
        .versions
        .iter_mut()
        .filter_map(|version| version.schema.as_mut()?.open_api_v3_schema.as_mut())
        .for_each(|root| visit(root, &mut polish));
    crd
}

fn polish(schema: &mut JSONSchemaProps) {
    // schemars offers null as a choice of an optional enum, which the API server would tell users of.
    if let Some(choices) = &mut schema.enum_ {
        choices.retain(|choice| !choice.0.is_null());
    }
    // Objects keep the order of their fields or not, as some dependency of the build wishes: the text must not.
    if let Some(default) = &mut schema.default {
        default.0.sort_all_objects();
    }
    let integer = schema.type_.as_deref() == Some("integer");
    if integer {
        schema.format.take_if(|format| !KNOWN_INTEGER_FORMATS.contains(&format.as_str()));
    }
}

/// Calls `change` on a schema and all schemas in it.
pub fn visit(schema: &mut JSONSchemaProps, change: &mut dyn FnMut(&mut JSONSchemaProps)) {
    change(schema);
    for child in schema.properties.iter_mut().flatten() {
        visit(child.1, change);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(items)) = &mut schema.items {
        visit(items, change);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(values)) = &mut schema.additional_properties {
        visit(values, change);
    }
}

/// A definition as a template of the chart `vicuna-operator-crds`: kept when the chart is removed,
/// because removing a definition removes all its objects.
pub fn as_chart_template(text: &str) -> String {
    text.replacen(
        "metadata:\n",
        "metadata:\n  annotations:\n    helm.sh/resource-policy: keep\n  labels:\n    app.kubernetes.io/name: {{ .Chart.Name }}\n    app.kubernetes.io/managed-by: {{ .Release.Service }}\n    app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}\n",
        1,
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::path::Path;

    /// What the API server would refuse in an object: fields that the schema does not have, fields that are missing, values
    /// of another type or choice. CEL and patterns are left to it.
    fn faults(schema: &JSONSchemaProps, value: &Value, path: &str) -> Vec<String> {
        if let Some(choices) = &schema.enum_
            && !choices.iter().any(|choice| choice.0 == *value)
        {
            return vec![format!("{path}: {value} is no choice")];
        }
        match (schema.type_.as_deref(), value) {
            (Some("object"), Value::Object(fields)) => {
                let known = schema.properties.as_ref();
                let missing = schema.required.iter().flatten().filter(|name| !fields.contains_key(*name));
                let missing = missing.map(|name| format!("{path}.{name} is missing"));
                let others = |name: &str, value: &Value| match &schema.additional_properties {
                    Some(JSONSchemaPropsOrBool::Schema(each)) => faults(each, value, &format!("{path}.{name}")),
                    Some(JSONSchemaPropsOrBool::Bool(true)) => Vec::new(),
                    _ if schema.x_kubernetes_preserve_unknown_fields == Some(true) => Vec::new(),
                    _ => vec![format!("{path}.{name} is not known")],
                };
                let each = fields.iter().flat_map(|(name, value)| match known.and_then(|known| known.get(name)) {
                    Some(field) => faults(field, value, &format!("{path}.{name}")),
                    None => others(name, value),
                });
                missing.chain(each).collect()
            }
            (Some("array"), Value::Array(items)) => match &schema.items {
                Some(JSONSchemaPropsOrArray::Schema(each)) => items
                    .iter()
                    .enumerate()
                    .flat_map(|(at, item)| faults(each, item, &format!("{path}[{at}]")))
                    .collect(),
                _ => Vec::new(),
            },
            (Some("string"), Value::String(_)) | (Some("boolean"), Value::Bool(_)) | (None, _) => Vec::new(),
            (Some("number"), Value::Number(_)) => Vec::new(),
            (Some("integer"), Value::Number(number)) if !number.is_f64() => Vec::new(),
            (Some(kind), value) => vec![format!("{path}: {value} is no {kind}")],
        }
    }

    fn faults_of(text: &str) -> Vec<String> {
        let object: Value = serde_yaml::from_str(text).unwrap();
        let definition = all().into_iter().find(|it| object["kind"] == it.spec.names.kind.as_str());
        let schema = definition.unwrap().spec.versions.remove(0).schema.unwrap().open_api_v3_schema.unwrap();
        let spec = schema.properties.as_ref().unwrap()["spec"].clone();
        faults(&spec, &object["spec"], "spec")
    }

    #[test]
    fn every_sample_has_the_fields_that_its_schema_has() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/samples");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|it| it != "yaml") || path.ends_with("kustomization.yaml") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(faults_of(&text), Vec::<String>::new(), "{}", path.display());
            let misspelt = text.replacen("  model:", "  modell:", 1);
            assert!(!faults_of(&misspelt).is_empty(), "{}: a misspelt field is not found", path.display());
            seen += 1;
        }
        assert!(seen >= 4, "only {seen} samples");
    }
}
