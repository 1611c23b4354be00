//! Chats with tools against Hugging Face transformers on the templates of models that call them. Needs
//! `tests/tools/transformers.sh` and `tests/tools/chat_templates.sh`; without them the test says so and ends.

#![allow(clippy::unwrap_used, reason = "a test stops where what it relies on is not there")]

use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tokenizers::{AddedToken, Tokenizer};
use vicuna_data::template::{Encoder, Said, Template};
use vicuna_protocol::tools::Dialect;

const TEMPLATES: [(&str, Dialect); 8] = [
    ("meta-llama-Llama-3.1-8B-Instruct", Dialect::Llama),
    ("meta-llama-Llama-3.2-3B-Instruct", Dialect::Llama),
    ("meta-llama-Llama-3.3-70B-Instruct", Dialect::Llama),
    ("Qwen-Qwen2.5-7B-Instruct", Dialect::Hermes),
    ("NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", Dialect::Hermes),
    ("NousResearch-Hermes-3-Llama-3.1-8B-tool_use", Dialect::Hermes),
    ("mistralai-Mistral-Nemo-Instruct-2407", Dialect::MistralList),
    ("unsloth-mistral-Devstral-Small-2507", Dialect::MistralArguments),
];

/// The newest folder of the cache with a name that begins like this; says so where there is none.
fn newest(prefix: &str, script: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("VICUNA_CACHE").map(PathBuf::from);
    let entries = cache.and_then(|cache| std::fs::read_dir(cache).ok()).into_iter().flatten();
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let found = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(named).max();
    if found.is_none() {
        eprintln!("skipped: {prefix}* is not there, run tests/tools/{script}");
    }
    found
}

fn by_transformers(site: &Path, asked: &[Value]) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/tool_templates.py");
    let mut python = Command::new("python3");
    python.arg(script).env("PYTHONPATH", site).env("HF_HUB_OFFLINE", "1").env_remove("LD_LIBRARY_PATH");
    let mut child = python.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(json!(asked).to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "tool_templates.py failed");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn tools() -> Vec<Value> {
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "type": "string", "description": "The city's name, as in \"São Paulo\"" } },
        "required": ["city"],
    });
    let function = json!({ "name": "weather", "description": "Tells the weather", "parameters": parameters });
    vec![json!({ "type": "function", "function": function })]
}

fn said(role: &str, content: &str) -> Said {
    Said { role: role.into(), content: content.into(), ..Said::default() }
}

/// A question, its call, what came of it, and the next question.
fn chat() -> Vec<Said> {
    let function = json!({ "name": "weather", "arguments": { "city": "São Paulo" } });
    let calls = vec![json!({ "id": "abcdefghi", "type": "function", "function": function })];
    vec![
        said("system", "You help."),
        said("user", "Is it warm in São Paulo?"),
        Said { calls, ..said("assistant", "") },
        Said { call_id: "abcdefghi".into(), name: "weather".into(), ..said("tool", "{\"celsius\": 31}") },
    ]
}

/// As Hugging Face's clients write the same chat.
fn messages() -> Value {
    let function = json!({ "name": "weather", "arguments": { "city": "São Paulo" } });
    json!([
        { "role": "system", "content": "You help." },
        { "role": "user", "content": "Is it warm in São Paulo?" },
        { "role": "assistant", "content": "", "tool_calls": [{ "id": "abcdefghi", "type": "function", "function": function }] },
        { "role": "tool", "content": "{\"celsius\": 31}", "tool_call_id": "abcdefghi", "name": "weather" },
    ])
}

/// One that has control tokens enough for every template.
fn tokenizer() -> Tokenizer {
    let mut tokenizer = vicuna_model::tiny::tokenizer();
    let tokens = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<s>", "</s>", "[INST]", "[/INST]"];
    tokenizer.add_special_tokens(&tokens.map(|token| AddedToken::from(token, true)));
    tokenizer
}

fn encoder(jinja: &str, tokenizer: &Tokenizer) -> Encoder {
    Template::from_jinja(jinja, "<s>", "</s>").unwrap().bind(tokenizer).unwrap()
}

#[test]
fn tools_are_written_down_as_transformers_does_in_every_family() {
    let (Some(site), Some(folder)) =
        (newest("transformers-", "transformers.sh"), newest("chat-templates-", "chat_templates.sh"))
    else {
        return;
    };
    let read = |(name, _): &(&str, Dialect)| std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
    let templates: Vec<_> = TEMPLATES.iter().map(read).collect();
    let asked = |jinja: &String| json!({ "template": jinja, "messages": messages(), "tools": tools() });
    let theirs = by_transformers(&site, &templates.iter().map(asked).collect::<Vec<_>>());
    let tokenizer = tokenizer();
    for (((name, dialect), jinja), theirs) in TEMPLATES.iter().zip(&templates).zip(theirs) {
        assert_eq!(Dialect::of(jinja), Some(*dialect), "{name}");
        let encoder = encoder(jinja, &tokenizer);
        assert!(encoder.takes_tools(), "{name}");
        let ids = encoder.chat_ids(&chat(), &tools()).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), theirs, "{name}");
    }
}
