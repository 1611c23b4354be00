//! Chat templates: from turns to token ids, and to the mask that says which of them are learned.
//!
//! A template is the Jinja text that Hugging Face keeps in `chat_template`; the named ones are such
//! texts too, so that what is trained, what is written into the result directory and what serves
//! are one thing. A rendered conversation is cut at control tokens and at the ends of replies, and
//! each piece is encoded by itself: the ids up to a reply are then those of the prompt that asks
//! for it, and the mask is known while concatenating. (Finding replies by tokenising prefixes again
//! is what breaks elsewhere: ids of a prefix need not be a prefix of the ids.)
//!
//! What a user writes never becomes a control token, whatever it looks like.

mod metered;
mod python_json;
mod tools;

pub use tools::Said;

use crate::conversation::{Role, Turn};
use metered::{FUEL, Metered};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use tokenizers::Tokenizer;

/// Label of a token that is not learned, as in PyTorch and Transformers.
pub const IGNORED: i64 = -100;

/// Bytes that a template may write, at most: these and so many times what the messages hold.
const WRITTEN_LIMIT_BYTES: usize = 1 << 20;
const WRITTEN_LIMIT_TIMES: usize = 16;
/// Replies that are looked for by rendering all that comes before each of them.
const RENDERED_APART: usize = 8;

/// The first Vicuna's: no control token ends a reply, "###" does.
pub const VICUNA_V0: &str = "vicuna_v0";
/// Also of v1.3 and v1.5, for tokenizers with `<s>` and `</s>`.
pub const VICUNA_V1_1: &str = "vicuna_v1.1";
pub const LLAMA_2: &str = "llama-2";
pub const LLAMA_3: &str = "llama-3";
/// ChatML without a default system prompt: who the model is must come from its training or from the
/// caller, never from a prompt that was absent in one of the two.
pub const CHATML: &str = "chatml";

/// Names that [`Template::named`] knows.
pub const NAMES: [&str; 5] = [VICUNA_V0, VICUNA_V1_1, LLAMA_2, LLAMA_3, CHATML];

/// A template that has a name.
struct Named {
    name: &'static str,
    jinja: &'static str,
    bos_token: &'static str,
    eos_token: &'static str,
    /// Tokens without which it is another model's.
    control_tokens: &'static [&'static str],
    /// What ends a reply, where no control token does.
    end: Option<&'static str>,
}

const NAMED: [Named; 5] = [
    Named {
        name: VICUNA_V0,
        jinja: VICUNA_V0_JINJA,
        bos_token: "<s>",
        eos_token: "</s>",
        control_tokens: &["<s>", "</s>"],
        end: Some("\n###"),
    },
    Named {
        name: VICUNA_V1_1,
        jinja: VICUNA_V1_1_JINJA,
        bos_token: "<s>",
        eos_token: "</s>",
        control_tokens: &["<s>", "</s>"],
        end: None,
    },
    Named {
        name: LLAMA_2,
        jinja: LLAMA_2_JINJA,
        bos_token: "<s>",
        eos_token: "</s>",
        control_tokens: &["<s>", "</s>"],
        end: None,
    },
    Named {
        name: LLAMA_3,
        jinja: LLAMA_3_JINJA,
        bos_token: "<|begin_of_text|>",
        eos_token: "<|eot_id|>",
        control_tokens: &["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        end: None,
    },
    Named {
        name: CHATML,
        jinja: CHATML_JINJA,
        bos_token: "<|im_start|>",
        eos_token: "<|im_end|>",
        control_tokens: &["<|im_start|>", "<|im_end|>"],
        end: None,
    },
];

/// "###" ends every turn; the one after the last reply is learned and no turn follows it.
const VICUNA_V0_JINJA: &str = concat!(
    "{% if messages and messages[0]['role'] == 'system' %}",
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}",
    "{% set system = 'A chat between a curious human and an artificial intelligence assistant. ",
    "The assistant gives helpful, detailed, and polite answers to the human\\'s questions.' %}",
    "{% set turns = messages %}{% endif %}",
    "{{ '<s>' + system + '\n\n###' }}",
    "{% for message in turns %}",
    "{% if message['role'] == 'user' %}{{ ' Human: ' + message['content'] + '\n###' }}",
    "{% elif message['role'] == 'assistant' %}{{ ' Assistant: ' + message['content'] + '\n###' }}",
    "{% else %}{{ raise_exception('a system message must be the first') }}{% endif %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ ' Assistant:' }}{% endif %}",
);

const VICUNA_V1_1_JINJA: &str = concat!(
    "{% if messages and messages[0]['role'] == 'system' %}",
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}{% else %}",
    "{% set system = 'A chat between a curious user and an artificial intelligence assistant. ",
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions.' %}",
    "{% set turns = messages %}{% endif %}",
    "{{ '<s>' + system + ' ' }}",
    "{% for message in turns %}",
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}",
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}",
    "{% else %}{{ raise_exception('a system message must be the first') }}{% endif %}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
);

/// The system's text is inside of the first question; each pair begins with `<s>`.
const LLAMA_2_JINJA: &str = concat!(
    "{% if messages and messages[0]['role'] == 'system' %}",
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}",
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}",
    "{% for message in turns %}",
    "{% if message['role'] == 'user' %}",
    "{{ '<s>[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}",
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + ' </s>' }}",
    "{% else %}{{ raise_exception('a system message must be the first') }}{% endif %}",
    "{% endfor %}",
);

const LLAMA_3_JINJA: &str = concat!(
    "{{ '<|begin_of_text|>' }}",
    "{% for message in messages %}",
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
);

const CHATML_JINJA: &str = concat!(
    "{% for message in messages %}",
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
);

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("there is no template {0:?}; use one of {names}, or leave it out for the model's own", names = NAMES.join(", "))]
    Unknown(String),
    #[error("template {template} is not valid Jinja: {source:#}")]
    Syntax { template: String, source: minijinja::Error },
    #[error("template {template} refuses these messages: {source:#}")]
    Render { template: String, source: minijinja::Error },
    #[error(
        "template {template} writes without end for these messages ({detail}); look for a loop in it, or name one of {names}",
        names = NAMES.join(", ")
    )]
    Endless { template: String, detail: String },
    #[error(
        "template {template} needs the control token {token:?}, which {tokenizer} does not have; choose the template that belongs to the model"
    )]
    MissingToken { template: String, token: String, tokenizer: String },
    #[error(
        "template {template} does not end a reply with a control token of {tokenizer}; choose the template that belongs to the model"
    )]
    NoEnd { template: String, tokenizer: String },
    #[error(
        "template {template} writes a reply differently once more is said, so it cannot be trained on; name one of {names}",
        names = NAMES.join(", ")
    )]
    NotIncremental { template: String },
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
}

/// How a conversation is written down for a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    name: String,
    jinja: String,
    bos_token: String,
    eos_token: String,
}

impl Template {
    /// One of [`NAMES`].
    pub fn named(name: &str) -> Result<Self, TemplateError> {
        let known = NAMED.iter().find(|known| known.name == name);
        known.map(Self::from).ok_or_else(|| TemplateError::Unknown(name.to_owned()))
    }

    /// A model's own `chat_template`. `bos_token` and `eos_token` are what the template may call by
    /// these names (`tokenizer_config.json`); empty where the model has none.
    pub fn from_jinja(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        if let Some(known) = NAMED.iter().find(|known| known.jinja == source) {
            return Ok(Self::from(known));
        }
        let template = Self {
            name: format!("jinja-{}", &blake3::hash(source.as_bytes()).to_hex()[..12]),
            jinja: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        };
        template.compile().map(|_| template)
    }

    /// The name; for a model's own template, `jinja-` and a digest: equal names are equal templates.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The template as Hugging Face keeps it in `chat_template`.
    pub fn jinja(&self) -> &str {
        &self.jinja
    }

    /// Checks the template against a tokenizer.
    pub fn bind(&self, tokenizer: &Tokenizer) -> Result<Encoder, TemplateError> {
        Encoder::new(self.clone(), tokenizer)
    }

    fn compile(&self) -> Result<Metered, TemplateError> {
        Metered::new(&self.jinja).map_err(|source| TemplateError::Syntax { template: self.name.clone(), source })
    }

    fn control_tokens(&self) -> &'static [&'static str] {
        self.known().map_or(&[], |known| known.control_tokens)
    }

    /// What ends a reply, where no control token does.
    fn end(&self) -> Option<&'static str> {
        self.known().and_then(|known| known.end)
    }

    fn known(&self) -> Option<&'static Named> {
        NAMED.iter().find(|known| known.name == self.name)
    }
}

impl From<&Named> for Template {
    fn from(known: &Named) -> Self {
        Self {
            name: known.name.to_owned(),
            jinja: known.jinja.to_owned(),
            bos_token: known.bos_token.to_owned(),
            eos_token: known.eos_token.to_owned(),
        }
    }
}

/// Token ids of one conversation and what is learned of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// Where in `ids` the learned tokens are, in order and apart.
    pub learned: Vec<Range<u32>>,
    /// Where in `ids` each of several conversations ends that do not see each other; empty where it is one.
    pub ends: Vec<u32>,
}

impl Example {
    /// Cuts what is beyond `length` tokens; tells whether anything was.
    pub fn truncate(&mut self, length: usize) -> bool {
        let cut = self.ids.len() > length;
        self.ids.truncate(length);
        let end = self.ids.len() as u32;
        self.learned.retain(|learned| learned.start < end);
        if let Some(last) = self.learned.last_mut() {
            last.end = last.end.min(end);
        }
        cut
    }

    /// One after the other in one row; `None` of none. Of each, the first token is predicted from nothing.
    pub(crate) fn together(mut sequences: impl Iterator<Item = Self>) -> Option<Self> {
        let mut row = sequences.next()?;
        for sequence in sequences {
            let start = row.ids.len() as u32;
            if row.ends.is_empty() {
                row.ends.push(start);
            }
            let learned = sequence.learned.iter().map(|learned| start + learned.start.max(1)..start + learned.end);
            row.learned.extend(learned.filter(|learned| !learned.is_empty()));
            row.ids.extend(sequence.ids);
            row.ends.push(row.ids.len() as u32);
        }
        Some(row)
    }

    /// Tokens of each conversation in it.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        let whole = [self.ids.len() as u32];
        let ends = if self.ends.is_empty() { whole.to_vec() } else { self.ends.clone() };
        let mut before = 0;
        ends.into_iter().map(move |end| (end - std::mem::replace(&mut before, end)) as usize)
    }

    /// Tokens whose prediction is learned. The first of a sequence is predicted from nothing.
    pub fn trained_tokens(&self) -> usize {
        self.learned.iter().map(|learned| (learned.start.max(1)..learned.end).len()).sum()
    }

    /// As long as `ids` and not shifted: the id itself where it is learned, else [`IGNORED`].
    pub fn labels(&self) -> Vec<i64> {
        let mut labels = vec![IGNORED; self.ids.len()];
        for learned in &self.learned {
            let learned = learned.start as usize..learned.end as usize;
            for (label, id) in labels[learned.clone()].iter_mut().zip(&self.ids[learned]) {
                *label = i64::from(*id);
            }
        }
        labels
    }

    fn extend(&mut self, ids: &[u32], learned: bool) {
        let start = self.ids.len() as u32;
        self.ids.extend_from_slice(ids);
        let end = self.ids.len() as u32;
        match self.learned.last_mut().filter(|last| last.end == start) {
            _ if !learned || start == end => {}
            Some(last) => last.end = end,
            None => self.learned.push(start..end),
        }
    }
}

/// A template on a tokenizer. Cheap to use, made once.
pub struct Encoder {
    template: Template,
    jinja: Metered,
    /// Encodes control tokens in text as the text that they look like.
    tokenizer: Tokenizer,
    control: ControlTokens,
    joint: Joint,
    end_tokens: Vec<u32>,
    /// What stands between a prompt and what the reply says.
    lead: String,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Encoder")
            .field("template", &self.template.name)
            .field("joint", &self.joint)
            .field("end_tokens", &self.end_tokens)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    fn new(template: Template, tokenizer: &Tokenizer) -> Result<Self, TemplateError> {
        let control = ControlTokens::of(tokenizer);
        for token in template.control_tokens() {
            if control.id(token).is_none() {
                return Err(TemplateError::MissingToken {
                    template: template.name.clone(),
                    token: (*token).to_owned(),
                    tokenizer: control.to_string(),
                });
            }
        }
        let tokenizer = plain_tokenizer(tokenizer)?;
        let joint = Joint::of(&tokenizer, &control)?;
        let jinja = template.compile()?;
        let (end_tokens, lead) = (Vec::new(), String::new());
        let mut encoder = Self { jinja, template, tokenizer, control, joint, end_tokens, lead };
        encoder.end_tokens = vec![encoder.find_end_token()?];
        encoder.lead = encoder.find_lead()?;
        Ok(encoder)
    }

    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The ids that end a reply.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The prompt that asks for the next reply. Its cost grows with the messages' length alone.
    pub fn prompt_ids(&self, turns: &[Turn]) -> Result<Vec<u32>, TemplateError> {
        let turns = self.guarded(turns);
        let text = self.render(&turns, true)?;
        // A template that rewrites what was said may be asked, but not trained on.
        let replies = self.replies(&turns, &text, true).unwrap_or_default();
        Ok(self.encode_marked(&text, &replies)?.ids)
    }

    /// A prompt without template, with what the tokenizer puts around every text (BOS).
    pub fn raw_ids(&self, prompt: &str) -> Result<Vec<u32>, TemplateError> {
        ids(&self.tokenizer, prompt, true)
    }

    /// The whole conversation; the replies and the tokens that end them are learned, but for turns that are not to be.
    pub fn example(&self, turns: &[Turn]) -> Result<Example, TemplateError> {
        let turns = self.guarded(turns);
        let text = self.render(&turns, false)?;
        let replies = self.replies(&turns, &text, false)?;
        if !self.continues(&turns, &text, &replies)? {
            return Err(self.not_incremental());
        }
        self.encode_marked(&text, &replies)
    }

    fn guarded(&self, turns: &[Turn]) -> Vec<Turn> {
        turns.iter().map(|turn| Turn { content: self.guarded_text(&turn.content), ..*turn }).collect()
    }

    fn guarded_text(&self, content: &str) -> String {
        let guarded = self.control.guard(content);
        let Some(end) = self.template.end() else { return guarded };
        let first = end.chars().next().map_or(0, char::len_utf8);
        guarded.replace(end, &format!("{}{GUARD}{}", &end[..first], &end[first..]))
    }

    fn render(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let messages: Vec<_> = turns
            .iter()
            .map(|turn| minijinja::context! { role => turn.role.name(), content => turn.content })
            .collect();
        let given = turns.iter().map(|turn| turn.content.len()).sum();
        self.render_with(minijinja::context! { messages, add_generation_prompt }, given)
    }

    /// `given`: bytes of what is written down.
    fn render_with(&self, context: minijinja::Value, given: usize) -> Result<String, TemplateError> {
        let context = minijinja::context! {
            bos_token => self.template.bos_token,
            eos_token => self.template.eos_token,
            ..context
        };
        let limit = WRITTEN_LIMIT_BYTES + WRITTEN_LIMIT_TIMES * given;
        let name = || self.template.name.clone();
        let endless = |detail| TemplateError::Endless { template: name(), detail };
        let text = self.jinja.render(context, given).map_err(|source| match source.kind() {
            minijinja::ErrorKind::OutOfFuel => endless(format!("more than {FUEL} instructions")),
            minijinja::ErrorKind::WriteFailure => endless(format!("more than {limit} bytes")),
            _ => TemplateError::Render { template: name(), source },
        })?;
        if text.len() > limit { Err(endless(format!("more than {limit} bytes"))) } else { Ok(text) }
    }

    /// Where in the rendered `text` the replies are. Few are found by rendering what comes before each; many by marks
    /// in one more rendering, or the cost would grow with the square of their number.
    fn replies(&self, turns: &[Turn], text: &str, prompt: bool) -> Result<Vec<Reply>, TemplateError> {
        let many = turns.iter().filter(|turn| turn.role == Role::Assistant).count() > RENDERED_APART;
        if many {
            let marked = self.marked_replies(turns, text, prompt)?;
            return marked.filter(|replies| in_order(replies)).ok_or_else(|| self.not_incremental());
        }
        let mut replies = Vec::new();
        for (index, turn) in turns.iter().enumerate().filter(|(_, turn)| turn.role == Role::Assistant) {
            let before = self.render(&turns[..index], true)?;
            let reply = self.reply(&before, text, turn);
            replies.push(reply.ok_or_else(|| self.not_incremental())?);
        }
        if in_order(&replies) { Ok(replies) } else { Err(self.not_incremental()) }
    }

    fn not_incremental(&self) -> TemplateError {
        TemplateError::NotIncremental { template: self.template.name.clone() }
    }

    fn reply(&self, before: &str, text: &str, turn: &Turn) -> Option<Reply> {
        let after = text.strip_prefix(before)?;
        let end = self.end_in(after)?;
        after[..end.start].contains(turn.content.trim()).then_some(())?;
        let start = before.len();
        let end = start + end.start..start + end.end;
        Some(Reply { content: start..end.start, end, learned: turn.learned })
    }

    /// The replies by a mark that stands before what each says. `None` where a template does more with a reply than to
    /// write it down and to trim it.
    fn marked_replies(&self, turns: &[Turn], text: &str, prompt: bool) -> Result<Option<Vec<Reply>>, TemplateError> {
        for place in [str::len, |content: &str| content.trim_start().len()] {
            let marked: Vec<Turn> = turns.iter().map(|turn| with_mark(turn, place)).collect();
            let marked = self.render(&marked, prompt)?;
            if marked.replace(MARK, "") == text {
                return Ok(self.at_marks(turns, text, &marked));
            }
        }
        Ok(None)
    }

    fn at_marks(&self, turns: &[Turn], text: &str, marked: &str) -> Option<Vec<Reply>> {
        let said = turns.iter().filter(|turn| turn.role == Role::Assistant);
        let marks = marked.match_indices(MARK).enumerate();
        // Those before it are not in the text.
        let starts: Vec<usize> = marks.map(|(number, (at, _))| at - number * MARK.len_utf8()).collect();
        let replies = said.clone().zip(&starts).map(|(turn, said_at)| {
            let start = text[..*said_at].strip_suffix(self.lead.as_str())?.len();
            let end = self.end_in(&text[*said_at..])?;
            let end = said_at + end.start..said_at + end.end;
            text[start..end.start].contains(turn.content.trim()).then_some(())?;
            Some(Reply { content: start..end.start, end, learned: turn.learned })
        });
        let replies = replies.collect::<Option<Vec<Reply>>>()?;
        (starts.len() == said.count()).then_some(replies)
    }

    /// Whether the prompts for the first and the last of the replies are how `text` goes on until there. Where there are
    /// few, each was found so.
    fn continues(&self, turns: &[Turn], text: &str, replies: &[Reply]) -> Result<bool, TemplateError> {
        if replies.len() <= RENDERED_APART {
            return Ok(true);
        }
        let said = turns.iter().enumerate().filter(|(_, turn)| turn.role == Role::Assistant).map(|(index, _)| index);
        for (number, (index, reply)) in said.zip(replies).enumerate() {
            let looked_at = number < RENDERED_APART || number + 1 == replies.len();
            if looked_at && self.render(&turns[..index], true)? != text[..reply.content.start] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where the first end of a reply is.
    fn end_in(&self, text: &str) -> Option<Range<usize>> {
        match self.template.end() {
            Some(end) => text.find(end).map(|at| at..at + end.len()),
            None => self.control.first(text).map(|(found, _)| found),
        }
    }

    /// The token by which a server knows that a reply is over. Where a text ends it, that is the first token of the
    /// text after the line's end.
    fn find_end_token(&self) -> Result<u32, TemplateError> {
        let (text, before) = self.smallest()?;
        let ends = match (self.template.end(), text.strip_prefix(before.as_str())) {
            (Some(end), Some(_)) => {
                let line_end = self.joint.ids(&self.tokenizer, Before::Text, "\n")?;
                self.joint.ids(&self.tokenizer, Before::Text, end)?.get(line_end.len()).copied()
            }
            (None, Some(reply)) => self.control.first(reply).map(|(_, id)| id),
            (_, None) => None,
        };
        ends.ok_or_else(|| TemplateError::NoEnd {
            template: self.template.name.clone(),
            tokenizer: self.control.to_string(),
        })
    }

    /// What the template writes between the prompt and what the reply says: a blank or nothing.
    fn find_lead(&self) -> Result<String, TemplateError> {
        let (text, before) = self.smallest()?;
        let reply = text.strip_prefix(before.as_str()).unwrap_or_default();
        Ok(reply.split(SMALLEST).next().unwrap_or_default().to_owned())
    }

    /// A question and its reply, and the prompt for it.
    fn smallest(&self) -> Result<(String, String), TemplateError> {
        let turns = [Turn::user("a"), Turn::assistant(SMALLEST)];
        Ok((self.render(&turns, false)?, self.render(&turns[..1], true)?))
    }

    /// `text` with the replies in it, which are in order and apart.
    fn encode_marked(&self, text: &str, replies: &[Reply]) -> Result<Example, TemplateError> {
        let mut pieces = Pieces::new(self);
        let mut at = 0;
        for Reply { content, end, learned } in replies {
            pieces.push(&text[at..content.start], false)?;
            pieces.push(&text[content.clone()], *learned)?;
            pieces.push(&text[end.clone()], *learned)?;
            at = end.end;
        }
        pieces.push(&text[at..], false)?;
        Ok(pieces.example)
    }
}

/// Where in a rendered conversation a reply is, and what ends it.
struct Reply {
    content: Range<usize>,
    end: Range<usize>,
    learned: bool,
}

/// A template that does not end every reply may have one reach into the next.
fn in_order(replies: &[Reply]) -> bool {
    replies.is_sorted_by(|one, next| one.end.end <= next.content.start)
}

/// A reply with a mark before the last bytes of it, as many as `place` says; every other turn as it is.
fn with_mark(turn: &Turn, place: fn(&str) -> usize) -> Turn {
    let mut marked = turn.clone();
    if turn.role == Role::Assistant {
        marked.content.insert(turn.content.len() - place(&turn.content), MARK);
    }
    marked
}

/// Ids and labels while they are put together.
struct Pieces<'a> {
    encoder: &'a Encoder,
    example: Example,
    before: Before,
}

/// What a piece of text follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Control,
    Text,
}

impl<'a> Pieces<'a> {
    fn new(encoder: &'a Encoder) -> Self {
        Self { encoder, example: Example::default(), before: Before::Nothing }
    }

    fn push(&mut self, mut text: &str, learned: bool) -> Result<(), TemplateError> {
        while let Some((found, id)) = self.encoder.control.first(text) {
            self.push_text(&text[..found.start], learned)?;
            self.extend(&[id], learned, Before::Control);
            text = &text[found.end..];
        }
        self.push_text(text, learned)
    }

    fn push_text(&mut self, text: &str, learned: bool) -> Result<(), TemplateError> {
        let text = text.replace(GUARD, "");
        if text.is_empty() {
            return Ok(());
        }
        let encoder = self.encoder;
        let ids = encoder.joint.ids(&encoder.tokenizer, self.before, &text)?;
        self.extend(&ids, learned, Before::Text);
        Ok(())
    }

    fn extend(&mut self, ids: &[u32], learned: bool, before: Before) {
        self.example.extend(ids, learned);
        self.before = before;
    }
}

/// A Unicode noncharacter, which no text may hold: it breaks up what looks like a control token
/// while the template is rendered, and is gone before the text is encoded.
const GUARD: char = '\u{fdd0}';
/// Another one: stands where a reply begins.
const MARK: char = '\u{fdd1}';
/// The smallest reply.
const SMALLEST: &str = "b";

/// The tokens that no text may become.
struct ControlTokens {
    ids: BTreeMap<String, u32>,
    /// Whether any of them begins with this byte.
    first_bytes: [bool; 256],
    vocabulary: usize,
}

impl ControlTokens {
    fn of(tokenizer: &Tokenizer) -> Self {
        let added = tokenizer.get_added_tokens_decoder();
        let control = added.into_iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let ids: BTreeMap<_, _> = control.map(|(id, token)| (token.content, id)).collect();
        let mut first_bytes = [false; 256];
        for token in ids.keys() {
            first_bytes[usize::from(token.as_bytes()[0])] = true;
        }
        Self { ids, first_bytes, vocabulary: tokenizer.get_vocab_size(true) }
    }

    fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The leftmost control token in `text`, the longest of those that begin there. One pass, since
    /// a text may consist of nothing but such tokens.
    fn first(&self, text: &str) -> Option<(Range<usize>, u32)> {
        let bytes = text.as_bytes();
        let begins = |at: &usize| self.first_bytes[usize::from(bytes[*at])];
        (0..bytes.len()).filter(begins).find_map(|at| {
            self.ids
                .iter()
                .filter(|(token, _)| bytes[at..].starts_with(token.as_bytes()))
                .max_by_key(|(token, _)| token.len())
                .map(|(token, id)| (at..at + token.len(), *id))
        })
    }

    fn guard(&self, content: &str) -> String {
        let content = content.replace([GUARD, MARK], "");
        let mut guarded = String::with_capacity(content.len());
        let mut rest = content.as_str();
        while let Some((found, _)) = self.first(rest) {
            let first = rest[found.start..].chars().next().map_or(0, char::len_utf8);
            guarded.push_str(&rest[..found.start + first]);
            guarded.push(GUARD);
            rest = &rest[found.start + first..];
        }
        guarded.push_str(rest);
        guarded
    }
}

impl fmt::Display for ControlTokens {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let some: Vec<_> = self.ids.keys().take(8).map(String::as_str).collect();
        let vocabulary = self.vocabulary;
        write!(out, "the tokenizer of {vocabulary} tokens (control tokens: {})", some.join(" "))
    }
}

fn plain_tokenizer(tokenizer: &Tokenizer) -> Result<Tokenizer, TemplateError> {
    let mut tokenizer = tokenizer.clone();
    tokenizer.set_encode_special_tokens(true);
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(failed)?;
    Ok(tokenizer)
}

/// Where the tokenizer thinks that a word begins. LLaMA's "legacy" encoding puts a space before the
/// text and before everything that follows a control token; a piece that continues a text must not
/// get one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Joint {
    /// Text is encoded as it is, wherever it stands.
    Plain,
    /// A space is put before text at the start and after control tokens.
    SpaceAfterControl,
    /// A space is put before text at the start only.
    SpaceAtStart,
}

/// Is in no vocabulary but as a byte, so that nothing merges with it.
const ANCHOR: &str = "\u{1}";

impl Joint {
    fn of(plain: &Tokenizer, control: &ControlTokens) -> Result<Self, TemplateError> {
        if !adds_space(plain)? {
            return Ok(Joint::Plain);
        }
        let alone = ids(plain, "a", false)?;
        let Some(token) = control.ids.keys().next() else {
            return Ok(Joint::SpaceAtStart);
        };
        let mut recognising = plain.clone();
        recognising.set_encode_special_tokens(false);
        let joined = ids(&recognising, &format!("{token}a"), false)?;
        Ok(match joined.get(1..) == Some(&alone[..]) {
            true => Joint::SpaceAfterControl,
            false => Joint::SpaceAtStart,
        })
    }

    fn ids(self, tokenizer: &Tokenizer, before: Before, text: &str) -> Result<Vec<u32>, TemplateError> {
        let continues = match self {
            Joint::Plain => false,
            Joint::SpaceAfterControl => before == Before::Text,
            Joint::SpaceAtStart => before != Before::Nothing,
        };
        match continues {
            true => continued(tokenizer, text),
            false => ids(tokenizer, text, false),
        }
    }
}

/// Whether a lone letter is encoded with a space before it.
fn adds_space(plain: &Tokenizer) -> Result<bool, TemplateError> {
    let encoding = plain.encode("a", false).map_err(failed)?;
    let first = encoding.get_tokens().first();
    Ok(first.is_some_and(|token| token.starts_with(['▁', 'Ġ', ' '])))
}

/// The ids of `text` where it continues another text.
fn continued(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, TemplateError> {
    let anchor = ids(tokenizer, ANCHOR, false)?;
    let joined = ids(tokenizer, &format!("{ANCHOR}{text}"), false)?;
    joined
        .strip_prefix(&anchor[..])
        .map(<[u32]>::to_vec)
        .ok_or_else(|| TemplateError::Tokenizer("a word cannot be encoded by itself".to_owned()))
}

fn ids(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<u32>, TemplateError> {
    let encoding = tokenizer.encode_fast(text, add_special).map_err(failed)?;
    Ok(encoding.get_ids().to_vec())
}

fn failed(error: tokenizers::Error) -> TemplateError {
    TemplateError::Tokenizer(error.to_string())
}

#[cfg(test)]
pub(crate) mod tests;
