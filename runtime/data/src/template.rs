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

use crate::conversation::{Conversation, Role, Turn};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use tokenizers::Tokenizer;

/// Label of a token that is not learned, as in PyTorch and Transformers.
pub const IGNORED: i64 = -100;

/// `vicuna_v1.1` (also of v1.3 and v1.5), for tokenizers with `<s>` and `</s>`.
pub const VICUNA_V1_1: &str = "vicuna_v1.1";
/// ChatML without a default system prompt: who the model is must come from its training or from the
/// caller, never from a prompt that was absent in one of the two.
pub const CHATML: &str = "chatml";

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

const CHATML_JINJA: &str = concat!(
    "{% for message in messages %}",
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
);

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error("there is no template {0:?}; use vicuna_v1.1 or chatml, or leave it out for the model's own")]
    Unknown(String),
    #[error("template {template} is not valid Jinja: {source:#}")]
    Syntax { template: String, source: minijinja::Error },
    #[error("template {template} refuses these messages: {source:#}")]
    Render { template: String, source: minijinja::Error },
    #[error(
        "template {template} needs the control token {token:?}, which {tokenizer} does not have; choose the template that belongs to the model"
    )]
    MissingToken { template: String, token: String, tokenizer: String },
    #[error(
        "template {template} does not end a reply with a control token of {tokenizer}; choose the template that belongs to the model"
    )]
    NoEnd { template: String, tokenizer: String },
    #[error(
        "template {template} writes a reply differently once more is said, so it cannot be trained on; name vicuna_v1.1 or chatml"
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
    /// [`VICUNA_V1_1`] or [`CHATML`].
    pub fn named(name: &str) -> Result<Self, TemplateError> {
        let (jinja, bos_token, eos_token) = match name {
            VICUNA_V1_1 => (VICUNA_V1_1_JINJA, "<s>", "</s>"),
            CHATML => (CHATML_JINJA, "<|im_start|>", "<|im_end|>"),
            _ => return Err(TemplateError::Unknown(name.to_owned())),
        };
        Ok(Self {
            name: name.to_owned(),
            jinja: jinja.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        })
    }

    /// A model's own `chat_template`. `bos_token` and `eos_token` are what the template may call by
    /// these names (`tokenizer_config.json`); empty where the model has none.
    pub fn from_jinja(source: &str, bos_token: &str, eos_token: &str) -> Result<Self, TemplateError> {
        for name in [VICUNA_V1_1, CHATML] {
            let named = Self::named(name)?;
            if named.jinja == source {
                return Ok(named);
            }
        }
        let template = Self {
            name: format!("jinja-{}", &blake3::hash(source.as_bytes()).to_hex()[..12]),
            jinja: source.to_owned(),
            bos_token: bos_token.to_owned(),
            eos_token: eos_token.to_owned(),
        };
        template.environment().map(|_| template)
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

    fn environment(&self) -> Result<minijinja::Environment<'static>, TemplateError> {
        let mut environment = minijinja::Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", self.jinja.clone())
            .map_err(|source| TemplateError::Syntax { template: self.name.clone(), source })?;
        Ok(environment)
    }

    fn control_tokens(&self) -> &[&'static str] {
        match self.name.as_str() {
            VICUNA_V1_1 => &["<s>", "</s>"],
            CHATML => &["<|im_start|>", "<|im_end|>"],
            _ => &[],
        }
    }
}

/// Token ids of one conversation and what is learned of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub ids: Vec<u32>,
    /// As long as `ids` and not shifted: the id itself where it is learned, else [`IGNORED`].
    pub labels: Vec<i64>,
}

impl Example {
    /// Cuts what is beyond `length` tokens; tells whether anything was.
    pub fn truncate(&mut self, length: usize) -> bool {
        let cut = self.ids.len() > length;
        self.ids.truncate(length);
        self.labels.truncate(length);
        cut
    }

    /// Tokens whose prediction is learned. The first of a sequence is predicted from nothing.
    pub fn trained_tokens(&self) -> usize {
        let learned = |label: &&i64| **label != IGNORED;
        self.labels.iter().skip(1).filter(learned).count()
    }
}

/// What encoding did to a dataset.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoded {
    pub examples: Vec<Example>,
    /// Conversations cut at the length limit.
    pub cut: usize,
    /// Conversations left out because no token of a reply was left within the limit.
    pub without_reply: usize,
    pub tokens: u64,
    pub trained_tokens: u64,
}

impl fmt::Display for Encoded {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} sequences, {} tokens, {} of them learned; {} cut at the length limit; {} left out because no reply fits in it",
            self.examples.len(),
            self.tokens,
            self.trained_tokens,
            self.cut,
            self.without_reply
        )
    }
}

/// A template on a tokenizer. Cheap to use, made once.
pub struct Encoder {
    template: Template,
    environment: minijinja::Environment<'static>,
    /// Encodes control tokens in text as the text that they look like.
    tokenizer: Tokenizer,
    control: ControlTokens,
    joint: Joint,
    end_tokens: Vec<u32>,
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
        let mut encoder =
            Self { environment: template.environment()?, template, tokenizer, control, joint, end_tokens: Vec::new() };
        encoder.end_tokens = vec![encoder.find_end_token()?];
        Ok(encoder)
    }

    pub fn template(&self) -> &Template {
        &self.template
    }

    /// The ids that end a reply.
    pub fn end_tokens(&self) -> &[u32] {
        &self.end_tokens
    }

    /// The prompt that asks for the next reply.
    pub fn prompt_ids(&self, turns: &[Turn]) -> Result<Vec<u32>, TemplateError> {
        let turns = self.guarded(turns);
        let text = self.render(&turns, true)?;
        let replies = self.replies(&turns, &text).unwrap_or_default();
        Ok(self.encode_marked(&text, &replies)?.ids)
    }

    /// A prompt without template, with what the tokenizer puts around every text (BOS).
    pub fn raw_ids(&self, prompt: &str) -> Result<Vec<u32>, TemplateError> {
        ids(&self.tokenizer, prompt, true)
    }

    /// The whole conversation; the replies and the tokens that end them are learned.
    pub fn example(&self, turns: &[Turn]) -> Result<Example, TemplateError> {
        let turns = self.guarded(turns);
        let text = self.render(&turns, false)?;
        let replies = self.replies(&turns, &text)?;
        self.encode_marked(&text, &replies)
    }

    /// A dataset, in order, with at most `max_length` tokens a sequence.
    pub fn encode(&self, conversations: &[Conversation], max_length: usize) -> Result<Encoded, TemplateError> {
        let mut encoded = Encoded::default();
        for conversation in conversations {
            let mut example = self.example(&conversation.turns)?;
            encoded.cut += usize::from(example.truncate(max_length));
            if example.trained_tokens() == 0 {
                encoded.without_reply += 1;
                continue;
            }
            encoded.tokens += example.ids.len() as u64;
            encoded.trained_tokens += example.trained_tokens() as u64;
            encoded.examples.push(example);
        }
        Ok(encoded)
    }

    fn guarded(&self, turns: &[Turn]) -> Vec<Turn> {
        let guard = |turn: &Turn| Turn::new(turn.role, self.control.guard(&turn.content));
        turns.iter().map(guard).collect()
    }

    fn render(&self, turns: &[Turn], add_generation_prompt: bool) -> Result<String, TemplateError> {
        let messages: Vec<_> = turns
            .iter()
            .map(|turn| minijinja::context! { role => turn.role.name(), content => turn.content })
            .collect();
        let context = minijinja::context! {
            messages,
            add_generation_prompt,
            bos_token => self.template.bos_token,
            eos_token => self.template.eos_token,
        };
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(context))
            .map_err(|source| TemplateError::Render { template: self.template.name.clone(), source })
    }

    /// Where in the rendered `text` the replies are, each with the control token that ends it.
    fn replies(&self, turns: &[Turn], text: &str) -> Result<Vec<Range<usize>>, TemplateError> {
        let mut replies = Vec::new();
        for (index, turn) in turns.iter().enumerate() {
            if turn.role == Role::Assistant {
                let before = self.render(&turns[..index], true)?;
                let reply = self.reply(&before, text, &turn.content);
                replies
                    .push(reply.ok_or_else(|| TemplateError::NotIncremental { template: self.template.name.clone() })?);
            }
        }
        Ok(replies)
    }

    fn reply(&self, before: &str, text: &str, content: &str) -> Option<Range<usize>> {
        let after = text.strip_prefix(before)?;
        let (found, _) = self.control.first(after)?;
        after[..found.start].contains(content.trim()).then_some(())?;
        Some(before.len()..before.len() + found.end)
    }

    fn find_end_token(&self) -> Result<u32, TemplateError> {
        let turns = [Turn::user("a"), Turn::assistant("b")];
        let text = self.render(&turns, false)?;
        let before = self.render(&turns[..1], true)?;
        text.strip_prefix(before.as_str()).and_then(|reply| self.control.first(reply)).map(|(_, id)| id).ok_or_else(
            || TemplateError::NoEnd { template: self.template.name.clone(), tokenizer: self.control.to_string() },
        )
    }

    /// `text` with `learned` parts, which are in order and apart.
    fn encode_marked(&self, text: &str, learned: &[Range<usize>]) -> Result<Example, TemplateError> {
        let mut pieces = Pieces::new(self);
        let mut at = 0;
        for part in learned {
            pieces.push(&text[at..part.start], false)?;
            pieces.push(&text[part.clone()], true)?;
            at = part.end;
        }
        pieces.push(&text[at..], false)?;
        Ok(pieces.example)
    }
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
        let example = Example { ids: Vec::new(), labels: Vec::new() };
        Self { encoder, example, before: Before::Nothing }
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
        self.example.ids.extend_from_slice(ids);
        let label = |id: &u32| if learned { i64::from(*id) } else { IGNORED };
        self.example.labels.extend(ids.iter().map(label));
        self.before = before;
    }
}

/// A Unicode noncharacter, which no text may hold: it breaks up what looks like a control token
/// while the template is rendered, and is gone before the text is encoded.
const GUARD: char = '\u{fdd0}';

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
        let content = content.replace(GUARD, "");
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
mod tests;
