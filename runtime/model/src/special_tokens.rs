//! What a model's tokenizer calls the tokens that begin, end and fill a text.

use crate::hugging_face::{read_optional_json, write_json};
use crate::{Config, ModelError};
use serde_json::{Map, Value, json};
use std::path::Path;
use tokenizers::Tokenizer;

/// Their texts, which a chat template may call by these names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub pad: Option<String>,
}

impl SpecialTokens {
    /// Those of the configuration's ids.
    pub fn of(config: &Config, tokenizer: &Tokenizer) -> Self {
        let text = |id: Option<u32>| tokenizer.id_to_token(id?);
        Self { bos: text(config.bos), eos: text(config.eos.first().copied()), pad: text(config.pad) }
    }

    /// As `tokenizer_config.json` of a directory names them, and where it does not, as `config.json` does: a chat
    /// model's tokenizer often ends a text otherwise than its configuration, and its template means the tokenizer's.
    pub(crate) fn read(directory: &Path, config: &Config, tokenizer: &Tokenizer) -> Result<Self, ModelError> {
        let of_config = Self::of(config, tokenizer);
        let settings = read_optional_json(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
        let named = |name: &str, otherwise| match settings.get(name) {
            None => otherwise,
            // `null`: the tokenizer has none.
            Some(token) => token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned),
        };
        Ok(Self {
            bos: named("bos_token", of_config.bos),
            eos: named("eos_token", of_config.eos),
            pad: named("pad_token", of_config.pad),
        })
    }

    /// The first and the last of a text as a chat template gets them: empty where there is none.
    pub fn around(&self) -> [&str; 2] {
        [&self.bos, &self.eos].map(|token| token.as_deref().unwrap_or_default())
    }

    fn named(&self) -> [(&'static str, &Option<String>); 3] {
        [("bos_token", &self.bos), ("eos_token", &self.eos), ("pad_token", &self.pad)]
    }

    /// Their names and texts.
    pub(crate) fn to_map(&self) -> Map<String, Value> {
        let there = |(name, token): (&str, &Option<String>)| Some((name.to_owned(), json!(token.as_ref()?)));
        self.named().into_iter().filter_map(there).collect()
    }

    /// Puts them in the place of the configuration's in a directory that [`crate::save_tokenizer`] has written.
    pub fn write(&self, directory: &Path) -> Result<(), ModelError> {
        let path = directory.join("tokenizer_config.json");
        let mut settings = read_optional_json(&path)?.unwrap_or_default();
        for (name, token) in self.named() {
            settings[name] = json!(token);
        }
        write_json(&path, &settings)?;
        write_json(&directory.join("special_tokens_map.json"), &Value::Object(self.to_map()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;

    #[test]
    fn the_tokenizer_s_words_come_before_the_configuration_s() {
        let model = tiny(1);
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let read = || SpecialTokens::read(path, &model.config, &model.tokenizer).unwrap();
        let of_config = SpecialTokens::of(&model.config, &model.tokenizer);
        assert_eq!(read(), of_config);
        let settings = json!({ "bos_token": null, "eos_token": { "content": "<|eot|>", "special": true } });
        write_json(&path.join("tokenizer_config.json"), &settings).unwrap();
        let named = SpecialTokens { bos: None, eos: Some("<|eot|>".to_owned()), pad: of_config.pad.clone() };
        assert_eq!(read(), named);

        crate::save_tokenizer(path, &model.config, &model.tokenizer, None).unwrap();
        assert_eq!(read(), of_config);
        named.write(path).unwrap();
        assert_eq!(read(), named);
        let map = read_optional_json(&path.join("special_tokens_map.json")).unwrap().unwrap();
        assert_eq!((map.get("bos_token"), map["eos_token"].as_str()), (None, Some("<|eot|>")));
    }
}
