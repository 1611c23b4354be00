//! Where conversations come from, and which of them are taken.

use anyhow::{Context, Result, anyhow, bail};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use tokenizers::Tokenizer;
use vicuna_data::prepare::Settings;
use vicuna_data::{Cleaning, Conversation, Encoder, Language, ReadError, Reader, Template, read, template};

/// Datasets by name.
#[derive(Debug, clap::Args)]
pub struct Datasets {
    /// Files or folders, or s3:// and file:// addresses of some.
    #[arg(required = true)]
    datasets: Vec<String>,
}

/// Files on disk; those of an object store in a folder that is removed at the end.
pub struct Files {
    pub paths: Vec<PathBuf>,
    /// Files that are no data by their names.
    pub skipped: Vec<String>,
    _fetched: Vec<TempDir>,
}

impl Datasets {
    pub fn files(&self) -> Result<Files> {
        let mut files = Files { paths: Vec::new(), skipped: Vec::new(), _fetched: Vec::new() };
        for dataset in &self.datasets {
            let path = match dataset.contains("://") {
                true => {
                    let folder = tempfile::tempdir().context("cannot make a temporary folder; set TMPDIR")?;
                    let path = fetch(dataset, folder.path())?;
                    files._fetched.push(folder);
                    path
                }
                false => PathBuf::from(dataset),
            };
            let found = read::files(&path)?;
            files.paths.extend(found.paths);
            files.skipped.extend(found.skipped.iter().map(|file| format!("{dataset}: {file}")));
        }
        if !files.skipped.is_empty() {
            tracing::warn!(files = files.skipped.join(", "), "not read: only .json, .jsonl and .parquet are data");
        }
        Ok(files)
    }
}

/// In chunks: an object is never in memory as a whole.
fn fetch(uri: &str, folder: &Path) -> Result<PathBuf> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let fetched = runtime.block_on(vicuna_checkpoint::fetch(uri, folder, |_, _| ()));
    fetched.with_context(|| format!("cannot fetch {uri}"))
}

impl Files {
    /// Every conversation of every file, as it is written there.
    pub fn conversations(&self) -> impl Iterator<Item = Result<Conversation, ReadError>> {
        self.paths.iter().flat_map(|path| {
            let (reader, failed) = match Reader::open(path) {
                Ok(reader) => (Some(reader), None),
                Err(error) => (None, Some(Err(error))),
            };
            failed.into_iter().chain(reader.into_iter().flatten())
        })
    }
}

/// Which steps of cleaning are taken.
#[derive(Debug, clap::Args)]
pub struct CleaningArguments {
    /// Keep only conversations in this language (en, de, zh …) and those whose language cannot be told.
    #[arg(long)]
    language: Option<String>,
    /// A name of which no conversation may speak, instead of the published ones; may be repeated. A blank in it also
    /// stands for a hyphen or nothing.
    #[arg(long, value_name = "NAME")]
    vendor: Vec<String>,
}

impl CleaningArguments {
    pub fn cleaning(&self) -> Result<Cleaning> {
        let published = Cleaning::published();
        let vendors = if self.vendor.is_empty() { published.vendors.clone() } else { self.vendor.clone() };
        Ok(Cleaning { language: language(self.language.as_deref())?, vendors, ..published })
    }
}

pub fn language(code: Option<&str>) -> Result<Option<Language>> {
    let Some(code) = code else { return Ok(None) };
    let known = Language::parse(code);
    let known =
        known.ok_or_else(|| anyhow!("there is no language {code:?}; use one of {}", Language::codes().join(" ")))?;
    Ok(Some(known))
}

/// A tokenizer and a template on it.
#[derive(Debug, clap::Args)]
pub struct Encoding {
    /// A Hugging Face tokenizer.json.
    #[arg(long)]
    tokenizer: PathBuf,
    #[command(flatten)]
    template: TemplateArguments,
}

#[derive(Debug, clap::Args)]
pub struct TemplateArguments {
    /// vicuna_v0, vicuna_v1.1, llama-2, llama-3 or chatml.
    #[arg(long, default_value = template::VICUNA_V1_1)]
    template: String,
    /// The model's own template instead: a file of Jinja, or a tokenizer_config.json.
    #[arg(long, value_name = "FILE", conflicts_with = "template")]
    chat_template: Option<PathBuf>,
}

impl Encoding {
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        read_tokenizer(&self.tokenizer)
    }

    pub fn encoder(&self) -> Result<Encoder> {
        self.template.encoder(&self.tokenizer()?)
    }
}

impl TemplateArguments {
    pub fn encoder(&self, tokenizer: &Tokenizer) -> Result<Encoder> {
        let template = match &self.chat_template {
            Some(file) => own_template(file)?,
            None => Template::named(&self.template)?,
        };
        Ok(template.bind(tokenizer)?)
    }
}

/// A template of Jinja alone knows its special tokens by their text only.
fn own_template(file: &Path) -> Result<Template> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    if file.extension().is_none_or(|end| end != "json") {
        return Ok(Template::from_jinja(&text, "", "")?);
    }
    let config: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is not JSON; mend it", file.display()))?;
    // One template, or a list of named ones of which "default" is meant.
    let named =
        || config["chat_template"].as_array()?.iter().find(|one| one["name"] == "default")?["template"].as_str();
    let Some(source) = config["chat_template"].as_str().or_else(named) else {
        bail!("{} has no \"chat_template\"; name a template with --template", file.display());
    };
    let token = |name: &str| {
        let token = &config[name];
        token.as_str().or_else(|| token["content"].as_str()).unwrap_or_default().to_owned()
    };
    Ok(Template::from_jinja(source, &token("bos_token"), &token("eos_token"))?)
}

pub fn read_tokenizer(path: &Path) -> Result<Tokenizer> {
    let read = vicuna_tokenizer::read(path);
    read.map_err(|error| anyhow!("cannot read the tokenizer {}: {error}; give a tokenizer.json", path.display()))
}

/// What a VicunaTraining's `prepare`, `recipe.maxLength` and `recipe.packing` would do.
#[derive(Debug, clap::Args)]
pub struct PrepareArguments {
    /// Take every published step of cleaning, as `prepare.clean` does.
    #[arg(long)]
    clean: bool,
    /// As `prepare.language`.
    #[arg(long)]
    language: Option<String>,
    /// As `prepare.splitAt`.
    #[arg(long)]
    split_at: Option<usize>,
    /// As `prepare.holdOut`.
    #[arg(long, default_value_t = 0.0, value_parser = share)]
    hold_out: f64,
    /// Tokens in a sequence, at most.
    #[arg(long, default_value_t = 2048)]
    max_length: usize,
    /// As `recipe.packing`.
    #[arg(long)]
    pub packing: bool,
}

impl PrepareArguments {
    pub fn settings(&self) -> Result<Settings> {
        Ok(Settings {
            clean: self.clean,
            language: language(self.language.as_deref())?,
            split_at: self.split_at,
            hold_out: self.hold_out,
            max_length: self.max_length,
            pack: self.packing,
        })
    }
}

pub fn share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|error| format!("{error}"))?;
    match (0.0..1.0).contains(&share) {
        true => Ok(share),
        false => Err("give a share of at least 0 and below 1, such as 0.02".to_owned()),
    }
}
