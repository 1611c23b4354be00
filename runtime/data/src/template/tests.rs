use super::*;
use proptest::prelude::*;
use std::path::PathBuf;

#[path = "../../tests/support/tokenizer.rs"]
mod tokenizer;

/// One token a byte, and these control tokens after them.
pub fn byte_tokenizer(control: &[&str]) -> Tokenizer {
    Tokenizer::from_bytes(tokenizer::document(control).to_string()).unwrap()
}

pub const CHATML_TOKENS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

fn chatml() -> (Tokenizer, Encoder) {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let encoder = Template::named(CHATML).unwrap().bind(&tokenizer).unwrap();
    (tokenizer, encoder)
}

/// A tokenizer that has the control tokens of every template, and each template on it.
fn every_template() -> (Tokenizer, Vec<Encoder>) {
    let tokens: Vec<&str> = NAMED.iter().flat_map(|known| known.control_tokens.iter().copied()).collect();
    let mut distinct = tokens.clone();
    distinct.sort_unstable();
    distinct.dedup();
    let tokenizer = byte_tokenizer(&distinct);
    let encoders = NAMES.iter().map(|name| Template::named(name).unwrap().bind(&tokenizer).unwrap());
    let encoders = encoders.collect();
    (tokenizer, encoders)
}

/// What is learned of a reply by the template's own definition: its text and what ends it.
fn learned_of(tokenizer: &Tokenizer, encoder: &Encoder, reply: &str) -> Vec<u32> {
    let control = |token: &str| vec![tokenizer.token_to_id(token).unwrap()];
    let (text, end) = match encoder.template().name() {
        VICUNA_V0 => (format!(" {reply}"), plain(tokenizer, "\n###")),
        VICUNA_V1_1 => (format!(" {reply}"), control("</s>")),
        LLAMA_2 => (format!(" {} ", reply.trim()), control("</s>")),
        LLAMA_3 => (reply.trim().to_owned(), control("<|eot_id|>")),
        CHATML => (reply.to_owned(), control("<|im_end|>")),
        other => panic!("{other} is not described here"),
    };
    [plain(tokenizer, &text), end].concat()
}

/// The ids of text that holds no control token, by the tokenizer alone.
fn plain(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut tokenizer = tokenizer.clone();
    tokenizer.set_encode_special_tokens(true);
    tokenizer.encode(text, false).unwrap().get_ids().to_vec()
}

fn learned(example: &Example) -> Vec<u32> {
    let labels = example.labels();
    labels.into_iter().filter(|label| *label != IGNORED).map(|label| label as u32).collect()
}

fn text() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        6 => "[a-zA-Z ,.!?\n]{1,12}",
        2 => "\\PC{1,4}",
        1 => Just("<|im_end|>".to_owned()),
        1 => Just("<|im_start|>system\n".to_owned()),
        1 => Just("</s>".to_owned()),
        1 => Just("<|<|im_end|>".to_owned()),
        1 => Just("<|eot_id|>".to_owned()),
        1 => Just(" </s><s>[INST] ".to_owned()),
        1 => Just("\n### Human: ".to_owned()),
    ];
    // A reply of blanks alone is dropped by cleaning, so there is always a letter.
    proptest::collection::vec(word, 0..5).prop_map(|words| format!("{}x", words.concat()))
}

fn conversation() -> impl Strategy<Value = Vec<Turn>> {
    let pairs = proptest::collection::vec((text(), text()), 1..4);
    (proptest::option::of(text()), pairs).prop_map(|(system, pairs)| {
        let mut turns: Vec<_> = system.into_iter().map(Turn::system).collect();
        for (question, reply) in pairs {
            turns.extend([Turn::user(question), Turn::assistant(reply)]);
        }
        turns
    })
}

proptest! {
    #[test]
    fn labels_are_exactly_the_replies_and_their_end_tokens(turns in conversation()) {
        let (tokenizer, encoders) = every_template();
        for encoder in encoders {
            let example = encoder.example(&turns).unwrap();
            let replies = turns.iter().filter(|turn| turn.role == Role::Assistant);
            let expected: Vec<u32> =
                replies.flat_map(|turn| learned_of(&tokenizer, &encoder, &turn.content)).collect();
            prop_assert_eq!(learned(&example), expected, "{}", encoder.template().name());
            for (id, label) in example.ids.iter().zip(example.labels()) {
                prop_assert!(label == IGNORED || label == i64::from(*id));
            }
        }
    }

    #[test]
    fn what_people_write_never_becomes_a_control_token(turns in conversation()) {
        let (_, encoders) = every_template();
        let harmless: Vec<Turn> = turns.iter().map(|turn| Turn::new(turn.role, "x")).collect();
        for encoder in encoders {
            let control = |turns: &[Turn]| -> Vec<u32> {
                encoder.example(turns).unwrap().ids.into_iter().filter(|id| *id >= 256).collect()
            };
            prop_assert_eq!(control(&turns), control(&harmless), "{}", encoder.template().name());
        }
    }

    #[test]
    fn a_prompt_is_how_the_trained_conversation_begins(turns in conversation()) {
        let (_, encoders) = every_template();
        for encoder in encoders {
            let example = encoder.example(&turns).unwrap();
            let labels = example.labels();
            for (index, turn) in turns.iter().enumerate() {
                if turn.role == Role::Assistant {
                    let prompt = encoder.prompt_ids(&turns[..index]).unwrap();
                    prop_assert!(example.ids.starts_with(&prompt), "{}", encoder.template().name());
                    prop_assert_eq!(labels[prompt.len() - 1], IGNORED);
                    prop_assert_ne!(labels[prompt.len()], IGNORED);
                }
            }
        }
    }

    #[test]
    fn the_text_is_what_the_template_writes(turns in conversation()) {
        let (tokenizer, encoders) = every_template();
        for encoder in encoders {
            let ids = encoder.example(&turns).unwrap().ids;
            prop_assert_eq!(tokenizer.decode(&ids, false).unwrap(), encoder.render(&turns, false).unwrap());
        }
    }
}

#[test]
fn every_template_is_laid_out_as_published() {
    let (tokenizer, encoders) = every_template();
    let turns = [Turn::system("S"), Turn::user("U"), Turn::assistant("A"), Turn::user("V")];
    let expected = [
        "<s>S\n\n### Human: U\n### Assistant: A\n### Human: V\n### Assistant:",
        "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT:",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    ];
    for (encoder, expected) in encoders.iter().zip(expected) {
        let ids = encoder.prompt_ids(&turns).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), expected, "{}", encoder.template().name());
    }
}

#[test]
fn chatml_is_written_without_a_default_system_prompt() {
    let (tokenizer, encoder) = chatml();
    let ids = encoder.prompt_ids(&[Turn::user("Hi")]).unwrap();
    let text = tokenizer.decode(&ids, false).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    assert_eq!(encoder.end_tokens(), [258]);
}

#[test]
fn a_model_s_own_template_serves_and_trains() {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let source = "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + m['role'] + '\n' + m['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    let encoder = Template::from_jinja(source, "", "").unwrap().bind(&tokenizer).unwrap();
    let turns = [Turn::user(" Hi "), Turn::assistant("Ho<|im_end|>")];
    let example = encoder.example(&turns).unwrap();
    let text = tokenizer.decode(&example.ids, false).unwrap();
    assert!(text.starts_with("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>"));
    let mut expected = plain(&tokenizer, "Ho<|im_end|>");
    expected.push(258);
    assert_eq!(learned(&example), expected);
    assert!(encoder.template().name().starts_with("jinja-"));
}

#[test]
fn the_jinja_of_a_named_template_is_that_template() {
    for name in NAMES {
        let named = Template::named(name).unwrap();
        assert_eq!(Template::from_jinja(named.jinja(), "", "").unwrap(), named);
    }
}

#[test]
fn a_template_that_contradicts_the_tokenizer_names_both() {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let error = Template::named(VICUNA_V1_1).unwrap().bind(&tokenizer).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("vicuna_v1.1") && message.contains("<|im_end|>"), "{message}");
    let endless = Template::from_jinja("{{ messages[0]['content'] }}", "", "").unwrap();
    assert!(matches!(endless.bind(&tokenizer), Err(TemplateError::NoEnd { .. })));
    let unknown = Template::named("alpaca").unwrap_err().to_string();
    assert!(NAMES.iter().all(|name| unknown.contains(name)), "{unknown}");
    for name in NAMES.iter().filter(|name| **name != CHATML) {
        let error = Template::named(name).unwrap().bind(&tokenizer).unwrap_err();
        assert!(matches!(error, TemplateError::MissingToken { .. }), "{name}");
    }
    assert!(matches!(Template::from_jinja("{% if %}", "", ""), Err(TemplateError::Syntax { .. })));
}

#[test]
fn a_reply_that_is_not_to_be_learned_is_read_only() {
    let (tokenizer, encoders) = every_template();
    let mut turns = vec![Turn::user("a"), Turn::assistant("b"), Turn::user("c"), Turn::assistant("d")];
    for encoder in encoders {
        turns[1].learned = true;
        let all = encoder.example(&turns).unwrap();
        turns[1].learned = false;
        let one = encoder.example(&turns).unwrap();
        assert_eq!(one.ids, all.ids);
        assert_eq!(learned(&one), learned_of(&tokenizer, &encoder, "d"), "{}", encoder.template().name());
    }
}

#[test]
fn cut_examples_learn_what_is_left() {
    let whole = Example { ids: (0..10).collect(), learned: vec![0..2, 4..6, 8..10], ends: Vec::new() };
    let cut = |length: usize| {
        let mut example = whole.clone();
        example.truncate(length);
        (example.trained_tokens(), example.labels())
    };
    assert_eq!(cut(10).0, 5);
    assert_eq!(cut(5), (2, vec![0, 1, IGNORED, IGNORED, 4]));
    assert_eq!(cut(4), (1, vec![0, 1, IGNORED, IGNORED]));
    assert_eq!(cut(0), (0, Vec::new()));
}

/// More replies than are looked for one by one.
fn long_conversation() -> Vec<Turn> {
    let replies = [" blank before", "\n\nlines around\n\n", "plain", "  ", "</s> and <|im_end|>", "\n###"];
    let pair =
        |index: usize| [Turn::user(format!("question {index}")), Turn::assistant(replies[index % replies.len()])];
    (0..4 * RENDERED_APART).flat_map(pair).collect()
}

#[test]
fn many_replies_are_found_as_few_are() {
    let (_, encoders) = every_template();
    let turns = long_conversation();
    for encoder in encoders {
        let name = encoder.template().name().to_owned();
        let guarded = encoder.guarded(&turns);
        let text = encoder.render(&guarded, false).unwrap();
        let marked = encoder.replies(&guarded, &text, false).unwrap();
        let replies = guarded.iter().enumerate().filter(|(_, turn)| turn.role == Role::Assistant);
        for ((index, turn), found) in replies.zip(&marked) {
            let before = encoder.render(&guarded[..index], true).unwrap();
            let expected = encoder.reply(&before, &text, turn).unwrap();
            assert_eq!((&found.content, &found.end), (&expected.content, &expected.end), "{name}, turn {index}");
        }
        let (example, prompt) = (encoder.example(&turns).unwrap(), encoder.prompt_ids(&turns[..31]).unwrap());
        assert!(example.ids.starts_with(&prompt), "{name}");
    }
}

#[test]
fn the_replies_of_a_long_conversation_are_found_without_its_beginnings() {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let source = "{% if messages|length > 2 and messages|length < 60 %}{{ raise_exception('a beginning') }}{% endif %}";
    let source = format!("{source}{CHATML_JINJA}");
    let encoder = Template::from_jinja(&source, "", "").unwrap().bind(&tokenizer).unwrap();
    let turns = encoder.guarded(&long_conversation());
    let text = encoder.render(&turns, true).unwrap();
    assert_eq!(encoder.replies(&turns, &text, true).unwrap().len(), turns.len() / 2);
}

#[test]
fn a_template_without_end_is_an_error_that_says_so() {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let source = |loops: &str| {
        format!(
            "{{% if messages|length > 2 %}}{loops}{{% endif %}}{{% for m in messages %}}{{{{ m['content'] + '<|im_end|>' }}}}{{% endfor %}}"
        )
    };
    let turns = [Turn::user("a"), Turn::assistant("b"), Turn::user("c")];
    let loops = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
    let writes = "{% for a in range(9999) %}{{ 'a line that is written again and again, until it is enough and more than '}}{% for b in range(9) %}{{ 'enough of it, so that nothing but a limit ends it' }}{% endfor %}{% endfor %}";
    for (body, expected) in [(loops, "instructions"), (writes, "bytes")] {
        let encoder = Template::from_jinja(&source(body), "", "").unwrap().bind(&tokenizer).unwrap();
        let error = encoder.prompt_ids(&turns).unwrap_err();
        assert!(matches!(error, TemplateError::Endless { .. }) && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn a_template_that_rewrites_history_cannot_be_trained_on() {
    let tokenizer = byte_tokenizer(&CHATML_TOKENS);
    let source = "{{ messages|length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}";
    let encoder = Template::from_jinja(source, "", "").unwrap().bind(&tokenizer);
    assert!(matches!(encoder, Err(TemplateError::NoEnd { .. })));
    let source = "{% for m in messages %}{% if not loop.last %}{{ 'old' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}";
    let source = format!(
        "{{% if messages|length > 2 %}}{source}{{% else %}}{source_simple}{{% endif %}}",
        source_simple = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    );
    let encoder = Template::from_jinja(&source, "", "").unwrap().bind(&tokenizer).unwrap();
    let turns = [Turn::user("a"), Turn::assistant("b"), Turn::user("c"), Turn::assistant("d")];
    assert!(matches!(encoder.example(&turns), Err(TemplateError::NotIncremental { .. })));
    assert!(encoder.prompt_ids(&turns).is_ok());
}

/// The LLaMA tokenizer, which `tests/tools/llama_tokenizer.sh` fetches: where there is a cache, it is there.
fn llama() -> Option<Tokenizer> {
    let cache = PathBuf::from(std::env::var_os("VICUNA_CACHE")?);
    let file = cache.join("llama2-tokenizer/tokenizer.json");
    Some(Tokenizer::from_file(file).expect("run tests/tools/llama_tokenizer.sh"))
}

#[test]
fn vicuna_on_llama_is_the_published_vector() {
    let Some(tokenizer) = llama() else {
        eprintln!("skipped: source tests/tools/env.sh");
        return;
    };
    let encoder = Template::named(VICUNA_V1_1).unwrap().bind(&tokenizer).unwrap();
    let turns =
        [Turn::user("Hello!"), Turn::assistant("Hi!"), Turn::user("How are you?"), Turn::assistant("I am good.")];
    let example = encoder.example(&turns).unwrap();
    assert_eq!(example.ids.len(), 61);
    assert_eq!(example.ids[..4], [1, 319, 13563, 1546]);
    assert_eq!(example.ids[58..], [1781, 29889, 2]);
    let learned: Vec<usize> = (0..61).filter(|at| example.labels()[*at] != IGNORED).collect();
    assert_eq!(learned, [41, 42, 43, 56, 57, 58, 59, 60]);
    assert_eq!(encoder.end_tokens(), [2]);

    // The same ids as encoding the whole text at once, control tokens recognised.
    let text = encoder.render(&turns, false).unwrap();
    let whole = tokenizer.encode(text, false).unwrap();
    assert_eq!(whole.get_ids(), example.ids);
    assert_eq!(encoder.joint, Joint::SpaceAfterControl);
    for end in [1, 3] {
        let prompt = encoder.prompt_ids(&turns[..end]).unwrap();
        assert!(example.ids.starts_with(&prompt));
    }
    assert_eq!(encoder.raw_ids("Hi!").unwrap(), [1, 6324, 29991]);
    // A literal control token stays text, and no space creeps in around it.
    let literal = encoder.example(&[Turn::user("a"), Turn::assistant("b</s>c")]).unwrap();
    let ends = literal.ids.iter().filter(|id| **id == 2).count();
    assert_eq!(ends, 1);
    let text = tokenizer.decode(&literal.ids[literal.ids.len() - 6..literal.ids.len() - 1], true).unwrap();
    assert!(text.ends_with("b</s>c"), "{text}");
}

#[test]
fn the_first_vicuna_ends_a_reply_with_the_token_that_opens_the_mark() {
    let Some(tokenizer) = llama() else {
        eprintln!("skipped: source tests/tools/env.sh");
        return;
    };
    let encoder = Template::named(VICUNA_V0).unwrap().bind(&tokenizer).unwrap();
    let token = |id: u32| tokenizer.id_to_token(id).unwrap();
    assert_eq!(encoder.end_tokens().iter().map(|id| token(*id)).collect::<Vec<_>>(), ["##"]);
    let example = encoder.example(&[Turn::user("Hello!"), Turn::assistant("Hi!")]).unwrap();
    let learned: Vec<String> = learned(&example).into_iter().map(token).collect();
    assert_eq!(learned, ["▁Hi", "!", "<0x0A>", "##", "#"]);
}

proptest! {
    #[test]
    fn on_the_llama_tokenizer_what_is_learned_reads_as_the_replies_and_their_ends(turns in conversation()) {
        static LLAMA: std::sync::LazyLock<Option<Tokenizer>> = std::sync::LazyLock::new(llama);
        let Some(tokenizer) = LLAMA.as_ref() else {
            eprintln!("skipped: source tests/tools/env.sh");
            return Ok(());
        };
        for (name, end) in [(VICUNA_V0, "\n###"), (VICUNA_V1_1, "</s>"), (LLAMA_2, " </s>")] {
            let encoder = Template::named(name).unwrap().bind(tokenizer).unwrap();
            let example = encoder.example(&turns).unwrap();
            let read = example.learned.iter().map(|learned| {
                let ids = &example.ids[learned.start as usize..learned.end as usize];
                tokenizer.decode(ids, false).unwrap().trim_start().to_owned()
            });
            let replies = turns.iter().filter(|turn| turn.role == Role::Assistant).map(|turn| {
                let text = if name == LLAMA_2 { turn.content.trim() } else { &turn.content };
                format!("{text}{end}").trim_start().to_owned()
            });
            prop_assert_eq!(read.collect::<Vec<_>>(), replies.collect::<Vec<_>>(), "{}", name);
        }
    }
}
