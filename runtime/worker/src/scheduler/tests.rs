//! The scheduler without threads or gateways: commands in, steps, messages out.

use super::*;
use crate::completion::Vocabulary;
use crate::detokenize::TokenBytes;
use crate::grammar::Grammars;
use std::sync::Arc;
use tch::Device;
use vicuna_model::inference::{BLOCK_TOKENS, EngineOptions, Precision};
use vicuna_protocol::inference::generate::Format;
use vicuna_protocol::inference::{PromptScores, Sampling};

struct Bench {
    scheduler: Scheduler,
    vocabulary: Vocabulary,
    replies: Replies,
    received: mpsc::Receiver<WorkerMessage>,
}

/// What one request got.
#[derive(Clone, Debug, Default, PartialEq)]
struct Answer {
    tokens: Vec<u32>,
    texts: Vec<String>,
    last_text: String,
    finish_reason: String,
    cached_tokens: u32,
    failure: Option<(i32, String)>,
}

impl Answer {
    fn text(&self) -> String {
        self.texts.concat() + &self.last_text
    }
}

fn options(cache_bytes: usize) -> EngineOptions {
    EngineOptions { device: Device::Cpu, precision: Precision::Fp32, max_length: None, cache_bytes, threads: 1 }
}

fn engine(model: &vicuna_model::Pretrained, cache_bytes: usize) -> Engine {
    Engine::new(model, &options(cache_bytes)).unwrap()
}

fn bench(slots: usize) -> Bench {
    let model = vicuna_model::tiny::tiny(21);
    let engine = engine(&model, 1 << 20);
    let bytes = Arc::new(TokenBytes::of(&model.tokenizer, &[]));
    let vocabulary = Vocabulary {
        grammars: Grammars::new(&bytes, model.config.vocab, 2).ok(),
        bytes,
        end_tokens: model.config.eos.as_slice().into(),
        size: model.config.vocab,
        max_length: engine.max_length(),
        dialect: None,
    };
    let (scheduler, _) = Scheduler::new("ns/m", engine, slots, Metrics::new().unwrap());
    let (messages, received) = mpsc::channel(4096);
    Bench { scheduler, vocabulary, replies: Replies::new(messages, CancellationToken::new()), received }
}

impl Bench {
    fn submit(&mut self, name: &str, prompt: &[u32], sampling: Sampling, generated: &[u32]) {
        self.submit_with(name, prompt, |generate| {
            generate.sampling = Some(sampling);
            generate.generated = generated.to_vec();
        });
    }

    fn submit_with(&mut self, name: &str, prompt: &[u32], change: impl FnOnce(&mut Generate)) {
        let mut generate = Generate { request: name.to_owned(), ..Generate::default() };
        change(&mut generate);
        let completion = Completion::new(&generate, prompt, &self.vocabulary).unwrap();
        let priority = generate.priority;
        let task = Task::Complete { prompt: prompt.to_vec(), completion, generate: Box::new(generate) };
        let job = Job::new(1, priority, None, task, self.replies.clone());
        self.scheduler.apply(Command::Submit(Box::new(job)));
    }

    /// All blocks are free again, or kept for reuse by nobody's leave.
    fn check_nothing_is_held(&self) {
        assert_eq!(self.scheduler.pool.free_tokens(), self.scheduler.pool.total_tokens());
    }

    fn finish(&mut self) {
        while self.scheduler.running.len() + self.scheduler.waiting.len() > 0 {
            self.scheduler.step();
        }
    }

    /// The answer to each named request.
    fn answers<const N: usize>(&mut self, names: [&str; N]) -> [Answer; N] {
        self.finish();
        let mut messages = Vec::new();
        while let Ok(message) = self.received.try_recv() {
            messages.extend(message.body);
        }
        names.map(|name| answer(name, &messages))
    }
}

fn answer(name: &str, messages: &[Body]) -> Answer {
    let mut answer = Answer::default();
    for body in messages {
        match body {
            Body::Delta(delta) if delta.request == name => {
                assert_eq!(delta.position as usize, answer.tokens.len());
                answer.tokens.extend(&delta.tokens);
                answer.texts.push(delta.text.clone());
            }
            Body::Done(done) if done.request == name => {
                answer.last_text = done.text.clone();
                answer.finish_reason = done.finish_reason.clone();
                answer.cached_tokens = done.cached_tokens;
            }
            Body::Failure(failure) if failure.request == name => {
                answer.failure = Some((failure.code, failure.message.clone()));
            }
            _ => {}
        }
    }
    answer
}

fn prompt(length: u32) -> Vec<u32> {
    (0..length).map(|index| 3 + (index * 17 + length) % 280).collect()
}

fn greedy(max_tokens: u32) -> Sampling {
    Sampling { max_tokens, ..Sampling::default() }
}

fn sampled(max_tokens: u32) -> Sampling {
    Sampling { temperature: 0.9, top_p: 0.95, seed: 5, frequency_penalty: 0.3, ..greedy(max_tokens) }
}

#[test]
fn a_batch_gives_each_request_what_it_gets_alone() {
    let prompts = [prompt(3), prompt(300), prompt(40), prompt(11)];
    let names = ["a", "b", "c", "d"];
    for sampling in [greedy(40), sampled(40)] {
        let mut together = bench(3);
        for (name, prompt) in names.iter().zip(&prompts) {
            together.submit(name, prompt, sampling.clone(), &[]);
        }
        let together = together.answers(names);
        for ((name, prompt), batched) in names.into_iter().zip(&prompts).zip(together) {
            let mut alone = bench(1);
            alone.submit(name, prompt, sampling.clone(), &[]);
            let [alone] = alone.answers([name]);
            assert_eq!(alone, batched, "request {name}");
            assert!(!alone.tokens.is_empty());
        }
    }
}

#[test]
fn a_resumed_request_continues_as_if_undisturbed() {
    for sampling in [greedy(30), sampled(30)] {
        let mut undisturbed = bench(1);
        undisturbed.submit("whole", &prompt(9), sampling.clone(), &[]);
        let [whole] = undisturbed.answers(["whole"]);
        assert!(whole.tokens.len() > 5, "only {} tokens", whole.tokens.len());
        for cut in 1..whole.tokens.len() {
            let mut other = bench(1);
            other.submit("rest", &prompt(9), sampling.clone(), &whole.tokens[..cut]);
            other.finish();
            let rest = rest_of(&mut other, cut);
            assert_eq!(rest.tokens, whole.tokens[cut..], "cut at {cut}");
            assert_eq!(rest.texts, whole.texts[cut..], "cut at {cut}");
            assert_eq!((rest.last_text, rest.finish_reason), (whole.last_text.clone(), whole.finish_reason.clone()));
        }
    }
}

/// The continuation after `cut` tokens; its first position must be `cut`.
fn rest_of(bench: &mut Bench, cut: usize) -> Answer {
    let mut rest = Answer::default();
    while let Ok(message) = bench.received.try_recv() {
        match message.body {
            Some(Body::Delta(delta)) => {
                assert_eq!(delta.position as usize, cut + rest.tokens.len());
                rest.tokens.extend(delta.tokens);
                rest.texts.push(delta.text);
            }
            Some(Body::Done(done)) => {
                (rest.last_text, rest.finish_reason) = (done.text, done.finish_reason);
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    rest
}

#[test]
fn the_texts_of_all_deltas_are_the_text_of_all_tokens() {
    let mut bench = bench(1);
    bench.submit("a", &prompt(5), sampled(60), &[]);
    let [answer] = bench.answers(["a"]);
    let expected = vicuna_model::tiny::tokenizer().decode(&answer.tokens, true).unwrap();
    assert_eq!(answer.text(), expected);
}

#[test]
fn what_does_not_fit_the_queue_is_refused_for_another_worker() {
    let mut bench = bench(1);
    let names: Vec<String> = (0..7).map(|index| index.to_string()).collect();
    for name in &names {
        bench.submit(name, &prompt(4), greedy(2), &[]);
    }
    let [first, fifth, sixth, seventh] = bench.answers(["0", "4", "5", "6"]);
    for served in [first, fifth] {
        assert_eq!((served.failure, served.finish_reason.as_str()), (None, "length"));
    }
    for refused in [sixth, seventh] {
        assert_eq!(refused.failure.map(|(code, _)| code), Some(Code::Overloaded as i32));
    }
}

#[test]
fn a_cancelled_request_frees_its_slot() {
    let mut bench = bench(1);
    bench.submit("a", &prompt(4), greedy(400), &[]);
    bench.submit("b", &prompt(4), greedy(3), &[]);
    bench.scheduler.step();
    bench.scheduler.apply(Command::Cancel { connection: 2, request: "a".into(), choice: 0, keep: false });
    assert_eq!(bench.scheduler.running.len(), 1, "another gateway's request is not its business");
    bench.scheduler.apply(Command::Cancel { connection: 1, request: "a".into(), choice: 0, keep: false });
    assert_eq!(bench.scheduler.running.len(), 0);
    let [a, b] = bench.answers(["a", "b"]);
    assert_eq!((a.finish_reason.as_str(), b.finish_reason.as_str()), ("", "length"));
}

#[test]
fn a_lost_gateway_takes_its_requests_with_it() {
    let mut bench = bench(2);
    bench.submit("a", &prompt(4), greedy(400), &[]);
    bench.submit("b", &prompt(4), greedy(400), &[]);
    bench.scheduler.step();
    bench.scheduler.apply(Command::Disconnected(1));
    let now = *bench.scheduler.occupancy.borrow();
    assert_eq!((now.running, now.waiting), (0, 0));
    bench.check_nothing_is_held();
}

#[test]
fn a_gateway_that_does_not_read_loses_its_connection_not_the_batch() {
    let mut bench = bench(1);
    let (messages, _full) = mpsc::channel(1);
    let healthy = std::mem::replace(&mut bench.replies, Replies::new(messages, CancellationToken::new()));
    bench.submit("slow", &prompt(4), greedy(400), &[]);
    for _ in 0..3 {
        bench.scheduler.step();
    }
    assert!(bench.replies.broken.is_cancelled());
    assert_eq!(bench.scheduler.running.len(), 0);
    bench.replies = healthy;
    bench.submit("b", &prompt(4), greedy(3), &[]);
    assert_eq!(bench.answers(["b"])[0].tokens.len(), 3);
}

#[test]
fn draining_finishes_what_runs_and_gives_back_the_rest() {
    let mut bench = bench(1);
    bench.submit("runs", &prompt(4), greedy(5), &[]);
    bench.scheduler.step();
    bench.submit("waits", &prompt(4), greedy(5), &[]);
    bench.scheduler.apply(Command::Drain);
    bench.submit("late", &prompt(4), greedy(5), &[]);
    let [runs, waits, late] = bench.answers(["runs", "waits", "late"]);
    assert_eq!(runs.tokens.len(), 5);
    for refused in [waits, late] {
        assert_eq!(refused.failure.map(|(code, _)| code), Some(Code::Overloaded as i32));
    }
}

#[test]
fn an_answer_in_one_piece_comes_in_few_messages_and_whole_whatever_interrupts_it() {
    let deltas = |bench: &mut Bench| {
        let messages = std::iter::from_fn(|| bench.received.try_recv().ok()).filter_map(|message| message.body);
        messages.filter(|body| matches!(body, Body::Delta(_))).collect::<Vec<_>>()
    };
    let mut streamed = bench(1);
    streamed.submit("a", &prompt(4), greedy(20), &[]);
    streamed.finish();
    let [expected] = [answer("a", &deltas(&mut streamed))];
    assert_eq!(expected.tokens.len(), 20);
    let start = || {
        let mut bench = bench(1);
        bench.submit_with("a", &prompt(4), |generate| (generate.whole, generate.sampling) = (true, Some(greedy(20))));
        bench
    };
    let mut whole = start();
    whole.finish();
    let told = deltas(&mut whole);
    assert!(told.len() < 20, "{}", told.len());
    assert_eq!((answer("a", &told).tokens, answer("a", &told).text()), (expected.tokens.clone(), expected.text()));

    let mut given_back = start();
    (0..5).for_each(|_| given_back.scheduler.step());
    given_back.scheduler.apply(Command::HandBack);
    assert_eq!(answer("a", &deltas(&mut given_back)).tokens, expected.tokens[..5]);

    let mut preempted = start();
    (0..5).for_each(|_| preempted.scheduler.step());
    preempted.scheduler.preempt(0, &mut Vec::new());
    preempted.finish();
    assert_eq!(answer("a", &deltas(&mut preempted)).tokens, expected.tokens);
}

#[test]
fn a_request_that_was_already_complete_is_only_closed() {
    let mut bench = bench(1);
    bench.submit("a", &prompt(4), greedy(2), &[10, 11]);
    let [answer] = bench.answers(["a"]);
    assert_eq!((answer.tokens.len(), answer.finish_reason.as_str()), (0, "length"));
}

#[test]
fn weights_that_are_no_numbers_fail_the_request_with_the_reason() {
    let mut model = vicuna_model::tiny::tiny(1);
    for tensor in model.tensors.values_mut() {
        let _ = tensor.fill_(f64::NAN);
    }
    let mut bench = bench(1);
    bench.scheduler.engine = engine(&model, 1 << 20);
    bench.submit("a", &prompt(4), greedy(2), &[]);
    let [answer] = bench.answers(["a"]);
    assert!(answer.failure.unwrap().1.contains("no numbers"));
}

/// A cache of so many blocks, at least those of the longest sequence.
fn small_cache(slots: usize, blocks: usize) -> Bench {
    let mut bench = bench(slots);
    let model = vicuna_model::tiny::tiny(21);
    let token_bytes = 2 * 2 * 2 * 16 * 4;
    bench.scheduler.engine = engine(&model, blocks * BLOCK_TOKENS * token_bytes);
    bench.scheduler.pool = BlockPool::new(bench.scheduler.engine.blocks());
    bench
}

#[test]
fn where_the_cache_is_full_the_youngest_waits_and_nobody_gets_other_tokens() {
    let names = ["a", "b", "c", "d"];
    for sampling in [greedy(150), sampled(150)] {
        let mut crowded = small_cache(4, 32);
        assert_eq!(crowded.scheduler.engine.blocks(), 32);
        for (index, name) in names.iter().enumerate() {
            crowded.submit(name, &prompt(100 + index as u32), sampling.clone(), &[]);
        }
        let crowded_answers = crowded.answers(names);
        assert!(crowded.scheduler.metrics.preemptions.get() > 0, "the cache was never full");
        crowded.check_nothing_is_held();
        for ((index, name), found) in names.into_iter().enumerate().zip(crowded_answers) {
            let mut alone = bench(1);
            alone.submit(name, &prompt(100 + index as u32), sampling.clone(), &[]);
            assert_eq!(alone.answers([name])[0], found, "request {name}");
        }
    }
}

#[test]
fn a_prompt_that_was_there_before_is_not_computed_again() {
    let mut bench = bench(2);
    let prompt = prompt(100);
    bench.submit("first", &prompt, greedy(5), &[]);
    let [first] = bench.answers(["first"]);
    let computed = bench.scheduler.metrics.prompt_tokens.get();
    bench.submit("second", &prompt, greedy(5), &[]);
    bench.submit("third", &prompt, greedy(5), &[]);
    let [second, third] = bench.answers(["second", "third"]);
    assert_eq!((&first.tokens, &first.tokens), (&second.tokens, &third.tokens));
    assert_eq!(bench.scheduler.metrics.cached_tokens.get(), 2 * 96);
    assert_eq!(bench.scheduler.metrics.prompt_tokens.get() - computed, 2 * 4);
    assert_eq!((first.cached_tokens, second.cached_tokens), (0, 96));
    bench.check_nothing_is_held();
}

#[test]
fn keys_and_values_of_one_adapter_are_not_taken_for_those_of_another() {
    let mut bench = bench(2);
    let folder = tempfile::tempdir().unwrap();
    let adapters = [5, 6].map(|seed| {
        vicuna_model::tiny::save_adapter(folder.path(), seed, 4, &["k_proj", "v_proj"]).unwrap();
        vicuna_model::lora::Adapter::load(folder.path()).unwrap()
    });
    bench.scheduler.engine = Engine::adapted(&vicuna_model::tiny::tiny(21), &adapters, &options(1 << 20)).unwrap();
    let ask = |bench: &mut Bench, name: &str, adapter| {
        let generate = Generate { request: name.to_owned(), sampling: Some(greedy(5)), ..Generate::default() };
        let completion = Completion::new(&generate, &prompt(100), &bench.vocabulary).unwrap();
        let task = Task::Complete { prompt: prompt(100), completion, generate: Box::new(generate) };
        let job = Job::new(1, 0, adapter, task, bench.replies.clone());
        bench.scheduler.apply(Command::Submit(Box::new(job)));
    };
    ask(&mut bench, "none", None);
    ask(&mut bench, "0", Some(0));
    let [none, first] = bench.answers(["none", "0"]);
    ask(&mut bench, "1", Some(1));
    ask(&mut bench, "0 again", Some(0));
    let [other, again] = bench.answers(["1", "0 again"]);
    assert_eq!((none.cached_tokens, first.cached_tokens, other.cached_tokens, again.cached_tokens), (0, 0, 0, 96));
    assert_eq!(again.tokens, first.tokens);
    assert!(none.tokens != first.tokens && other.tokens != first.tokens, "adapters change too little to be seen");
}

#[test]
fn choices_of_one_request_share_its_prompt_while_they_run() {
    let mut bench = bench(4);
    let prompt = prompt(200);
    for choice in 0..4 {
        bench.submit_with("n", &prompt, |generate| {
            generate.choice = choice;
            generate.sampling = Some(sampled(3));
        });
    }
    bench.finish();
    assert_eq!(bench.scheduler.metrics.cached_tokens.get(), 3 * 192);
}

#[test]
fn higher_priorities_go_first() {
    let mut bench = bench(1);
    bench.submit("runs", &prompt(4), greedy(3), &[]);
    bench.scheduler.step();
    for (name, priority) in [("low", -1), ("usual", 0), ("high", 5), ("high too", 5)] {
        bench.submit_with(name, &prompt(4), |generate| {
            generate.sampling = Some(greedy(2));
            generate.priority = priority;
        });
    }
    let waiting: Vec<&str> = bench.scheduler.waiting.iter().map(|job| job.request()).collect();
    assert_eq!(waiting, ["high", "high too", "usual", "low"]);
}

#[test]
fn a_prompts_scores_come_once_before_its_first_token_whatever_the_pieces() {
    let mut bench = bench(1);
    let prompt = prompt(300);
    bench.submit_with("a", &prompt, |generate| {
        generate.sampling = Some(greedy(1));
        generate.prompt_logprobs = Some(1);
    });
    bench.finish();
    let first = bench.received.try_recv().unwrap().body.unwrap();
    let Body::PromptScores(PromptScores { tokens, .. }) = first else { panic!("{first:?} came first") };
    assert_eq!(tokens.iter().map(|entry| entry.token).collect::<Vec<_>>(), prompt);
    let model = vicuna_model::tiny::tiny(21);
    let logits = vicuna_model::logits(&model.config, &model.tensors, &prompt).unwrap();
    let expected = logits.log_softmax(-1, tch::Kind::Float);
    for (position, entry) in tokens.iter().enumerate().skip(1) {
        let expected = expected.double_value(&[position as i64 - 1, i64::from(entry.token)]);
        assert!((f64::from(entry.logprob) - expected).abs() < 1e-4, "at {position}");
    }
    assert!(matches!(bench.received.try_recv().unwrap().body, Some(Body::Delta(_))));
}

#[test]
fn a_json_schema_is_kept_by_a_model_that_knows_nothing_of_it() {
    let schema =
        r#"{"type":"object","properties":{"a":{"enum":["x","y"]}},"required":["a"],"additionalProperties":false}"#;
    let mut bench = bench(1);
    bench.submit_with("whole", &prompt(9), |generate| {
        generate.sampling = Some(sampled(200));
        generate.format = Some(Format::JsonSchema(schema.to_owned()));
    });
    let [whole] = bench.answers(["whole"]);
    // White space is free, so that it may have been cut off.
    if whole.finish_reason == "stop" {
        let value: serde_json::Value = serde_json::from_str(&whole.text()).unwrap();
        assert!(value["a"] == "x" || value["a"] == "y", "{value}");
    }
    assert_eq!(whole.failure, None);
    assert!(whole.text().trim_start().starts_with('{'));
    let middle = whole.tokens.len() / 2;
    bench.submit_with("rest", &prompt(9), |generate| {
        generate.sampling = Some(sampled(200));
        generate.format = Some(Format::JsonSchema(schema.to_owned()));
        generate.generated = whole.tokens[..middle].to_vec();
    });
    bench.finish();
    assert_eq!(rest_of(&mut bench, middle).tokens, whole.tokens[middle..]);
}

#[test]
fn what_a_lost_gateway_had_is_known_for_a_while_and_what_the_client_left_is_not() {
    let mut bench = bench(3);
    bench.submit("lost", &prompt(4), greedy(400), &[]);
    bench.submit("left", &prompt(5), greedy(400), &[]);
    bench.submit("back", &prompt(6), greedy(400), &[]);
    (0..4).for_each(|_| bench.scheduler.step());
    for (request, keep) in [("left", false), ("back", true)] {
        bench.scheduler.apply(Command::Cancel { connection: 1, request: request.into(), choice: 0, keep });
    }
    bench.scheduler.apply(Command::Disconnected(1));
    let mut known = |request: &str| {
        let (answer, mut found) = oneshot::channel();
        bench.scheduler.apply(Command::TranscriptOf { request: request.into(), answer });
        found.try_recv().unwrap()
    };
    assert!(known("left").is_empty());
    for request in ["lost", "back"] {
        let found = known(request);
        assert_eq!((found.len(), found[0].finish_reason.as_str()), (1, ""));
        assert!(found[0].tokens.len() >= 3, "{request}");
    }
}

#[test]
fn at_the_deadline_of_a_drain_what_runs_is_handed_back() {
    let mut bench = bench(1);
    bench.submit("a", &prompt(4), greedy(400), &[]);
    bench.scheduler.step();
    bench.scheduler.apply(Command::HandBack);
    let [a] = bench.answers(["a"]);
    assert_eq!(a.failure.map(|(code, _)| code), Some(Code::Overloaded as i32));
    assert!(!a.tokens.is_empty());
    bench.check_nothing_is_held();
}

#[test]
fn texts_are_embedded_beside_running_answers_and_do_not_change_them() {
    let mut alone = bench(2);
    alone.submit("a", &prompt(40), greedy(10), &[]);
    let alone = alone.answers(["a"]);
    let mut bench = bench(2);
    bench.submit("a", &prompt(40), greedy(10), &[]);
    let embedder = Embedder::new("e".into(), vec![prompt(300), prompt(7)], 300, 512).unwrap();
    let job = Job::new(1, 0, None, Task::Embed(embedder), bench.replies.clone());
    bench.scheduler.apply(Command::Submit(Box::new(job)));
    bench.finish();
    let mut messages = Vec::new();
    while let Ok(message) = bench.received.try_recv() {
        messages.extend(message.body);
    }
    assert_eq!(answer("a", &messages), alone[0]);
    let vectors = messages.iter().find_map(|body| match body {
        Body::Embeddings(found) => Some(&found.vectors),
        _ => None,
    });
    assert_eq!(vectors.unwrap().len(), 2);
    bench.check_nothing_is_held();
}

#[test]
fn what_has_no_token_yet_says_how_far_it_is() {
    let mut bench = bench(1);
    let length = STEP_TOKENS as u32 + 100;
    bench.submit("reads", &prompt(length), greedy(2), &[]);
    bench.submit("waits", &prompt(3), greedy(2), &[]);
    bench.scheduler.step();
    let told = |bench: &mut Bench, after: Duration| {
        let told = bench.scheduler.told;
        bench.scheduler.tell_progress(told + after);
        let messages = std::iter::from_fn(|| bench.received.try_recv().ok());
        let progress = messages.filter_map(|message| match message.body {
            Some(Body::Progress(progress)) => Some((progress.request, progress.computed, progress.all)),
            _ => None,
        });
        progress.collect::<Vec<_>>()
    };
    assert_eq!(told(&mut bench, PROGRESS_EVERY / 2), [], "not so often");
    let expected = [("reads".to_owned(), STEP_TOKENS as u32, length), ("waits".to_owned(), 0, 0)];
    assert_eq!(told(&mut bench, PROGRESS_EVERY), expected);
    bench.scheduler.step();
    assert_eq!(told(&mut bench, PROGRESS_EVERY), [("waits".to_owned(), 0, 0)], "the first is being answered");
}

#[test]
fn requests_are_counted_under_vllm_s_names_too() {
    let mut bench = bench(2);
    bench.submit("fresh", &prompt(20), greedy(5), &[]);
    bench.submit("resumed", &prompt(10), greedy(5), &[7, 8]);
    bench.finish();
    bench.submit("again", &prompt(20), greedy(1), &[]);
    bench.finish();
    bench.submit("cancelled", &prompt(20), greedy(5), &[]);
    let (request, choice, keep) = ("cancelled".to_owned(), 0, false);
    bench.scheduler.apply(Command::Cancel { connection: 1, request, choice, keep });
    let text = String::from_utf8(bench.scheduler.metrics.text().unwrap()).unwrap();
    let label = "{model_name=\"ns/m\"}";
    for expected in [
        format!("vllm:prompt_tokens_total{label} 50"),
        format!("vllm:generation_tokens_total{label} 9"),
        format!("vllm:prefix_cache_queries_total{label} 50"),
        format!("vllm:prefix_cache_hits_total{label} 16"),
        format!("vllm:time_to_first_token_seconds_count{label} 2"),
        format!("vllm:inter_token_latency_seconds_count{label} 6"),
        format!("vllm:request_time_per_output_token_seconds_count{label} 2"),
        format!("vllm:e2e_request_latency_seconds_count{label} 3"),
        format!("vllm:request_queue_time_seconds_count{label} 3"),
        format!("vllm:request_inference_time_seconds_count{label} 3"),
        format!("vllm:request_prefill_time_seconds_count{label} 3"),
        format!("vllm:request_decode_time_seconds_count{label} 3"),
        format!("vllm:request_prompt_tokens_sum{label} 50"),
        format!("vllm:request_generation_tokens_sum{label} 9"),
        format!("vllm:num_requests_running{label} 0"),
        format!("vllm:kv_cache_usage_perc{label} 0"),
        "vllm:request_success_total{finished_reason=\"length\",model_name=\"ns/m\"} 3".to_owned(),
        "vllm:request_success_total{finished_reason=\"abort\",model_name=\"ns/m\"} 1".to_owned(),
    ] {
        assert!(text.contains(&format!("{expected}\n")), "{expected} is not in {text}");
    }
}
