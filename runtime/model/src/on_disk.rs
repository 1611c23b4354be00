//! A model that lies on disk: what describes it is read at once, its weights one by one, when they are asked for.

use crate::gguf::{self, Gguf, TensorInfo};
use crate::pretrained::{map_file, only_gguf};
use crate::weights_file::{Place, Stored};
use crate::{Config, ModelError, SpecialTokens, hugging_face};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use tch::{Kind, Tensor};
use tokenizers::Tokenizer;

/// Complete and of the right shapes, as far as can be told without reading the weights.
#[derive(Debug)]
pub struct OnDisk {
    pub config: Config,
    pub tokenizer: Tokenizer,
    pub special_tokens: SpecialTokens,
    /// Jinja source of the model's own chat template.
    pub chat_template: Option<String>,
    /// By Hugging Face's names; a tied output projection is absent.
    pub(crate) weights: BTreeMap<String, Weight>,
}

/// How a tensor lies in its file.
#[derive(Debug)]
pub(crate) enum Weight {
    Safetensors(Stored),
    Gguf(Place, TensorInfo),
}

impl OnDisk {
    /// Opens what [`load`](crate::load) reads. The files must stay as they are.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.join("config.json").is_file() {
            return hugging_face::open(path);
        }
        let file = if path.is_dir() { only_gguf(path) } else { Some(path.to_owned()) };
        open_gguf(&file.ok_or_else(|| ModelError::NotAModel { path: path.to_owned() })?)
    }

    /// Names in their order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.weights.keys().map(String::as_str)
    }

    /// A weight in fp32, on the CPU.
    pub fn tensor(&self, name: &str) -> Result<Tensor, ModelError> {
        let weight = self.weights.get(name).ok_or_else(|| ModelError::MissingTensor {
            name: name.to_owned(),
            expected: crate::parameter_shape(&self.config, name).unwrap_or_default(),
        })?;
        match weight {
            Weight::Safetensors(stored) => Ok(stored.read(name)?.f_to_kind(Kind::Float)?),
            Weight::Gguf(place, info) => gguf::read_tensor(&self.config, name, info, &place.read()?),
        }
    }
}

fn open_gguf(path: &Path) -> Result<OnDisk, ModelError> {
    let bytes = map_file(path)?;
    if !bytes.starts_with(gguf::MAGIC) {
        return Err(ModelError::NotAModel { path: path.to_owned() });
    }
    let gguf = Gguf::parse(&bytes)?;
    let config = Config::from_gguf(&gguf)?;
    let file = Arc::new(File::open(path).map_err(|source| ModelError::Read { path: path.to_owned(), source })?);
    let shared: Arc<Path> = path.into();
    let weight = |(name, info): (String, &TensorInfo)| {
        let (offset, length) = gguf.range(info);
        let place = Place { file: file.clone(), path: shared.clone(), offset: offset as u64, length };
        (name, Weight::Gguf(place, info.clone()))
    };
    let weights = gguf::named(&gguf, &config)?.into_iter().map(weight).collect();
    let tokenizer = gguf::tokenizer(&gguf)?;
    Ok(OnDisk {
        special_tokens: SpecialTokens::of(&config, &tokenizer),
        tokenizer,
        chat_template: gguf.text("tokenizer.chat_template").map(str::to_owned),
        config,
        weights,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;

    #[test]
    fn each_weight_is_what_the_whole_model_has_whatever_the_format() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, file) = (folder.path().join("model"), folder.path().join("one.gguf"));
        let model = tiny(1);
        crate::save(&directory, &model.config, &model.tensors, &model.tokenizer, None).unwrap();
        gguf::save(&file, &model, gguf::Weights::F32).unwrap();
        for path in [directory, file] {
            let opened = OnDisk::open(&path).unwrap();
            assert!(opened.names().eq(model.tensors.keys()), "{}", path.display());
            for (name, tensor) in &model.tensors {
                assert_eq!(&opened.tensor(name).unwrap(), tensor, "{name}");
            }
            assert!(matches!(opened.tensor("x"), Err(ModelError::MissingTensor { .. })));
        }
        assert!(matches!(OnDisk::open(&folder.path().join("none")), Err(ModelError::Read { .. })));
    }
}
