//! A GGUF file made in the test, and what happens when it is damaged.

use super::*;
use crate::RopeScaling;
use half::f16;

/// Writes the format's fields.
#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn text(&mut self, text: &str) {
        self.0.extend((text.len() as u64).to_le_bytes());
        self.0.extend(text.as_bytes());
    }

    fn number(&mut self, key: &str, value: usize) {
        self.text(key);
        self.0.extend(4u32.to_le_bytes());
        self.0.extend((value as u32).to_le_bytes());
    }

    fn string(&mut self, key: &str, value: &str) {
        self.text(key);
        self.0.extend(8u32.to_le_bytes());
        self.text(value);
    }

    fn texts(&mut self, key: &str, values: &[String]) {
        self.text(key);
        self.0.extend([9u32.to_le_bytes(), 8u32.to_le_bytes()].concat());
        self.0.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.text(value));
    }

    fn numbers(&mut self, key: &str, values: &[u32]) {
        self.text(key);
        self.0.extend([9u32.to_le_bytes(), 4u32.to_le_bytes()].concat());
        self.0.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.0.extend(value.to_le_bytes()));
    }
}

/// The tiny model as llama.cpp's converter would write it, fp16.
fn tiny_gguf() -> Vec<u8> {
    let model = crate::tiny::tiny(4);
    let config = &model.config;
    let mut file = Writer(MAGIC.to_vec());
    file.0.extend(3u32.to_le_bytes());
    file.0.extend((model.tensors.len() as u64).to_le_bytes());
    file.0.extend(13u64.to_le_bytes());
    write_metadata(&mut file, config);
    let mut data = Vec::new();
    for (name, tensor) in &model.tensors {
        file.text(&gguf_name(name));
        let shape = tensor.size();
        file.0.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|size| file.0.extend((*size as u64).to_le_bytes()));
        file.0.extend(1u32.to_le_bytes());
        file.0.extend((data.len() as u64).to_le_bytes());
        let values = Vec::<f32>::try_from(permuted(config, name, tensor).reshape([-1])).unwrap();
        data.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()));
        data.resize(data.len().next_multiple_of(32), 0);
    }
    file.0.resize(file.0.len().next_multiple_of(32), 0);
    file.0.extend(data);
    file.0
}

fn write_metadata(file: &mut Writer, config: &Config) {
    let mut tokens = vec![String::new(); config.vocab];
    for (token, id) in crate::tiny::tokenizer().get_vocab(true) {
        tokens[id as usize] = token;
    }
    let mut types = vec![1; config.vocab];
    types[..3].fill(3);
    file.string("general.architecture", "llama");
    file.number("llama.block_count", config.layers);
    file.number("llama.context_length", config.max_position);
    file.number("llama.embedding_length", config.hidden);
    file.number("llama.feed_forward_length", config.intermediate);
    file.number("llama.attention.head_count", config.heads);
    file.number("llama.attention.head_count_kv", config.kv_heads);
    file.number("tokenizer.ggml.bos_token_id", 1);
    file.number("tokenizer.ggml.eos_token_id", 2);
    file.string("tokenizer.ggml.model", "gpt2");
    file.texts("tokenizer.ggml.tokens", &tokens);
    file.numbers("tokenizer.ggml.token_type", &types);
    file.texts("tokenizer.ggml.merges", &["h e".to_owned(), "Ġ t".to_owned(), "Ġt he".to_owned()]);
}

fn gguf_name(name: &str) -> String {
    match name {
        EMBEDDING => return "token_embd.weight".to_owned(),
        FINAL_NORM => return "output_norm.weight".to_owned(),
        _ => {}
    }
    let (index, name) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let (theirs, _) = LAYER_NAMES.iter().find(|(_, ours)| *ours == name).unwrap();
    format!("blk.{index}.{theirs}")
}

/// The converter's permutation, the other way round than ours.
fn permuted(config: &Config, name: &str, tensor: &Tensor) -> Tensor {
    let heads = match name {
        name if name.contains("q_proj") => config.heads,
        name if name.contains("k_proj") => config.kv_heads,
        _ => return tensor.shallow_clone(),
    };
    let halves = [heads as i64, 2, config.head_dim as i64 / 2, config.hidden as i64];
    tensor.view(halves).transpose(1, 2).reshape(tensor.size())
}

#[test]
fn a_gguf_file_gives_the_model_it_was_made_from() {
    let bytes = tiny_gguf();
    let read = load(&bytes).unwrap();
    let model = crate::tiny::tiny(4);
    assert_eq!(read.config.heads, model.config.heads);
    assert_eq!((read.config.bos, read.config.eos.clone()), (Some(1), vec![2]));
    assert!(read.config.tie_word_embeddings);
    for (name, tensor) in &model.tensors {
        assert_eq!(read.tensors[name], tensor.to_kind(Kind::Half).to_kind(Kind::Float), "{name}");
    }
    let text = "<|im_start|>say the thé<|im_end|>";
    let ids = read.tokenizer.encode(text, false).unwrap();
    assert_eq!(ids.get_ids()[0], 1);
    assert_eq!(ids.get_ids().last(), Some(&2));
    assert!(ids.get_tokens().contains(&"Ġthe".to_owned()));
    assert_eq!(read.tokenizer.decode(ids.get_ids(), false).unwrap(), text);
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let bytes = tiny_gguf();
    for length in (0..bytes.len()).step_by(97).chain([bytes.len() - 33]) {
        assert!(load(&bytes[..length]).is_err(), "{length} of {} bytes were accepted", bytes.len());
    }
}

#[test]
fn no_mutation_of_the_header_causes_a_panic() {
    let bytes = tiny_gguf();
    let mut refused = 0;
    for position in (0..8000.min(bytes.len())).step_by(3) {
        for value in [0x00, 0x80, 0xff] {
            let mut mutated = bytes.clone();
            mutated[position] = value;
            refused += usize::from(Gguf::parse(&mutated).and_then(|gguf| Config::from_gguf(&gguf)).is_err());
        }
    }
    assert!(refused > 0);
}

#[test]
fn a_length_that_overflows_is_refused() {
    let mut bytes = [MAGIC, &3u32.to_le_bytes(), &0u64.to_le_bytes(), &1u64.to_le_bytes()].concat();
    bytes.extend(u64::MAX.to_le_bytes());
    let message = Gguf::parse(&bytes).unwrap_err().to_string();
    assert!(message.contains("claims"), "{message}");
}

/// Writes a model and reads it back.
fn written(model: &Pretrained, weights: Weights) -> Result<Pretrained, ModelError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model.gguf");
    save(&path, model, weights)?;
    crate::load(&path)
}

fn relatives() -> [Config; 5] {
    let base = Config { max_position: 256, ..crate::tiny::config() };
    let scaled = |rope_scaling| Config { rope_scaling, ..base.clone() };
    [
        base.clone(),
        Config { family: Family::Qwen2, tie_word_embeddings: false, ..scaled(RopeScaling::Linear { factor: 4.0 }) },
        Config { family: Family::Mistral, sliding_window: Some(21), head_dim: 24, ..base.clone() },
        scaled(RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 64 }),
        scaled(RopeScaling::Yarn {
            factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 0.1 * 4f64.ln() + 1.0,
            original: 64,
        }),
    ]
}

#[test]
fn what_is_written_reads_back_with_equal_logits_in_every_family() {
    let ids: Vec<u32> = (0..100).map(|index| 3 + index * 37 % 280).collect();
    for config in relatives() {
        let model = crate::tiny::of_config(config, 6);
        let logits = |model: &Pretrained| crate::logits(&model.config, &model.tensors, &ids).unwrap();
        let again = written(&model, Weights::F32).unwrap();
        assert_eq!(again.config.family, model.config.family);
        assert_eq!(again.config.max_position, model.config.max_position);
        assert_eq!((&again.config.eos, again.config.pad), (&model.config.eos, model.config.pad));
        assert_eq!(crate::weights_digest(&again.tensors).unwrap(), crate::weights_digest(&model.tensors).unwrap());
        let difference = (logits(&again) - logits(&model)).abs().max().double_value(&[]);
        // The file holds frequencies' constants as fp32, and Llama 3's as quotients.
        assert!(difference < 1e-4, "{:?}: {difference}", model.config);
        assert_eq!(again.chat_template, model.chat_template);
        let text = "<|im_start|>user\nsay the thé<|im_end|>";
        let encoded = |model: &Pretrained| model.tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(encoded(&again), encoded(&model));
    }
}

#[test]
fn half_precision_files_hold_the_rounded_weights() {
    let model = crate::tiny::tiny(6);
    for (weights, kind) in [(Weights::F16, Kind::Half), (Weights::Bf16, Kind::BFloat16)] {
        for (name, tensor) in written(&model, weights).unwrap().tensors {
            let original = &model.tensors[&name];
            let expected =
                if original.dim() > 1 { original.to_kind(kind).to_kind(Kind::Float) } else { original.shallow_clone() };
            assert_eq!(tensor, expected, "{name}");
        }
    }
}

#[test]
fn weights_beyond_fp16_are_refused_by_name() {
    let mut model = crate::tiny::tiny(6);
    let name = "model.layers.1.mlp.up_proj.weight";
    model.tensors.insert(name.to_owned(), &model.tensors[name] * 1e6);
    let message = written(&model, Weights::F16).unwrap_err().to_string();
    assert!(message.contains("blk.1.ffn_up.weight") && message.contains("bf16"), "{message}");
    assert!(written(&model, Weights::Bf16).is_ok());
}

/// The tokenizer of Vicuna's base survives: needs `tests/tools/llama_tokenizer.sh`.
#[test]
fn the_tokenizer_of_llama_2_reads_back_with_its_merges() {
    let Some(cache) = std::env::var_os("VICUNA_CACHE").map(std::path::PathBuf::from) else {
        eprintln!("skipped: source tests/tools/env.sh");
        return;
    };
    let file = cache.join("llama2-tokenizer/tokenizer.json");
    let config = Config { vocab: 32_000, hidden: 32, layers: 1, ..crate::tiny::config() };
    let mut model = crate::tiny::of_config(config, 6);
    model.tokenizer = tokenizers::Tokenizer::from_file(&file).expect("run tests/tools/llama_tokenizer.sh");
    let again = written(&model, Weights::F16).unwrap();
    let described = |model: &Pretrained| serde_json::to_value(&model.tokenizer).unwrap();
    let (theirs, ours) = (described(&model), described(&again));
    assert_eq!(ours["model"]["merges"], theirs["model"]["merges"]);
    for text in ["Hello, how are you?", " two  spaces\n", "ein Käse 🐫 <s>", "A chat between a curious user</s>"] {
        let ids = |model: &Pretrained| model.tokenizer.encode(text, true).unwrap().get_ids().to_vec();
        assert_eq!(ids(&again), ids(&model), "{text:?}");
        let decoded = |model: &Pretrained| model.tokenizer.decode(&ids(model), true).unwrap();
        assert_eq!(decoded(&again), decoded(&model));
    }
}
