//! The scheduler without threads or gateways: commands in, steps, messages out.

use super::*;
use crate::completion::Vocabulary;
use crate::detokenize::TokenBytes;
use std::sync::Arc;
use tch::{Device, Kind};
use vicuna_protocol::inference::{Generate, Sampling};

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
    failure: Option<(i32, String)>,
}

impl Answer {
    fn text(&self) -> String {
        self.texts.concat() + &self.last_text
    }
}

fn bench(slots: usize) -> Bench {
    let model = vicuna_model::tiny::tiny(21);
    let engine = Engine::new(&model.config, &model.tensors, Device::Cpu, Kind::Float, None).unwrap();
    let vocabulary = Vocabulary {
        bytes: Arc::new(TokenBytes::of(&model.tokenizer)),
        end_tokens: model.config.eos.as_slice().into(),
        size: model.config.vocab,
        max_length: engine.max_length(),
    };
    let (scheduler, _) = Scheduler::new(engine, slots, Metrics::new().unwrap());
    let (messages, received) = mpsc::channel(4096);
    Bench { scheduler, vocabulary, replies: Replies::new(messages, CancellationToken::new()), received }
}

impl Bench {
    fn submit(&mut self, name: &str, prompt: &[u32], sampling: Sampling, generated: &[u32]) {
        let generate = Generate {
            request: name.to_owned(),
            sampling: Some(sampling),
            generated: generated.to_vec(),
            ..Generate::default()
        };
        let completion = Completion::new(&generate, prompt.len(), &self.vocabulary).unwrap();
        let job = Job { connection: 1, prompt: prompt.to_vec(), completion, replies: self.replies.clone() };
        self.scheduler.apply(Command::Submit(Box::new(job)));
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
    bench.scheduler.apply(Command::Cancel { connection: 2, request: "a".into(), choice: 0 });
    assert_eq!(bench.scheduler.running.len(), 1, "another gateway's request is not its business");
    bench.scheduler.apply(Command::Cancel { connection: 1, request: "a".into(), choice: 0 });
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
    assert_eq!(*bench.scheduler.occupancy.borrow(), Occupancy::default());
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
fn a_request_that_was_already_complete_is_only_closed() {
    let mut bench = bench(1);
    bench.submit("a", &prompt(4), greedy(2), &[10, 11]);
    let [answer] = bench.answers(["a"]);
    assert_eq!((answer.tokens.len(), answer.finish_reason.as_str()), (0, "length"));
}

#[test]
fn weights_that_are_no_numbers_fail_the_request_with_the_reason() {
    let model = vicuna_model::tiny::tiny(1);
    let mut tensors = model.tensors;
    for tensor in tensors.values_mut() {
        let _ = tensor.fill_(f64::NAN);
    }
    let mut bench = bench(1);
    bench.scheduler.engine = Engine::new(&model.config, &tensors, Device::Cpu, Kind::Float, None).unwrap();
    bench.submit("a", &prompt(4), greedy(2), &[]);
    let [answer] = bench.answers(["a"]);
    assert!(answer.failure.unwrap().1.contains("no numbers"));
}
