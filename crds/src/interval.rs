//! The time between two checkpoints as users write it: a length of time, or `Auto`.

use crate::Period;
use crate::period::{PATTERN, PeriodError};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

const AUTO: &str = "Auto";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interval {
    /// As measured: the square root of twice a checkpoint's stall times the time between interruptions.
    Auto,
    Every(Period),
}

impl FromStr for Interval {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == AUTO { Ok(Self::Auto) } else { text.parse().map(Self::Every) }
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str(AUTO),
            Self::Every(period) => period.fmt(f),
        }
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Interval {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Interval".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": 32,
            "x-kubernetes-validations": [
                {
                    "rule": format!("self == '{AUTO}' || self.matches('{PATTERN}')"),
                    "message": "Write Auto, or a length of time with units, such as 90s, 10m or 1h30m.",
                },
                {
                    "rule": format!("self == '{AUTO}' || self.matches('[1-9]')"),
                    "message": "Set an interval above 0, such as 10m.",
                },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_auto_or_a_period() {
        assert_eq!("Auto".parse(), Ok(Interval::Auto));
        assert_eq!("10m".parse(), Ok(Interval::Every(Period::from_secs(600))));
        assert_eq!(Interval::Auto.to_string(), "Auto");
        assert!("auto".parse::<Interval>().is_err());
    }
}
