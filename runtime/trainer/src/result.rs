//! The result of a run: a plain Hugging Face directory in the bucket, or PEFT's where adapters were trained.

use crate::blocks::Parameter;
use crate::card;
use crate::checkpoint::{CheckpointError, retry};
use crate::generation::GenerationError;
use crate::log::{Line, plot};
use crate::prepare::{DATA_REPORT, Session};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};
use tokio_util::sync::CancellationToken;
use vicuna_checkpoint::{StoreError, upload_dir};
use vicuna_model::lora::{Adapter, Lora};
use vicuna_model::{ModelError, WeightsWriter};

/// Where it lies below the checkpoint URI.
pub const RESULT: &str = "result";

#[derive(Clone, Debug)]
pub struct Written {
    pub uri: String,
    pub digest: String,
}

/// The model card, a drawing of the loss, and what preparing did to the data.
fn describe(session: &Session, log: &[Line], digest: &str, directory: &Path) -> Result<(), ModelError> {
    let name = &session.job.name;
    let files = [
        ("README.md", card::markdown(session, log, digest)),
        (card::PLOT, plot::svg(name, log)),
        (DATA_REPORT, session.data_report_json()),
    ];
    files.into_iter().try_for_each(|(name, content)| {
        let path = directory.join(name);
        std::fs::write(&path, content).map_err(|source| ModelError::Write { path, source })
    })
}

/// The directory in scratch, while it is being written.
pub struct Directory<'s> {
    session: &'s Session,
    path: PathBuf,
    weights: Trained,
}

/// What was trained.
enum Trained {
    Model(WeightsWriter),
    /// Small beside their base, for PEFT.
    Adapters(Lora, BTreeMap<String, Tensor>),
}

impl<'s> Directory<'s> {
    /// Everything but what was trained: the model's description, and its tokenizer.
    pub fn create(session: &'s Session) -> Result<Self, ModelError> {
        let path = session.scratch.join(RESULT);
        std::fs::create_dir_all(&path).map_err(|source| ModelError::Write { path: path.clone(), source })?;
        let (model, template) = (&session.model, Some(session.chat_template.as_str()));
        let weights = match &session.adapted {
            None => {
                let (config, kind) = (&session.config, session.kind());
                Trained::Model(vicuna_model::save_one_by_one(&path, config, kind, &model.tokenizer, template)?)
            }
            Some(adapted) => {
                vicuna_model::save_tokenizer(&path, &session.config, &model.tokenizer, template)?;
                Trained::Adapters(adapted.lock().lora.clone(), BTreeMap::new())
            }
        };
        // The template calls them by these names.
        model.special_tokens.write(&path)?;
        Ok(Self { session, path, weights })
    }

    pub fn add(&mut self, parameter: &Parameter, tensor: &Tensor) -> Result<(), ModelError> {
        match &mut self.weights {
            Trained::Model(writer) => writer.write(&parameter.name, tensor),
            Trained::Adapters(_, adapters) => {
                adapters.insert(parameter.name.clone(), tensor.f_to_device(Device::Cpu)?);
                Ok(())
            }
        }
    }

    /// Ends it and uploads it, trying until it works or `cancel` is called.
    pub fn upload(self, cancel: &CancellationToken, trouble: &dyn Fn(&StoreError)) -> Result<Written, GenerationError> {
        let Self { session, path, weights } = self;
        let digest = match weights {
            Trained::Model(writer) => writer.finish()?,
            Trained::Adapters(lora, tensors) => {
                Adapter::save(&path, &lora, &session.job.model.from, &tensors)?;
                vicuna_model::weights_digest(&tensors)?
            }
        };
        let log = retry(&session.runtime, cancel, trouble, || session.log())?;
        describe(session, &log, &digest, &path)?;
        let store = session.store.below(RESULT);
        let uploaded = retry(&session.runtime, cancel, trouble, || upload_dir(&store, &path));
        uploaded.map_err(|error: CheckpointError| GenerationError::from(error))?;
        std::fs::remove_dir_all(&path).map_err(|source| ModelError::Write { path, source })?;
        tracing::info!(uri = store.uri(), digest, "result written");
        Ok(Written { uri: store.uri().to_owned(), digest })
    }
}
