//! Hugging Face transformers as the golden tests of this crate and of the trainer use it: `logits.py` in a Python that
//! `tests/tools/transformers.sh` installed.

use std::ffi::OsStr;
use std::fmt::Debug;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vicuna_model::{Pretrained, load, tiny};

/// Families of which `logits.py` makes tiny random models.
pub const FAMILIES: [&str; 6] = ["llama", "llama-linear", "llama3", "qwen2", "qwen2-yarn", "mistral"];

pub fn cache() -> Option<PathBuf> {
    std::env::var_os("VICUNA_CACHE").map(PathBuf::from)
}

/// The newest folder of the cache with a name that begins like this.
pub fn newest(prefix: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(cache()?).ok()?;
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    folders.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))).max()
}

/// The newest installed transformers; says so where there is none.
pub fn transformers() -> Option<PathBuf> {
    newest("transformers-").or_else(|| {
        eprintln!("skipped: transformers is not installed, run tests/tools/transformers.sh");
        None
    })
}

/// Runs logits.py and returns what it prints.
pub fn python(site: &Path, arguments: &[&str], input: &str) -> String {
    // The trainer's tests include this file, too.
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/logits.py");
    script_says(&script, site.as_os_str(), arguments, input)
}

/// Runs a script with this PYTHONPATH and returns what it prints.
pub fn script_says<A: AsRef<OsStr> + Debug>(
    script: &Path,
    python_path: &OsStr,
    arguments: &[A],
    input: &str,
) -> String {
    let mut child = Command::new("python3")
        .arg(script)
        .args(arguments)
        .env("PYTHONPATH", python_path)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("LD_LIBRARY_PATH")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{} {arguments:?} failed", script.display());
    String::from_utf8(output.stdout).unwrap()
}

/// A family's tiny random model as transformers saves it.
pub fn made_by_transformers(site: &Path, family: &str) -> (tempfile::TempDir, Pretrained) {
    let directory = tempfile::tempdir().unwrap();
    python(site, &["make", directory.path().to_str().unwrap(), family], "");
    tiny::tokenizer().save(directory.path().join("tokenizer.json"), false).unwrap();
    let model = load(directory.path()).unwrap();
    (directory, model)
}
