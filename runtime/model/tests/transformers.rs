//! Our forward pass against Hugging Face transformers on the same weights. Needs
//! `tests/tools/transformers.sh` and, for the real model, `tests/tools/model.sh`; without them the
//! tests say so and end.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

mod golden;

use golden::{FAMILIES, cache, made_by_transformers, python, transformers};
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};
use vicuna_model::inference::{BLOCK_TOKENS, Engine, EngineOptions, Outputs, Piece, Precision, Want};
use vicuna_model::{Pretrained, load, logits, save};

fn small_model() -> Option<PathBuf> {
    let path = cache()?.join("smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        eprintln!("skipped: the model is not there, run tests/tools/model.sh");
        return None;
    }
    Some(path)
}

fn their_logits(site: &Path, directory: &Path, ids: &[u32]) -> Tensor {
    let printed = python(site, &["logits", directory.to_str().unwrap()], &serde_json::to_string(ids).unwrap());
    let values: Vec<f32> = serde_json::from_str(&printed).unwrap();
    Tensor::from_slice(&values).reshape([ids.len() as i64, -1])
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn checkpoints_of_transformers_give_its_logits_in_every_family() {
    let Some(site) = transformers() else { return };
    let ids: Vec<u32> = (0..90).map(|index| index * 7 % 300).collect();
    for family in FAMILIES {
        let (directory, model) = made_by_transformers(&site, family);
        let theirs = their_logits(&site, directory.path(), &ids);
        let ours = [logits(&model.config, &model.tensors, &ids).unwrap(), engine_logits(&model, &ids, Precision::Fp32)];
        for ours in ours {
            let difference = largest_difference(&theirs, &ours);
            eprintln!(
                "{family}: largest logit {:.3}, largest difference {difference:e}",
                theirs.abs().max().double_value(&[])
            );
            assert!(difference < 1e-4, "{family}: {difference}");
        }
        // And the other way round: what we save is what we read, to transformers too.
        let saved = tempfile::tempdir().unwrap();
        save(saved.path(), &model.config, &model.tensors, &model.tokenizer, None).unwrap();
        assert_eq!(load(saved.path()).unwrap().config, model.config);
        assert_eq!(largest_difference(&theirs, &their_logits(&site, saved.path(), &ids)), 0.0, "{family}");
    }
}

#[test]
fn the_gguf_model_saved_by_us_answers_alike_in_transformers() {
    let (Some(site), Some(gguf)) = (transformers(), small_model()) else { return };
    let model = load(&gguf).unwrap();
    assert_eq!(model.config.parameter_count(), 134_515_008);
    let saved = tempfile::tempdir().unwrap();
    save(saved.path(), &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();

    let question = ["answer", saved.path().to_str().unwrap(), "What is the capital of France?"];
    let theirs: serde_json::Value = serde_json::from_str(&python(&site, &question, "")).unwrap();
    assert_eq!(theirs["text"], "The capital of France is Paris.");
    let prompt: Vec<u32> = serde_json::from_value(theirs["prompt"].clone()).unwrap();
    let text = model.tokenizer.decode(&prompt, false).unwrap();
    assert_eq!(model.tokenizer.encode(text, false).unwrap().get_ids(), prompt, "the tokenizers differ");

    let difference = largest_difference(
        &their_logits(&site, saved.path(), &prompt),
        &logits(&model.config, &model.tensors, &prompt).unwrap(),
    );
    eprintln!("SmolLM2: largest difference of logits {difference:e}");
    assert!(difference < 1e-4, "{difference}");
    for precision in [Precision::Fp32, Precision::Bf16, Precision::File, Precision::Int8] {
        assert_eq!(greedy(&model, &prompt, precision), "The capital of France is Paris.", "{precision:?}");
    }
}

/// The engine's own path with fp32 weights gives transformers' numbers, and what it rounds costs little.
#[test]
fn the_engine_gives_the_logits_of_transformers() {
    let (Some(site), Some(gguf)) = (transformers(), small_model()) else { return };
    let model = load(&gguf).unwrap();
    let saved = tempfile::tempdir().unwrap();
    save(saved.path(), &model.config, &model.tensors, &model.tokenizer, model.chat_template.as_deref()).unwrap();
    let prompt = model.tokenizer.encode("Gravity pulls the apple towards the ground, because", false).unwrap();
    let theirs = their_logits(&site, saved.path(), prompt.get_ids());
    // Sums of other orders differ in fp32's last bits: of logits near 30, about this much.
    let allowed = [(Precision::Fp32, 5e-4), (Precision::Bf16, 1.0), (Precision::Int8, 1.0), (Precision::File, 2.0)];
    let differences = allowed.map(|(precision, allowed)| {
        let ours = engine_logits(&model, prompt.get_ids(), precision);
        let difference = largest_difference(&theirs, &ours);
        eprintln!("SmolLM2 {precision:?}: largest difference of logits {difference:e}");
        (precision, difference, allowed)
    });
    for (precision, difference, allowed) in differences {
        assert!(difference < allowed, "{precision:?}: {difference}");
    }
}

fn engine(model: &Pretrained, precision: Precision) -> Engine {
    let options = EngineOptions { device: Device::Cpu, precision, max_length: None, cache_bytes: 0, threads: 2 };
    Engine::new(model, &options).unwrap()
}

fn engine_logits(model: &Pretrained, ids: &[u32], precision: Precision) -> Tensor {
    let mut engine = engine(model, precision);
    let blocks: Vec<u32> = (0..engine.blocks() as u32).collect();
    let mut outputs = Outputs::default();
    engine
        .step(&[Piece { tokens: ids, past: 0, blocks: &blocks, want: Want::Every, adapter: None }], &mut outputs)
        .unwrap();
    let rows: Vec<Tensor> = outputs.logits(0).map(|row| Tensor::from_slice(row)).collect();
    Tensor::stack(&rows, 0)
}

fn greedy(model: &Pretrained, prompt: &[u32], precision: Precision) -> String {
    let mut engine = engine(model, precision);
    let blocks: Vec<u32> = (0..engine.blocks() as u32).collect();
    assert!(blocks.len() * BLOCK_TOKENS >= 256);
    let mut outputs = Outputs::default();
    let mut ids = prompt.to_vec();
    let mut past = 0;
    while ids.len() < prompt.len() + 24 {
        engine
            .step(
                &[Piece { tokens: &ids[past..], past, blocks: &blocks, want: Want::Last, adapter: None }],
                &mut outputs,
            )
            .unwrap();
        past = ids.len();
        let row = outputs.logits(0).next().unwrap();
        let token = (0..row.len()).reduce(|best, id| if row[id] > row[best] { id } else { best }).unwrap() as u32;
        if model.config.eos.contains(&token) {
            break;
        }
        ids.push(token);
    }
    model.tokenizer.decode(&ids[prompt.len()..], true).unwrap()
}
