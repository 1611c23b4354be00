//! Who set which field: server-side apply, and what other writes do to it.
//!
//! A field is a leaf: what is no map and no list with keys. Lists with keys are those of which the API says so.

use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};

/// From the object's root; an element of a list with keys is its key's value.
pub type Path = Vec<String>;
/// Fields by manager.
pub type Owners = BTreeMap<String, BTreeSet<Path>>;

/// By what the elements of the list with this name are told apart.
fn key_of(list: &str) -> Option<&'static str> {
    match list {
        "conditions" => Some("type"),
        "ownerReferences" => Some("uid"),
        "containers" | "volumes" | "env" => Some("name"),
        _ => None,
    }
}

/// Without what says nothing.
pub fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}

/// Fields with their values, but for those that name the object.
pub fn leaves(object: &Value) -> BTreeMap<Path, Value> {
    let mut found = BTreeMap::new();
    collect(object, &mut Vec::new(), &mut found);
    found.retain(|path, _| match path.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["apiVersion" | "kind"] => false,
        ["metadata", name, ..] => matches!(*name, "labels" | "annotations" | "ownerReferences" | "finalizers"),
        _ => true,
    });
    found
}

fn collect(value: &Value, path: &mut Path, found: &mut BTreeMap<Path, Value>) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            for (name, value) in map {
                path.push(name.clone());
                collect(value, path, found);
                path.pop();
            }
        }
        Value::Array(items) if !items.is_empty() && list_key(path, items).is_some() => {
            let key = list_key(path, items).unwrap_or_default();
            for item in items {
                path.push(item[key].as_str().unwrap_or_default().to_owned());
                collect(item, path, found);
                path.pop();
            }
        }
        leaf => drop(found.insert(path.clone(), leaf.clone())),
    }
}

fn list_key(path: &[String], items: &[Value]) -> Option<&'static str> {
    let key = key_of(path.last()?)?;
    items.iter().all(|item| item[key].is_string()).then_some(key)
}

/// Fields that others have set to something else, with who did.
pub fn conflicts(owners: &Owners, manager: &str, live: &Value, applied: &BTreeMap<Path, Value>) -> Vec<(String, Path)> {
    let live = leaves(live);
    let others = owners.iter().filter(|(other, _)| *other != manager);
    others
        .flat_map(|(other, fields)| fields.iter().map(move |path| (other.clone(), path.clone())))
        .filter(|(_, path)| applied.get(path).is_some_and(|value| live.get(path) != Some(value)))
        .collect()
}

/// What `manager` applies is there, and what it applied before and nobody else has set is not any more.
pub fn apply(owners: &mut Owners, manager: &str, live: &mut Value, applied: &BTreeMap<Path, Value>) {
    let before = owners.remove(manager).unwrap_or_default();
    let current = leaves(live);
    for path in before.iter().filter(|path| !applied.contains_key(*path)) {
        if !owners.values().any(|fields| fields.contains(path)) {
            remove(live, path);
        }
    }
    for (path, value) in applied {
        if current.get(path) != Some(value) {
            owners.values_mut().for_each(|fields| fields.retain(|other| other != path));
        }
        set(live, path, value);
    }
    owners.retain(|_, fields| !fields.is_empty());
    owners.insert(manager.to_owned(), applied.keys().cloned().collect());
}

/// A write that is no apply takes the fields that it changes.
pub fn take_over(owners: &mut Owners, manager: &str, before: &Value, after: &Value) {
    let (before, after) = (leaves(before), leaves(after));
    let changed: BTreeSet<Path> =
        after.iter().filter(|(path, value)| before.get(*path) != Some(value)).map(|(path, _)| path.clone()).collect();
    for fields in owners.values_mut() {
        fields.retain(|path| after.contains_key(path) && !changed.contains(path));
    }
    owners.retain(|_, fields| !fields.is_empty());
    if !changed.is_empty() {
        // Apart from what the same manager applies, as the API server keeps it.
        owners.entry(format!("{manager} (update)")).or_default().extend(changed);
    }
}

fn set(value: &mut Value, path: &[String], leaf: &Value) {
    let Some((name, rest)) = path.split_first() else {
        *value = leaf.clone();
        return;
    };
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    let child = &mut value[name.as_str()];
    match (key_of(name), rest.split_first()) {
        (Some(key), Some((wanted, rest))) => {
            if !child.is_array() {
                *child = Value::Array(Vec::new());
            }
            let Value::Array(items) = child else { return };
            let found = items.iter().position(|item| item[key] == wanted.as_str());
            let index = found.unwrap_or_else(|| {
                items.push(Value::Object(Map::new()));
                items.len() - 1
            });
            set(&mut items[index], rest, leaf);
            items[index][key] = Value::String(wanted.clone());
        }
        _ => set(child, rest, leaf),
    }
}

/// Removes the leaf, and what is empty without it.
fn remove(value: &mut Value, path: &[String]) {
    let Some((name, rest)) = path.split_first() else { return };
    let Value::Object(map) = value else { return };
    let Some(child) = map.get_mut(name) else { return };
    let empty = rest.is_empty()
        || match (key_of(name), child) {
            (Some(key), Value::Array(items)) => {
                remove_element(items, key, rest);
                items.is_empty()
            }
            (_, child) => {
                remove(child, rest);
                child.as_object().is_some_and(Map::is_empty)
            }
        };
    if empty {
        map.remove(name);
    }
}

fn remove_element(items: &mut Vec<Value>, key: &str, path: &[String]) {
    let Some((wanted, rest)) = path.split_first() else { return };
    let Some(index) = items.iter().position(|item| item[key] == wanted.as_str()) else { return };
    remove(&mut items[index], rest);
    // Its key goes with the last of its fields, or was the last.
    let left = items[index].as_object().map_or(0, |item| item.keys().filter(|name| *name != key).count());
    if left == 0 {
        items.remove(index);
    }
}
