//! An adapter as PEFT keeps it: `adapter_config.json` and `adapter_model.safetensors`.

use super::{A, B, Lora, PREFIX};
use crate::digest::copy_f32_bytes;
use crate::hugging_face::{chat_template, read_json, write_json};
use crate::layers::Projection;
use crate::weights_file::{self, Stored};
use crate::{ModelError, Pretrained};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tch::{Kind, Tensor};

const SETTINGS: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// What is added to a base model's weights.
#[derive(Debug)]
pub struct Adapter {
    /// Where the base model is, as the adapter says.
    pub base: String,
    /// The factor on `B A`.
    pub scale: f64,
    /// `A [r, in]` and `B [out, r]`, fp32 on the CPU, by Hugging Face's name of the weight they change.
    pub pairs: BTreeMap<String, (Tensor, Tensor)>,
    /// Jinja source of the chat template that it was trained with.
    pub chat_template: Option<String>,
}

/// Whether a directory holds an adapter rather than a model.
pub fn is_adapter(directory: &Path) -> bool {
    directory.join(SETTINGS).is_file()
}

impl Adapter {
    /// Reads PEFT's directory. What would change the numbers and is not known here is refused by name.
    pub fn load(directory: &Path) -> Result<Self, ModelError> {
        let settings = read_json(&directory.join(SETTINGS))?;
        refuse_unknown(&settings)?;
        let rank = positive(&settings, "r")?;
        let alpha = positive(&settings, "lora_alpha")?;
        let rank_stabilised = settings["use_rslora"].as_bool() == Some(true);
        Ok(Self {
            base: settings["base_model_name_or_path"].as_str().unwrap_or_default().to_owned(),
            scale: alpha / if rank_stabilised { rank.sqrt() } else { rank },
            pairs: pairs(read_tensors(&directory.join(WEIGHTS))?, rank as i64)?,
            chat_template: chat_template(directory)?,
        })
    }

    /// `scale · B A [out, in]`, what the adapter adds to the weight `name`; `None` where it adds nothing.
    pub fn added(&self, name: &str) -> Option<Tensor> {
        let (a, b) = self.pairs.get(name)?;
        Some(b.matmul(a) * self.scale)
    }

    /// Refuses a base that lacks what the adapter changes; `shape` gives a tensor's.
    pub(crate) fn check(&self, shape: impl Fn(&str) -> Option<Vec<i64>>) -> Result<(), ModelError> {
        for (name, (a, b)) in &self.pairs {
            let expected = vec![b.size()[0], a.size()[1]];
            match shape(name) {
                Some(found) if found == expected => {}
                Some(found) => return Err(other_base(format!("{name} has shape {found:?} there, not {expected:?}"))),
                None => return Err(other_base(format!("{name}, of shape {expected:?}, is not there"))),
            }
        }
        Ok(())
    }

    /// A name for what it makes of the base model with the digest `base`: BLAKE3 over that, the factor and
    /// all values.
    pub fn digest(&self, base: &str) -> Result<String, ModelError> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(base.as_bytes()).update(&self.scale.to_le_bytes());
        let mut bytes = Vec::new();
        for (name, (a, b)) in &self.pairs {
            hasher.update(name.as_bytes()).update(&[0]).update(&a.size()[0].to_le_bytes());
            for tensor in [a, b] {
                copy_f32_bytes(tensor, &mut bytes)?;
                hasher.update(&bytes);
            }
        }
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Adds itself to the weights of its base model.
    pub fn merge_into(&self, model: &mut Pretrained) -> Result<(), ModelError> {
        self.check(|name| model.tensors.get(name).map(Tensor::size))?;
        for (name, tensor) in &mut model.tensors {
            if let Some(added) = self.added(name) {
                *tensor = tensor.f_add(&added)?;
                model.packed.remove(name);
            }
        }
        if self.chat_template.is_some() {
            model.chat_template.clone_from(&self.chat_template);
        }
        Ok(())
    }

    /// Writes the tensors of [`Lora::layer_parameters`] as PEFT does. The directory is made if need be.
    pub fn save(
        directory: &Path,
        lora: &Lora,
        base: &str,
        tensors: &BTreeMap<String, Tensor>,
    ) -> Result<(), ModelError> {
        std::fs::create_dir_all(directory)
            .map_err(|source| ModelError::Write { path: directory.to_owned(), source })?;
        let settings = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": lora.targets.iter().map(|target| target.name()).collect::<Vec<_>>(),
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "inference_mode": true,
            "modules_to_save": null,
            "use_dora": false,
            "use_rslora": false,
        });
        write_json(&directory.join(SETTINGS), &settings)?;
        weights_file::write(&directory.join(WEIGHTS), tensors)
    }
}

fn other_base(found: String) -> ModelError {
    ModelError::Lora(format!("it was trained on another base model than this one: {found}"))
}

fn refuse_unknown(settings: &Value) -> Result<(), ModelError> {
    let refuse = |message: String| Err(ModelError::Lora(message));
    if settings["peft_type"] != "LORA" {
        return refuse(format!("peft_type is {}; only LORA is supported", settings["peft_type"]));
    }
    let is_unset = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        other => other == "none",
    };
    let unknown = ["use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "bias"];
    match unknown.into_iter().find(|field| !is_unset(&settings[*field])) {
        Some(field) => refuse(format!("{field} is {} in {SETTINGS}, which is not supported", settings[field])),
        None => Ok(()),
    }
}

fn positive(settings: &Value, field: &str) -> Result<f64, ModelError> {
    let number = settings[field].as_f64().filter(|number| *number > 0.0 && *number < 1e6);
    number.ok_or_else(|| ModelError::Lora(format!("{field} is {}; a number above 0 is needed", settings[field])))
}

fn read_tensors(path: &Path) -> Result<BTreeMap<String, Tensor>, ModelError> {
    let read = |(name, stored): (String, Stored)| {
        let tensor = stored.read(&name)?.f_to_kind(Kind::Float)?;
        Ok((name, tensor))
    };
    weights_file::open(path)?.into_iter().map(read).collect()
}

/// Pairs by the name of the weight that they change.
fn pairs(mut tensors: BTreeMap<String, Tensor>, rank: i64) -> Result<BTreeMap<String, (Tensor, Tensor)>, ModelError> {
    let modules: BTreeSet<String> = tensors.keys().filter_map(|name| module_of(name)).collect();
    let mut pairs = BTreeMap::new();
    for module in modules {
        let mut part = |part: &str, rank_at: usize| {
            let name = format!("{module}.{part}");
            let tensor = tensors.remove(&name);
            let tensor = tensor.ok_or_else(|| ModelError::Lora(format!("{name} is missing in {WEIGHTS}")))?;
            let shape = tensor.size();
            if shape.len() != 2 || shape[rank_at] != rank {
                return Err(ModelError::Lora(format!("{name} has shape {shape:?}, which does not fit rank {rank}")));
            }
            Ok(tensor)
        };
        let pair = (part(A, 0)?, part(B, 1)?);
        let weight = module.strip_prefix(PREFIX).unwrap_or(&module);
        pairs.insert(format!("{weight}.weight"), pair);
    }
    match tensors.into_keys().next() {
        Some(name) => Err(ModelError::Lora(format!("tensor {name} is not an adapter of a layer's projection"))),
        None if pairs.is_empty() => Err(ModelError::Lora(format!("there is no adapter in {WEIGHTS}"))),
        None => Ok(pairs),
    }
}

/// The module that a tensor of PEFT's belongs to, if it is a projection of a layer.
fn module_of(name: &str) -> Option<String> {
    let module = name.strip_suffix(A).or_else(|| name.strip_suffix(B))?.strip_suffix('.')?;
    let (_, last) = module.strip_prefix(PREFIX)?.rsplit_once('.')?;
    Projection::ALL.iter().any(|projection| projection.name() == last).then(|| module.to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::tiny;

    /// An adapter of the tiny model with values in both A and B.
    pub fn saved(lora: &Lora) -> (tempfile::TempDir, BTreeMap<String, Tensor>) {
        let directory = tempfile::tempdir().unwrap();
        let config = tiny::config();
        let parameters = (0..config.layers).flat_map(|layer| lora.layer_parameters(&config, layer));
        // A's rule for all: B would be zero.
        let value = |name: &str, shape: &[i64]| Lora::initial(7, &name.replace("lora_B", "lora_A of B"), shape);
        let tensors = parameters.map(|(name, shape)| (name.clone(), value(&name, &shape))).collect();
        Adapter::save(directory.path(), lora, "s3://models/base", &tensors).unwrap();
        (directory, tensors)
    }

    #[test]
    fn a_saved_adapter_loads_as_it_was() {
        let lora = Lora::new(4, 16.0, 0.1, &["q_proj", "down_proj"]).unwrap();
        let (directory, tensors) = saved(&lora);
        assert!(is_adapter(directory.path()));
        let adapter = Adapter::load(directory.path()).unwrap();
        assert_eq!((adapter.base.as_str(), adapter.scale, adapter.pairs.len()), ("s3://models/base", 4.0, 4));
        let (a, b) = &adapter.pairs["model.layers.1.mlp.down_proj.weight"];
        assert_eq!(*a, tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"]);
        assert_eq!(*b, tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]);
    }

    #[test]
    fn what_is_not_supported_or_missing_is_named() {
        let lora = Lora::new(4, 16.0, 0.1, &["q_proj"]).unwrap();
        let (directory, mut tensors) = saved(&lora);
        let path = directory.path().join(SETTINGS);
        let settings = read_json(&path).unwrap();
        for (field, value) in [
            ("peft_type", json!("IA3")),
            ("use_dora", json!(true)),
            ("alpha_pattern", json!({"x": 1})),
            ("r", json!(0)),
        ] {
            let mut changed = settings.clone();
            changed[field] = value;
            write_json(&path, &changed).unwrap();
            let message = Adapter::load(directory.path()).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
        write_json(&path, &settings).unwrap();
        let name = tensors.keys().next().unwrap().clone();
        tensors.remove(&name);
        weights_file::write(&directory.path().join(WEIGHTS), &tensors).unwrap();
        let message = Adapter::load(directory.path()).unwrap_err().to_string();
        assert!(message.contains(&name), "{message}");
    }

    #[test]
    fn an_adapter_of_another_model_is_refused_with_both_shapes() {
        let lora = Lora::new(4, 16.0, 0.1, &["q_proj"]).unwrap();
        let (directory, _) = saved(&lora);
        let adapter = Adapter::load(directory.path()).unwrap();
        let mut model = tiny::tiny(1);
        let name = "model.layers.1.self_attn.q_proj.weight";
        model.tensors.insert(name.to_owned(), Tensor::zeros([32, 64], (Kind::Float, tch::Device::Cpu)));
        let message = adapter.merge_into(&mut model).unwrap_err().to_string();
        assert!(message.contains(name) && message.contains("[32, 64]") && message.contains("[64, 64]"), "{message}");
    }
}
