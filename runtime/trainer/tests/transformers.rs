//! First gradients and a loss curve of each family against Hugging Face transformers: the same weights,
//! the same batches, fp32. Needs `tests/tools/transformers.sh`; without it the test says so and ends.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

#[path = "../../model/tests/golden/mod.rs"]
#[allow(dead_code, reason = "shared with the model's tests, which use all of it")]
mod golden;

use golden::{FAMILIES, made_by_transformers, python, transformers};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use tch::{Device, Kind, Tensor};
use vicuna_model::gradients::{embedding_backward, head_backward, layer_backward};
use vicuna_model::layers::{IGNORED, LayerWeights, Rope, embed, layer_forward};
use vicuna_model::parameters::{EMBEDDING, FINAL_NORM, head_name};
use vicuna_model::{Config, layer_parameter_names};
use vicuna_trainer::optimizer::{Slot, Update, adamw, clip_scale, squared_norm};

const STEPS: usize = 30;
const LEARNING_RATE: f64 = 1e-3;
const WEIGHT_DECAY: f64 = 0.01;
const CLIP: f64 = 1.0;

type Tensors = BTreeMap<String, Tensor>;

/// Two sequences of 40 tokens a step, a part of each without loss.
fn batches() -> Vec<[Vec<Vec<i64>>; 2]> {
    let row = |step: i64, row: i64| -> Vec<i64> {
        (0..40).map(|index| (index * 7 + step % 3 * 11 + row * 101 + index * index % 13) % 300).collect()
    };
    let step = |step: i64| {
        let ids: Vec<Vec<i64>> = (0..2).map(|index| row(step, index)).collect();
        let mut labels = ids.clone();
        labels.iter_mut().for_each(|row| row[..6].fill(IGNORED));
        [ids, labels]
    };
    (0..STEPS as i64).map(step).collect()
}

fn shaped(rows: &[Vec<i64>]) -> Tensor {
    Tensor::from_slice(&rows.concat()).view([rows.len() as i64, -1])
}

/// Mean loss and its gradients, piece by piece as a rank computes them.
fn gradients(config: &Config, tensors: &Tensors, ids: &Tensor, labels: &Tensor) -> (f64, Tensors) {
    let rope = Rope::new(config, ids.size()[1] as usize, Device::Cpu, Kind::Float);
    let layers: Vec<LayerWeights> =
        (0..config.layers).map(|index| LayerWeights::from_map(tensors, index).unwrap()).collect();
    let mut inputs = vec![embed(&tensors[EMBEDDING], ids)];
    for weights in &layers {
        inputs.push(layer_forward(config, weights, inputs.last().unwrap(), &rope));
    }
    let head = head_backward(config, &inputs[config.layers], &tensors[FINAL_NORM], &tensors[head_name(config)], labels);
    let mut found = Tensors::from([(FINAL_NORM.to_owned(), head.norm), (head_name(config).to_owned(), head.lm_head)]);
    let mut upstream = head.hidden;
    for index in (0..config.layers).rev() {
        let layer = layer_backward(config, &layers[index], &inputs[index], &rope, &upstream);
        let values = layer.weights.as_vec().into_iter().map(Tensor::shallow_clone);
        found.extend(layer_parameter_names(config, index).into_iter().zip(values));
        upstream = layer.input;
    }
    let embedding = embedding_backward(config, ids, &upstream);
    let sum = found.get(EMBEDDING).map_or(embedding.shallow_clone(), |head| head + &embedding);
    found.insert(EMBEDDING.to_owned(), sum);
    let tokens = head.tokens as f64;
    let loss = head.loss_sum.double_value(&[]) / tokens;
    (loss, found.into_iter().map(|(name, gradient)| (name, gradient / tokens)).collect())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.contiguous().view([-1])).unwrap()
}

/// A parameter's moments.
type Moments = BTreeMap<String, [Vec<f32>; 2]>;

fn update(tensors: &mut Tensors, moments: &mut Moments, gradients: &Tensors, count: u64) {
    let norm = gradients.values().map(|gradient| squared_norm(&values(gradient))).sum::<f64>().sqrt();
    for (name, gradient) in gradients {
        let tensor = &tensors[name];
        let shape = tensor.size();
        let mut weights = values(tensor);
        let [first, second] = moments.entry(name.clone()).or_insert_with(|| [0, 1].map(|_| vec![0.0; weights.len()]));
        let weight_decay = if shape.len() > 1 { WEIGHT_DECAY } else { 0.0 };
        let terms = Update { learning_rate: LEARNING_RATE, weight_decay, scale: clip_scale(norm, CLIP), count };
        adamw(Slot { weights: &mut weights, first, second }, &values(gradient), terms);
        tensors.insert(name.clone(), Tensor::from_slice(&weights).view(shape.as_slice()));
    }
}

#[test]
fn every_family_trains_as_transformers_does() {
    let Some(site) = transformers() else { return };
    let batches = batches();
    let recipe =
        json!({ "batches": batches, "learningRate": LEARNING_RATE, "weightDecay": WEIGHT_DECAY, "clip": CLIP });
    for family in FAMILIES {
        let (directory, model) = made_by_transformers(&site, family);
        let path = directory.path().to_str().unwrap();
        let theirs: Value = serde_json::from_str(&python(&site, &["train", path], &recipe.to_string())).unwrap();
        let (mut tensors, mut moments) = (model.tensors, Moments::new());
        let (mut gradient_gap, mut loss_gap) = (0f64, 0f64);
        for (step, [ids, labels]) in batches.iter().enumerate() {
            let (loss, found) = gradients(&model.config, &tensors, &shaped(ids), &shaped(labels));
            if step == 0 {
                gradient_gap = largest_gap(&found, &theirs["gradients"]);
            }
            let expected = theirs["losses"][step].as_f64().unwrap();
            loss_gap = loss_gap.max((loss / expected - 1.0).abs());
            update(&mut tensors, &mut moments, &found, step as u64 + 1);
        }
        let [first, last] = [0, STEPS - 1].map(|step| theirs["losses"][step].as_f64().unwrap());
        eprintln!("{family}: gradients {gradient_gap:.1e}, losses {loss_gap:.1e} over {first:.3} to {last:.3}");
        assert!(last < 0.9 * first, "{family}: nothing was learnt, {first} to {last}");
        assert!(gradient_gap < 1e-4, "{family}: gradients differ by {gradient_gap} of the largest");
        // Rounding grows from step to step, since Adam divides by the root of what may be nearly 0.
        assert!(loss_gap < 1e-3, "{family}: losses differ by {loss_gap}");
    }
}

/// Of all parameters: the largest difference as a share of the parameter's largest gradient.
fn largest_gap(ours: &Tensors, theirs: &Value) -> f64 {
    assert_eq!(ours.len(), theirs.as_object().unwrap().len());
    let gap = |(name, ours): (&String, &Tensor)| {
        let theirs: Vec<f32> = serde_json::from_value(theirs[name].clone()).unwrap();
        let theirs = Tensor::from_slice(&theirs);
        let difference = (ours.view([-1]) - &theirs).abs().max().double_value(&[]);
        difference / theirs.abs().max().double_value(&[])
    };
    ours.iter().map(gap).fold(0.0, f64::max)
}
