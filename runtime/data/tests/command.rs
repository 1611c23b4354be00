//! The command as users call it.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/tokenizer.rs"]
mod tokenizer;

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};
use tempfile::TempDir;

fn vicuna_data(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vicuna-data")).args(arguments).output().unwrap()
}

fn succeeds(arguments: &[&str]) -> String {
    let output = vicuna_data(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fails(arguments: &[&str]) -> String {
    let output = vicuna_data(arguments);
    assert!(!output.status.success(), "{arguments:?} succeeded");
    String::from_utf8(output.stderr).unwrap()
}

fn written(folder: &TempDir, name: &str, text: &str) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn path(folder: &TempDir, name: &str) -> String {
    folder.path().join(name).display().to_string()
}

/// Long enough in two pairs to be cut at 60 tokens of a byte each, and more.
fn records(count: usize) -> Vec<Value> {
    let turn = |role: &str, text: String| json!({ "role": role, "content": text });
    let record = |index: usize| {
        let pairs = (0..4).flat_map(|pair| {
            [turn("user", format!("Question {pair} of {index}?")), turn("assistant", format!("Answer {pair}."))]
        });
        json!({ "id": index.to_string(), "messages": pairs.collect::<Vec<_>>() })
    };
    (0..count).map(record).collect()
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn tokenizer(folder: &TempDir) -> String {
    written(folder, "tokenizer.json", &tokenizer::document(&["<|im_start|>", "<|im_end|>"]).to_string())
}

#[test]
fn cleaning_writes_what_is_kept_and_reports_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let vendor = r#"{"id":"v","conversations":[{"from":"human","value":"Who?"},{"from":"gpt","value":"ChatGPT"}]}"#;
    let good = r#"{"id":"g","conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"<p>Ho</p>"}]}"#;
    let dirty = written(&folder, "dirty.jsonl", &format!("{vendor}\n{good}\n"));
    let (out, report) = (path(&folder, "clean.json"), path(&folder, "report.json"));
    let said = succeeds(&["clean", &dirty, "--out", &out, "--report", &report, "--format", "openai"]);
    assert!(said.starts_with("1 of 2 conversations kept"), "{said}");
    let kept: Value = serde_json::from_slice(&std::fs::read(&out).unwrap()).unwrap();
    assert_eq!(
        kept,
        json!([{ "id": "g", "messages": [{ "role": "user", "content": "Hi" }, { "role": "assistant", "content": "Ho" }] }])
    );
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!((&report["records"], &report["kept"]["conversations"]), (&json!(2), &json!(1)));
    assert!(!Path::new(&format!("{out}.partial")).exists());
}

/// The golden file has every published defect, each in a record of its own.
#[test]
fn a_dirty_file_becomes_the_clean_one_and_its_malformed_records_are_told() {
    let golden = |name: &str| format!("{}/tests/golden/{name}", env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let (out, report) = (path(&folder, "clean.jsonl"), path(&folder, "report.json"));
    let dirty = golden("dirty.jsonl");
    let said = succeeds(&["clean", &dirty, "--language", "en", "--out", &out, "--report", &report]);
    assert!(said.starts_with("10 of 24 conversations kept"), "{said}");
    assert!(
        said.contains("dropped record 20 (line 20) of dirty.jsonl (malformed records: conversations[].value"),
        "{said}"
    );
    let kept = lines(&std::fs::read_to_string(&out).unwrap());
    assert_eq!(kept, lines(&std::fs::read_to_string(golden("clean.jsonl")).unwrap()));
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!((&report["steps"][0]["step"], &report["steps"][0]["dropped"]), (&json!("malformed records"), &json!(4)));
    // Nothing is left out unasked.
    let said = fails(&["stats", &dirty]);
    assert!(
        said.contains("record 20 (line 20), field conversations[0].value") && said.contains("vicuna-data clean"),
        "{said}"
    );
}

#[test]
fn addresses_are_read_like_paths_and_lines_go_to_the_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("set")).unwrap();
    written(&folder, "set/a.json", &Value::from(records(2)).to_string());
    written(&folder, "set/b.jsonl", &format!("{}\n", records(3)[2]));
    let by_address = succeeds(&["clean", &format!("file://{}", path(&folder, "set"))]);
    assert_eq!(lines(&by_address).len(), 3);
    assert_eq!(by_address, succeeds(&["clean", &path(&folder, "set")]));
}

#[test]
fn splitting_loses_nothing_and_keeps_the_two_sides_apart() {
    let folder = tempfile::tempdir().unwrap();
    let data = written(&folder, "data.json", &Value::from(records(100)).to_string());
    let (tokens, aside) = (tokenizer(&folder), path(&folder, "aside.jsonl"));
    let common = ["split", &data, "--tokenizer", &tokens, "--template", "chatml", "--at", "100"];
    let report = path(&folder, "report.json");
    let side = ["--hold-out", "0.2", "--held-out", &aside, "--report", &report];
    let trained = lines(&succeeds(&[&common[..], &side[..]].concat()));
    let held_out = lines(&std::fs::read_to_string(&aside).unwrap());
    let ids = |records: &[Value]| -> std::collections::BTreeSet<String> {
        records.iter().map(|record| record["id"].as_str().unwrap().split('_').next().unwrap().to_owned()).collect()
    };
    assert!(ids(&trained).is_disjoint(&ids(&held_out)) && !held_out.is_empty());
    assert_eq!(ids(&trained).len() + ids(&held_out).len(), 100);
    let turns: usize =
        trained.iter().chain(&held_out).map(|piece| piece["conversations"].as_array().unwrap().len()).sum();
    assert_eq!(turns, 800);
    let report: Value = serde_json::from_slice(&std::fs::read(&report).unwrap()).unwrap();
    assert_eq!((&report["heldOut"], &report["split"]["at"]), (&json!(ids(&held_out).len()), &json!(100)));
    assert!(trained.len() > ids(&trained).len());
}

#[test]
fn statistics_tell_what_a_training_would_see() {
    let folder = tempfile::tempdir().unwrap();
    let data = written(&folder, "data.json", &Value::from(records(20)).to_string());
    let said =
        succeeds(&["stats", &data, "--tokenizer", &tokenizer(&folder), "--template", "chatml", "--max-length", "100"]);
    assert!(said.contains("20 sequences") && said.contains("20 cut at the length limit"), "{said}");
    let shown =
        succeeds(&["inspect", &data, "--tokenizer", &tokenizer(&folder), "--template", "chatml", "--count", "1"]);
    assert!(shown.contains("Question 0 of 0?") && shown.contains("\x1b[4;32m"), "{shown}");
    let encoded = succeeds(&["encode", &data, "--tokenizer", &tokenizer(&folder), "--template", "chatml"]);
    assert_eq!(lines(&encoded).len(), 20);
}

#[test]
fn of_named_templates_the_default_one_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let data = written(&folder, "data.json", &serde_json::to_string(&records(1)).unwrap());
    let source =
        |end: &str| format!("{{% for m in messages %}}{{{{ m['content'] + '<|im_end|>{end}' }}}}{{% endfor %}}");
    let list =
        json!([{ "name": "tool_use", "template": source("tool") }, { "name": "default", "template": source("") }]);
    let encoded = |name: &str, template: &Value| {
        let settings = written(&folder, name, &json!({ "chat_template": template }).to_string());
        succeeds(&["encode", &data, "--tokenizer", &tokenizer(&folder), "--chat-template", &settings])
    };
    assert_eq!(encoded("list.json", &list), encoded("one.json", &json!(source(""))));
}

#[test]
fn identity_is_a_dataset() {
    let folder = tempfile::tempdir().unwrap();
    let out = path(&folder, "identity.json");
    succeeds(&["identity", "--name", "Willow", "--organization", "Spot Labs", "--count", "7", "--out", &out]);
    let said = succeeds(&["stats", &out]);
    assert!(said.starts_with("7 of 7 conversations kept"), "{said}");
}

#[test]
fn errors_name_the_file_the_record_and_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let broken =
        written(&folder, "broken.jsonl", "{\"messages\":[]}\n{\"messages\":[{\"role\":\"tool\",\"content\":\"\"}]}\n");
    let said = fails(&["stats", &broken]);
    assert!(
        said.contains("broken.jsonl: record 2 (line 2), field messages[0].role") && said.contains("use system"),
        "{said}"
    );
    assert_eq!(said.matches("record 2").count(), 1, "{said}");
    let said = fails(&["stats", &path(&folder, "gone.json")]);
    assert!(said.contains("gone.json") && said.contains("check the path"), "{said}");
    let said = fails(&["stats", &broken, "--language", "klingon"]);
    assert!(said.contains("there is no language \"klingon\"; use one of"), "{said}");
    let whole = std::fs::read_to_string(tokenizer(&folder)).unwrap();
    let cut = written(&folder, "cut.json", &whole[..whole.find(r#""decoder""#).unwrap() + 20]);
    let said = fails(&["stats", &broken, "--tokenizer", &cut]);
    assert!(said.contains("cut.json") && !said.contains("panicked"), "{said}");
    let said = fails(&["stats", &broken, "--tokenizer", &tokenizer(&folder)]);
    assert!(said.contains("vicuna_v1.1") && said.contains("<|im_start|>"), "{said}");
}
