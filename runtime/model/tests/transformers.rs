//! Our forward pass against Hugging Face transformers on the same weights. Needs
//! `tests/tools/transformers.sh` and, for the real model, `tests/tools/model.sh`; without them the
//! tests say so and end.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tch::{Device, Kind, Tensor};
use vicuna_model::inference::Engine;
use vicuna_model::layers::{LayerWeights, Rope, embed, head_logits, layer_forward};
use vicuna_model::parameters::{EMBEDDING, FINAL_NORM, head_name};
use vicuna_model::{Pretrained, load, save};

fn cache() -> Option<PathBuf> {
    std::env::var_os("VICUNA_CACHE").map(PathBuf::from)
}

/// The newest installed transformers.
fn transformers() -> Option<PathBuf> {
    let entries = std::fs::read_dir(cache()?).ok()?;
    let folders = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let named = folders.filter(|path| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("transformers-"))
    });
    named.max().or_else(|| {
        eprintln!("skipped: transformers is not installed, run tests/tools/transformers.sh");
        None
    })
}

fn small_model() -> Option<PathBuf> {
    let path = cache()?.join("smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.is_file() {
        eprintln!("skipped: the model is not there, run tests/tools/model.sh");
        return None;
    }
    Some(path)
}

/// Runs logits.py and returns what it prints.
fn python(site: &Path, arguments: &[&str], input: &str) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/logits.py");
    let mut child = Command::new("python3")
        .arg(script)
        .args(arguments)
        .env("PYTHONPATH", site)
        .env("HF_HUB_OFFLINE", "1")
        .env_remove("LD_LIBRARY_PATH")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "logits.py {arguments:?} failed");
    String::from_utf8(output.stdout).unwrap()
}

fn their_logits(site: &Path, directory: &Path, ids: &[u32]) -> Tensor {
    let printed = python(site, &["logits", directory.to_str().unwrap()], &serde_json::to_string(ids).unwrap());
    let values: Vec<f32> = serde_json::from_str(&printed).unwrap();
    Tensor::from_slice(&values).reshape([ids.len() as i64, -1])
}

fn our_logits(model: &Pretrained, ids: &[u32]) -> Tensor {
    let (config, tensors) = (&model.config, &model.tensors);
    let rope = Rope::new(config, ids.len(), Device::Cpu, Kind::Float);
    let ids: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let mut x = embed(&tensors[EMBEDDING], &Tensor::from_slice(&ids).unsqueeze(0));
    for index in 0..config.layers {
        x = layer_forward(config, &LayerWeights::from_map(tensors, index).unwrap(), &x, &rope);
    }
    head_logits(config, &x, &tensors[FINAL_NORM], &tensors[head_name(config)]).squeeze_dim(0)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn a_checkpoint_of_transformers_gives_its_logits() {
    let Some(site) = transformers() else { return };
    let directory = tempfile::tempdir().unwrap();
    python(&site, &["make", directory.path().to_str().unwrap()], "");
    vicuna_model::tiny::tokenizer().save(directory.path().join("tokenizer.json"), false).unwrap();
    let model = load(directory.path()).unwrap();
    assert_eq!(model.config.rope_theta, 50_000.0);
    let ids: Vec<u32> = (0..90).map(|index| index * 7 % 300).collect();
    let theirs = their_logits(&site, directory.path(), &ids);
    let difference = largest_difference(&theirs, &our_logits(&model, &ids));
    eprintln!("largest logit {:.3}, largest difference {difference:e}", theirs.abs().max().double_value(&[]));
    assert!(difference < 1e-4, "{difference}");
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

    let difference = largest_difference(&their_logits(&site, saved.path(), &prompt), &our_logits(&model, &prompt));
    eprintln!("SmolLM2: largest difference of logits {difference:e}");
    assert!(difference < 1e-4, "{difference}");
    assert_eq!(greedy(&model, &prompt), "The capital of France is Paris.");
}

fn greedy(model: &Pretrained, prompt: &[u32]) -> String {
    let engine = Engine::new(&model.config, &model.tensors, Device::Cpu, Kind::Float, None).unwrap();
    let mut sequence = engine.sequence();
    let mut logits = engine.prefill(&mut sequence, prompt).unwrap();
    let mut reply = Vec::new();
    while reply.len() < 24 {
        let token = logits.argmax(-1, false).int64_value(&[]) as u32;
        if model.config.eos.contains(&token) {
            break;
        }
        reply.push(token);
        logits = engine.decode(&mut [&mut sequence], &[token]).unwrap().squeeze_dim(0);
    }
    model.tokenizer.decode(&reply, true).unwrap()
}
