//! A length of time as users write it: `90s`, `10m`, `1h30m`.

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// What [`FromStr`] accepts, checked by the API server before we see the text.
pub const PATTERN: &str = "^([0-9]{1,6}(ms|s|m|h))+$";
const MAX_LENGTH: usize = 32;

/// A length of time that serialises as text such as `10m`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Period(Duration);

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeriodError(String);

impl fmt::Display for PeriodError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a length of time: write numbers with units, such as 90s, 10m or 1h30m", self.0)
    }
}

impl std::error::Error for PeriodError {}

impl Period {
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    pub const fn get(self) -> Duration {
        self.0
    }
}

impl From<Duration> for Period {
    fn from(duration: Duration) -> Self {
        Self(Duration::from_millis(u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)))
    }
}

impl From<Period> for Duration {
    fn from(period: Period) -> Self {
        period.0
    }
}

impl FromStr for Period {
    type Err = PeriodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || PeriodError(text.to_owned());
        if text.is_empty() || text.len() > MAX_LENGTH {
            return Err(refuse());
        }
        let mut rest = text;
        let mut total_ms = 0u64;
        while !rest.is_empty() {
            let (term_ms, after) = term(rest).ok_or_else(refuse)?;
            total_ms = total_ms.saturating_add(term_ms);
            rest = after;
        }
        Ok(Self(Duration::from_millis(total_ms)))
    }
}

/// Reads one `<number><unit>` and returns it in ms with what follows.
fn term(text: &str) -> Option<(u64, &str)> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text.get(..digits).filter(|n| n.len() <= 6)?.parse().ok()?;
    let rest = &text[digits..];
    // `ms` before `m`, which is its prefix.
    [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)]
        .iter()
        .find_map(|(unit, ms)| Some((number * ms, rest.strip_prefix(unit)?)))
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest_ms = self.0.as_millis();
        if rest_ms == 0 {
            return f.write_str("0s");
        }
        for (unit, ms) in [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)] {
            if rest_ms >= ms {
                write!(f, "{}{unit}", rest_ms / ms)?;
                rest_ms %= ms;
            }
        }
        Ok(())
    }
}

impl Serialize for Period {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Period {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Period {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Period".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "maxLength": MAX_LENGTH,
            // A rule instead of `pattern`, whose message would be the regular expression.
            "x-kubernetes-validations": [{
                "rule": format!("self.matches('{PATTERN}')"),
                "message": "Write a length of time with units, such as 90s, 10m or 1h30m.",
            }],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_reads_what_it_writes() {
        for text in ["0s", "90ms", "30s", "10m", "1h30m", "2h5s", "1s250ms"] {
            let period: Period = text.parse().unwrap();
            assert_eq!(period.to_string(), text);
        }
        assert_eq!("90s".parse::<Period>().unwrap().to_string(), "1m30s");
        assert_eq!("1h".parse::<Period>().unwrap().get().as_secs(), 3600);
    }

    #[test]
    fn what_is_not_a_period_is_refused_with_a_hint() {
        for text in ["", "10", "m", "1.5h", "-1s", "1 m", "1234567s", "10d"] {
            let error = text.parse::<Period>().unwrap_err();
            assert!(error.to_string().contains("such as 90s"), "{text}");
        }
    }
}
