//! Merging an adapter into its base model on disk, tensor by tensor.

use super::Adapter;
use crate::hugging_face::{save, weight_files};
use crate::weights_file::{self, Stored, WeightsWriter, kind_of};
use crate::{ModelError, load};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::Kind;

/// What an adapter's directory may have of its own, and the merged model takes over.
const TOKENIZER: [&str; 4] =
    ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

/// Writes the Hugging Face directory `out`: the base model (a directory or a GGUF file) with the adapter
/// added. A directory's files keep their names and precision, and no more than one tensor of it is in
/// memory; a GGUF model is written as fp32.
pub fn merge(base: &Path, adapter: &Path, out: &Path) -> Result<(), ModelError> {
    check_out(base, adapter, out)?;
    let added = Adapter::load(adapter)?;
    std::fs::create_dir_all(out).map_err(|source| ModelError::Write { path: out.to_owned(), source })?;
    if !base.join("config.json").is_file() {
        let mut model = load(base)?;
        added.merge_into(&mut model)?;
        return save(out, &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref());
    }
    let weights = weight_files(base)?;
    let tensors = weights.iter().map(|file| weights_file::open(file)).collect::<Result<Vec<_>, _>>()?;
    check(&tensors, &added)?;
    copy_others(base, &weights, out)?;
    for name in TOKENIZER.iter().filter(|name| adapter.join(name).is_file()) {
        copy(&adapter.join(name), &out.join(name))?;
    }
    weights.iter().zip(&tensors).try_for_each(|(file, tensors)| merge_file(file, tensors, &added, out))
}

/// What is read while it is written is lost, and what lies there might be mixed with the model.
fn check_out(base: &Path, adapter: &Path, out: &Path) -> Result<(), ModelError> {
    let Ok(place) = out.canonicalize() else { return Ok(()) };
    let is = |other: &Path| other.canonicalize().is_ok_and(|other| other == place);
    let is_empty = || std::fs::read_dir(out).is_ok_and(|mut entries| entries.next().is_none());
    let reason = if is(base) {
        "it is the base model"
    } else if is(adapter) {
        "it is the adapter"
    } else if !is_empty() {
        "it is not empty"
    } else {
        return Ok(());
    };
    Err(ModelError::Occupied { path: out.to_owned(), reason })
}

/// All that the adapter changes must be there, before anything is written.
fn check(files: &[BTreeMap<String, Stored>], adapter: &Adapter) -> Result<(), ModelError> {
    for (name, stored) in files.iter().flatten().filter(|(name, _)| adapter.pairs.contains_key(*name)) {
        kind_of(name, stored.dtype)?;
    }
    adapter.check(|name| files.iter().find_map(|file| Some(file.get(name)?.shape.clone())))
}

/// Configuration, tokenizer, the index: every file of the directory but its weights in any format.
fn copy_others(base: &Path, weights: &[PathBuf], out: &Path) -> Result<(), ModelError> {
    let failed = |source| ModelError::Read { path: base.to_owned(), source };
    for entry in std::fs::read_dir(base).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let named = |extension: &&str| path.extension().is_some_and(|its| its == *extension);
        let is_weights = weights.contains(&path) || ["safetensors", "bin", "pt", "pth", "gguf"].iter().any(named);
        if let Some(name) = path.file_name().filter(|_| path.is_file() && !is_weights) {
            copy(&path, &out.join(name))?;
        }
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<(), ModelError> {
    std::fs::copy(from, to).map_err(|source| ModelError::Write { path: to.to_owned(), source })?;
    Ok(())
}

fn merge_file(
    path: &Path,
    tensors: &BTreeMap<String, Stored>,
    adapter: &Adapter,
    out: &Path,
) -> Result<(), ModelError> {
    let described = tensors.iter().map(|(name, stored)| (name.clone(), stored.dtype, stored.shape.clone()));
    let mut writer = WeightsWriter::of_types(&out.join(path.file_name().unwrap_or_default()), described)?;
    for (name, stored) in tensors {
        match adapter.added(name) {
            None => writer.write_bytes(name, &stored.place.read()?)?,
            Some(added) => {
                let base = stored.read(name)?;
                let sum = base.f_to_kind(Kind::Float)?.f_add(&added)?.f_to_kind(base.kind())?;
                writer.write(name, &sum)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lora::Lora;
    use crate::lora::adapter::tests::saved;
    use crate::tiny::tiny;
    use tch::Tensor;

    fn base() -> (tempfile::TempDir, crate::Pretrained) {
        let (base, model) = (tempfile::tempdir().unwrap(), tiny(3));
        save(base.path(), &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();
        (base, model)
    }

    #[test]
    fn a_merged_directory_is_the_base_with_what_the_adapter_adds() {
        let lora = Lora::new(4, 16.0, 0.1, &["all-linear"]).unwrap();
        let (adapter, _) = saved(&lora);
        let (base, model) = base();
        let out = tempfile::tempdir().unwrap();
        merge(base.path(), adapter.path(), out.path()).unwrap();

        let mut expected = tiny(3);
        Adapter::load(adapter.path()).unwrap().merge_into(&mut expected).unwrap();
        let merged = load(out.path()).unwrap();
        let digest = |model: &crate::Pretrained| crate::weights_digest(&model.tensors).unwrap();
        assert_eq!(digest(&merged), digest(&expected));
        assert_ne!(digest(&merged), digest(&model));
        assert_eq!(merged.chat_template, model.chat_template);
    }

    #[test]
    fn neither_base_nor_adapter_nor_anything_else_is_written_over() {
        let lora = Lora::new(4, 16.0, 0.1, &["q_proj"]).unwrap();
        let (adapter, _) = saved(&lora);
        let (base, _) = base();
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join("notes"), "mine").unwrap();
        let around = base.path().join("..").join(base.path().file_name().unwrap());
        let of = |path: &Path| std::fs::read(path).unwrap();
        let before = of(&base.path().join("model.safetensors"));
        for (out, expected) in [
            (base.path(), "it is the base model"),
            (&around, "it is the base model"),
            (adapter.path(), "it is the adapter"),
            (other.path(), "it is not empty"),
        ] {
            let said = merge(base.path(), adapter.path(), out).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
        }
        assert_eq!(of(&base.path().join("model.safetensors")), before);
        assert!(Adapter::load(adapter.path()).is_ok());
    }

    #[test]
    fn a_base_in_half_precision_stays_in_it() {
        let lora = Lora::new(4, 16.0, 0.1, &["q_proj"]).unwrap();
        let (adapter, _) = saved(&lora);
        let (base, model) = base();
        let halves: Vec<_> =
            model.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.to_kind(Kind::BFloat16))).collect();
        Tensor::write_safetensors(&halves, base.path().join("model.safetensors")).unwrap();
        let out = tempfile::tempdir().unwrap();
        merge(base.path(), adapter.path(), out.path()).unwrap();

        let size = |directory: &Path| std::fs::metadata(directory.join("model.safetensors")).unwrap().len();
        assert!(size(out.path()) < size(base.path()) + 1000);
        let (before, after) = (load(base.path()).unwrap(), load(out.path()).unwrap());
        let added = Adapter::load(adapter.path()).unwrap();
        for (name, tensor) in &before.tensors {
            let expected = added.added(name).map_or_else(|| tensor.shallow_clone(), |added| tensor + added);
            assert_eq!(after.tensors[name], expected.to_kind(Kind::BFloat16).to_kind(Kind::Float), "{name}");
        }
    }
}
