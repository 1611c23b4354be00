//! The tokenizer inside a GGUF file, rebuilt as Hugging Face's `tokenizer.json` describes it.

use super::export::Metadata;
use super::{Gguf, Value};
use crate::{Config, ModelError};
use serde_json::{Map, json};
use std::collections::HashMap;
use tokenizers::Tokenizer;

/// `tokenizer.ggml.token_type` of tokens.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
/// Tokens that text must not produce.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
/// `<0x0A>` and so on, for what no other token covers.
const BYTE: i32 = 6;

/// Stands for a space in SentencePiece's tokens.
const SPACE: &str = "\u{2581}";

/// Builds the tokenizer: byte-level BPE (`gpt2`) or SentencePiece's (`llama`); other kinds are refused by
/// name.
pub fn build(gguf: &Gguf) -> Result<Tokenizer, ModelError> {
    let tokens = texts(gguf, "tokenizer.ggml.tokens")?;
    let description = match gguf.text("tokenizer.ggml.model") {
        Some("gpt2") => byte_level(gguf, &tokens)?,
        Some("llama") => sentence_piece(gguf, &tokens)?,
        other => {
            return Err(refuse(format!(
                "the GGUF file's tokenizer is {other:?}; gpt2 (byte-level BPE) and llama (SentencePiece) are read, use the Hugging Face directory for others"
            )));
        }
    };
    serde_json::from_value(description).map_err(|error| refuse(error.to_string()))
}

fn byte_level(gguf: &Gguf, tokens: &[&str]) -> Result<serde_json::Value, ModelError> {
    let name = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
    let pre_tokenizer = pre_tokenizer(name).ok_or_else(|| {
        refuse(format!("pre-tokenizer {name:?} is not known ({PRE_TOKENIZERS:?} are); use the Hugging Face directory"))
    })?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(gguf, tokens),
        "normalizer": if name == "qwen2" { json!({ "type": "NFC" }) } else { json!(null) },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor(gguf, tokens)?,
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": bpe(vocabulary(tokens)?, json!(texts(gguf, "tokenizer.ggml.merges")?), false, name == "llama-bpe"),
    }))
}

/// SentencePiece's BPE: of two neighbours that make a token those are merged first whose token scores
/// highest (Kudo and Richardson 2018).
fn sentence_piece(gguf: &Gguf, tokens: &[&str]) -> Result<serde_json::Value, ModelError> {
    let scores = gguf.array("tokenizer.ggml.scores").unwrap_or_default();
    let scores: Vec<f64> = scores.iter().filter_map(Value::number).collect();
    if scores.len() != tokens.len() {
        return Err(refuse("metadata tokenizer.ggml.scores does not hold a number for each token".to_owned()));
    }
    let prefix = gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let space = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let mut normalizers = vec![space];
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(gguf, tokens),
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": post_processor(gguf, tokens)?,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": bpe(vocabulary(tokens)?, json!(merges(tokens, &kinds(gguf), &scores)), true, false),
    }))
}

fn bpe(
    vocabulary: Map<String, serde_json::Value>,
    merges: serde_json::Value,
    pieces: bool,
    whole: bool,
) -> serde_json::Value {
    let unknown = pieces && vocabulary.contains_key("<unk>");
    json!({
        "type": "BPE",
        "dropout": null,
        "unk_token": if unknown { json!("<unk>") } else { json!(null) },
        "continuing_subword_prefix": null,
        "end_of_word_suffix": null,
        "fuse_unk": pieces,
        "byte_fallback": pieces,
        "ignore_merges": whole,
        "vocab": vocabulary,
        "merges": merges,
    })
}

/// Every way to make a token of two, best token first.
fn merges<'a>(tokens: &[&'a str], kinds: &[i32], scores: &[f64]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut found = Vec::new();
    for (id, token) in tokens.iter().enumerate().filter(|(id, _)| kinds.get(*id).is_none_or(|kind| *kind == NORMAL)) {
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(first), Some(second)) = (ids.get(left), ids.get(right)) {
                found.push((id, *first, *second, [left, right]));
            }
        }
    }
    found.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]).then((a.0, a.1, a.2).cmp(&(b.0, b.1, b.2))));
    found.into_iter().map(|(.., pair)| pair).collect()
}

fn kinds(gguf: &Gguf) -> Vec<i32> {
    let kinds = gguf.array("tokenizer.ggml.token_type").unwrap_or_default();
    kinds.iter().map(|kind| kind.integer().and_then(|kind| i32::try_from(kind).ok()).unwrap_or(NORMAL)).collect()
}

/// Writes a tokenizer's metadata, the other way round than [`build`]; what that could not read is refused.
pub(super) fn describe(tokenizer: &Tokenizer, config: &Config, metadata: &mut Metadata) -> Result<(), ModelError> {
    let json = serde_json::to_value(tokenizer).map_err(|error| refuse(error.to_string()))?;
    let model = &json["model"];
    if model["type"] != "BPE" {
        return Err(refuse(format!("a tokenizer of type {} cannot be written to GGUF; BPE can", model["type"])));
    }
    let (tokens, kinds) = numbered_tokens(&json, config.vocab)?;
    let merges = merge_pairs(&model["merges"]);
    if model["byte_fallback"] == true {
        metadata.text("tokenizer.ggml.model", "llama");
        metadata.floats("tokenizer.ggml.scores", &scores(&tokens, &merges));
        let prefix = json["normalizer"].to_string().contains("Prepend") || json["pre_tokenizer"]["type"] == "Metaspace";
        metadata.switch("tokenizer.ggml.add_space_prefix", prefix);
    } else {
        let name = PRE_TOKENIZERS
            .into_iter()
            .find(|name| pre_tokenizer(name).is_some_and(|known| is_alike(&known, &json["pre_tokenizer"])));
        let name = name.ok_or_else(|| {
            refuse(format!("GGUF has no name for this tokenizer's pre-tokenizer; {PRE_TOKENIZERS:?} are known"))
        })?;
        metadata.text("tokenizer.ggml.model", "gpt2");
        metadata.text("tokenizer.ggml.pre", name);
        metadata.texts("tokenizer.ggml.merges", &merges.iter().map(|pair| pair.join(" ")).collect::<Vec<_>>());
    }
    metadata.texts("tokenizer.ggml.tokens", &tokens);
    metadata.signed("tokenizer.ggml.token_type", &kinds);
    let ids = [
        ("bos", config.bos),
        ("eos", config.eos.first().copied()),
        ("eot", config.eos.get(1).copied()),
        ("padding", config.pad),
    ];
    for (name, id) in ids.into_iter().filter_map(|(name, id)| Some((name, id?))) {
        metadata.number(&format!("tokenizer.ggml.{name}_token_id"), id as usize);
    }
    let nothing = tokenizer.encode("", true).map_err(|error| refuse(error.to_string()))?;
    metadata
        .switch("tokenizer.ggml.add_bos_token", config.bos.is_some_and(|bos| nothing.get_ids().first() == Some(&bos)));
    Ok(())
}

/// Texts and types by id; ids that no token has are filled up, as the format has no holes.
fn numbered_tokens(json: &serde_json::Value, vocabulary: usize) -> Result<(Vec<String>, Vec<i32>), ModelError> {
    let mut tokens: Vec<String> = (0..vocabulary).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; vocabulary];
    let mut put = |text: &str, id: Option<u64>, kind| match id.filter(|id| (*id as usize) < vocabulary) {
        Some(id) => {
            tokens[id as usize] = text.to_owned();
            kinds[id as usize] = kind;
            Ok(())
        }
        None => Err(refuse(format!("token {text:?} has the id {id:?}; the model has {vocabulary} ids"))),
    };
    for (text, id) in json["model"]["vocab"].as_object().into_iter().flatten() {
        let is_byte = text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
        put(text, id.as_u64(), if is_byte { BYTE } else { NORMAL })?;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let text = added["content"].as_str().unwrap_or_default();
        let kind = match added["special"] == true {
            true if json["model"]["unk_token"] == text => UNKNOWN,
            true => CONTROL,
            false => USER_DEFINED,
        };
        put(text, added["id"].as_u64(), kind)?;
    }
    Ok((tokens, kinds))
}

fn merge_pairs(merges: &serde_json::Value) -> Vec<[&str; 2]> {
    let merges = merges.as_array().into_iter().flatten();
    merges
        .filter_map(|merge| match merge.as_str() {
            Some(text) => text.split_once(' ').map(|(left, right)| [left, right]),
            None => Some([merge[0].as_str()?, merge[1].as_str()?]),
        })
        .collect()
}

/// Higher for tokens that are made earlier.
fn scores(tokens: &[String], merges: &[[&str; 2]]) -> Vec<f32> {
    let mut ranks = HashMap::new();
    for (rank, pair) in merges.iter().enumerate() {
        ranks.entry(pair.concat()).or_insert(rank);
    }
    tokens.iter().map(|token| -(ranks.get(token).copied().unwrap_or(merges.len()) as f32)).collect()
}

/// Whether two pre-tokenizers cut alike: offsets are no matter of ours.
fn is_alike(known: &serde_json::Value, found: &serde_json::Value) -> bool {
    match (known, found) {
        (serde_json::Value::Object(known), serde_json::Value::Object(found)) => known
            .iter()
            .all(|(key, value)| key == "trim_offsets" || found.get(key).is_some_and(|found| is_alike(value, found))),
        (serde_json::Value::Array(known), serde_json::Value::Array(found)) => {
            known.len() == found.len() && known.iter().zip(found).all(|(known, found)| is_alike(known, found))
        }
        _ => known == found,
    }
}

fn vocabulary(tokens: &[&str]) -> Result<Map<String, serde_json::Value>, ModelError> {
    let map: Map<_, _> = tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    if map.len() != tokens.len() {
        return Err(refuse("a token occurs twice in the vocabulary".to_owned()));
    }
    Ok(map)
}

fn added_tokens(gguf: &Gguf, tokens: &[&str]) -> Vec<serde_json::Value> {
    let added = tokens.iter().zip(kinds(gguf)).enumerate().filter_map(|(id, (token, kind))| {
        let is_added = [UNKNOWN, CONTROL, USER_DEFINED].contains(&kind);
        is_added.then(|| added_token(id, token, kind != USER_DEFINED))
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

/// Names of the ways to cut text before merging that are known here.
const PRE_TOKENIZERS: [&str; 6] = ["gpt-2", "gpt2", "default", "smollm", "qwen2", "llama-bpe"];

/// How text is cut before merging: a property of the model family.
fn pre_tokenizer(name: &str) -> Option<serde_json::Value> {
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let sequence = |first: serde_json::Value, second: serde_json::Value| json!({ "type": "Sequence", "pretokenizers": [first, second] });
    // Runs of digits are what they differ in.
    let split = |digits: &str| {
        let pattern = format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        );
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    };
    match name {
        "gpt-2" | "gpt2" | "default" => Some(byte_level(true)),
        "smollm" => Some(sequence(json!({ "type": "Digits", "individual_digits": true }), byte_level(true))),
        "qwen2" => Some(sequence(split(r"\p{N}"), byte_level(false))),
        "llama-bpe" => Some(sequence(split(r"\p{N}{1,3}"), byte_level(false))),
        _ => None,
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
