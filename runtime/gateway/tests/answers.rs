//! What an answer may hold: log probabilities, echoes, calls of tools, embeddings, counts.

#![allow(clippy::unwrap_used, clippy::panic)]

mod support;

use serde_json::{Value, json};
use support::{MODEL, Stream, TestGateway, Worker, gateway, in_time, scored, text};
use vicuna_protocol::inference::gateway_message::Body as FromGateway;
use vicuna_protocol::inference::worker_message::Body as FromWorker;
use vicuna_protocol::inference::{
    Delta, EmbedInput, Embedding, Embeddings, Failure, PromptScores, TokenCount, TokenLogprob, failure,
};

async fn able_worker(gateway: &TestGateway) -> Worker {
    let able = |hello: &mut vicuna_protocol::inference::WorkerHello| {
        hello.models[0].tool_dialect = "hermes".into();
        hello.models[0].json_schema = true;
        hello.models[0].embedding_dimensions = 2;
    };
    gateway.worker_with("w-1", able).await
}

/// A request in the background.
fn ask(gateway: &TestGateway, path: &str, body: Value) -> tokio::task::JoinHandle<(u16, Value)> {
    let response = gateway.post(path, body);
    tokio::spawn(async move {
        let response = response.await;
        let status = response.status().as_u16();
        (status, serde_json::from_str(&in_time(response.text()).await.unwrap()).unwrap())
    })
}

fn tools() -> Value {
    json!([{ "type": "function", "function": { "name": "weather", "parameters": { "type": "object" } } }])
}

#[tokio::test]
async fn log_probabilities_survive_the_loss_of_a_worker() {
    let gateway = gateway(&[]).await;
    let mut first = gateway.worker("w-1").await;
    let answer = gateway.ask(json!({ "logprobs": true, "top_logprobs": 1 }));
    let generate = first.generate().await;
    assert_eq!(generate.logprobs, Some(1));
    first.speak_scored(&generate, 0..2).await;
    in_time(async {
        while !gateway.metrics().await.contains("tokens_total{model=\"team/chat\"} 2") {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(first);
    let mut second = gateway.worker("w-2").await;
    let generate = second.generate().await;
    second.speak_scored(&generate, 2..3).await;
    second.done(&generate, 3).await;
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 200);
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap();
    let said: String = content.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
    assert_eq!(said, text(0..3));
    assert_eq!(content[2]["top_logprobs"][0]["token"], "other");
}

#[tokio::test]
async fn streamed_log_probabilities_come_with_their_text() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let stream = gateway.stream(json!({ "logprobs": true }));
    let generate = worker.generate().await;
    worker.speak_scored(&generate, 0..2).await;
    worker.speak_scored(&generate, 2..3).await;
    worker.done(&generate, 3).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    for event in stream.events() {
        let choice = &event["choices"][0];
        let content = choice["logprobs"]["content"].as_array().cloned().unwrap_or_default();
        let scored: String = content.iter().map(|entry| entry["token"].as_str().unwrap()).collect();
        assert_eq!(scored, choice["delta"]["content"].as_str().unwrap_or_default());
    }
    assert_eq!(stream.text(), text(0..3));
}

#[tokio::test]
async fn an_echo_scores_the_prompt_and_tokens_alone_are_made_text() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let body = json!({
        "model": MODEL, "prompt": [[5, 6], [7]], "max_tokens": 0, "echo": true, "logprobs": 1,
    });
    let answer = ask(&gateway, "/v1/completions", body);
    let mut requests = Vec::new();
    for _ in 0..2 {
        let generate = worker.generate().await;
        assert_eq!((generate.prompt_logprobs, generate.sampling.as_ref().unwrap().max_tokens), (Some(1), 1));
        let tokens = generate
            .prompt_tokens
            .iter()
            .map(|token| TokenLogprob { bytes: format!("t{token}").into_bytes(), ..scored(0) });
        let scores = PromptScores {
            request: generate.request.clone(),
            choice: generate.choice,
            first: 0,
            tokens: tokens.collect(),
        };
        worker.send(FromWorker::PromptScores(scores)).await;
        worker.speak_scored(&generate, 0..1).await;
        worker.done(&generate, 1).await;
        requests.push(generate.request);
    }
    assert_ne!(requests[0], requests[1], "prompts are told apart");
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 200, "{body}");
    let choice = &body["choices"][0];
    assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!("t5t6"), &json!("length")));
    assert_eq!(choice["logprobs"]["tokens"], json!(["t5", "t6"]));
    assert_eq!(choice["logprobs"]["token_logprobs"], json!([null, -0.5]));
    assert_eq!(choice["logprobs"]["text_offset"], json!([0, 2]));
    assert_eq!((&body["choices"][1]["text"], &body["choices"][1]["index"]), (&json!("t7"), &json!(1)));
    // Both prompts count, each once.
    assert_eq!(body["usage"]["prompt_tokens"], 14);
    assert_eq!(body["usage"]["completion_tokens"], 0);
}

#[tokio::test]
async fn a_streamed_echo_opens_with_the_prompt() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let body = json!({ "model": MODEL, "prompt": "Once ", "echo": true, "stream": true });
    let response = tokio::spawn(gateway.post("/v1/completions", body));
    let generate = worker.generate().await;
    worker.speak(&generate, 0..2).await;
    worker.done(&generate, 2).await;
    let raw = response.await.unwrap().text().await.unwrap();
    let data = raw.lines().filter_map(|line| line.strip_prefix("data: {"));
    let events = data.map(|data| serde_json::from_str::<Value>(&format!("{{{data}")).unwrap());
    let said: String = events.map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned()).collect();
    assert_eq!(said, format!("Once {}", text(0..2)));
}

#[tokio::test]
async fn calls_of_tools_are_told_apart_from_text() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let stream = gateway.stream(json!({ "tools": tools() }));
    let generate = worker.generate().await;
    assert_eq!(serde_json::from_str::<Value>(&generate.tools_json).unwrap(), tools());
    let said = ["I look. ", "<tool", "_call>{\"name\":\"weather\",", "\"arguments\":{\"in\":\"Rome\"}}</tool_call>"];
    for (position, part) in said.iter().enumerate() {
        worker.say(&generate, position, part).await;
    }
    worker.done(&generate, 4).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(stream.text(), "I look.");
    let events = stream.events();
    let calls: Vec<_> = events.iter().map(|event| &event["choices"][0]["delta"]["tool_calls"]).collect();
    let calls: Vec<_> = calls.into_iter().filter(|calls| !calls.is_null()).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["function"], json!({ "name": "weather", "arguments": "{\"in\":\"Rome\"}" }));
    assert_eq!(calls[0][0]["index"], 0);
    assert!(events.iter().any(|event| event["choices"][0]["finish_reason"] == "tool_calls"));
}

/// Indexes, names and arguments of the deltas of calls, as they came.
fn deltas(stream: &Stream) -> Vec<(u64, String, String)> {
    let events = stream.events();
    let deltas = events.iter().filter_map(|event| event["choices"][0]["delta"]["tool_calls"].as_array());
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let parts = deltas.flatten().map(|delta| {
        let function = &delta["function"];
        (delta["index"].as_u64().unwrap(), text(&function["name"]), text(&function["arguments"]))
    });
    parts.collect()
}

#[tokio::test]
async fn arguments_come_as_they_are_written_also_from_another_worker_and_to_a_client_that_comes_back() {
    let gateway = gateway(&[]).await;
    let mut first = able_worker(&gateway).await;
    let stream = gateway.stream(json!({ "tools": tools() }));
    let generate = first.generate().await;
    first.say(&generate, 0, "<tool_call>{\"name\": \"weather\", \"arguments\": {\"in\": ").await;
    let mut stream = stream.await.unwrap();
    while deltas(&stream).is_empty() {
        stream.more().await;
    }
    let begun = stream.last_event_id();
    drop(first);
    let mut second = gateway.worker_with("w-2", |hello| hello.models[0].tool_dialect = "hermes".into()).await;
    let generate = second.generate().await;
    assert_eq!(generate.generated, [100]);
    second.say(&generate, 1, "\"Rome\"}").await;
    second.say(&generate, 2, "}</tool_call>").await;
    while deltas(&stream).len() < 2 {
        stream.more().await;
    }
    let expected = [(0, "weather".to_owned(), "{\"in\": ".to_owned()), (0, String::new(), "\"Rome\"}".to_owned())];
    assert_eq!(deltas(&stream), expected);
    drop(stream);
    assert!(matches!(second.next().await.unwrap(), FromGateway::Cancel(_)));

    let stream = gateway.stream_with(&[("last-event-id", begun)], json!({ "tools": tools() }));
    let generate = second.generate().await;
    second.done(&generate, 3).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    assert_eq!(deltas(&stream), expected[1..]);
    assert!(stream.events().iter().any(|event| event["choices"][0]["finish_reason"] == "tool_calls"));
}

#[tokio::test]
async fn one_call_at_a_time_is_one_call() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let answer = gateway.ask(json!({ "tools": tools(), "parallel_tool_calls": false }));
    let generate = worker.generate().await;
    assert!(generate.tool_use.as_ref().unwrap().single);
    let call = "<tool_call>{\"name\": \"weather\", \"arguments\": {}}</tool_call>";
    worker.say(&generate, 0, &format!("{call}\n{call}")).await;
    worker.done(&generate, 1).await;
    let (_, body) = in_time(answer).await.unwrap();
    assert_eq!(body["choices"][0]["message"]["tool_calls"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn each_model_s_way_of_calling_is_read() {
    let cases = [
        ("llama", r#"{"name": "weather", "parameters": {"in": "Rome"}}"#),
        ("mistral-list", r#"[TOOL_CALLS] [{"name": "weather", "arguments": {"in": "Rome"}}]"#),
        ("mistral-arguments", r#"[TOOL_CALLS]weather[ARGS]{"in": "Rome"}"#),
    ];
    for (dialect, said) in cases {
        let gateway = gateway(&[]).await;
        let mut worker = gateway.worker_with("w-1", |hello| hello.models[0].tool_dialect = dialect.into()).await;
        let answer = gateway.ask(json!({ "tools": tools() }));
        let generate = worker.generate().await;
        worker.say(&generate, 0, said).await;
        worker.done(&generate, 1).await;
        let (_, body) = in_time(answer).await.unwrap();
        let function = &body["choices"][0]["message"]["tool_calls"][0]["function"];
        assert_eq!(*function, json!({ "name": "weather", "arguments": "{\"in\": \"Rome\"}" }), "{dialect}");
    }
}

#[tokio::test]
async fn a_call_that_must_be_made_is_held_to_its_schema() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let answer = gateway.ask(json!({ "tools": tools(), "tool_choice": "required" }));
    let generate = worker.generate().await;
    assert!(generate.tool_use.as_ref().unwrap().required && generate.format.is_none());
    worker.say(&generate, 0, r#"<tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call>"#).await;
    worker.done(&generate, 1).await;
    let (_, body) = in_time(answer).await.unwrap();
    let choice = &body["choices"][0];
    assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], "weather");
    assert!(choice["message"]["tool_calls"][0]["id"].as_str().unwrap().starts_with("call_"));
}

#[tokio::test]
async fn the_likeliest_of_more_candidates_are_the_answer() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let body = json!({ "model": MODEL, "prompt": "Once", "n": 2, "best_of": 3 });
    let answer = ask(&gateway, "/v1/completions", body);
    for logprob in [-2.0, -1.0, -3.0] {
        let generate = worker.generate().await;
        assert_eq!(generate.logprobs, Some(0), "they are compared by it");
        let delta = Delta {
            request: generate.request.clone(),
            choice: generate.choice,
            tokens: vec![7],
            text: format!("{logprob}"),
            logprobs: vec![TokenLogprob { logprob, ..scored(0) }],
            ..Delta::default()
        };
        worker.send(FromWorker::Delta(delta)).await;
        worker.done(&generate, 1).await;
    }
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!(status, 200, "{body}");
    let told: Vec<_> =
        body["choices"].as_array().unwrap().iter().map(|choice| (&choice["index"], &choice["text"])).collect();
    assert_eq!(told, [(&json!(0), &json!("-1")), (&json!(1), &json!("-2"))]);
    assert_eq!(body["choices"][0]["logprobs"], Value::Null, "nobody asked for them");
    assert_eq!(body["usage"]["completion_tokens"], 3);
}

#[tokio::test]
async fn calls_in_the_old_way_are_answered_in_the_old_way() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let functions = json!([{ "name": "weather", "parameters": { "type": "object" } }]);
    let said = r#"<tool_call>{"name": "weather", "arguments": {"in": "Rome"}}</tool_call>"#;
    let answer = gateway.ask(json!({ "functions": functions }));
    let generate = worker.generate().await;
    worker.say(&generate, 0, said).await;
    worker.done(&generate, 1).await;
    let choice = &in_time(answer).await.unwrap().1["choices"][0];
    assert_eq!(choice["finish_reason"], "function_call");
    assert_eq!(choice["message"]["function_call"], json!({ "name": "weather", "arguments": r#"{"in": "Rome"}"# }));
    assert_eq!(choice["message"].get("tool_calls"), None);

    let stream = gateway.stream(json!({ "functions": functions }));
    let generate = worker.generate().await;
    let (begun, rest) = said.split_at(said.find("Rome").unwrap());
    worker.say(&generate, 0, begun).await;
    worker.say(&generate, 1, rest).await;
    worker.done(&generate, 2).await;
    let mut stream = stream.await.unwrap();
    stream.read_to_end().await;
    let events = stream.events();
    let calls = events.iter().map(|event| &event["choices"][0]["delta"]["function_call"]);
    let (mut name, mut arguments) = (String::new(), String::new());
    for call in calls {
        name += call["name"].as_str().unwrap_or_default();
        arguments += call["arguments"].as_str().unwrap_or_default();
    }
    assert_eq!((name.as_str(), arguments.as_str()), ("weather", r#"{"in": "Rome"}"#));
    assert!(stream.raw.contains(r#""finish_reason":"function_call""#), "{}", stream.raw);
}

#[tokio::test]
async fn many_embeddings_are_computed_in_parts_and_come_in_order() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let texts: Vec<_> = (0..600).map(|number| number.to_string()).collect();
    let answer = ask(&gateway, "/v1/embeddings", json!({ "model": MODEL, "input": texts }));
    let mut parts = Vec::new();
    for _ in 0..3 {
        let FromGateway::Embed(embed) = worker.next().await.unwrap() else { panic!("expected a question") };
        parts.push(embed);
    }
    assert!(parts.iter().all(|part| part.inputs.len() <= 256));
    // The last one first: they are put together by their place.
    for part in parts.into_iter().rev() {
        let vector = |input: &EmbedInput| Embedding { values: vec![input.text.parse().unwrap(), 1.0] };
        let vectors = part.inputs.iter().map(vector).collect();
        worker.send(FromWorker::Embeddings(Embeddings { request: part.request, vectors, prompt_tokens: 10 })).await;
    }
    let (status, body) = in_time(answer).await.unwrap();
    assert_eq!((status, &body["usage"]["prompt_tokens"]), (200, &json!(30)));
    let data = body["data"].as_array().unwrap();
    assert_eq!(data.len(), 600);
    assert!(data.iter().enumerate().all(|(index, entry)| entry["embedding"][0].as_f64() == Some(index as f64)));
}

#[tokio::test]
async fn embeddings_come_as_numbers_or_base64() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    for format in ["float", "base64"] {
        let body = json!({ "model": MODEL, "input": ["a", [1, 2]], "encoding_format": format });
        let answer = ask(&gateway, "/v1/embeddings", body);
        let FromGateway::Embed(embed) = worker.next().await.unwrap() else {
            panic!("expected a question");
        };
        assert_eq!((embed.inputs[0].text.as_str(), embed.inputs[1].tokens.as_slice()), ("a", &[1, 2][..]));
        let vectors = vec![Embedding { values: vec![1.0, 0.0] }, Embedding { values: vec![0.0, -1.0] }];
        let embeddings = Embeddings { request: embed.request, vectors, prompt_tokens: 5 };
        worker.send(FromWorker::Embeddings(embeddings)).await;
        let (status, body) = in_time(answer).await.unwrap();
        assert_eq!((status, &body["usage"]["total_tokens"]), (200, &json!(5)));
        let second = &body["data"][1]["embedding"];
        assert_eq!(*second, if format == "float" { json!([0.0, -1.0]) } else { json!("AAAAAAAAgL8=") });
    }
}

#[tokio::test]
async fn a_question_goes_to_another_worker_when_the_first_dies() {
    let gateway = gateway(&[]).await;
    let mut first = able_worker(&gateway).await;
    let answer = ask(&gateway, "/v1/embeddings", json!({ "model": MODEL, "input": "a" }));
    assert!(matches!(first.next().await.unwrap(), FromGateway::Embed(_)));
    drop(first);
    let mut second = gateway.worker_with("w-2", |hello| hello.models[0].embedding_dimensions = 2).await;
    let FromGateway::Embed(embed) = second.next().await.unwrap() else {
        panic!("expected the question");
    };
    let vectors = vec![Embedding { values: vec![1.0, 0.0] }];
    second.send(FromWorker::Embeddings(Embeddings { request: embed.request, vectors, prompt_tokens: 1 })).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);
}

#[tokio::test]
async fn a_model_without_a_worker_is_woken_by_every_kind_of_request() {
    let gateway = gateway(&[]).await;
    gateway.running.gateway.registry.expect(&[MODEL.to_owned()]);
    let loads = gateway.running.gateway.loads.clone();
    let with_tools = gateway.ask(json!({ "tools": tools() }));
    let to_a_schema = gateway.ask(json!({ "response_format": { "type": "json_object" } }));
    let vectors = ask(&gateway, "/v1/embeddings", json!({ "model": MODEL, "input": "a" }));
    in_time(async {
        while loads.demand(MODEL).unfinished < 3 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut worker = gateway.worker("w-1").await;
    for _ in 0..2 {
        let generate = worker.generate().await;
        let (request, code) = (generate.request, failure::Code::Invalid.into());
        worker.send(FromWorker::Failure(Failure { request, code, ..Failure::default() })).await;
    }
    for answer in [in_time(with_tools).await, in_time(to_a_schema).await, in_time(vectors).await] {
        assert_eq!(answer.unwrap().0, 400, "this worker has none of it");
    }
}

#[tokio::test]
async fn busy_workers_are_asked_until_the_time_is_over() {
    let gateway = gateway(&["--queue-timeout-seconds", "3"]).await;
    let mut worker = able_worker(&gateway).await;
    let busy = |request: String| {
        FromWorker::Failure(Failure { request, code: failure::Code::Overloaded.into(), ..Failure::default() })
    };
    let body = json!({ "model": MODEL, "input": "a" });
    let answer = ask(&gateway, "/v1/embeddings", body.clone());
    for _ in 0..6 {
        let FromGateway::Embed(embed) = worker.next().await.unwrap() else { panic!("expected a question") };
        worker.send(busy(embed.request)).await;
    }
    let FromGateway::Embed(embed) = worker.next().await.unwrap() else { panic!("expected a question") };
    let vectors = vec![Embedding { values: vec![1.0, 0.0] }];
    worker.send(FromWorker::Embeddings(Embeddings { request: embed.request, vectors, prompt_tokens: 1 })).await;
    assert_eq!(in_time(answer).await.unwrap().0, 200);

    let response = tokio::spawn(gateway.post("/v1/embeddings", body));
    while !response.is_finished() {
        tokio::select! {
            message = worker.next() => match message.unwrap() {
                FromGateway::Embed(embed) => worker.send(busy(embed.request)).await,
                other => panic!("{other:?}"),
            },
            () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {}
        }
    }
    let response = response.await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn an_embedding_whose_client_goes_is_cancelled() {
    let gateway = gateway(&[]).await;
    let mut worker = able_worker(&gateway).await;
    let answer = tokio::spawn(gateway.post("/v1/embeddings", json!({ "model": MODEL, "input": "a" })));
    let FromGateway::Embed(embed) = worker.next().await.unwrap() else { panic!("expected a question") };
    answer.abort();
    let FromGateway::Cancel(cancel) = worker.next().await.unwrap() else { panic!("expected a cancel") };
    assert_eq!((cancel.request, cancel.keep), (embed.request, false));
}

#[tokio::test]
async fn fastchat_s_clients_can_check_whether_a_prompt_fits() {
    let gateway = gateway(&[]).await;
    let mut worker = gateway.worker("w-1").await;
    let prompts = json!([{ "model": MODEL, "prompt": "Hi", "max_tokens": 60 }]);
    let answer = ask(&gateway, "/api/v1/token_check", json!({ "prompts": prompts }));
    let FromGateway::CountTokens(question) = worker.next().await.unwrap() else {
        panic!("expected a question");
    };
    assert_eq!(question.prompt.as_deref(), Some("Hi"));
    worker.send(FromWorker::TokenCount(TokenCount { request: question.request, tokens: 5, max_length: 64 })).await;
    let (_, body) = in_time(answer).await.unwrap();
    assert_eq!(body, json!({ "prompts": [{ "fits": false, "tokenCount": 5, "contextLength": 64 }] }));
}
