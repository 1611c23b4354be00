use super::embeddings::EmbeddingsAsk;
use super::*;
use clap::Parser;
use proptest::prelude::*;
use serde_json::json;
use vicuna_protocol::inference::ToolUse;

fn limits() -> Limits {
    let arguments = ["gateway", "--tls-cert", "c", "--tls-key", "k"];
    crate::config::Config::parse_from(arguments).limits
}

fn chat_body(extra: &Value) -> Vec<u8> {
    let mut body = json!({ "model": "a/b", "messages": [{ "role": "user", "content": "Hi" }] });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    body.to_string().into_bytes()
}

fn chat(extra: Value) -> Result<Ask, ApiError> {
    Ask::chat(&chat_body(&extra), &limits())
}

fn completion(extra: Value) -> Result<Ask, ApiError> {
    let mut body = json!({ "model": "a/b", "prompt": "x" });
    for (name, value) in extra.as_object().unwrap() {
        body[name] = value.clone();
    }
    Ask::completion(body.to_string().as_bytes(), &limits())
}

fn tool(name: &str) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } })
}

#[test]
fn everything_that_is_supported_arrives() {
    let ask = chat(json!({
        "temperature": 0, "top_p": 0.5, "top_k": 4, "min_p": 0.1, "seed": -1, "stop": "x", "n": 2, "stream": true,
        "max_completion_tokens": 9, "stream_options": { "include_usage": true }, "user": "u",
        "frequency_penalty": -1, "presence_penalty": 1.5, "repetition_penalty": 1.1, "logit_bias": { "7": -100 },
        "stop_token_ids": [3], "min_tokens": 2, "ignore_eos": true, "tools": [], "response_format": { "type": "text" }, "logprobs": true, "top_logprobs": 2,
    }))
    .unwrap();
    let expected = Sampling {
        max_tokens: 9,
        min_tokens: 2,
        ignore_end: true,
        temperature: 0.0,
        top_p: 0.5,
        top_k: 4,
        min_p: 0.1,
        seed: u64::MAX,
        stop: vec!["x".into()],
        stop_tokens: vec![3],
        frequency_penalty: -1.0,
        presence_penalty: 1.5,
        repetition_penalty: 1.1,
        logit_bias: [(7, -100.0)].into(),
    };
    assert_eq!(ask.sampling, expected);
    assert!(ask.stream && ask.include_usage && ask.n == 2);
    assert_eq!((ask.logprobs, ask.tools, ask.session.as_deref()), (Some(2), None, Some("u")));
}

#[test]
fn errors_name_the_field() {
    let tools = json!([tool("f")]);
    let cases = [
        (json!({ "temperature": 3 }), "temperature"),
        (json!({ "top_p": -0.1 }), "top_p"),
        (json!({ "top_k": -2 }), "top_k"),
        (json!({ "min_p": 2 }), "min_p"),
        (json!({ "repetition_penalty": 0 }), "repetition_penalty"),
        (json!({ "logit_bias": { "x": 1 } }), "logit_bias"),
        (json!({ "logit_bias": { "1": 101 } }), "logit_bias"),
        (json!({ "stop_token_ids": [-1] }), "stop_token_ids"),
        (json!({ "seed": 0.5 }), "seed"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 129 }), "n"),
        (json!({ "frequency_penalty": 2.1 }), "frequency_penalty"),
        (json!({ "presence_penalty": "much" }), "presence_penalty"),
        (json!({ "min_tokens": -1 }), "min_tokens"),
        (json!({ "min_tokens": 9, "max_completion_tokens": 8 }), "min_tokens"),
        (json!({ "ignore_eos": 1 }), "ignore_eos"),
        (json!({ "max_completion_tokens": 0 }), "max_completion_tokens"),
        (json!({ "return_tokens_as_token_ids": "ids" }), "return_tokens_as_token_ids"),
        (json!({ "prompt_cache_key": 1 }), "prompt_cache_key"),
        (json!({ "safety_identifier": [] }), "safety_identifier"),
        (json!({ "logprobs": 2 }), "logprobs"),
        (json!({ "guided_json": 1 }), "guided_json"),
        (json!({ "guided_grammar": 1 }), "guided_grammar"),
        (json!({ "modalities": ["audio"] }), "modalities"),
        (json!({ "web_search_options": {} }), "web_search_options"),
        (json!({ "use_beam_search": true }), "use_beam_search"),
        (json!({ "prompt_logprobs": 1 }), "prompt_logprobs"),
        (json!({ "max_tokens": "many" }), "max_tokens"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "stop": [""] }), "stop"),
        (json!({ "model": null }), "model"),
        (json!({ "stream": "yes" }), "stream"),
        (json!({ "user": 1 }), "user"),
        (json!({ "messages": [] }), "messages"),
        (json!({ "messages": [{ "role": "robot", "content": "x" }] }), "messages[0].role"),
        (json!({ "messages": [{ "role": "tool", "content": "x" }] }), "messages[0].tool_call_id"),
        (json!({ "messages": [{ "role": "assistant" }] }), "messages[0].content"),
        (json!({ "messages": [{ "role": "assistant", "tool_calls": [{}] }] }), "messages[0].tool_calls"),
        (json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url" }] }] }), "messages[0].content"),
        (json!({ "messages": [{ "role": "assistant", "function_call": "f" }] }), "messages[0].function_call"),
        (json!({ "messages": [{ "role": "function", "name": "f", "content": "x" }] }), "messages[0].name"),
        (json!({ "stream_options": { "include_usage": 1 } }), "stream_options.include_usage"),
        (json!({ "stream_options": 1 }), "stream_options"),
        (json!({ "tools": [{}] }), "tools[0].type"),
        (json!({ "tools": [tool("no spaces")] }), "tools[0].function.name"),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "f", "strict": 1 } }] }),
            "tools[0].function.strict",
        ),
        (json!({ "tools": tools, "tool_choice": "always" }), "tool_choice"),
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "tools": tools, "tool_choice": { "type": "function", "function": { "name": "g" } } }), "tool_choice"),
        (json!({ "tools": tools, "parallel_tool_calls": "no" }), "parallel_tool_calls"),
        (
            json!({ "tools": tools, "tool_choice": { "type": "allowed_tools", "allowed_tools": { "mode": "all" } } }),
            "tool_choice.allowed_tools.mode",
        ),
        (json!({ "tools": tools, "tool_choice": allowed("auto", &["g"]) }), "tool_choice.allowed_tools.tools"),
        (json!({ "tools": tools, "tool_choice": allowed("auto", &["f"; 129]) }), "tool_choice.allowed_tools.tools"),
        (json!({ "functions": [{ "name": "" }] }), "functions[0].name"),
        (json!({ "functions": [{ "name": "f", "parameters": 1 }] }), "functions[0].parameters"),
        (json!({ "functions": [{ "name": "f" }], "function_call": { "name": "g" } }), "function_call"),
        (json!({ "functions": [{ "name": "f" }], "tools": tools }), "functions"),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), "top_logprobs"),
        (json!({ "response_format": { "type": "xml" } }), "response_format.type"),
        (json!({ "response_format": { "type": "json_schema" } }), "response_format.json_schema"),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": { "schema": 1 } } }),
            "response_format.json_schema.schema",
        ),
        (
            json!({ "tools": tools, "tool_choice": "required", "response_format": { "type": "json_object" } }),
            "response_format",
        ),
        (json!({ "audio": {} }), "audio"),
        (json!({ "best_of": 0 }), "best_of"),
    ];
    for (extra, param) in cases {
        let error = chat(extra.clone()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{extra}");
        assert_eq!(error.status, 400);
    }
    assert_eq!(Ask::chat(b"{", &limits()).unwrap_err().status, 400);
}

#[test]
fn errors_name_the_field_of_completions_and_embeddings_too() {
    let cases = [
        (json!({ "prompt": null }), "prompt"),
        (json!({ "prompt": 7 }), "prompt"),
        (json!({ "echo": "yes" }), "echo"),
        (json!({ "logprobs": true }), "logprobs"),
        (json!({ "logprobs": 21 }), "logprobs"),
        (json!({ "suffix": "end" }), "suffix"),
        (json!({ "max_tokens": 0 }), "max_tokens"),
        (json!({ "n": 2, "best_of": 1 }), "best_of"),
        (json!({ "best_of": 129 }), "best_of"),
        (json!({ "best_of": 2, "stream": true }), "best_of"),
    ];
    for (extra, param) in cases {
        assert_eq!(completion(extra.clone()).unwrap_err().param.as_deref(), Some(param), "{extra}");
    }
    for (body, param) in [
        (json!({ "input": "x" }), "model"),
        (json!({ "model": "a/b" }), "input"),
        (json!({ "model": "a/b", "input": [1, "x"] }), "input"),
        (json!({ "model": "a/b", "input": vec!["x"; 2049] }), "input"),
        (json!({ "model": "a/b", "input": "x", "encoding_format": "hex" }), "encoding_format"),
        (json!({ "model": "a/b", "input": "x", "dimensions": 0 }), "dimensions"),
    ] {
        let error = EmbeddingsAsk::parse(body.to_string().as_bytes(), &limits()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{body}");
    }
}

fn allowed(mode: &str, names: &[&str]) -> Value {
    let tools: Vec<_> = names.iter().map(|name| json!({ "type": "function", "function": { "name": name } })).collect();
    json!({ "type": "allowed_tools", "allowed_tools": { "mode": mode, "tools": tools } })
}

#[test]
fn of_all_tools_only_the_allowed_ones_are_shown() {
    let ask = |mode| {
        let choice = allowed(mode, &["h", "f", "h"]);
        let body = json!({ "tools": [tool("f"), tool("g"), tool("h")], "tool_choice": choice });
        chat(body).unwrap().tools.unwrap()
    };
    assert_eq!(ask("auto").names, ["f", "h"], "each once");
    assert!(!ask("auto").json.contains("\"g\"") && !ask("auto").wanted.required);
    assert!(ask("required").wanted.required);
}

#[test]
fn functions_in_the_old_way_are_tools() {
    let functions = json!([{ "name": "f", "parameters": { "type": "object" } }, { "name": "g" }]);
    let ask = |choice: Value| chat(json!({ "functions": functions, "function_call": choice })).unwrap();
    let auto = ask(json!("auto")).tools.unwrap();
    assert_eq!(auto.names, ["f", "g"]);
    assert!(auto.legacy && auto.wanted.single && !auto.wanted.required);
    assert_eq!(serde_json::from_str::<Value>(&auto.json).unwrap()[0], tool("f"));
    assert_eq!(ask(json!({ "name": "g" })).tools.unwrap().wanted.function, "g");
    assert!(ask(json!("none")).tools.is_none());
    assert!(chat(json!({ "functions": [], "function_call": "auto" })).unwrap().tools.is_none());
    let history = chat(json!({ "messages": [
        { "role": "user", "content": "Hi" },
        { "role": "assistant", "content": null, "function_call": { "name": "f", "arguments": "{}" } },
        { "role": "function", "name": "f", "content": "sunny" },
    ] }));
    let Prompt::Chat(messages) = &history.unwrap().prompts[0] else { panic!("no chat") };
    assert_eq!((messages[2].role.as_str(), messages[2].tool_call_id.as_str()), ("tool", "call_1"));
    assert!(messages[1].tool_calls_json.contains("\"call_1\""), "{messages:?}");
}

#[test]
fn a_refusal_is_what_the_assistant_said() {
    let said = |message: Value| match &chat(json!({ "messages": [message] })).unwrap().prompts[0] {
        Prompt::Chat(messages) => messages[0].content.clone(),
        other => panic!("{other:?}"),
    };
    let part = json!([{ "type": "text", "text": "No. " }, { "type": "refusal", "refusal": "I will not." }]);
    assert_eq!(said(json!({ "role": "assistant", "content": part })), "No. I will not.");
    assert_eq!(said(json!({ "role": "assistant", "content": null, "refusal": "I will not." })), "I will not.");
}

#[test]
fn the_best_of_more_candidates_can_be_asked_for() {
    let ask = completion(json!({ "n": 2, "best_of": 5 })).unwrap();
    assert_eq!((ask.n, ask.candidates), (2, 5));
    assert_eq!(completion(json!({ "n": 2 })).unwrap().candidates, 2);
}

#[test]
fn without_a_seed_each_request_has_its_own() {
    let seed = || chat(json!({})).unwrap().sampling.seed;
    assert_ne!(seed(), seed());
}

#[test]
fn completions_take_texts_and_tokens() {
    let prompts = |prompt: Value| completion(json!({ "prompt": prompt })).map(|ask| ask.prompts);
    let text = |text: &str| Prompt::Text(text.into());
    assert_eq!(prompts(json!("x")).unwrap(), [text("x")]);
    assert_eq!(prompts(json!(["x", "y"])).unwrap(), [text("x"), text("y")]);
    assert_eq!(prompts(json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
    assert_eq!(prompts(json!([[1], [2]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2])]);
    for wrong in [json!(""), json!([]), json!([[]]), json!([1, "x"]), json!([-1]), json!(vec!["x"; 65])] {
        assert_eq!(prompts(wrong).unwrap_err().param.as_deref(), Some("prompt"));
    }
    assert_eq!(completion(json!({})).unwrap().sampling.max_tokens, 16);
}

#[test]
fn nothing_but_the_prompt_can_be_asked_for() {
    let ask = completion(json!({ "echo": true, "max_tokens": 0, "logprobs": 1 })).unwrap();
    assert!(ask.only_prompt && ask.echo);
    assert_eq!((ask.logprobs, ask.sampling.max_tokens), (Some(1), 1));
    assert!(completion(json!({ "max_tokens": 0 })).is_err());
}

#[test]
fn what_is_to_be_called_arrives() {
    let ask = |extra: Value| {
        let mut body = json!({ "tools": [tool("f"), tool("g")] });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        chat(body).unwrap().tools
    };
    assert!(ask(json!({ "tool_choice": "none" })).is_none());
    let wanted = |extra: Value| {
        let ToolUse { required, function, single } = ask(extra).unwrap().wanted;
        (required, function, single)
    };
    assert_eq!(wanted(json!({ "tool_choice": "auto" })), (false, String::new(), false));
    assert_eq!(wanted(json!({ "parallel_tool_calls": false })), (false, String::new(), true));
    assert_eq!(wanted(json!({ "tool_choice": "required" })), (true, String::new(), false));
    let named = json!({ "tool_choice": { "type": "function", "function": { "name": "g" } } });
    assert_eq!(wanted(named), (true, "g".to_owned(), true));
    assert_eq!(ask(json!({})).unwrap().names, ["f", "g"]);
}

#[test]
fn a_model_is_asked_only_for_what_it_offers() {
    let plain = ModelOffer { max_length: 8, ..ModelOffer::default() };
    let able = ModelOffer { tool_dialect: "hermes".into(), json_schema: true, grammars: true, ..plain.clone() };
    let called = json!([{ "id": "c", "type": "function", "function": { "name": "f", "arguments": "{}" } }]);
    let cases = [
        (json!({ "tools": [tool("f")] }), "tools"),
        (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        (json!({ "messages": [{ "role": "assistant", "tool_calls": called }] }), "messages"),
    ];
    for (extra, param) in cases {
        let ask = chat(extra).unwrap();
        assert_eq!(ask.check(Some(&able)), Ok(()));
        assert_eq!(ask.check(Some(&plain)).unwrap_err().param.as_deref(), Some(param));
    }
    let forced = chat(json!({ "tools": [tool("f")], "tool_choice": "required" })).unwrap();
    let only_tools = ModelOffer { tool_dialect: "hermes".into(), ..plain.clone() };
    let mut strict = tool("f");
    strict["function"]["strict"] = json!(true);
    let strict = chat(json!({ "tools": [strict] })).unwrap();
    assert_eq!(strict.check(Some(&only_tools)).unwrap_err().param.as_deref(), Some("tools"));
    assert_eq!(forced.check(Some(&only_tools)).unwrap_err().param.as_deref(), Some("tool_choice"));
    assert_eq!(forced.check(None), Ok(()), "nobody knows yet");
    for (extra, param) in [(json!({ "min_tokens": 2 }), "min_tokens"), (json!({ "ignore_eos": true }), "ignore_eos")] {
        let ask = chat(extra).unwrap();
        assert_eq!(ask.check(Some(&plain)).unwrap_err().param.as_deref(), Some(param));
        assert_eq!(ask.check(Some(&ModelOffer { min_tokens: true, ..plain.clone() })), Ok(()));
    }
    let long = completion(json!({ "prompt": [1, 2, 3, 4, 5, 6, 7, 8] })).unwrap();
    let error = long.check(Some(&plain)).unwrap_err();
    assert_eq!((error.param.as_deref(), error.code), (Some("prompt"), "context_length_exceeded"));
}

#[test]
fn an_answer_can_be_guided_as_vllm_s_clients_ask() {
    let format = |extra: Value| chat(extra).unwrap().format.unwrap();
    assert_eq!(format(json!({ "guided_regex": "a+" })), Format::Regex("a+".into()));
    assert_eq!(format(json!({ "guided_grammar": "start: \"a\"" })), Format::Grammar("start: \"a\"".into()));
    let choice = format(json!({ "guided_choice": ["yes", "a \"b\\"] }));
    assert_eq!(choice, Format::Grammar(r#"start: "yes" | "a\u0020\u0022b\u005c""#.into()));
    for (wrong, param) in [
        (json!({ "guided_choice": [] }), "guided_choice"),
        (json!({ "guided_choice": ["a", ""] }), "guided_choice"),
        (json!({ "guided_regex": 5 }), "guided_regex"),
        (json!({ "guided_regex": "a", "guided_choice": ["a"] }), "guided_choice"),
    ] {
        assert_eq!(chat(wrong).unwrap_err().param.as_deref(), Some(param));
    }
    let only_json = ModelOffer { max_length: 8, json_schema: true, ..ModelOffer::default() };
    let asked = chat(json!({ "guided_regex": "a" })).unwrap();
    assert_eq!(asked.check(Some(&only_json)).unwrap_err().param.as_deref(), Some("guided_regex"));
}

#[test]
fn a_nucleus_of_nothing_is_the_likeliest_token() {
    let least = chat(json!({ "top_p": 0 })).unwrap().sampling.top_p;
    assert!(least > 0.0 && least < 1e-30, "{least}");
}

#[test]
fn embeddings_are_asked_of_models_that_have_them() {
    let ask = |extra: Value| {
        let mut body = json!({ "model": "a/b", "input": ["x", "y"] });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        EmbeddingsAsk::parse(body.to_string().as_bytes(), &limits())
    };
    let offer = |embedding_dimensions| ModelOffer { embedding_dimensions, ..ModelOffer::default() };
    let asked = ask(json!({ "encoding_format": "base64", "dimensions": 4 })).unwrap();
    assert!(asked.base64 && asked.inputs.len() == 2);
    assert_eq!(asked.check(&offer(4)), Ok(()));
    assert_eq!(asked.check(&offer(8)).unwrap_err().param.as_deref(), Some("dimensions"));
    assert_eq!(asked.check(&offer(0)).unwrap_err().param.as_deref(), Some("model"));
    for wrong in [json!({ "input": "" }), json!({ "input": [[]] }), json!({ "encoding_format": "hex" })] {
        assert_eq!(ask(wrong).unwrap_err().status, 400);
    }
}

/// Any JSON, with the words that the parser looks for more often than chance would have them.
fn anything() -> impl Strategy<Value = Value> {
    let words = prop::sample::select(vec![
        "user",
        "assistant",
        "tool",
        "text",
        "function",
        "json_schema",
        "required",
        "allowed_tools",
        "refusal",
        "none",
        "auto",
        "f",
        "",
        "é\u{0}",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3.0f64..130.0).prop_map(Value::from),
        (-2i64..20).prop_map(Value::from),
        words.prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let keys = prop::sample::select(vec![
            "role",
            "content",
            "type",
            "text",
            "function",
            "name",
            "parameters",
            "tool_calls",
            "tool_call_id",
            "id",
            "arguments",
            "include_usage",
            "schema",
            "json_schema",
            "function_call",
            "refusal",
            "mode",
            "allowed_tools",
            "7",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(keys, inner, 0..4).prop_map(|map| {
                map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect::<serde_json::Map<_, _>>().into()
            }),
        ]
    })
}

const FIELDS: &[&str] = &[
    "model",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "n",
    "best_of",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "echo",
    "logit_bias",
    "response_format",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "user",
    "prompt_cache_key",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "guided_json",
    "functions",
    "function_call",
    "min_tokens",
    "ignore_eos",
    "audio",
    "suffix",
    "input",
    "encoding_format",
    "dimensions",
    "prompts",
];

/// What every request that is let through has to be.
fn is_within_bounds(ask: &Ask, limits: &Limits) -> bool {
    let sampling = &ask.sampling;
    let numbers = [sampling.temperature, sampling.top_p, sampling.min_p, sampling.repetition_penalty];
    (1..=limits.max_choices).contains(&ask.n)
        && (ask.n..=limits.max_choices).contains(&ask.candidates)
        && (1..=limits.max_prompts).contains(&ask.prompts.len())
        && numbers.iter().all(|number| number.is_finite() && *number >= 0.0)
        && sampling.top_p > 0.0
        && sampling.stop.iter().all(|stop| !stop.is_empty())
        && sampling.logit_bias.values().all(|bias| bias.abs() <= 100.0)
        && ask.logprobs.is_none_or(|top| top <= MAX_TOP_LOGPROBS)
        && (!ask.only_prompt || ask.echo)
}

proptest! {
    #[test]
    fn no_bytes_break_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for parsed in [Ask::chat(&bytes, &limits()), Ask::completion(&bytes, &limits())] {
            prop_assert_eq!(parsed.unwrap_err().status, 400);
        }
        prop_assert!(EmbeddingsAsk::parse(&bytes, &limits()).is_err());
    }

    #[test]
    fn a_request_is_within_bounds_or_refused_with_the_field(
        fields in prop::collection::hash_map(prop::sample::select(FIELDS), anything(), 0..6)
    ) {
        let limits = limits();
        let mut body = json!({ "model": "a/b", "messages": [{ "role": "user", "content": "Hi" }], "prompt": "x", "input": "x" });
        for (name, value) in fields {
            body[name] = value;
        }
        let body = body.to_string();
        for parsed in [Ask::chat(body.as_bytes(), &limits), Ask::completion(body.as_bytes(), &limits)] {
            match parsed {
                Ok(ask) => prop_assert!(is_within_bounds(&ask, &limits), "{:?}", ask),
                Err(error) => {
                    prop_assert_eq!(error.status, 400);
                    prop_assert!(error.param.is_some() && !error.message.is_empty(), "{:?}", error);
                }
            }
        }
        if let Ok(ask) = EmbeddingsAsk::parse(body.as_bytes(), &limits) {
            prop_assert!((1..=limits.max_inputs).contains(&ask.inputs.len()));
        }
    }
}
