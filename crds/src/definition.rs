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
