//! The result of a run: a plain Hugging Face directory in the bucket, or PEFT's where adapters were trained.

use crate::card;
use crate::checkpoint::{CheckpointError, retry};
use crate::generation::GenerationError;
use crate::log::{Line, plot};
use crate::prepare::Session;
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{StoreError, upload_dir};
use vicuna_model::ModelError;
use vicuna_model::lora::Adapter;

/// Where it lies below the checkpoint URI.
pub const RESULT: &str = "result";

#[derive(Clone, Debug)]
pub struct Written {
    pub uri: String,
    pub digest: String,
}

/// The model card, and a drawing of the loss.
fn describe(session: &Session, log: &[Line], digest: &str, directory: &Path) -> Result<(), ModelError> {
    let name = &session.job.name;
    let files = [("README.md", card::markdown(session, log, digest)), (card::PLOT, plot::svg(name, log))];
    files.into_iter().try_for_each(|(name, content)| {
        let path = directory.join(name);
        std::fs::write(&path, content).map_err(|source| ModelError::Write { path, source })
    })
}

/// Saves what was trained, by name, to scratch and uploads it, trying until it works or `cancel` is called.
pub fn write(
    session: &Session,
    tensors: &BTreeMap<String, Tensor>,
    cancel: &CancellationToken,
    trouble: &dyn Fn(&StoreError),
) -> Result<Written, GenerationError> {
    let directory = session.scratch.join(RESULT);
    let digest = save(session, tensors, &directory)?;
    let log = retry(&session.runtime, cancel, trouble, || session.log())?;
    describe(session, &log, &digest, &directory)?;
    let store = session.store.below(RESULT);
    let uploaded = retry(&session.runtime, cancel, trouble, || upload_dir(&store, &directory));
    uploaded.map_err(|error: CheckpointError| GenerationError::from(error))?;
    std::fs::remove_dir_all(&directory).map_err(|source| ModelError::Write { path: directory, source })?;
    tracing::info!(uri = store.uri(), digest, "result written");
    Ok(Written { uri: store.uri().to_owned(), digest })
}

/// The model, or the adapters for PEFT with their base's tokenizer; returns the digest of what was trained.
fn save(session: &Session, tensors: &BTreeMap<String, Tensor>, directory: &Path) -> Result<String, GenerationError> {
    let (config, template) = (&session.config, Some(session.chat_template.as_str()));
    let model = session.model.lock();
    match &session.adapted {
        None => vicuna_model::save(directory, config, tensors, &model.tokenizer, template)?,
        Some(adapted) => {
            Adapter::save(directory, &adapted.lock().lora, &session.job.model.from, tensors)?;
            vicuna_model::save_tokenizer(directory, config, &model.tokenizer, template)?;
        }
    }
    // The template calls them by these names.
    model.special_tokens.write(directory)?;
    Ok(vicuna_model::weights_digest(tensors)?)
}
