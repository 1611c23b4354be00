use super::*;

/// A bucket with models of ten bytes, and caches on one folder.
struct Bench {
    bucket: tempfile::TempDir,
    disk: tempfile::TempDir,
}

fn bench() -> Bench {
    Bench { bucket: tempfile::tempdir().unwrap(), disk: tempfile::tempdir().unwrap() }
}

impl Bench {
    fn put(&self, model: &str, file: &str, content: &str) -> String {
        let folder = self.bucket.path().join(model);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(file), content).unwrap();
        format!("file://{}", folder.display())
    }

    fn cache(&self, limit_bytes: u64) -> Cache {
        Cache::new(self.disk.path().to_owned(), limit_bytes)
    }

    /// Entries that are whole, and what was begun.
    fn folders(&self) -> usize {
        let entries = std::fs::read_dir(self.disk.path()).unwrap().flatten();
        entries.filter(|entry| entry.file_type().unwrap().is_dir()).count()
    }
}

/// Gets an entry and tells whether it was fetched.
async fn get(cache: &Cache, uri: &str) -> (Option<Entry>, bool) {
    let mut fetched = false;
    let entry = cache.get(uri, |told| fetched |= matches!(told, Progress::Fetched(..))).await.unwrap();
    (entry, fetched)
}

fn content(entry: &Option<Entry>, file: &str) -> String {
    std::fs::read_to_string(entry.as_ref().unwrap().path.join(file)).unwrap()
}

#[tokio::test]
async fn what_is_there_is_compared_and_not_fetched_again() {
    let bench = bench();
    let uri = bench.put("m", "weights", "0123456789");
    let cache = bench.cache(100);
    let (entry, fetched) = get(&cache, &uri).await;
    assert!(fetched && content(&entry, "weights") == "0123456789");
    let mut told = Vec::new();
    let again = cache.get(&uri, |progress| told.push(progress)).await.unwrap();
    assert_eq!(told, [Progress::Compared(10, 10)]);
    assert_eq!(again.unwrap().path, entry.unwrap().path);
}

#[tokio::test]
async fn one_file_is_found_by_its_own_name() {
    let bench = bench();
    let uri = bench.put("m", "model.gguf", "0123456789");
    let (entry, _) = get(&bench.cache(100), &format!("{uri}/model.gguf")).await;
    assert!(entry.unwrap().path.ends_with("files/model.gguf"));
}

#[tokio::test]
async fn what_has_changed_in_the_bucket_or_on_the_disk_is_fetched() {
    let bench = bench();
    let uri = bench.put("m", "weights", "0123456789");
    let cache = bench.cache(100);
    let (entry, _) = get(&cache, &uri).await;
    std::fs::write(entry.unwrap().path.join("weights"), "012345678X").unwrap();
    let (entry, fetched) = get(&cache, &uri).await;
    assert!(fetched && content(&entry, "weights") == "0123456789", "the disk had other bytes of the same length");
    drop(entry);
    bench.put("m", "weights", "another model");
    let (entry, fetched) = get(&cache, &uri).await;
    assert!(fetched && content(&entry, "weights") == "another model");
    entry.unwrap().discard();
    assert!(get(&cache, &uri).await.1, "one that is of no use is fetched again");
}

#[tokio::test]
async fn what_a_process_has_left_half_written_is_made_anew() {
    let bench = bench();
    let uri = bench.put("m", "weights", "0123456789");
    let cache = bench.cache(15);
    let key = listing(&uri).await.unwrap().key;
    let partial = bench.disk.path().join(format!("{key}.partial"));
    std::fs::create_dir_all(partial.join("files")).unwrap();
    std::fs::write(partial.join("files/weights"), "xxxxxxxxxx").unwrap();
    std::fs::write(partial.join(RESERVED), "10").unwrap();
    let (entry, fetched) = get(&cache, &uri).await;
    assert!(fetched && content(&entry, "weights") == "0123456789");
    assert_eq!(bench.folders(), 1);
}

#[tokio::test]
async fn the_one_used_longest_ago_makes_room_unless_it_is_in_use() {
    let bench = bench();
    let uris = ["a", "b", "c", "d"].map(|model| bench.put(model, "weights", "0123456789"));
    let cache = bench.cache(25);
    let date = |entry: &Option<Entry>, seconds: u64| {
        let path = entry.as_ref().unwrap().folder.join(MANIFEST);
        let then = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        File::options().write(true).open(path).unwrap().set_modified(then).unwrap();
    };
    let (a, _) = get(&cache, &uris[0]).await;
    date(&a, 1);
    let (b, _) = get(&cache, &uris[1]).await;
    date(&b, 2);
    drop(b);
    let (c, _) = get(&cache, &uris[2]).await;
    assert_eq!(bench.folders(), 2, "the second went, since the first is in use");
    assert!(!get(&cache, &uris[0]).await.1);
    let (none, _) = get(&cache, &uris[3]).await;
    assert!(none.is_none(), "both are in use");
    drop((a, c));
    assert!(get(&cache, &uris[3]).await.0.is_some());
    let large = bench.put("large", "weights", &"x".repeat(26));
    assert!(get(&cache, &large).await.0.is_none(), "it would never fit");
}

#[tokio::test]
async fn several_that_want_the_same_at_once_fetch_it_once() {
    let bench = bench();
    let uri = bench.put("m", "weights", "0123456789");
    // Each has its own locks, as processes have.
    let caches: Vec<_> = (0..4).map(|_| bench.cache(100)).collect();
    let all = futures::future::join_all(caches.iter().map(|cache| get(cache, &uri))).await;
    assert_eq!(all.iter().filter(|(_, fetched)| *fetched).count(), 1);
    assert!(all.iter().all(|(entry, _)| content(entry, "weights") == "0123456789"));
}
