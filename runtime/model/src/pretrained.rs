//! A model read from disk, whatever its format.

use crate::gguf::packed::Packed;
use crate::lora::Adapter;
use crate::parameters::EMBEDDING;
use crate::{Config, ModelError, SpecialTokens, gguf, hugging_face};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use tch::{Kind, Tensor};
use tokenizers::Tokenizer;

/// Everything that a checkpoint holds.
#[derive(Debug)]
pub struct Pretrained {
    pub config: Config,
    /// fp32, on the CPU, by Hugging Face's names, complete and of the right shapes. A tied output
    /// projection is absent.
    pub tensors: BTreeMap<String, Tensor>,
    /// Those of them that the file holds quantised, as they are there.
    pub(crate) packed: BTreeMap<String, Packed>,
    pub tokenizer: Tokenizer,
    pub special_tokens: SpecialTokens,
    /// Jinja source of the model's own chat template.
    pub chat_template: Option<String>,
}

impl Pretrained {
    /// With fp32 weights alone, for whoever does not run inference on quantised ones.
    pub fn unpacked(self) -> Self {
        Self { packed: BTreeMap::new(), ..self }
    }

    /// Whether its weights were stored in bf16, which then loses nothing of them: told by the embedding, which no adapter
    /// changes.
    pub fn is_bf16(&self) -> bool {
        let exact = |tensor: &Tensor| tensor.to_kind(Kind::BFloat16).to_kind(Kind::Float).equal(tensor);
        self.tensors.get(EMBEDDING).is_some_and(exact)
    }
}

/// Reads a Hugging Face directory or one GGUF file. A directory that holds nothing but one GGUF
/// file counts as that file.
pub fn load(path: &Path) -> Result<Pretrained, ModelError> {
    if path.join("config.json").is_file() {
        return hugging_face::load(path);
    }
    if path.is_dir() {
        return match only_gguf(path) {
            Some(file) => load_gguf(&file),
            None => Err(ModelError::NotAModel { path: path.to_owned() }),
        };
    }
    load_gguf(path)
}

/// The configuration alone of what [`load`] reads, or of a `config.json`.
pub fn load_config(path: &Path) -> Result<Config, ModelError> {
    let json = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let file = if json.is_file() { Some(json) } else { only_gguf(path) };
    let file = file.ok_or_else(|| ModelError::NotAModel { path: path.to_owned() })?;
    let bytes = map_file(&file)?;
    match bytes.starts_with(gguf::MAGIC) {
        true => Config::from_gguf(&gguf::Gguf::header(&bytes)?),
        false => Config::from_hugging_face(&hugging_face::read_json(&file)?),
    }
}

/// Reads a base model and adds a PEFT adapter to its weights.
pub fn load_adapted(base: &Path, adapter: &Path) -> Result<Pretrained, ModelError> {
    let adapter = Adapter::load(adapter)?;
    let mut model = load(base)?;
    adapter.merge_into(&mut model)?;
    Ok(model)
}

pub(crate) fn only_gguf(directory: &Path) -> Option<std::path::PathBuf> {
    let mut found = std::fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "gguf"));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

fn load_gguf(path: &Path) -> Result<Pretrained, ModelError> {
    let bytes = map_file(path)?;
    if !bytes.starts_with(gguf::MAGIC) {
        return Err(ModelError::NotAModel { path: path.to_owned() });
    }
    gguf::load(&bytes)
}

/// Maps a file into memory for reading.
pub(crate) fn map_file(path: &Path) -> Result<memmap2::Mmap, ModelError> {
    let failed = |source| ModelError::Read { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    // SAFETY: model files are written once into scratch space that this process owns, and are not
    // truncated while it reads them.
    unsafe { memmap2::Mmap::map(&file) }.map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiny::tiny;

    #[test]
    fn a_configuration_is_read_without_the_weights() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, file) = (folder.path().join("model"), folder.path().join("one.gguf"));
        let model = tiny(1);
        crate::save(&directory, &model.config, &model.tensors, &model.tokenizer, None).unwrap();
        std::fs::remove_file(directory.join("model.safetensors")).unwrap();
        gguf::save(&file, &model, gguf::Weights::F32).unwrap();
        let whole = std::fs::read(&file).unwrap();
        // As much of it as a store is asked for.
        std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
        for path in [directory.join("config.json"), directory, file] {
            let config = load_config(&path).unwrap();
            assert_eq!(config.parameter_count(), model.config.parameter_count(), "{}", path.display());
        }
        assert!(load_config(folder.path()).is_ok(), "a folder with nothing but one GGUF file is that file");
        assert!(matches!(load_config(&folder.path().join("none")), Err(ModelError::NotAModel { .. })));
    }
}
