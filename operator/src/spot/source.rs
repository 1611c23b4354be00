//! Where a warning is written on a node, as administrators name it.

use super::notices::Urgency;
use std::fmt;
use std::str::FromStr;

/// What on a node carries the warning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carrier {
    /// Key of a taint.
    Taint,
    /// Type of a condition whose status is True.
    Condition,
    /// Key of an annotation, whatever its value.
    Annotation,
    /// Key of a label, whatever its value.
    Label,
}

/// One more source of notices: `taint:example.com/preempted=hurry`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub carrier: Carrier,
    pub name: String,
    pub urgency: Urgency,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceError(String);

impl fmt::Display for SourceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no source of notices: write CARRIER:NAME=URGENCY, where CARRIER is taint, condition, annotation or label, and URGENCY is now, hurry, calm or advice; such as taint:example.com/preempted=hurry",
            self.0
        )
    }
}

impl std::error::Error for SourceError {}

impl FromStr for Source {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| SourceError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Source> {
    let (carrier, rest) = text.trim().split_once(':')?;
    let (name, urgency) = rest.rsplit_once('=')?;
    let carrier = match carrier {
        "taint" => Carrier::Taint,
        "condition" => Carrier::Condition,
        "annotation" => Carrier::Annotation,
        "label" => Carrier::Label,
        _ => return None,
    };
    let urgency = match urgency {
        "now" => Urgency::Now,
        "hurry" => Urgency::Hurry,
        "calm" => Urgency::Calm,
        "advice" => Urgency::Advice,
        _ => return None,
    };
    (!name.is_empty()).then(|| Source { carrier, name: name.to_owned(), urgency })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_names_carrier_key_and_urgency() {
        let source: Source = "taint:example.com/preempted=hurry".parse().unwrap();
        assert_eq!((source.carrier, source.urgency), (Carrier::Taint, Urgency::Hurry));
        assert_eq!(source.name, "example.com/preempted");
        assert_eq!("condition:Going=advice".parse::<Source>().unwrap().carrier, Carrier::Condition);
    }

    #[test]
    fn what_is_no_source_is_refused_with_an_example() {
        for text in ["", "preempted", "taint:=hurry", "taint:a=soon", "pod:a=now", "taint:a"] {
            let error = text.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains("taint:example.com/preempted=hurry"), "{error}");
        }
    }
}
