//! The sample that trains a model of 13e9 weights on one card says why it does so by QLoRA: with the estimator's numbers.

#![allow(clippy::unwrap_used, clippy::panic)]

use serde_json::Value;
use vicuna_model::tiny;
use vicuna_protocol::job::{
    Base, Lora, Method, Parameters, Precision, Recipe, Recompute, Reproducibility, RunLength, Schedule,
};
use vicuna_trainer::adapters;
use vicuna_trainer::blocks::BlockTable;
use vicuna_trainer::memory::limits::Limits;
use vicuna_trainer::memory::{Need, Workload};

/// What such a card has.
const CARD_BYTES: u64 = 24_000_000_000;

fn sample() -> String {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../manifests/samples/training-13b-lora.yaml");
    std::fs::read_to_string(path).unwrap()
}

fn spec(sample: &str) -> Value {
    serde_yaml::from_str::<Value>(sample).unwrap()["spec"].take()
}

/// As far as it takes memory.
fn recipe(spec: &Value) -> Recipe {
    let (recipe, lora) = (&spec["recipe"], &spec["recipe"]["lora"]);
    let number = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
    assert_eq!((&recipe["method"], &lora["base"]), (&"QLoRA".into(), &"Nf4".into()));
    let lora = Lora {
        rank: number(&lora["rank"]),
        alpha: lora["alpha"].as_f64().unwrap(),
        dropout: lora["dropout"].as_f64().unwrap(),
        targets: serde_json::from_value(lora["targets"].clone()).unwrap(),
    };
    assert_eq!(recipe["precision"], "Bf16");
    Recipe {
        method: Method::QLoRA(lora, Base::Nf4),
        global_batch: number(&recipe["globalBatch"]),
        micro_batch: number(&recipe["microBatch"]),
        length: RunLength::Epochs(number(&recipe["epochs"])),
        learning_rate: recipe["learningRate"].as_f64().unwrap(),
        schedule: Schedule::Cosine,
        warmup_ratio: 0.03,
        weight_decay: 0.0,
        gradient_clip: 1.0,
        max_length: number(&recipe["maxLength"]),
        packing: false,
        seed: 0,
        evaluate_every: None,
        precision: Precision::Bf16,
        recompute: Recompute::default(),
        reproducibility: Reproducibility::default(),
        parameters: Parameters::default(),
        offload: recipe["memory"]["offload"].as_bool().unwrap(),
        rope_scaling: None,
    }
}

fn limits(spec: &Value) -> Limits {
    let memory = spec["workers"]["resources"]["limits"]["memory"].as_str().unwrap();
    let host = memory.strip_suffix("Gi").unwrap().parse::<u64>().unwrap() << 30;
    Limits { host: Some(host), reserved: Some(host), device: Some(CARD_BYTES) }
}

fn need(recipe: &Recipe, limits: Limits) -> Need {
    let config = tiny::llama_13b();
    let table = BlockTable::of(&config, adapters::lora(&recipe.method).unwrap().as_ref());
    Workload { config: &config, table: &table, recipe, gpu: true, data: 0, slow_store: true }.need_within(1, limits)
}

#[test]
fn the_whole_model_does_not_fit_on_one_card_and_the_sample_s_method_does() {
    let spec = spec(&sample());
    let (recipe, limits) = (recipe(&spec), limits(&spec));
    let chosen = need(&recipe, limits);
    assert!(chosen.fits(limits), "{chosen}");
    let full_recipe = Recipe { method: Method::Full, ..recipe };
    let full = need(&full_recipe, limits);
    assert!(!full.fits(limits), "{full}");
    let on_the_card = need(&Recipe { parameters: Parameters::Replicated, ..full_recipe }, limits);
    assert!(on_the_card.device > CARD_BYTES, "nor do the weights on the card: {on_the_card}");
    let part = |what: &str| full.parts.iter().find(|part| part.what == what).unwrap().bytes;
    // 13.0e9 weights: master and two moments of four bytes each.
    assert!((155e9..157e9).contains(&(part("masters and moments") as f64)), "{full}");
}

#[test]
fn the_sample_s_comment_has_the_estimator_s_numbers() {
    let sample = sample();
    let spec = spec(&sample);
    let (recipe, limits) = (recipe(&spec), limits(&spec));
    let comment: Vec<&str> = sample.lines().map_while(|line| line.strip_prefix('#')).map(str::trim).collect();
    let comment = comment.join(" ");
    for method in [Method::Full, recipe.method.clone()] {
        let name = if method == Method::Full { "Full" } else { "QLoRA" };
        let line = format!("{name}: {}", need(&Recipe { method, ..recipe.clone() }, limits));
        assert!(comment.contains(&line), "the sample's comment lacks: {line}");
    }
}
