//! From the spec of a VicunaTraining to the job that its ranks get.

use kube::{Resource, ResourceExt};
use vicuna_crds::training as spec;
use vicuna_crds::{Interval, VicunaTraining};
use vicuna_protocol::job::{
    Base, Checkpointing, DatasetSource, Identity, Lora, Method, ModelSource, Parameters, Precision, Prepare, Recipe,
    Recompute, Reproducibility, RopeScaling, RunLength, Scaling, Schedule, TrainingJob,
};

#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("the training {0} has no namespace or UID: it does not come from the API server")]
    NotStored(String),
    #[error("spec.recipe names neither epochs nor steps: set exactly one of them")]
    NoLength,
}

/// The job of a training. It depends on nothing that may change while it runs.
pub fn job(training: &VicunaTraining) -> Result<TrainingJob, JobError> {
    let not_stored = || JobError::NotStored(training.name_any());
    let spec = &training.spec;
    Ok(TrainingJob {
        namespace: training.namespace().ok_or_else(not_stored)?,
        name: training.name_any(),
        uid: training.meta().uid.clone().ok_or_else(not_stored)?,
        model: ModelSource {
            from: spec.model.from.clone(),
            template: spec.model.template.map(|template| template.name().to_owned()),
        },
        dataset: spec.dataset.iter().map(|set| DatasetSource { from: set.from.clone(), weight: set.weight }).collect(),
        prepare: prepare(spec.prepare.as_ref()),
        recipe: recipe(&spec.recipe)?,
        checkpoint: Checkpointing {
            to: spec.checkpoint.to.clone(),
            interval_seconds: match spec.checkpoint.interval {
                Interval::Auto => None,
                Interval::Every(period) => Some(period.get().as_secs().max(1)),
            },
            keep: spec.checkpoint.keep,
        },
    })
}

fn prepare(prepare: Option<&spec::Prepare>) -> Prepare {
    let Some(prepare) = prepare else { return Prepare::default() };
    let identity = |identity: &spec::Identity| Identity {
        name: identity.name.clone(),
        organization: identity.organization.clone(),
    };
    Prepare {
        clean: prepare.clean,
        language: prepare.language.clone(),
        split_at: prepare.split_at,
        hold_out: prepare.hold_out,
        identity: prepare.identity.as_ref().map(identity),
    }
}

fn recipe(recipe: &spec::Recipe) -> Result<Recipe, JobError> {
    Ok(Recipe {
        method: method(recipe),
        global_batch: recipe.global_batch,
        micro_batch: recipe.micro_batch,
        length: match (recipe.epochs, recipe.steps) {
            (Some(epochs), None) => RunLength::Epochs(epochs),
            (None, Some(steps)) => RunLength::Steps(steps),
            _ => return Err(JobError::NoLength),
        },
        learning_rate: recipe.learning_rate,
        schedule: match recipe.schedule {
            spec::Schedule::Cosine => Schedule::Cosine,
            spec::Schedule::Linear => Schedule::Linear,
            spec::Schedule::Constant => Schedule::Constant,
        },
        warmup_ratio: recipe.warmup_ratio,
        weight_decay: recipe.weight_decay,
        gradient_clip: recipe.gradient_clip,
        max_length: recipe.max_length,
        packing: recipe.packing,
        seed: recipe.seed,
        evaluate_every: recipe.evaluate_every,
        precision: match recipe.precision {
            spec::Precision::Fp32 => Precision::Fp32,
            spec::Precision::Bf16 => Precision::Bf16,
        },
        recompute: match recipe.memory.recompute {
            spec::Recompute::Auto => Recompute::Auto,
            spec::Recompute::Always => Recompute::Always,
            spec::Recompute::Never => Recompute::Never,
        },
        reproducibility: reproducibility(recipe),
        parameters: match recipe.memory.parameters {
            spec::Parameters::Auto => Parameters::Auto,
            spec::Parameters::Replicated => Parameters::Replicated,
            spec::Parameters::Sharded => Parameters::Sharded,
        },
        offload: recipe.memory.offload,
        rope_scaling: recipe.rope_scaling.as_ref().map(|scaling| RopeScaling {
            kind: match scaling.kind {
                spec::Scaling::Linear => Scaling::Linear,
                spec::Scaling::Llama3 => Scaling::Llama3,
                spec::Scaling::Yarn => Scaling::Yarn,
            },
            factor: scaling.factor,
        }),
    })
}

/// Whether every bit is promised.
pub fn reproducibility(recipe: &spec::Recipe) -> Reproducibility {
    match recipe.reproducibility {
        spec::Reproducibility::Exact => Reproducibility::Exact,
        spec::Reproducibility::Fast => Reproducibility::Fast,
    }
}

fn method(recipe: &spec::Recipe) -> Method {
    let settings = recipe.lora.clone().unwrap_or_default();
    let lora = Lora {
        rank: settings.rank,
        alpha: settings.alpha,
        dropout: settings.dropout,
        targets: settings.targets.iter().map(|target| target.name().to_owned()).collect(),
    };
    match (recipe.method, settings.base.unwrap_or_default()) {
        (spec::Method::Full, _) => Method::Full,
        (spec::Method::LoRA, _) => Method::LoRA(lora),
        (spec::Method::QLoRA, spec::Base::Nf4) => Method::QLoRA(lora, Base::Nf4),
        (spec::Method::QLoRA, spec::Base::Int8) => Method::QLoRA(lora, Base::Int8),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn preparation_is_passed_on_and_none_of_it_is_made_up() {
        let mut training = crate::training::tests::training("t");
        training.spec.prepare = None;
        assert_eq!(job(&training).unwrap().prepare, Prepare::default());
        let spec = json!({ "clean": true, "language": "en", "splitAt": 512, "holdOut": 0.05,
                           "identity": { "name": "N", "organization": "O" } });
        training.spec.prepare = Some(serde_json::from_value(spec.clone()).unwrap());
        assert_eq!(serde_json::to_value(job(&training).unwrap().prepare).unwrap(), spec);
    }

    #[test]
    fn the_job_says_what_the_spec_says() {
        let training = crate::training::tests::training("t");
        let job = job(&training).unwrap();
        assert_eq!((job.namespace.as_str(), job.name.as_str(), job.uid.as_str()), ("ns", "t", "uid-t"));
        assert_eq!(job.recipe.length, RunLength::Steps(100));
        assert_eq!(job.recipe.global_batch, 8);
        assert_eq!(job.checkpoint.to, "s3://bucket/run");
        let text = serde_json::to_string(&job).unwrap();
        assert_eq!(serde_json::from_str::<TrainingJob>(&text).unwrap(), job);
    }

    #[test]
    fn that_bits_may_differ_is_passed_on_and_exactness_is_not_said() {
        let mut training = crate::training::tests::training("t");
        let said = |training: &VicunaTraining| serde_json::to_value(job(training).unwrap().recipe).unwrap();
        assert_eq!(said(&training).get("reproducibility"), None, "digests of older recipes stay as they are");
        training.spec.recipe.reproducibility = spec::Reproducibility::Fast;
        assert_eq!(said(&training)["reproducibility"], "Fast");
    }

    #[test]
    fn a_longer_context_is_passed_on() {
        let mut training = crate::training::tests::training("t");
        assert_eq!(job(&training).unwrap().recipe.rope_scaling, None);
        let scaling = json!({ "type": "Yarn", "factor": 4.0 });
        training.spec.recipe.rope_scaling = Some(serde_json::from_value(scaling.clone()).unwrap());
        assert_eq!(serde_json::to_value(job(&training).unwrap().recipe.rope_scaling).unwrap(), scaling);
    }

    #[test]
    fn adapters_are_passed_on_with_their_defaults() {
        let mut training = crate::training::tests::training("t");
        let method = |training: &VicunaTraining| serde_json::to_value(job(training).unwrap().recipe.method).unwrap();
        assert_eq!(method(&training), json!("Full"));
        training.spec.recipe.method = spec::Method::LoRA;
        let defaults = json!({ "rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": ["q_proj", "v_proj"] });
        assert_eq!(serde_json::to_value(vicuna_protocol::job::Lora::default()).unwrap(), defaults);
        assert_eq!(method(&training), json!({ "LoRA": defaults }));
        training.spec.recipe.method = spec::Method::QLoRA;
        assert_eq!(method(&training), json!({ "QLoRA": [defaults, "Nf4"] }));
        let lora = json!({ "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["all-linear"], "base": "Int8" });
        training.spec.recipe.lora = Some(serde_json::from_value(lora).unwrap());
        let passed = json!({ "rank": 4, "alpha": 8.0, "dropout": 0.0, "targets": ["all-linear"] });
        assert_eq!(method(&training), json!({ "QLoRA": [passed, "Int8"] }));
    }
}
