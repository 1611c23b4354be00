//! A model small enough for tests of every part: random weights that depend on the seed alone, a
//! byte-level tokenizer, ChatML.

use crate::config::Family;
use crate::gguf::added_token;
use crate::lora::{Adapter, Lora};
use crate::rope::RopeScaling;
use crate::{Config, ModelError, Pretrained, SpecialTokens, parameter_names, parameter_shape};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Frequent English pairs, so that tokens are not all bytes. `Ġ` is a leading space.
const MERGES: [&str; 36] = [
    "Ġ t", "h e", "Ġt he", "i n", "e r", "a n", "Ġ a", "r e", "o n", "Ġ s", "o u", "i s", "a t", "e n", "Ġ w", "o r",
    "i t", "Ġ i", "Ġan d", "an d", "Ġ o", "e s", "in g", "Ġo f", "Ġ y", "Ġy ou", "a r", "Ġ he", "l l", "Ġi s", "a l",
    "Ġt o", "u s", "e r", "us er", "Ġa s",
];

pub const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Two layers of 64 units, two query heads to a key-value head, tied embeddings.
pub fn config() -> Config {
    Config {
        family: Family::Llama,
        hidden: 64,
        intermediate: 128,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab: vocabulary().len(),
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Unscaled,
        sliding_window: None,
        eps: 1e-5,
        max_position: 512,
        tie_word_embeddings: true,
        bos: Some(1),
        eos: vec![2],
        pad: Some(2),
    }
}

/// The same model for the same seed, on every machine.
pub fn tiny(seed: u64) -> Pretrained {
    of_config(config(), seed)
}

/// Writes an adapter of the tiny model in PEFT's layout, with values in both A and B: it changes what
/// the model says.
pub fn save_adapter(directory: &Path, seed: u64, rank: usize, targets: &[&str]) -> Result<(), ModelError> {
    let (config, lora) = (config(), Lora::new(rank, rank as f64, 0.0, targets)?);
    let parameters = (0..config.layers).flat_map(|layer| lora.layer_parameters(&config, layer));
    // A's rule for both: B would be zero.
    let value = |name: &str, shape: &[i64]| Lora::initial(seed, &name.replace("lora_B", "lora_A of B"), shape);
    let tensors = parameters.map(|(name, shape)| (name.clone(), value(&name, &shape))).collect();
    Adapter::save(directory, &lora, "file:///models/tiny", &tensors)
}

/// Weights for any configuration with the tiny tokenizer's vocabulary.
pub fn of_config(config: Config, seed: u64) -> Pretrained {
    let mut noise = Noise(seed);
    let tensors = parameter_names(&config)
        .into_iter()
        .map(|name| {
            let shape = parameter_shape(&config, &name).unwrap_or_default();
            let tensor = random_tensor(&mut noise, &name, &shape);
            (name, tensor)
        })
        .collect();
    Pretrained { tensors, chat_template: Some(CHATML.to_owned()), ..without_weights(config) }
}

/// A model of any shape with random weights, made where they are to be: for benches. The tokenizer is
/// the tiny one.
pub fn random(config: Config, kind: Kind, device: Device) -> Pretrained {
    let tensor = |name: String| {
        let shape = parameter_shape(&config, &name).unwrap_or_default();
        let tensor = match shape.len() {
            1 => Tensor::ones(&shape, (kind, device)),
            _ => Tensor::randn(&shape, (kind, device)) * 0.02,
        };
        (name, tensor)
    };
    let tensors = parameter_names(&config).into_iter().map(tensor).collect();
    Pretrained { tensors, ..without_weights(config) }
}

fn without_weights(config: Config) -> Pretrained {
    let tokenizer = tokenizer();
    Pretrained {
        special_tokens: SpecialTokens::of(&config, &tokenizer),
        config,
        tensors: BTreeMap::new(),
        packed: BTreeMap::new(),
        tokenizer,
        chat_template: None,
    }
}

/// LLaMA-7B's shape (Touvron et al. 2023).
pub fn llama_7b() -> Config {
    Config {
        hidden: 4096,
        intermediate: 11_008,
        layers: 32,
        heads: 32,
        kv_heads: 32,
        head_dim: 128,
        vocab: 32_000,
        max_position: 4096,
        tie_word_embeddings: false,
        ..config()
    }
}

/// LLaMA-13B's shape (Touvron et al. 2023).
pub fn llama_13b() -> Config {
    Config { hidden: 5120, intermediate: 13_824, layers: 40, heads: 40, kv_heads: 40, ..llama_7b() }
}

/// SmolLM2-135M's shape (Ben Allal et al. 2025).
pub fn smollm2_135m() -> Config {
    Config {
        hidden: 576,
        intermediate: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49_152,
        max_position: 8192,
        tie_word_embeddings: true,
        ..config()
    }
}

/// Norms near one, biases near zero; small embeddings, so that what the layers compute decides the next token.
fn random_tensor(noise: &mut Noise, name: &str, shape: &[i64]) -> Tensor {
    let count = shape.iter().product::<i64>() as usize;
    let (mean, deviation) = match shape {
        [_] if name.ends_with("bias") => (0.0, 0.3),
        [_] => (1.0, 0.1),
        [_, _] if name.contains("embed") => (0.0, 0.1),
        [_, inputs] => (0.0, 1.0 / (*inputs as f64).sqrt()),
        _ => (0.0, 1.0),
    };
    let values: Vec<f32> = (0..count).map(|_| (mean + deviation * noise.normal()) as f32).collect();
    Tensor::from_slice(&values).reshape(shape)
}

fn vocabulary() -> Vec<String> {
    let mut bytes: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    bytes.sort_unstable();
    let mut tokens: Vec<String> = SPECIAL.iter().map(ToString::to_string).collect();
    tokens.extend(bytes.into_iter().map(String::from));
    for merge in MERGES {
        let token = merge.replace(' ', "");
        if !tokens.contains(&token) {
            tokens.push(token);
        }
    }
    tokens
}

/// Byte-level BPE over every byte, a few merges and ChatML's special tokens.
#[expect(clippy::expect_used, reason = "the description is a constant, and a test builds it")]
pub fn tokenizer() -> Tokenizer {
    let tokens = vocabulary();
    let ids: serde_json::Map<_, _> = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let known = |merge: &&str| merge.split(' ').all(|part| tokens.iter().any(|token| token == part));
    let merges: Vec<&str> = MERGES.iter().copied().filter(known).collect();
    let added: Vec<_> = SPECIAL.iter().enumerate().map(|(id, token)| added_token(id, token, true)).collect();
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    let description = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": ids, "merges": merges },
    });
    serde_json::from_value(description).expect("the tiny tokenizer is valid")
}

/// SplitMix64 (Steele et al. 2014) and Box–Muller.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In (0, 1].
    fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tokenizer_round_trips_any_text() {
        let tokenizer = tokenizer();
        for text in ["the user is in Ålesund 🐫\n", "<|im_start|>user\nHello<|im_end|>\n"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text);
        }
        assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(2));
        assert_eq!(tokenizer.get_vocab_size(true), config().vocab);
    }

    #[test]
    fn weights_depend_on_the_seed_alone() {
        let digest = |seed| crate::weights_digest(&tiny(seed).tensors).unwrap();
        assert_eq!(digest(1), digest(1));
        assert_ne!(digest(1), digest(2));
    }
}
