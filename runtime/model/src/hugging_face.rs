//! Hugging Face's directory layout: `config.json`, safetensors in one file or several, the
//! tokenizer and its settings.

use crate::config::token_ids;
use crate::parameters::{self, LM_HEAD};
use crate::pretrained::map_file;
use crate::{Config, ModelError, Pretrained, SpecialTokens};
use safetensors::{Dtype, SafeTensors, View};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};
use tokenizers::Tokenizer;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

pub(crate) fn load(directory: &Path) -> Result<Pretrained, ModelError> {
    let mut config = Config::from_hugging_face(&read_json(&directory.join("config.json"))?)?;
    if let Some(generation) = read_optional_json(&directory.join("generation_config.json"))? {
        add_end_tokens(&mut config, &token_ids(&generation["eos_token_id"]));
    }
    let mut tensors = BTreeMap::new();
    for file in weight_files(directory)? {
        read_safetensors(&file, &config, &mut tensors)?;
    }
    parameters::check(&config, &tensors)?;
    let path = directory.join("tokenizer.json");
    let tokenizer =
        Tokenizer::from_file(&path).map_err(|error| ModelError::Tokenizer(format!("{}: {error}", path.display())))?;
    Ok(Pretrained {
        special_tokens: SpecialTokens::read(directory, &config, &tokenizer)?,
        config,
        tensors,
        packed: BTreeMap::new(),
        tokenizer,
        chat_template: chat_template(directory)?,
    })
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

fn read_safetensors(path: &Path, config: &Config, into: &mut BTreeMap<String, Tensor>) -> Result<(), ModelError> {
    let bytes = map_file(path)?;
    read_safetensors_bytes(&bytes, config, into).map_err(|error| match error {
        ModelError::Safetensors { reason, .. } => ModelError::Safetensors { path: path.to_owned(), reason },
        other => other,
    })
}

fn read_safetensors_bytes(
    bytes: &[u8],
    config: &Config,
    into: &mut BTreeMap<String, Tensor>,
) -> Result<(), ModelError> {
    let file = SafeTensors::deserialize(bytes)
        .map_err(|error| ModelError::Safetensors { path: PathBuf::new(), reason: error.to_string() })?;
    for (name, view) in file.iter() {
        if is_redundant(config, name) {
            continue;
        }
        let shape: Vec<i64> = view.shape().iter().map(|size| *size as i64).collect();
        parameters::check_shape(config, name, &shape)?;
        let kind = tensor_kind(name, view.dtype())?;
        let tensor = Tensor::f_from_data_size(view.data(), &shape, kind)?.f_to_kind(Kind::Float)?;
        into.insert(name.to_owned(), tensor);
    }
    Ok(())
}

/// Old checkpoints store the rotary frequencies, and some a copy of the tied projection.
fn is_redundant(config: &Config, name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (config.tie_word_embeddings && name == LM_HEAD)
}

pub(crate) fn tensor_kind(name: &str, dtype: Dtype) -> Result<Kind, ModelError> {
    match dtype {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(ModelError::UnsupportedType {
            name: name.to_owned(),
            found: format!("{other:?}"),
            supported: "F32, F16 and BF16",
        }),
    }
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

/// Writes a directory that transformers loads: fp32 weights in one safetensors file. The directory
/// is made if need be; files of the same names are replaced.
pub fn save(
    directory: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
    tokenizer: &Tokenizer,
    chat_template: Option<&str>,
) -> Result<(), ModelError> {
    parameters::check(config, tensors)?;
    let failed = |source| ModelError::Write { path: directory.to_owned(), source };
    std::fs::create_dir_all(directory).map_err(failed)?;
    let mut description = config.to_hugging_face();
    let all_bf16 = tensors.values().all(|tensor| tensor.kind() == Kind::BFloat16);
    description["torch_dtype"] = json!(if all_bf16 { "bfloat16" } else { "float32" });
    write_json(&directory.join("config.json"), &description)?;
    write_json(&directory.join("generation_config.json"), &generation_config(config))?;
    save_tokenizer(directory, config, tokenizer, chat_template)?;
    write_safetensors(&directory.join(SINGLE), tensors)
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

pub(crate) fn write_safetensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<(), ModelError> {
    let views = tensors
        .iter()
        .map(|(name, tensor)| Ok((name.as_str(), StoredView::new(tensor)?)))
        .collect::<Result<Vec<_>, ModelError>>()?;
    // transformers refuses files that do not say which framework wrote them.
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), path)
        .map_err(|error| ModelError::Safetensors { path: path.to_owned(), reason: error.to_string() })?;
    readable(path)
}

/// The crate makes files readable for their owner only, unlike those beside them.
pub(crate) fn readable(path: &Path) -> Result<(), ModelError> {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644))
        .map_err(|source| ModelError::Write { path: path.to_owned(), source })
}

/// A tensor's values as bytes, made when they are written: bf16 stays so, all else is fp32.
struct StoredView {
    tensor: Tensor,
    shape: Vec<usize>,
}

impl StoredView {
    fn new(tensor: &Tensor) -> Result<Self, ModelError> {
        let tensor = tensor.f_detach()?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        let tensor = if tensor.kind() == Kind::BFloat16 { tensor } else { tensor.f_to_kind(Kind::Float)? };
        let shape = tensor.size().iter().map(|size| *size as usize).collect();
        Ok(Self { tensor, shape })
    }
}

impl View for StoredView {
    fn dtype(&self) -> Dtype {
        if self.tensor.kind() == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let mut bytes = vec![0; self.data_len()];
        // A contiguous CPU tensor is only copied; a failure would leave the wrong length, which the
        // writer below refuses.
        if self.tensor.f_copy_data_u8(&mut bytes, self.tensor.numel()).is_err() {
            bytes.clear();
        }
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
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
        write_safetensors(&directory.join(SINGLE), tensors).unwrap();
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
            write_safetensors(&path.join(file), &clone(parity)).unwrap();
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
            let _ = read_safetensors_bytes(&mutated, &crate::tiny::config(), &mut BTreeMap::new());
        }
    }

    #[test]
    fn a_directory_without_weights_is_not_a_model() {
        let (directory, _) = saved();
        std::fs::remove_file(directory.path().join(SINGLE)).unwrap();
        assert!(matches!(crate::load(directory.path()), Err(ModelError::NotAModel { .. })));
    }
}
