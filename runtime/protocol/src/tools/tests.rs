use super::*;
use proptest::prelude::*;

fn tools() -> Vec<String> {
    ["f", "g"].map(str::to_owned).to_vec()
}

fn read(dialect: Dialect, text: &str, ended: bool) -> Reading {
    dialect.read(text, ended, &tools())
}

fn call(name: &str, arguments: &str) -> Call {
    Call { name: name.into(), arguments: arguments.into() }
}

fn text(content: &str) -> Reading {
    Reading { content: content.into(), calls: Vec::new() }
}

#[test]
fn a_template_tells_its_dialect() {
    let of = |template: &str| Dialect::of(template);
    assert_eq!(of("{% for tool in tools %}{% endfor %}<tool_call>"), Some(Dialect::Hermes));
    assert_eq!(of("{{ tools }} Environment: ipython"), Some(Dialect::Llama));
    assert_eq!(of("{{ tools }}[TOOL_CALLS]"), Some(Dialect::MistralList));
    assert_eq!(of("{{ tools }}[TOOL_CALLS]x[ARGS]"), Some(Dialect::MistralArguments));
    assert_eq!(of("{{ messages }}"), None);
    assert_eq!(of("{{ tools }}"), None, "calls cannot be told from text");
    for dialect in DIALECTS {
        assert_eq!(Dialect::named(dialect.name()), Some(dialect));
    }
}

#[test]
fn tagged_calls_are_found_between_and_behind_text() {
    let whole = "Let me look.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>\n\
                 <tool_call>{\"name\":\"g\",\"parameters\":{}}</tool_call>";
    let expected = Reading { content: "Let me look.".into(), calls: vec![call("f", "{\"x\": 1}"), call("g", "{}")] };
    assert_eq!(read(Dialect::Hermes, whole, true), expected);
    assert_eq!(read(Dialect::Hermes, whole.trim_end_matches("</tool_call>"), true), expected, "the end ends it");
    let unclosed = whole.replacen("</tool_call>", "", 1);
    assert_eq!(read(Dialect::Hermes, &unclosed, true), expected, "the next one ends it");
}

#[test]
fn what_is_no_call_stays_text() {
    for no_call in ["a < b", "<tool_call>nothing</tool_call> to call", "ends with <tool_c", "<tool_call>{"] {
        assert_eq!(read(Dialect::Hermes, no_call, true), text(no_call), "{no_call}");
    }
    for no_call in ["{\"answer\": 42}", "{\"name\": \"h\", \"parameters\": {}}", "{", "a {\"name\": \"f\"}"] {
        assert_eq!(read(Dialect::Llama, no_call, true), text(no_call), "{no_call}");
    }
    for no_call in ["[1] is", "[TOOL_CALLS] are", "[TOOL_CALLS][1]", "[TOOL_CALLS]f[ARGS]x", "[TOOL"] {
        assert_eq!(read(Dialect::MistralList, no_call, true), text(no_call), "{no_call}");
    }
    assert_eq!(read(Dialect::Hermes, "ends with <tool_c", false).content, "ends with");
}

#[test]
fn a_bare_call_is_one_of_a_tool_that_there_is() {
    let one = r#"{"name": "f", "parameters": {"x": 1}}"#;
    let expected = vec![call("f", "{\"x\": 1}")];
    for written in [one.to_owned(), format!("<|python_tag|>{one}"), format!("\n {one}")] {
        assert_eq!(read(Dialect::Llama, &written, true).calls, expected, "{written}");
    }
    let both = format!("{one}; {}", one.replace("\"f\"", "\"g\""));
    assert_eq!(read(Dialect::Llama, &both, true).calls.len(), 2);
    assert_eq!(read(Dialect::Llama, "<|python_tag|>print(1)", true), text("print(1)"));
}

#[test]
fn mistral_s_calls_are_a_list_or_one_by_one() {
    let expected = Reading { content: "Yes.".into(), calls: vec![call("f", "{\"x\": 1}"), call("g", "{}")] };
    let list = r#"Yes.[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]"#;
    assert_eq!(read(Dialect::MistralList, list, true), expected);
    let each = r#"Yes.[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}"#;
    assert_eq!(read(Dialect::MistralArguments, each, true), expected);
}

#[test]
fn long_arguments_are_told_as_they_come() {
    let cases = [
        (Dialect::Hermes, r#"<tool_call>{"name": "f", "arguments": {"text": "Once upon"#),
        (Dialect::Llama, r#"{"name": "f", "parameters": {"text": "Once upon"#),
        (Dialect::MistralList, r#"[TOOL_CALLS][{"name": "f", "arguments": {"text": "Once upon"#),
        (Dialect::MistralArguments, r#"[TOOL_CALLS]f[ARGS]{"text": "Once upon"#),
    ];
    for (dialect, begun) in cases {
        for ended in [false, true] {
            let reading = read(dialect, begun, ended);
            assert_eq!(reading.calls, [call("f", r#"{"text": "Once upon"#)], "{dialect:?} {ended}");
        }
    }
}

#[test]
fn only_what_is_wanted_or_strict_is_held_to_a_grammar() {
    let tool = |strict| Tool { name: "f".into(), parameters: any_object(), strict };
    let required = Wanted { required: true, ..Wanted::default() };
    for dialect in DIALECTS {
        assert_eq!(dialect.grammar(&[tool(false)], &Wanted::default()), None);
        assert!(dialect.grammar(&[tool(true)], &Wanted::default()).unwrap().contains("TEXT"));
        let named = Wanted { function: Some("f".into()), ..required.clone() };
        let other = Tool { name: "other".into(), ..tool(true) };
        assert!(!dialect.grammar(&[tool(false), other], &named).unwrap().contains("other"));
    }
}

#[test]
fn openai_s_list_is_read() {
    let list = json!([
        { "type": "function", "function": { "name": "f", "strict": true, "parameters": { "type": "object" } } },
        { "type": "function", "function": { "name": "g" } },
        { "type": "other" },
    ]);
    let tools = Tool::list(&list);
    assert_eq!(
        tools.iter().map(|tool| (tool.name.as_str(), tool.strict)).collect::<Vec<_>>(),
        [("f", true), ("g", false)]
    );
}

proptest! {
    #[test]
    fn what_has_been_told_is_never_taken_back(parts in prop::collection::vec(prop::sample::select(vec![
        "<tool_call>", "</tool_call>", "<tool", "_call>", " ", "\n", "x", "{", "}", "é", ",", ";", "[", "]", "f",
        "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", r#"{"name": "f", "arguments": {"x": "y"}}"#,
        r#"{"name":"g","parameters":{"#, r#""x": [1, 2]"#, r#"{"name": "f""#, r#""arguments": "{}""#,
    ]), 0..12)) {
        let whole: String = parts.concat();
        for dialect in DIALECTS {
            let mut before = Reading::default();
            let ends = whole.char_indices().map(|(at, _)| at).chain([whole.len()]);
            let readings = ends.map(|end| read(dialect, &whole[..end], false)).chain([read(dialect, &whole, true)]);
            for reading in readings.collect::<Vec<_>>() {
                prop_assert!(reading.content.starts_with(&before.content), "{:?} {:?} {:?}", dialect, before, reading);
                prop_assert!(reading.calls.len() >= before.calls.len(), "{:?} {:?} {:?}", dialect, before, reading);
                for (number, (old, new)) in before.calls.iter().zip(&reading.calls).enumerate() {
                    let grows = new.arguments.starts_with(&old.arguments);
                    let may_grow = number + 1 == before.calls.len();
                    let kept = old.name == new.name && if may_grow { grows } else { old == new };
                    prop_assert!(kept, "{:?} {:?} {:?}", dialect, old, new);
                }
                before = reading;
            }
        }
    }
}
