//! A machine outside the cluster: an address, one file and a model are all that a worker there needs.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

mod served;

use serde_json::{Value, json};
use served::{MODEL, Served, is_used, until};
use vicuna_tests::product::{Chat, post};

#[test]
fn a_worker_joins_with_a_gateway_a_bundle_and_a_model_and_answers() {
    let served = Served::start();
    let _worker = served.worker("home");
    served.until_ready(1);
    let answer = Chat::new(served.http(), MODEL).ask("Who are you?").unwrap();
    assert!(answer.completion_tokens > 0, "{answer:?}");
    assert!(is_used(&served.home("home").join(".cache/vicuna-worker")), "its files are in the user's cache");
}

#[test]
fn a_worker_is_there_before_its_model_and_tells_what_becomes_of_that() {
    let served = Served::start();
    let later = served.model().with_file_name("later");
    let _worker = served.worker_of("home", &later, &["--model-patience", "100"]);
    let registry = &served.gateway.gateway.registry;
    let told = || registry.loading(MODEL).unwrap_or_default();
    until("what is missing is told", || told().contains("cannot be loaded") && told().contains("does not exist"));
    assert!(registry.model(MODEL).is_some_and(|model| model.workers.is_empty()), "it takes no requests yet");
    std::fs::rename(served.model(), &later).unwrap();
    served.until_ready(1);
    assert_eq!(told(), "");
}

/// What lm-eval's `local-completions` sends for a continuation, and how it reads the answer: several prompts of token ids,
/// echoed, with one token more than it wants; the sum of the log probabilities, and whether each was the highest.
fn scored(served: &Served, contexts: &[Vec<u64>], continuations: &[Vec<u64>]) -> Vec<(f64, bool)> {
    let prompts: Vec<Vec<u64>> = contexts.iter().zip(continuations).map(|(a, b)| [a.as_slice(), b].concat()).collect();
    let body = json!({
        "model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": true,
    });
    let answer = post(served.http(), "/v1/completions", &body).unwrap();
    let read = |(choice, context): (&Value, &Vec<u64>)| {
        let of = |name: &str| {
            let all = choice["logprobs"][name].as_array().unwrap();
            all[context.len()..all.len() - 1].to_vec()
        };
        let (own, tops) = (of("token_logprobs"), of("top_logprobs"));
        let highest = |top: &Value| {
            top.as_object().unwrap().values().map(|value| value.as_f64().unwrap()).fold(f64::NEG_INFINITY, f64::max)
        };
        let is_greedy = own.iter().zip(&tops).all(|(own, top)| own.as_f64().unwrap() == highest(top));
        (own.iter().map(|own| own.as_f64().unwrap()).sum(), is_greedy)
    };
    answer["choices"].as_array().unwrap().iter().zip(contexts).map(read).collect()
}

#[test]
fn an_evaluation_harness_scores_continuations_by_their_token_ids() {
    let served = Served::start();
    let _worker = served.worker("home");
    served.until_ready(1);
    let context: Vec<u64> = (10..30).collect();
    let body = json!({
        "model": MODEL, "prompt": context, "temperature": 0, "max_tokens": 8, "logprobs": 0, "ignore_eos": true,
        "return_tokens_as_token_ids": true,
    });
    let logprobs = post(served.http(), "/v1/completions", &body).unwrap()["choices"][0]["logprobs"].take();
    let id = |name: &Value| name.as_str().unwrap().strip_prefix("token_id:").unwrap().parse::<u64>().unwrap();
    let likeliest: Vec<u64> = logprobs["tokens"].as_array().unwrap().iter().map(id).collect();
    let said: f64 = logprobs["token_logprobs"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).sum();
    assert_eq!(likeliest.len(), 8);
    let mut other = likeliest.clone();
    other[3] = (likeliest[3] + 1) % 100 + 3;
    let scores = scored(&served, &[context.clone(), context], &[likeliest, other]);
    assert!((scores[0].0 - said).abs() < 1e-3, "read at once {} and one by one {said}", scores[0].0);
    assert!(scores[0].1 && !scores[1].1, "{scores:?}");
}
