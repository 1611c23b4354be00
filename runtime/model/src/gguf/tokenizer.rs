//! The tokenizer inside a GGUF file, rebuilt as Hugging Face's `tokenizer.json` describes it.

use super::{Gguf, Value};
use crate::ModelError;
use serde_json::{Map, json};
use tokenizers::Tokenizer;

/// `tokenizer.ggml.token_type` of tokens that text must not produce.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// Builds the byte-level BPE tokenizer; other kinds are refused by name.
pub fn build(gguf: &Gguf) -> Result<Tokenizer, ModelError> {
    match gguf.text("tokenizer.ggml.model") {
        Some("gpt2") => {}
        other => {
            return Err(refuse(format!(
                "the GGUF file's tokenizer is {other:?}; only gpt2 (byte-level BPE) is read, use the Hugging Face directory for others"
            )));
        }
    }
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let description = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(gguf, &tokens),
        "normalizer": null,
        "pre_tokenizer": pre_tokenizer(gguf)?,
        "post_processor": post_processor(gguf, &tokens)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": vocabulary(&tokens)?,
            "merges": texts(gguf, "tokenizer.ggml.merges")?,
        },
    });
    serde_json::from_value(description).map_err(|error| refuse(error.to_string()))
}

fn vocabulary(tokens: &[&str]) -> Result<Map<String, serde_json::Value>, ModelError> {
    let map: Map<_, _> = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    if map.len() != tokens.len() {
        return Err(refuse("a token occurs twice in the vocabulary".to_owned()));
    }
    Ok(map)
}

fn added_tokens(gguf: &Gguf, tokens: &[&str]) -> Vec<serde_json::Value> {
    let types = gguf.array("tokenizer.ggml.token_type").unwrap_or_default();
    let added = tokens.iter().zip(types).enumerate().filter_map(|(id, (token, kind))| {
        let kind = kind.integer().filter(|kind| [CONTROL, USER_DEFINED].contains(kind))?;
        Some(added_token(id, token, kind == CONTROL))
    });
    added.collect()
}

pub(crate) fn added_token(id: usize, content: &str, special: bool) -> serde_json::Value {
    json!({
        "id": id,
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// How text is cut before merging: a property of the model family.
fn pre_tokenizer(gguf: &Gguf) -> Result<serde_json::Value, ModelError> {
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    match gguf.text("tokenizer.ggml.pre") {
        None | Some("default" | "gpt-2" | "gpt2") => Ok(byte_level),
        Some("smollm") => Ok(json!({
            "type": "Sequence",
            "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level],
        })),
        Some(other) => Err(refuse(format!(
            "pre-tokenizer {other:?} is not known (smollm, gpt-2 and default are); use the Hugging Face directory"
        ))),
    }
}

fn post_processor(gguf: &Gguf, tokens: &[&str]) -> Result<serde_json::Value, ModelError> {
    if gguf.bool("tokenizer.ggml.add_bos_token") != Some(true) {
        return Ok(serde_json::Value::Null);
    }
    let id = gguf.token_id("tokenizer.ggml.bos_token_id").unwrap_or_default();
    let token = tokens.get(id as usize).ok_or_else(|| refuse("its first token is not in the vocabulary".to_owned()))?;
    let special = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let text = |name: &str| json!({ "Sequence": { "id": name, "type_id": 0 } });
    Ok(json!({
        "type": "TemplateProcessing",
        "single": [special, text("A")],
        "pair": [special, text("A"), special, text("B")],
        "special_tokens": { (*token): { "id": token, "ids": [id], "tokens": [token] } },
    }))
}

fn texts<'a>(gguf: &'a Gguf, key: &str) -> Result<Vec<&'a str>, ModelError> {
    let values = gguf.array(key).ok_or_else(|| refuse(format!("metadata {key} is missing")))?;
    let texts: Option<Vec<&str>> = values.iter().map(Value::text).collect();
    texts.ok_or_else(|| refuse(format!("metadata {key} does not hold texts")))
}

fn refuse(message: String) -> ModelError {
    ModelError::Tokenizer(message)
}
