//! Hugging Face's directory layout: `config.json`, safetensors in one file or several, the
//! tokenizer and its settings.

use crate::config::token_ids;
use crate::on_disk::{OnDisk, Weight};
use crate::parameters::{self, LM_HEAD, parameter_names, parameter_shape};
use crate::weights_file::{self, WeightsWriter};
use crate::{Config, ModelError, Pretrained, SpecialTokens};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use tokenizers::Tokenizer;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

pub(crate) fn open(directory: &Path) -> Result<OnDisk, ModelError> {
    let mut config = Config::from_hugging_face(&read_json(&directory.join("config.json"))?)?;
    if let Some(generation) = read_optional_json(&directory.join("generation_config.json"))? {
        add_end_tokens(&mut config, &token_ids(&generation["eos_token_id"]));
    }
    let weights = weights(directory, &config)?;
    let path = directory.join("tokenizer.json");
    let tokenizer =
        vicuna_tokenizer::read(&path).map_err(|error| ModelError::Tokenizer(format!("{}: {error}", path.display())))?;
    Ok(OnDisk {
        special_tokens: SpecialTokens::read(directory, &config, &tokenizer)?,
        config,
        weights,
        tokenizer,
        chat_template: chat_template(directory)?,
    })
}

pub(crate) fn load(directory: &Path) -> Result<Pretrained, ModelError> {
    let opened = open(directory)?;
    let read = |name: &str| Ok((name.to_owned(), opened.tensor(name)?));
    let tensors = opened.names().map(read).collect::<Result<_, ModelError>>()?;
    let OnDisk { config, tokenizer, special_tokens, chat_template, .. } = opened;
    Ok(Pretrained { config, tensors, packed: BTreeMap::new(), tokenizer, special_tokens, chat_template })
}

/// Chat models often name more end tokens in `generation_config.json` than in `config.json`.
fn add_end_tokens(config: &mut Config, more: &[u32]) {
    for id in more {
        if !config.eos.contains(id) {
            config.eos.push(*id);
        }
    }
}

/// The single file, or all files that the index names.
pub(crate) fn weight_files(directory: &Path) -> Result<Vec<PathBuf>, ModelError> {
    if directory.join(SINGLE).is_file() {
        return Ok(vec![directory.join(SINGLE)]);
    }
    let path = directory.join(INDEX);
    let Some(index) = read_optional_json(&path)? else {
        return Err(ModelError::NotAModel { path: directory.to_owned() });
    };
    let names: BTreeSet<&str> =
        index["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str()).collect();
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        return Err(ModelError::Safetensors {
            path,
            reason: format!("the index names {name:?}, which is not a file beside it"),
        });
    }
    Ok(names.iter().map(|name| directory.join(name)).collect())
}

/// All weights, of which none has been read yet.
fn weights(directory: &Path, config: &Config) -> Result<BTreeMap<String, Weight>, ModelError> {
    let mut weights = BTreeMap::new();
    for file in weight_files(directory)? {
        for (name, stored) in weights_file::open(&file)?.into_iter().filter(|(name, _)| !is_redundant(config, name)) {
            parameters::check_shape(config, &name, &stored.shape)?;
            weights_file::kind_of(&name, stored.dtype)?;
            weights.insert(name, Weight::Safetensors(stored));
        }
    }
    parameters::check_complete(config, |name| weights.contains_key(name))?;
    Ok(weights)
}

/// Old checkpoints store the rotary frequencies, and some a copy of the tied projection.
fn is_redundant(config: &Config, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == LM_HEAD)
}

/// In a file of its own since transformers 4.51, before that in `tokenizer_config.json`.
pub(crate) fn chat_template(directory: &Path) -> Result<Option<String>, ModelError> {
    let path = directory.join("chat_template.jinja");
    if path.is_file() {
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path, source })?;
        return Ok(Some(text));
    }
    let settings = read_optional_json(&directory.join("tokenizer_config.json"))?.unwrap_or_default();
    Ok(default_template(&settings["chat_template"]))
}

/// One template, or a list of named ones of which `default` is meant.
fn default_template(value: &Value) -> Option<String> {
    let named = || value.as_array()?.iter().find(|entry| entry["name"] == "default")?["template"].as_str();
    value.as_str().or_else(named).map(str::to_owned)
}

pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let bytes = std::fs::read(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

pub(crate) fn read_optional_json(path: &Path) -> Result<Option<Value>, ModelError> {
    if path.is_file() { read_json(path).map(Some) } else { Ok(None) }
}

/// Writes a directory that transformers loads: all weights in one safetensors file, bf16 as they are and others in fp32. The
/// directory is made if need be; files of the same names are replaced.
pub fn save(
    directory: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<(), ModelError> {
    parameters::check(config, tensors)?;
    let all_bf16 = tensors.values().all(|tensor| tensor.kind() == Kind::BFloat16);
    let kind = if all_bf16 { Kind::BFloat16 } else { Kind::Float };
    save_description(directory, config, kind, tokenizer, chat_template)?;
    weights_file::write(&directory.join(SINGLE), tensors)
}

/// The same where weights of one kind come one by one, in any order.
pub fn save_one_by_one(
    directory: &Path,
    config: &Config,
    kind: Kind,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<WeightsWriter, ModelError> {
    save_description(directory, config, kind, tokenizer, chat_template)?;
    let shape = |name: &String| parameter_shape(config, name).unwrap_or_default();
    let described = parameter_names(config).into_iter().map(|name| (name.clone(), kind, shape(&name)));
    WeightsWriter::create(&directory.join(SINGLE), described)
}

/// All but the weights.
fn save_description(
    directory: &Path,
    config: &Config,
    kind: Kind,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<(), ModelError> {
    let failed = |source| ModelError::Write { path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let mut description = config.to_hugging_face();
    description["torch_dtype"] = json!(if kind == Kind::BFloat16 { "bfloat16" } else { "float32" });
    write_json(&directory.join("config.json"), &description)?;
    write_json(&directory.join("generation_config.json"), &generation_config(config))?;
    save_tokenizer(directory, config, tokenizer, chat_template)
}

/// Writes the tokenizer and its settings into a directory that is there.
pub fn save_tokenizer(
    directory: &Path,
    config: &Config,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<(), ModelError> {
    write_json(&directory.join("tokenizer_config.json"), &tokenizer_config(config, tokenizer, chat_template))?;
    write_json(
        &directory.join("special_tokens_map.json"),
        &Value::Object(SpecialTokens::of(config, tokenizer).to_map()),
    )?;
    tokenizer.save(directory.join("tokenizer.json"), false).map_err(|error| ModelError::Tokenizer(error.to_string()))
}

fn generation_config(config: &Config) -> Value {
    json!({
        "bos_token_id": config.bos,
        "eos_token_id": config.eos_json(),
        "pad_token_id": config.pad,
    })
}

fn tokenizer_config(config: &Config, tokenizer: &Tokenizer, chat_template: Option<&str>) -> Value {
    let mut settings = SpecialTokens::of(config, tokenizer).to_map();
    settings.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    settings.insert("model_max_length".to_owned(), json!(config.max_position));
    settings.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    if let Some(template) = chat_template {
        settings.insert("chat_template".to_owned(), json!(template));
    }
    Value::Object(settings)
}

pub(crate) fn write_json(path: &Path, value: &Value) -> Result<(), ModelError> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(|source| ModelError::Write { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;
    use serde_json::Map;

    fn saved() -> (tempfile::TempDir, Pretrained) {
        let directory = tempfile::tempdir().unwrap();
        let model = tiny(1);
        let template = model.chat_template.as_deref();
        save(directory.path(), &model.config, &model.tensors, &model.tokenizer, template).unwrap();
        (directory, model)
    }

    fn rewrite(directory: &Path, tensors: &BTreeMap<String, Tensor>) {
        weights_file::write(&directory.join(SINGLE), tensors).unwrap();
    }

    #[test]
    fn a_saved_model_loads_as_it_was() {
        let (directory, model) = saved();
        let again = crate::load(directory.path()).unwrap();
        assert_eq!(again.config, model.config);
        assert_eq!(again.chat_template, model.chat_template);
        assert_eq!(crate::weights_digest(&again.tensors).unwrap(), crate::weights_digest(&model.tensors).unwrap());
        let ids = |tokenizer: &Tokenizer| tokenizer.encode("the theme\n", false).unwrap().get_ids().to_vec();
        assert_eq!(ids(&again.tokenizer), ids(&model.tokenizer));
    }

    #[test]
    fn shards_named_by_an_index_are_read_together() {
        let (directory, model) = saved();
        let path = directory.path();
        std::fs::remove_file(path.join(SINGLE)).unwrap();
        let clone = |parity: usize| -> BTreeMap<String, Tensor> {
            let every_other = model.tensors.iter().enumerate().filter(|(index, _)| index % 2 == parity);
            every_other.map(|(_, (name, tensor))| (name.clone(), tensor.shallow_clone())).collect()
        };
        let mut map = Map::new();
        for (parity, file) in ["a.safetensors", "b.safetensors"].iter().enumerate() {
            weights_file::write(&path.join(file), &clone(parity)).unwrap();
            map.extend(clone(parity).into_keys().map(|name| (name, json!(file))));
        }
        write_json(&path.join(INDEX), &json!({ "weight_map": map })).unwrap();
        let again = crate::load(path).unwrap();
        assert_eq!(crate::weights_digest(&again.tensors).unwrap(), crate::weights_digest(&model.tensors).unwrap());
    }

    #[test]
    fn an_index_that_points_elsewhere_is_refused() {
        let (directory, _) = saved();
        std::fs::remove_file(directory.path().join(SINGLE)).unwrap();
        let index = json!({ "weight_map": { "x": "../x.safetensors" } });
        write_json(&directory.path().join(INDEX), &index).unwrap();
        let message = crate::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains("not a file beside it"), "{message}");
    }

    #[test]
    fn half_precision_weights_are_read_as_fp32() {
        let (directory, model) = saved();
        for kind in [Kind::BFloat16, Kind::Half] {
            let file = directory.path().join(SINGLE);
            let halves: Vec<(&str, Tensor)> =
                model.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.to_kind(kind))).collect();
            Tensor::write_safetensors(&halves, &file).unwrap();
            let again = crate::load(directory.path()).unwrap();
            for (name, tensor) in &again.tensors {
                assert_eq!(tensor, &model.tensors[name].to_kind(kind).to_kind(Kind::Float), "{name}");
            }
        }
    }

    #[test]
    fn partial_and_foreign_checkpoints_are_refused_by_name_and_shape() {
        let (directory, mut model) = saved();
        let norm = "model.layers.1.input_layernorm.weight";
        let removed = model.tensors.remove(norm).unwrap();
        rewrite(directory.path(), &model.tensors);
        let message = crate::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains(norm) && message.contains("[64]"), "{message}");

        model.tensors.insert(norm.to_owned(), Tensor::zeros([65], (Kind::Float, tch::Device::Cpu)));
        rewrite(directory.path(), &model.tensors);
        let message = crate::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains(norm) && message.contains("[65]") && message.contains("[64]"), "{message}");

        model.tensors.insert(norm.to_owned(), removed);
        model.tensors.insert(
            "model.layers.0.self_attn.q_proj.bias".to_owned(),
            Tensor::zeros([64], (Kind::Float, tch::Device::Cpu)),
        );
        rewrite(directory.path(), &model.tensors);
        let message = crate::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains("q_proj.bias"), "{message}");
    }

    #[test]
    fn truncated_and_mutated_files_are_refused_without_a_panic() {
        let (directory, _) = saved();
        let file = directory.path().join(SINGLE);
        let whole = std::fs::read(&file).unwrap();
        for length in [0, 1, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(&file, &whole[..length]).unwrap();
            assert!(crate::load(directory.path()).is_err(), "{length} bytes were accepted");
        }
        for position in 0..400 {
            let mut mutated = whole.clone();
            mutated[position] ^= 1 << (position % 8);
            std::fs::write(&file, &mutated).unwrap();
            let _ = crate::load(directory.path());
        }
    }

    #[test]
    fn a_directory_without_weights_is_not_a_model() {
        let (directory, _) = saved();
        std::fs::remove_file(directory.path().join(SINGLE)).unwrap();
        assert!(matches!(crate::load(directory.path()), Err(ModelError::NotAModel { .. })));
    }
}
