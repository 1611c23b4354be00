//! Hugging Face's `tokenizer.json`, from anywhere: a broken one is an error, never a panic.

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use tokenizers::Tokenizer;

/// Why a file is no tokenizer; whoever asked knows its name.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(transparent)]
    Read(#[from] std::io::Error),
    #[error(transparent)]
    Json(#[from] serde_json::Error),
    #[error("a part of it, such as its normalizer or decoder, is broken; was the upload complete?")]
    Broken,
}

/// Reads a `tokenizer.json`.
///
/// The library panics over some of what is wrong with one: where the JSON ends within a decoder, which is why it is parsed
/// before, and where a character map cannot be read.
pub fn read(path: &Path) -> Result<Tokenizer, TokenizerError> {
    let json: serde_json::Value = serde_json::from_slice(&fs::read(path)?)?;
    Ok(catch_unwind(|| serde_json::from_value(json)).map_err(|_| TokenizerError::Broken)??)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

    use super::*;

    const WHOLE: &str = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": {"type": "ByteFallback"},
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}"#;

    fn read_text(text: &str) -> Result<Tokenizer, TokenizerError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        read(file.path())
    }

    #[test]
    fn what_the_library_would_panic_over_is_an_error() {
        assert_eq!(read_text(WHOLE).unwrap().token_to_id("a"), Some(0));
        let cut = WHOLE.find(r#"{"type": "ByteFallback"#).unwrap() + 8;
        assert!(matches!(read_text(&WHOLE[..cut]), Err(TokenizerError::Json(_))));
        let map = r#""normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}"#;
        let mapped = WHOLE.replace(r#""normalizer": null"#, map);
        assert!(matches!(read_text(&mapped), Err(TokenizerError::Broken)));
        assert!(matches!(read_text("{}"), Err(TokenizerError::Json(_))));
        assert!(matches!(read(Path::new("nowhere/tokenizer.json")), Err(TokenizerError::Read(_))));
    }
}
