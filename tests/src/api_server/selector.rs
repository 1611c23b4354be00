//! What a list or watch asks for.

use super::Refusal;
use serde_json::Value;

/// Labels and fields that must have, or must not have, a value.
#[derive(Clone, Debug, Default)]
pub struct Selector {
    labels: Vec<Term>,
    fields: Vec<Term>,
}

#[derive(Clone, Debug)]
struct Term {
    key: String,
    /// `None`: it only has to be there.
    value: Option<String>,
    equal: bool,
}

impl Selector {
    pub fn parse(labels: &str, fields: &str) -> Result<Self, Refusal> {
        Ok(Self { labels: terms(labels)?, fields: terms(fields)? })
    }

    pub fn selects(&self, object: &Value) -> bool {
        let label = |key: &str| object["metadata"]["labels"][key].as_str();
        let field = |path: &str| path.split('.').fold(object, |value, name| &value[name]).as_str();
        self.labels.iter().all(|term| term.holds(label(&term.key)))
            && self.fields.iter().all(|term| term.holds(Some(field(&term.key).unwrap_or_default())))
    }
}

impl Term {
    fn holds(&self, found: Option<&str>) -> bool {
        match &self.value {
            Some(value) => (found == Some(value.as_str())) == self.equal,
            None => found.is_some(),
        }
    }
}

fn terms(text: &str) -> Result<Vec<Term>, Refusal> {
    text.split(',').filter(|term| !term.is_empty()).map(term).collect()
}

fn term(text: &str) -> Result<Term, Refusal> {
    if text.contains([' ', '(', '!']) && !text.contains("!=") {
        return Err(Refusal::new(400, "BadRequest", format!("the selector {text:?} is not simulated")));
    }
    let of = |(key, value): (&str, &str), equal| Term { key: key.to_owned(), value: Some(value.to_owned()), equal };
    Ok(match (text.split_once("!="), text.split_once("=")) {
        (Some(pair), _) => of(pair, false),
        (None, Some((key, value))) => of((key, value.trim_start_matches('=')), true),
        (None, None) => Term { key: text.to_owned(), value: None, equal: true },
    })
}
