//! A tokenizer that needs no file.

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A `tokenizer.json` of a token a byte, and these control tokens after them.
pub fn document(control: &[&str]) -> Value {
    let mut letters: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    letters.sort();
    let vocabulary: Map<_, _> = letters.into_iter().enumerate().map(|(id, letter)| (letter, json!(id))).collect();
    let added = control.iter().enumerate().map(|(index, token)| {
        json!({ "id": 256 + index, "content": token, "special": true, "normalized": false,
                "single_word": false, "lstrip": false, "rstrip": false })
    });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true });
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added.collect::<Vec<_>>(),
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                   "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                   "vocab": vocabulary, "merges": [] },
    })
}
