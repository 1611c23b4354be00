//! Frequencies of rotary embeddings (Su et al. 2021), and how models stretch them to contexts longer
//! than they were first trained on. Each is computed in fp32 as transformers does.

use crate::ModelError;
use crate::gguf::{Gguf, ROPE_FACTORS};
use serde_json::{Value, json};
use std::f32::consts::TAU;

/// What is done to the frequencies `θ^(-2i/d)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    Unscaled,
    /// All are divided (Chen et al. 2023, "position interpolation").
    Linear {
        factor: f64,
    },
    /// Low ones are divided, high ones kept (Grattafiori et al. 2024, "The Llama 3 Herd of Models").
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        /// Tokens that the model was first trained on.
        original: usize,
    },
    /// The same over a ramp of dimensions, and attention is sharpened (Peng et al. 2023, "YaRN").
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        /// Cosines and sines are multiplied by it.
        attention_factor: f64,
        original: usize,
    },
}

/// A way to stretch a model's context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stretch {
    Linear,
    Llama3,
    Yarn,
}

impl RopeScaling {
    /// What makes a model for `factor` times the `original` tokens that it was made for, with the constants that are usual.
    pub fn stretching(how: Stretch, factor: f64, original: usize) -> Result<Self, ModelError> {
        if !(factor.is_finite() && factor > 1.0) {
            return Err(refuse(format!("rope scaling's factor is {factor}; it must be above 1")));
        }
        let scaling = match how {
            Stretch::Linear => Self::Linear { factor },
            Stretch::Llama3 => Self::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0, original },
            Stretch::Yarn => {
                Self::Yarn { factor, beta_fast: 32.0, beta_slow: 1.0, attention_factor: sharpened(factor), original }
            }
        };
        scaling.checked()
    }

    /// Reads `rope_scaling` or, as transformers 5 writes it, `rope_parameters` of a `config.json`.
    pub fn from_hugging_face(json: &Value, max_position: usize) -> Result<Self, ModelError> {
        let settings = if json["rope_scaling"].is_object() { &json["rope_scaling"] } else { &json["rope_parameters"] };
        if let Some((layers, _)) = settings.as_object().into_iter().flatten().find(|(_, value)| value.is_object()) {
            return Err(refuse(format!("rope_parameters.{layers} is of some layers only; one for all is supported")));
        }
        let fields = Fields { settings };
        let original = match json["original_max_position_embeddings"].as_u64() {
            Some(original) => original as usize,
            None => fields.number_or("original_max_position_embeddings", max_position as f64)? as usize,
        };
        match settings["rope_type"].as_str().or(settings["type"].as_str()).unwrap_or("default") {
            "default" => Ok(Self::Unscaled),
            "linear" => Ok(Self::Linear { factor: fields.number("factor")? }),
            "llama3" => Ok(Self::Llama3 {
                factor: fields.number("factor")?,
                low_freq_factor: fields.number("low_freq_factor")?,
                high_freq_factor: fields.number("high_freq_factor")?,
                original,
            }),
            "yarn" => {
                fields.refuse(&["mscale", "mscale_all_dim", "truncate"])?;
                let factor = fields.number_or("factor", max_position as f64 / original.max(1) as f64)?;
                Ok(Self::Yarn {
                    factor,
                    beta_fast: fields.number_or("beta_fast", 32.0)?,
                    beta_slow: fields.number_or("beta_slow", 1.0)?,
                    attention_factor: fields.number_or("attention_factor", sharpened(factor))?,
                    original,
                })
            }
            other => Err(unsupported(other)),
        }?
        .checked()
    }

    /// Reads `rope.scaling.*` and `rope_freqs.weight`. `frequencies` are those before scaling.
    pub fn from_gguf(gguf: &Gguf, architecture: &str, frequencies: &[f32]) -> Result<Self, ModelError> {
        let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
        let number = |name: &str| gguf.float(&key(name));
        let factor = number("factor").unwrap_or(1.0);
        let scaling = match gguf.text(&key("type")) {
            None | Some("none") => match gguf.values(ROPE_FACTORS)? {
                Some(divisors) => from_divisors(&divisors, frequencies)?,
                // As files said it before there were types.
                None => match gguf.float(&format!("{architecture}.rope.scale_linear")) {
                    Some(factor) if factor != 1.0 => Self::Linear { factor },
                    _ => Self::Unscaled,
                },
            },
            Some("linear") => Self::Linear { factor },
            Some("yarn") => Self::Yarn {
                factor,
                beta_fast: number("yarn_beta_fast").unwrap_or(32.0),
                beta_slow: number("yarn_beta_slow").unwrap_or(1.0),
                attention_factor: number("attn_factor").unwrap_or(1.0) * sharpened(factor),
                original: gguf
                    .size(&key("original_context_length"))
                    .or_else(|_| gguf.size(&format!("{architecture}.context_length")))?,
            },
            Some(other) => return Err(unsupported(other)),
        };
        scaling.checked()
    }

    /// The value of `rope_scaling`.
    pub fn to_hugging_face(self) -> Value {
        match self {
            Self::Unscaled => Value::Null,
            Self::Linear { factor } => json!({ "rope_type": "linear", "type": "linear", "factor": factor }),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original,
            }),
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, original } => json!({
                "rope_type": "yarn",
                "type": "yarn",
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "attention_factor": attention_factor,
                "original_max_position_embeddings": original,
            }),
        }
    }

    /// Hands each field of GGUF's `rope.scaling` to `put`.
    pub(crate) fn describe(self, mut put: impl FnMut(&str, Value)) {
        match self {
            Self::Unscaled | Self::Llama3 { .. } => {}
            Self::Linear { factor } => {
                put("rope.scaling.type", json!("linear"));
                put("rope.scaling.factor", json!(factor));
            }
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, original } => {
                put("rope.scaling.type", json!("yarn"));
                put("rope.scaling.factor", json!(factor));
                put("rope.scaling.original_context_length", json!(original));
                put("rope.scaling.yarn_beta_fast", json!(beta_fast));
                put("rope.scaling.yarn_beta_slow", json!(beta_slow));
                put("rope.scaling.attn_factor", json!(attention_factor / sharpened(factor)));
            }
        }
    }

    /// Tokens of the longest sequence, where the configuration tells those before scaling.
    pub(crate) fn stretched(self, max_position: usize) -> usize {
        match self {
            Self::Unscaled | Self::Llama3 { .. } => max_position,
            Self::Linear { factor } => (max_position as f64 * factor) as usize,
            Self::Yarn { factor, original, .. } => max_position.max((original as f64 * factor) as usize),
        }
    }

    /// The other way round.
    pub(crate) fn unstretched(self, max_position: usize) -> usize {
        match self {
            Self::Linear { factor } => (max_position as f64 / factor).ceil() as usize,
            _ => max_position,
        }
    }

    /// What cosines and sines are multiplied by.
    pub fn magnitude(self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } => attention_factor,
            _ => 1.0,
        }
    }

    /// Changes the frequencies, highest first.
    pub fn apply(self, frequencies: &mut [f32], theta: f64) {
        let dimensions = (2 * frequencies.len()) as f64;
        match self {
            Self::Unscaled => {}
            Self::Linear { factor } => frequencies.iter_mut().for_each(|frequency| *frequency /= factor as f32),
            Self::Llama3 { .. } => frequencies.iter_mut().for_each(|frequency| *frequency = self.of_llama3(*frequency)),
            Self::Yarn { factor, beta_fast, beta_slow, original, .. } => {
                // The dimension that turns so many times within the original length.
                let turning = |turns: f64| {
                    dimensions * (original as f64 / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
                };
                let low = turning(beta_fast).floor().max(0.0);
                let high = turning(beta_slow).ceil().min(dimensions - 1.0);
                let width = if high == low { 0.001 } else { high - low };
                for (index, frequency) in frequencies.iter_mut().enumerate() {
                    let kept = 1.0 - ((index as f32 - low as f32) / width as f32).clamp(0.0, 1.0);
                    let divided = 1.0 / (factor as f32 * frequency.recip());
                    *frequency = divided * (1.0 - kept) + *frequency * kept;
                }
            }
        }
    }

    fn of_llama3(self, frequency: f32) -> f32 {
        let Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } = self else { return frequency };
        let (factor, original) = (factor as f32, original as f32);
        let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
        let wavelength = TAU / frequency;
        if wavelength < original / high {
            frequency
        } else if wavelength > original / low {
            frequency / factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }

    fn checked(self) -> Result<Self, ModelError> {
        let positive = |name: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(refuse(format!("rope scaling's {name} is {value}; it must be a positive number"))),
        };
        match self {
            Self::Unscaled => {}
            Self::Linear { factor } => positive("factor", factor)?,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                positive("factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor above low_freq_factor", high_freq_factor - low_freq_factor)?;
                positive("original_max_position_embeddings", original as f64)?;
            }
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, original } => {
                positive("factor", factor)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention_factor", attention_factor)?;
                positive("original_max_position_embeddings", original as f64)?;
            }
        }
        Ok(self)
    }
}

/// YaRN's own attention factor.
fn sharpened(factor: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 }
}

/// GGUF files of Llama 3 hold what each frequency is divided by instead of the rule. All such models
/// share the rule's bounds 1 and 4; its factor and length follow from the numbers.
fn from_divisors(divisors: &[f32], frequencies: &[f32]) -> Result<RopeScaling, ModelError> {
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    if factor == 1.0 {
        return Ok(RopeScaling::Unscaled);
    }
    let (low_freq_factor, high_freq_factor) = (1.0, 4.0);
    let between = divisors
        .iter()
        .zip(frequencies)
        .find(|(divisor, _)| **divisor > 1.001 && f64::from(**divisor) < 0.999 * factor);
    let original = between.map_or(8192.0, |(divisor, frequency)| {
        let smooth = (f64::from(*divisor).recip() - factor.recip()) / (1.0 - factor.recip());
        let turns = smooth * (high_freq_factor - low_freq_factor) + low_freq_factor;
        (turns * std::f64::consts::TAU / f64::from(*frequency)).round()
    });
    let found = RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original: original as usize };
    let follows =
        |(divisor, frequency): (&f32, &f32)| (frequency / found.of_llama3(*frequency) / divisor - 1.0).abs() < 1e-3;
    if divisors.len() != frequencies.len() || !divisors.iter().zip(frequencies).all(follows) {
        return Err(refuse(
            "tensor rope_freqs.weight is not that of a Llama 3 model; use the Hugging Face directory".to_owned(),
        ));
    }
    Ok(found)
}

struct Fields<'a> {
    settings: &'a Value,
}

impl Fields<'_> {
    fn number(&self, name: &str) -> Result<f64, ModelError> {
        let value = &self.settings[name];
        value.as_f64().ok_or_else(|| refuse(format!("rope scaling's {name} is {value}; a number is needed")))
    }

    fn number_or(&self, name: &str, default: f64) -> Result<f64, ModelError> {
        if self.settings[name].is_null() { Ok(default) } else { self.number(name) }
    }

    fn refuse(&self, names: &[&str]) -> Result<(), ModelError> {
        match names.iter().find(|name| !self.settings[**name].is_null()) {
            Some(name) => Err(refuse(format!("rope scaling's {name} is not supported"))),
            None => Ok(()),
        }
    }
}

fn unsupported(kind: &str) -> ModelError {
    refuse(format!("rope scaling {kind:?} is not supported; linear, llama3 and yarn are, and none"))
}

fn refuse(message: String) -> ModelError {
    ModelError::Config(message)
}
