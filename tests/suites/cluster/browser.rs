//! The chat page in a real browser.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};
use vicuna_tests::cluster::{repository, wait_for};
use vicuna_tests::product::{Chat, Objects};

use crate::fixture::{Fixture, NAMESPACE, SOON, serving};

const NAME: &str = "page";

/// Chooses a model, sends, sees the stream end, stops another one, sees where the worker runs; no error in the console,
/// no request elsewhere.
pub fn the_chat_page_answers_in_a_browser(fixture: &Fixture) -> Result<()> {
    fixture.apply(&serving(NAME, "s3://vicuna/models/tiny"))?;
    fixture.objects.wait("vicunaserving", NAME, SOON, |vs| Objects::condition(vs, "Ready", "True"))?;
    let model = format!("{NAMESPACE}/{NAME}");
    wait_for("the model at the gateway", SOON, || Ok(Chat::models(fixture.gateway)?.contains(&model).then_some(())))?;
    let screenshot = repository().join("target/chat-page.png");
    let output = Command::new("python3")
        .env("PYTHONPATH", playwright()?)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(repository().join("tests/browser/chat.py"))
        .args([&format!("http://{}/", fixture.gateway), &model])
        .arg(&screenshot)
        .output()
        .context("cannot start python3")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    println!("  screenshot {}", screenshot.display());
    fixture.delete("vicunaserving", NAME)
}

/// As `tests/tools/browser.sh` installs it.
fn playwright() -> Result<PathBuf> {
    let value = |name: &str| {
        let set = std::env::var(name);
        set.with_context(|| format!("{name} is not set: source tests/tools/env.sh"))
    };
    let folder = PathBuf::from(value("VICUNA_CACHE")?).join(format!("playwright-{}", value("PLAYWRIGHT_VERSION")?));
    if !folder.exists() {
        bail!("{} does not exist: run tests/tools/browser.sh", folder.display());
    }
    Ok(folder)
}
