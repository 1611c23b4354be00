//! A tiny model, a small dataset and folders for them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use tch::Device;
use vicuna_data::{Conversation, identity};
use vicuna_protocol::job::{
    Checkpointing, DatasetSource, Method, ModelSource, Parameters, Precision, Prepare, Recipe, Recompute,
    Reproducibility, RunLength, Schedule, TrainingJob,
};
use vicuna_trainer::prepare::{Place, Session, prepare};

pub const STEPS: u64 = 6;
const DAY: u64 = 86_400;

/// Folders of one training.
pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub runtime: tokio::runtime::Runtime,
    device: Device,
}

/// `VICUNA_DEVICE=cuda` runs the suite on a GPU, all ranks on the one that there is.
fn device() -> Device {
    vicuna_model::device::open_exact(std::env::var("VICUNA_DEVICE").ok().as_deref()).unwrap()
}

pub fn url(path: &Path) -> String {
    format!("file://{}", path.display())
}

impl Fixture {
    pub fn new() -> Self {
        // CUDA registers itself if it comes before the first use of torch.
        let device = device();
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let fixture = Self { dir, runtime, device };
        fixture.write_model(11);
        fixture.write_data(40);
        fixture
    }

    /// The base model with weights of this seed.
    pub fn write_model(&self, seed: u64) {
        let model = vicuna_model::tiny::tiny(seed);
        let template = model.chat_template.as_deref();
        vicuna_model::save(&self.path("model"), &model.config, &model.tensors, &model.tokenizer, template).unwrap();
    }

    /// So many conversations.
    pub fn write_data(&self, count: usize) {
        let set = identity::conversations("Willow", "Spot Labs", 5, count);
        let records: Vec<_> = set.iter().map(Conversation::to_sharegpt).collect();
        std::fs::write(self.path("data.json"), serde_json::to_vec(&records).unwrap()).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// 7 micro-batches in a step: neither a power of two nor a multiple of the ranks.
    pub fn job(&self, bucket: &str) -> TrainingJob {
        TrainingJob {
            namespace: "default".to_owned(),
            name: "tiny".to_owned(),
            uid: "uid".to_owned(),
            model: ModelSource { from: url(&self.path("model")), template: None },
            dataset: vec![DatasetSource { from: url(&self.path("data.json")), weight: 1.0 }],
            prepare: Prepare::default(),
            recipe: Recipe {
                method: Method::Full,
                global_batch: 14,
                micro_batch: 2,
                length: RunLength::Steps(STEPS),
                learning_rate: 1e-2,
                schedule: Schedule::Cosine,
                warmup_ratio: 0.2,
                weight_decay: 0.1,
                gradient_clip: 1.0,
                max_length: 96,
                seed: 3,
                evaluate_every: None,
                precision: Precision::Fp32,
                recompute: Recompute::default(),
                parameters: Parameters::default(),
                offload: false,
                packing: false,
                rope_scaling: None,
                reproducibility: Reproducibility::default(),
            },
            checkpoint: Checkpointing { to: url(&self.path(bucket)), interval_seconds: Some(DAY), keep: 3 },
        }
    }

    pub fn session(&self, job: TrainingJob) -> Arc<Session> {
        let scratch = tempfile::tempdir_in(self.dir.path()).unwrap().keep();
        let place = Place { scratch, device: self.device, threads: 1 };
        Arc::new(self.runtime.block_on(prepare(job, place)).unwrap())
    }
}
