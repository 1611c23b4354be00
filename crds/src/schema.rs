//! Schemas of the Kubernetes types that our types contain, written by hand: only the fields that we
//! pass on, so that the API server refuses the rest instead of dropping it silently.

use schemars::{Schema, SchemaGenerator, json_schema};

/// metav1 conditions, merged by type.
pub fn conditions(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["type"],
        "items": {
            "type": "object",
            "required": ["type", "status", "lastTransitionTime", "reason", "message"],
            "properties": {
                "type": { "type": "string", "maxLength": 316, "description": "What the condition is about." },
                "status": { "type": "string", "enum": ["True", "False", "Unknown"], "description": "Whether it holds." },
                "reason": { "type": "string", "minLength": 1, "maxLength": 1024, "description": "One word that says why." },
                "message": { "type": "string", "maxLength": 32768, "description": "A sentence that says why, and what to do." },
                "lastTransitionTime": { "type": "string", "format": "date-time", "description": "When the status last changed." },
                "observedGeneration": { "type": "integer", "format": "int64", "minimum": 0, "description": "The generation of the spec that it is about." }
            }
        }
    })
}

pub fn time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time", "nullable": true })
}

pub fn required_time(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "string", "format": "date-time" })
}

fn quantities(description: &str) -> Schema {
    json_schema!({
        "type": "object",
        "description": description,
        "additionalProperties": {
            "x-kubernetes-int-or-string": true,
            "anyOf": [{ "type": "integer" }, { "type": "string" }],
            "pattern": "^(\\+|-)?(([0-9]+(\\.[0-9]*)?)|(\\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\\+|-)?(([0-9]+(\\.[0-9]*)?)|(\\.[0-9]+))))?$"
        }
    })
}

/// Requests and limits of a container.
pub fn resources(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "properties": {
            "requests": quantities("What the scheduler sets aside."),
            "limits": quantities("What the container may use at most."),
        }
    })
}

pub fn tolerations(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 32,
        "items": {
            "type": "object",
            "properties": {
                "key": { "type": "string", "description": "Key of the taint; absent with operator Exists: every taint." },
                "operator": { "type": "string", "enum": ["Exists", "Equal"], "description": "How the value is compared." },
                "value": { "type": "string", "description": "Value of the taint, with operator Equal." },
                "effect": { "type": "string", "enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"], "description": "Effect of the taint; absent: every effect." },
                "tolerationSeconds": { "type": "integer", "format": "int64", "description": "How long a NoExecute taint is tolerated." }
            }
        }
    })
}
