use super::*;

pub(crate) async fn checkpoint(
    store: &Store,
    step: u64,
    generation: u64,
    contents: &[&str],
) -> (ManifestRef, Manifest) {
    let mut blocks = Vec::new();
    for (index, content) in contents.iter().enumerate() {
        let bytes = Bytes::copy_from_slice(content.as_bytes());
        let stored = put_block(store, bytes, Duration::from_secs(60), Utc::now()).await.unwrap();
        blocks.push(BlockEntry { name: format!("block-{index}"), digest: stored.digest, bytes: stored.bytes });
    }
    let manifest = Manifest {
        format_version: FORMAT_VERSION,
        training_uid: "uid".to_owned(),
        recipe_digest: "recipe".to_owned(),
        numerics_class: "isa=avx2".to_owned(),
        inputs: Inputs { data: Some("data".to_owned()), base: None },
        generation,
        step,
        updates: step,
        cursor: Cursor { epoch: 0, offset: step * 4 },
        blocks,
    };
    let reference = write(store, &manifest).await.unwrap();
    (reference, manifest)
}

fn stores() -> (Vec<Store>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let folder = Store::open(&format!("file://{}", dir.path().display())).unwrap();
    (vec![Store::in_memory(), folder], dir)
}

#[tokio::test]
async fn a_checkpoint_comes_back_as_it_was_written() {
    let (stores, _dir) = stores();
    for store in stores {
        let (reference, manifest) = checkpoint(&store, 7, 2, &["one", "two"]).await;
        assert_eq!(reference.key, "manifests/0000000007-000002.json");
        assert_eq!(open(&store, &reference).await.unwrap(), manifest);
        assert_eq!(reference.numerics_class, "isa=avx2");
        assert_eq!(list_manifests(&store, "uid", 1).await.unwrap(), [reference]);
        let bytes = load_block(&store, &manifest.blocks[1]).await.unwrap();
        assert_eq!(bytes, Bytes::from_static(b"two"));
    }
}

#[tokio::test]
async fn an_unchanged_block_is_not_written_again() {
    let store = Store::in_memory();
    let put = |refresh| put_block(&store, Bytes::from_static(b"x"), refresh, Utc::now());
    assert!(put(Duration::from_secs(60)).await.unwrap().written);
    assert!(!put(Duration::from_secs(60)).await.unwrap().written);
    assert!(put(Duration::ZERO).await.unwrap().written, "an old one is refreshed");
}

#[tokio::test]
async fn the_newest_step_comes_first_and_strangers_are_left_out() {
    let store = Store::in_memory();
    for (step, generation) in [(5, 1), (20, 1), (10, 1), (20, 2)] {
        checkpoint(&store, step, generation, &["one"]).await;
    }
    let list = list_manifests(&store, "uid", 3).await.unwrap();
    let order: Vec<_> = list.iter().map(|m| (m.step, m.generation)).collect();
    assert_eq!(order, [(20, 2), (20, 1), (10, 1)]);
    assert!(list_manifests(&store, "other", 3).await.unwrap().is_empty());
}

#[tokio::test]
async fn the_same_manifest_twice_is_no_conflict_and_another_is() {
    let store = Store::in_memory();
    let (reference, manifest) = checkpoint(&store, 1, 1, &["one"]).await;
    assert_eq!(write(&store, &manifest).await.unwrap(), reference);
    let other = Manifest { updates: 9, ..manifest };
    let error = write(&store, &other).await.unwrap_err();
    assert!(matches!(error, ManifestError::Conflict { .. }), "{error}");
}

#[tokio::test]
async fn no_manifest_is_written_over_a_missing_block() {
    let store = Store::in_memory();
    let (_, mut manifest) = checkpoint(&store, 1, 1, &["one", "two"]).await;
    store.delete(&block_key(&manifest.blocks[1].digest)).await.unwrap();
    manifest.step = 2;
    let error = write(&store, &manifest).await.unwrap_err().to_string();
    assert!(error.contains("block-1") && error.contains(&manifest.blocks[1].digest), "{error}");
    assert!(!store.exists(&manifest_key(2, 1)).await.unwrap());
}

#[tokio::test]
async fn damage_names_the_object() {
    let (stores, _dir) = stores();
    for store in stores {
        let (reference, manifest) = checkpoint(&store, 1, 1, &["one", "two", "three"]).await;
        let keys: Vec<_> = manifest.blocks.iter().map(|b| block_key(&b.digest)).collect();
        store.put(&keys[0], Bytes::from_static(b"eno")).await.unwrap();
        store.put(&keys[1], Bytes::from_static(b"tw")).await.unwrap();
        store.delete(&keys[2]).await.unwrap();
        for (block, words) in manifest.blocks.iter().zip(["match", "2 bytes", "not exist"]) {
            let error = load_block(&store, block).await.unwrap_err();
            assert!(!error.is_transient());
            let text = error.to_string();
            assert!(text.contains(words) && text.contains(&block.digest), "{text}");
        }
        assert!(list_manifests(&store, "uid", 9).await.unwrap().is_empty());
        store.put(&reference.key, Bytes::from_static(b"{")).await.unwrap();
        let error = open(&store, &reference).await.unwrap_err().to_string();
        assert!(error.contains(&reference.key), "{error}");
    }
}

#[tokio::test]
async fn a_damaged_manifest_hides_no_older_one() {
    let store = Store::in_memory();
    let (older, _) = checkpoint(&store, 1, 1, &["one"]).await;
    let (newer, _) = checkpoint(&store, 2, 1, &["two"]).await;
    store.put(&newer.key, Bytes::from_static(b"garbage")).await.unwrap();
    assert_eq!(list_manifests(&store, "uid", 9).await.unwrap(), std::slice::from_ref(&older));
    let renamed = ManifestRef { digest: "0".repeat(64), ..older };
    assert!(open(&store, &renamed).await.unwrap_err().to_string().contains("digest"));
}

#[test]
fn a_manifest_of_an_earlier_release_knows_nothing_of_what_was_read_nor_of_its_numerics() {
    let inputs = Inputs { data: Some("data".to_owned()), base: None };
    assert_eq!(serde_json::to_value(&inputs).unwrap(), serde_json::json!({ "data": "data" }));
    let manifest = serde_json::json!({
        "formatVersion": FORMAT_VERSION, "trainingUid": "uid", "recipeDigest": "recipe", "generation": 1, "step": 2,
        "updates": 2, "cursor": { "epoch": 0, "offset": 4 }, "blocks": [],
    });
    let manifest: Manifest = serde_json::from_value(manifest).unwrap();
    assert_eq!((manifest.inputs, manifest.numerics_class.as_str()), (Inputs::default(), ""));
}
