//! Completions that must be JSON, or match an expression, or follow a grammar: which tokens may come next
//! (`llguidance`). The state is a function of the tokens so far, so that a completion continues elsewhere.

use crate::detokenize::TokenBytes;
use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::fmt;
use std::sync::Arc;
use vicuna_protocol::inference::generate::Format;

/// Bytes of a schema, an expression or a grammar at most.
const MAX_BYTES: usize = 1 << 16;
/// Of the schemas of all tools together.
const MAX_TOOLS_BYTES: usize = 1 << 18;

/// Makes grammars for one vocabulary.
#[derive(Clone)]
pub struct Grammars {
    factory: Arc<ParserFactory>,
    /// Stands for all tokens that may end a completion.
    end_token: u32,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Grammars").field("end_token", &self.end_token).finish_non_exhaustive()
    }
}

impl Grammars {
    /// `size` tokens, of which `end_token` ends a completion.
    pub fn new(bytes: &TokenBytes, size: usize, end_token: u32) -> Result<Self, String> {
        let words: Vec<Vec<u8>> = (0..size as u32).map(|id| bytes.get(id).to_vec()).collect();
        let trie = TokTrie::from(&TokRxInfo::new(size as u32, end_token), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        factory.quiet();
        Ok(Self { factory: Arc::new(factory), end_token })
    }

    /// The error is for the client.
    pub fn of(&self, format: &Format) -> Result<Option<Grammar>, String> {
        let (what, text) = match format {
            Format::JsonObject(false) => return Ok(None),
            Format::JsonObject(true) => ("JSON schema", r#"{ "type": "object" }"#),
            Format::JsonSchema(text) => ("JSON schema", text.as_str()),
            Format::Regex(text) => ("regular expression", text.as_str()),
            Format::Grammar(text) => ("grammar", text.as_str()),
        };
        if text.len() > MAX_BYTES {
            return Err(format!("the {what} has {} bytes; at most {MAX_BYTES} are allowed", text.len()));
        }
        let grammar = match format {
            Format::Regex(_) => TopLevelGrammar::from_regex(text),
            Format::Grammar(_) => TopLevelGrammar::from_lark(text.to_owned()),
            _ => TopLevelGrammar::from_json_schema(
                serde_json::from_str(text).map_err(|error| format!("the JSON schema is not valid JSON: {error}"))?,
            ),
        };
        let made = self.make(grammar).map_err(|error| format!("the {what} cannot be used: {error}"))?;
        Ok(Some(made))
    }

    /// `lark`: as a dialect of tools writes it, with the schemas of its tools.
    pub fn of_calls(&self, lark: &str) -> Result<Grammar, String> {
        if lark.len() > MAX_TOOLS_BYTES {
            return Err(format!(
                "the schemas of the tools have {} bytes; at most {MAX_TOOLS_BYTES} are allowed where calls are held to them",
                lark.len()
            ));
        }
        let grammar = TopLevelGrammar::from_lark(lark.to_owned());
        self.make(grammar).map_err(|error| format!("the schemas of the tools cannot be used: {error}"))
    }

    fn make(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        let parser = self.factory.create_parser(grammar).map_err(|error| error.to_string())?;
        Ok(Grammar { matcher: Matcher::new(Ok(parser)), end_token: self.end_token })
    }
}

/// Where one completion is in its grammar.
pub struct Grammar {
    matcher: Matcher,
    end_token: u32,
}

impl fmt::Debug for Grammar {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Grammar").field("complete", &self.is_complete()).finish_non_exhaustive()
    }
}

impl Grammar {
    /// Makes the logits of tokens that may not come next -∞. `end_tokens` may where the text is whole.
    pub fn restrict(&mut self, logits: &mut [f32], end_tokens: &[u32]) -> Result<(), String> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(|error| format!("the grammar failed: {error}"))?;
        let may_end = allowed.is_allowed(self.end_token);
        for (id, logit) in logits.iter_mut().enumerate() {
            let ends = end_tokens.contains(&(id as u32));
            if !(allowed.get(id) || ends && may_end) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    /// Takes the next token of the completion.
    pub fn take(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(|error| format!("the completion leaves its grammar: {error}"))
    }

    /// Nothing can follow.
    pub fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;
    use rand::seq::IteratorRandom;
    use serde_json::json;
    use vicuna_model::tiny;
    use vicuna_protocol::tools::{Call, Dialect, Tool, Wanted};

    fn grammars() -> Grammars {
        Grammars::new(&TokenBytes::of(&tiny::tokenizer(), &[]), tiny::config().vocab, 2).unwrap()
    }

    fn allowed(grammar: &mut Grammar) -> String {
        let tokenizer = tiny::tokenizer();
        let mut logits = vec![0.0; tiny::config().vocab];
        grammar.restrict(&mut logits, &[2]).unwrap();
        let texts = (0..logits.len() as u32).filter(|id| logits[*id as usize] == 0.0).map(|id| match id {
            2 => "END".to_owned(),
            id => tokenizer.decode(&[id], false).unwrap(),
        });
        texts.collect()
    }

    #[test]
    fn only_what_the_schema_allows_may_come_and_the_end_only_when_it_is_whole() {
        let schema = r#"{"enum": ["yes", "no"]}"#.to_owned();
        let mut grammar = grammars().of(&Format::JsonSchema(schema)).unwrap().unwrap();
        let tokenizer = tiny::tokenizer();
        assert_eq!(allowed(&mut grammar), "\"");
        for id in tokenizer.encode("\"no\"", false).unwrap().get_ids() {
            assert!(!grammar.is_complete());
            grammar.take(*id).unwrap();
        }
        assert!(grammar.is_complete() || allowed(&mut grammar) == "END");
    }

    #[test]
    fn a_token_outside_the_grammar_is_an_error() {
        let mut grammar = grammars().of(&Format::JsonObject(true)).unwrap().unwrap();
        let ids = tiny::tokenizer().encode("x", false).unwrap().get_ids().to_vec();
        assert!(grammar.take(ids[0]).is_err());
    }

    #[test]
    fn expressions_and_grammars_say_what_may_come() {
        for format in [Format::Regex("no|7".to_owned()), Format::Grammar("start: \"no\" | \"7\"".to_owned())] {
            let mut grammar = grammars().of(&format).unwrap().unwrap();
            let first = allowed(&mut grammar);
            assert!(first.contains('n') && first.contains('7') && !first.contains('x'), "{first}");
            let ids = tiny::tokenizer().encode("7", false).unwrap().get_ids().to_vec();
            grammar.take(ids[0]).unwrap();
            assert!(grammar.is_complete() || allowed(&mut grammar) == "END");
        }
        let refused = |format: Format| grammars().of(&format).unwrap_err();
        assert!(refused(Format::Regex("(".to_owned())).contains("the regular expression cannot be used"));
        assert!(refused(Format::Grammar("start: nothing".to_owned())).contains("the grammar cannot be used"));
    }

    fn weather(strict: bool) -> Vec<Tool> {
        let parameters = json!({
            "type": "object", "properties": { "in": { "enum": ["Rome", "Oslo"] } }, "required": ["in"],
            "additionalProperties": false,
        });
        let tool = |name: &str| Tool { name: name.to_owned(), parameters: parameters.clone(), strict };
        vec![tool("now"), tool("later")]
    }

    /// What a model without any sense says that is held to `lark`: the end as soon as it may, from `patience` tokens on.
    fn babble(lark: &str, patience: usize, seed: u64) -> String {
        let mut grammar = grammars().of_calls(lark).unwrap_or_else(|error| panic!("{error}: {lark}"));
        let tokenizer = tiny::tokenizer();
        let mut random = StdRng::seed_from_u64(seed);
        let (mut said, bytes) = (Vec::new(), TokenBytes::of(&tokenizer, &[]));
        for count in 0..2000 {
            if grammar.is_complete() {
                break;
            }
            let mut logits = vec![0.0; tiny::config().vocab];
            grammar.restrict(&mut logits, &[2]).unwrap();
            if count >= patience && logits[2] == 0.0 {
                break;
            }
            let allowed = (0..logits.len() as u32).filter(|id| logits[*id as usize] == 0.0 && *id != 2);
            let Some(token) = allowed.choose(&mut random) else { break };
            grammar.take(token).unwrap();
            said.extend_from_slice(bytes.get(token));
        }
        String::from_utf8_lossy(&said).into_owned()
    }

    const DIALECTS: [Dialect; 4] = [Dialect::Hermes, Dialect::Llama, Dialect::MistralList, Dialect::MistralArguments];

    fn is_sound(call: &Call) -> bool {
        let arguments: serde_json::Value = serde_json::from_str(&call.arguments).unwrap_or_default();
        let place = arguments["in"].as_str().unwrap_or_default();
        ["now", "later"].contains(&call.name.as_str()) && ["Rome", "Oslo"].contains(&place)
    }

    #[test]
    fn what_must_be_a_call_is_read_as_one_whatever_the_model_would_rather_say() {
        let names = ["now", "later"].map(str::to_owned);
        for dialect in DIALECTS {
            for (seed, single) in (0..12).zip([true, false].into_iter().cycle()) {
                let wanted = Wanted { required: true, single, ..Wanted::default() };
                let said = babble(&dialect.grammar(&weather(false), &wanted).unwrap(), 0, seed);
                let reading = dialect.read(&said, true, &names);
                assert!(!reading.calls.is_empty() && reading.calls.iter().all(is_sound), "{dialect:?}: {said}");
                assert_eq!(reading.content, "", "{dialect:?}: {said}");
            }
            let function = Some("later".to_owned());
            let wanted = Wanted { required: true, function, single: true, ..Wanted::default() };
            let said = babble(&dialect.grammar(&weather(false), &wanted).unwrap(), 0, 1);
            assert_eq!(dialect.read(&said, true, &names).calls[0].name, "later", "{said}");
        }
    }

    #[test]
    fn a_strict_tool_leaves_text_free_and_every_call_sound() {
        let names = ["now", "later"].map(str::to_owned);
        let calls = [
            "Well.<tool_call>{\"name\": \"now\", \"arguments\": {\"in\": \"Rome\"}}</tool_call>",
            "{\"name\": \"now\", \"parameters\": {\"in\": \"Rome\"}}",
            "Well.[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {\"in\": \"Rome\"}}]",
            "Well.[TOOL_CALLS]now[ARGS]{\"in\": \"Rome\"}",
        ];
        for (dialect, call) in DIALECTS.into_iter().zip(calls) {
            let lark = dialect.grammar(&weather(true), &Wanted::default()).unwrap();
            for seed in 0..8 {
                let said = babble(&lark, 20, seed);
                assert!(dialect.read(&said, true, &names).calls.iter().all(is_sound), "{dialect:?}: {said}");
            }
            assert_eq!(taken(&lark, call), call.len(), "{dialect:?}");
            let astray = call.replace("Rome", "Roma");
            assert!(taken(&lark, &astray) < astray.len(), "{dialect:?}");
            assert_eq!(taken(&lark, "Just a text."), 12, "{dialect:?}");
        }
    }

    /// How many letters of a text the grammar lets through.
    fn taken(lark: &str, text: &str) -> usize {
        let mut grammar = grammars().of_calls(lark).unwrap();
        let tokenizer = tiny::tokenizer();
        let id = |letter: char| tokenizer.encode(letter.to_string(), false).unwrap().get_ids()[0];
        text.chars().take_while(|letter| grammar.take(id(*letter)).is_ok()).count()
    }

    #[test]
    fn an_answer_that_is_no_call_can_be_held_to_a_schema_of_its_own() {
        for dialect in DIALECTS {
            let answer = Some(json!({ "enum": [42] }));
            let wanted = Wanted { answer, ..Wanted::default() };
            let lark = dialect.grammar(&weather(false), &wanted).unwrap();
            assert_eq!((taken(&lark, "42"), taken(&lark, "43")), (2, 1), "{dialect:?}");
        }
    }

    #[test]
    fn a_schema_that_is_none_is_the_clients_mistake() {
        let refused = |text: &str| grammars().of(&Format::JsonSchema(text.to_owned())).unwrap_err();
        assert!(refused("{").contains("not valid JSON"));
        assert!(refused(r#"{"type": "wizard"}"#).contains("cannot be used"));
        assert!(refused(&" ".repeat(MAX_BYTES + 1)).contains("bytes"));
        assert!(grammars().of(&Format::JsonObject(false)).unwrap().is_none());
    }
}
