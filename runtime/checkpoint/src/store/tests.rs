use super::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

fn bytes(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

/// What every backend must do alike.
async fn conforms(store: Store) {
    assert!(!store.exists("a/one").await.unwrap());
    assert_eq!(store.put_if_absent("a/one", bytes("1")).await.unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("a/one", bytes("2")).await.unwrap(), Put::Exists);
    assert_eq!(store.get("a/one").await.unwrap(), bytes("1"));
    store.put("a/one", bytes("three")).await.unwrap();
    store.put("a/b/two", bytes("2")).await.unwrap();
    store.put("ab", bytes("no child of a")).await.unwrap();
    let keys = |objects: Vec<Object>| objects.into_iter().map(|o| o.key).collect::<Vec<_>>();
    assert_eq!(keys(store.list("a").await.unwrap()), ["a/b/two", "a/one"]);
    assert_eq!(store.stat("a/one").await.unwrap().unwrap().bytes, 5);
    assert_eq!(keys(store.below("a").list("").await.unwrap()), ["b/two", "one"]);
    store.delete("a/one").await.unwrap();
    store.delete("a/one").await.unwrap();
    assert!(store.get("a/one").await.unwrap_err().is_not_found());
    store.probe().await.unwrap();
}

#[tokio::test]
async fn memory_and_folders_conform() {
    conforms(Store::in_memory()).await;
    let dir = tempfile::tempdir().unwrap();
    conforms(Store::open(&format!("file://{}", dir.path().display())).unwrap()).await;
}

/// Needs an S3 server: set VICUNA_TEST_S3 to a URI below an existing bucket, and AWS_*.
#[tokio::test]
async fn s3_conforms() {
    let Ok(uri) = std::env::var("VICUNA_TEST_S3") else {
        eprintln!("skipped: VICUNA_TEST_S3 names no S3 server");
        return;
    };
    let unique = format!("{uri}/{}", std::process::id());
    conforms(Store::open(&unique).unwrap()).await;
    let missing = Store::open("s3://vicuna-no-such-bucket/x").unwrap();
    let error = missing.probe().await.unwrap_err();
    assert!(matches!(error, StoreError::BucketMissing { .. }), "{error}");
}

#[tokio::test]
async fn a_folder_goes_up_and_comes_back() {
    let (source, bucket, dest) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    std::fs::create_dir(source.path().join("sub")).unwrap();
    std::fs::write(source.path().join("big"), vec![7; 20 << 20]).unwrap();
    std::fs::write(source.path().join("sub/empty"), b"").unwrap();
    let uri = format!("file://{}/model", bucket.path().display());
    let sent = upload_dir(&Store::open(&uri).unwrap(), source.path()).await.unwrap();
    assert_eq!(sent, 20 << 20);
    let mut last = (0, 0);
    let path = fetch(&uri, dest.path(), |done, total| last = (done, total)).await.unwrap();
    assert_eq!(path, dest.path());
    assert_eq!(last, (20 << 20, 20 << 20));
    assert_eq!(std::fs::read(dest.path().join("big")).unwrap().len(), 20 << 20);
    assert!(dest.path().join("sub/empty").exists());
    let one = fetch(&format!("{uri}/big"), &dest.path().join("single"), |_, _| ()).await;
    assert_eq!(one.unwrap(), dest.path().join("single/big"));
    let none = fetch(&format!("{uri}/none"), dest.path(), |_, _| ()).await;
    assert!(none.unwrap_err().is_not_found());
}

/// One answer to every request, as a store would give it.
async fn answering(status: &'static str, body: &'static str) -> Store {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).await;
            let length = body.len();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    s3_at(&format!("http://{address}"))
}

fn s3_at(endpoint: &str) -> Store {
    let inner = AmazonS3Builder::new()
        .with_bucket_name("bucket")
        .with_endpoint(endpoint)
        .with_access_key_id("key")
        .with_secret_access_key("secret")
        .with_allow_http(true)
        .with_retry(RetryConfig { max_retries: 1, ..retries() })
        .build()
        .unwrap();
    Store { inner: Arc::new(inner), base: Key::from("base"), uri: "s3://bucket/base".to_owned() }
}

#[tokio::test]
async fn refusals_say_what_to_do() {
    let store = answering("403 Forbidden", "<Error><Code>InvalidAccessKeyId</Code></Error>").await;
    let error = store.get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::CredentialsRefused { .. }), "{error}");
    assert!(!error.is_transient());
    assert!(error.to_string().contains("s3://bucket/base/x"), "{error}");
    assert!(!error.to_string().contains("secret\""), "{error}");

    let store = answering("404 Not Found", "<Error><Code>NoSuchBucket</Code></Error>").await;
    let error = store.probe().await.unwrap_err();
    assert!(matches!(error, StoreError::BucketMissing { .. }), "{error}");
    let error = store.get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::BucketMissing { .. }), "{error}");

    let store = answering("404 Not Found", "<Error><Code>NoSuchKey</Code></Error>").await;
    assert!(store.get("x").await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn a_store_without_room_says_so_whatever_status_it_answers_with() {
    let answers = [
        ("507 Insufficient Storage", ""),
        ("507 Insufficient Storage", "<Error><Code>XMinioStorageFull</Code></Error>"),
        ("403 Forbidden", "<Error><Code>QuotaExceeded</Code><Message>Used up.</Message></Error>"),
        ("400 Bad Request", "<Error><Code>XMinioAdminBucketQuotaExceeded</Code></Error>"),
    ];
    for (status, body) in answers {
        let error = answering(status, body).await.put("x", bytes("1")).await.unwrap_err();
        assert!(matches!(error, StoreError::StoreFull { .. }), "{status}: {error}");
        let told = error.to_string();
        assert!(told.contains("s3://bucket/base/x") && told.contains("quota"), "{told}");
    }
    let refused = "<Error><Code>AccessDenied</Code><Resource>/bucket/QuotaExceeded</Resource></Error>";
    let error = answering("403 Forbidden", refused).await.put("x", bytes("1")).await.unwrap_err();
    assert!(matches!(error, StoreError::CredentialsRefused { .. }), "{error}");
}

#[tokio::test]
async fn a_store_out_of_reach_is_transient() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let error = s3_at(&format!("http://{address}")).get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    assert!(error.is_transient());

    let error = answering("503 Service Unavailable", "").await.get("x").await.unwrap_err();
    assert!(matches!(error, StoreError::Unreachable { .. }), "{error}");
}

#[test]
fn other_schemes_are_refused() {
    let error = Store::open("ftp://host/x").unwrap_err();
    assert!(error.to_string().contains("ftp"), "{error}");
    assert!(Store::open("no uri").is_err());
}

#[test]
fn without_a_key_no_instance_is_asked_for_one_unless_that_is_wanted() {
    let with = |set: &'static [(&str, &str)]| {
        has_credentials(move |name| {
            let found = set.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    };
    assert!(!with(&[]));
    assert!(!with(&[("AWS_ACCESS_KEY_ID", "id")]));
    assert!(!with(&[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "")]));
    assert!(with(&[("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", "key")]));
    assert!(with(&[("AWS_WEB_IDENTITY_TOKEN_FILE", "/token")]));
    assert!(!with(&[("VICUNA_STORE_INSTANCE_CREDENTIALS", "false")]));
    assert!(with(&[("VICUNA_STORE_INSTANCE_CREDENTIALS", "true")]));
}

#[test]
fn a_bucket_without_credentials_is_refused_with_what_to_do() {
    if has_credentials(configured) {
        eprintln!("skipped: this environment has credentials");
        return;
    }
    let error = Store::open("s3://bucket/x").unwrap_err();
    assert!(matches!(error, StoreError::CredentialsMissing { .. }), "{error}");
    let told = error.to_string();
    assert!(told.contains("s3://bucket/x") && told.contains("AWS_ACCESS_KEY_ID"), "{told}");
}
