//! Files from anywhere: a broken one is an error, or another model; never a panic, and never more memory than its size
//! justifies.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

#[path = "../../data/tests/support/peak.rs"]
mod peak;

use peak::peak_bytes;
use proptest::prelude::*;
use proptest::sample::Index;
use std::path::Path;
use std::sync::LazyLock;
use vicuna_model::gguf::{self, Weights};
use vicuna_model::lora::Adapter;
use vicuna_model::{OnDisk, load, tiny};

/// Beyond what the file itself has.
const ROOM_BYTES: usize = 64 << 20;

/// One change of a file's bytes.
#[derive(Clone, Debug)]
enum Break {
    Byte(Index, u8),
    /// A length or an offset, most likely.
    Number(Index, u64),
    Cut(Index),
    Put(Index, Vec<u8>),
}

impl Break {
    /// Within the first `reach` bytes.
    fn apply(&self, bytes: &mut Vec<u8>, reach: usize) {
        let within = |index: &Index, bytes: &[u8]| index.index(reach.min(bytes.len()).max(1)).min(bytes.len());
        match self {
            Self::Byte(at, value) => {
                let at = within(at, bytes);
                bytes.get_mut(at).into_iter().for_each(|byte| *byte = *value);
            }
            Self::Number(at, value) => {
                let at = within(at, bytes);
                bytes[at..].iter_mut().zip(value.to_le_bytes()).for_each(|(byte, value)| *byte = value);
            }
            Self::Cut(at) => bytes.truncate(within(at, bytes)),
            Self::Put(at, more) => {
                let at = within(at, bytes);
                drop(bytes.splice(at..at, more.iter().copied()));
            }
        }
    }
}

fn breaks() -> impl Strategy<Value = Vec<Break>> {
    let number = prop_oneof![
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 40),
        Just(1 << 32),
        Just((1 << 22) - 1),
        Just(0),
        any::<u64>(),
    ];
    let one = prop_oneof![
        4 => (any::<Index>(), any::<u8>()).prop_map(|(at, value)| Break::Byte(at, value)),
        4 => (any::<Index>(), number).prop_map(|(at, value)| Break::Number(at, value)),
        1 => any::<Index>().prop_map(Break::Cut),
        1 => (any::<Index>(), proptest::collection::vec(any::<u8>(), 1..9)).prop_map(|(at, more)| Break::Put(at, more)),
    ];
    proptest::collection::vec(one, 1..4)
}

/// The tiny model's files: each format's, by name.
struct Files {
    gguf: Vec<u8>,
    folder: tempfile::TempDir,
    adapter: tempfile::TempDir,
}

static FILES: LazyLock<Files> = LazyLock::new(|| {
    let (folder, adapter, model) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tiny::tiny(1));
    let file = folder.path().join("one.gguf");
    gguf::save(&file, &model, Weights::F16).unwrap();
    let gguf = std::fs::read(&file).unwrap();
    std::fs::remove_file(file).unwrap();
    vicuna_model::save(folder.path(), &model.config, &model.tensors, &model.tokenizer, None).unwrap();
    tiny::save_adapter(adapter.path(), 1, 4, &["q_proj", "up_proj"]).unwrap();
    Files { gguf, folder, adapter }
});

fn copy(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// A copy of a folder with one file of it broken.
fn broken(folder: &Path, name: &str, breaks: &[Break], reach: usize) -> tempfile::TempDir {
    let copy = copy(folder);
    let mut bytes = std::fs::read(folder.join(name)).unwrap();
    breaks.iter().for_each(|one| one.apply(&mut bytes, reach));
    std::fs::write(copy.path().join(name), bytes).unwrap();
    copy
}

fn size(folder: &Path) -> usize {
    std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len() as usize).sum()
}

#[test]
fn what_is_broken_below_loads_when_it_is_whole() {
    let file = FILES.folder.path().join("whole.gguf");
    std::fs::write(&file, &FILES.gguf).unwrap();
    let loaded = load(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(loaded.config.layers, load(FILES.folder.path()).unwrap().config.layers);
    assert!(Adapter::load(FILES.adapter.path()).is_ok());
}

#[test]
fn a_tokenizer_that_its_library_would_panic_over_is_refused() {
    let whole = std::fs::read_to_string(FILES.folder.path().join("tokenizer.json")).unwrap();
    let cut = whole[..whole.find(r#""decoder""#).unwrap() + 20].to_owned();
    let mut mapped: serde_json::Value = serde_json::from_str(&whole).unwrap();
    mapped["normalizer"] = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" });
    for broken in [cut, mapped.to_string()] {
        let folder = copy(FILES.folder.path());
        std::fs::write(folder.path().join("tokenizer.json"), broken).unwrap();
        let error = load(folder.path()).err().unwrap().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
    }
}

proptest! {
    #[test]
    fn a_broken_gguf_file_is_refused_or_read(breaks in breaks()) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.gguf");
        let mut bytes = FILES.gguf.clone();
        // The header, with the tokenizer, is the smaller part of it.
        breaks.iter().for_each(|one| one.apply(&mut bytes, 20_000));
        std::fs::write(&file, &bytes).unwrap();
        let (peak, _) = peak_bytes(|| {
            drop(load(&file));
            OnDisk::open(&file).map(|opened| opened.names().try_for_each(|name| opened.tensor(name).map(drop)))
        });
        prop_assert!(peak < bytes.len() + ROOM_BYTES, "{} MiB of a file of {} bytes", peak >> 20, bytes.len());
    }

    #[test]
    fn a_broken_hugging_face_directory_is_refused_or_read(
        breaks in breaks(),
        name in proptest::sample::select(vec!["config.json", "model.safetensors", "tokenizer.json"]),
    ) {
        let folder = broken(FILES.folder.path(), name, &breaks, 4_000);
        let size = size(folder.path());
        let (peak, _) = peak_bytes(|| drop(load(folder.path())));
        prop_assert!(peak < size + ROOM_BYTES, "{} MiB of {size} bytes", peak >> 20);
    }

    #[test]
    fn a_broken_index_of_shards_is_refused_or_read(breaks in breaks()) {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "tokenizer.json"] {
            std::fs::copy(FILES.folder.path().join(name), folder.path().join(name)).unwrap();
        }
        let shard = "model-00001-of-00001.safetensors";
        std::fs::copy(FILES.folder.path().join("model.safetensors"), folder.path().join(shard)).unwrap();
        let names = tiny::tiny(1).tensors.into_keys();
        let map: serde_json::Map<_, _> = names.map(|name| (name, shard.into())).collect();
        let index = serde_json::json!({ "metadata": { "total_size": 1 }, "weight_map": map });
        let path = folder.path().join("model.safetensors.index.json");
        std::fs::write(&path, index.to_string()).unwrap();
        prop_assert!(load(folder.path()).is_ok(), "the index is right as it is");
        let mut bytes = index.to_string().into_bytes();
        let reach = bytes.len();
        breaks.iter().for_each(|one| one.apply(&mut bytes, reach));
        std::fs::write(&path, bytes).unwrap();
        let size = size(folder.path());
        let (peak, _) = peak_bytes(|| drop(load(folder.path())));
        prop_assert!(peak < size + ROOM_BYTES, "{} MiB of {size} bytes", peak >> 20);
    }

    #[test]
    fn a_broken_adapter_is_refused_or_read(
        breaks in breaks(),
        name in proptest::sample::select(vec!["adapter_config.json", "adapter_model.safetensors"]),
    ) {
        let folder = broken(FILES.adapter.path(), name, &breaks, 4_000);
        let size = size(folder.path());
        let (peak, _) = peak_bytes(|| drop(Adapter::load(folder.path())));
        prop_assert!(peak < size + ROOM_BYTES, "{} MiB of {size} bytes", peak >> 20);
    }
}
