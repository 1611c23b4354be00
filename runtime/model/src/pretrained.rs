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

/// Reads a base model and adds a PEFT adapter to its weights.
pub fn load_adapted(base: &Path, adapter: &Path) -> Result<Pretrained, ModelError> {
    let adapter = Adapter::load(adapter)?;
    let mut model = load(base)?;
    adapter.merge_into(&mut model)?;
    Ok(model)
}

fn only_gguf(directory: &Path) -> Option<std::path::PathBuf> {
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
