//! Jinja that cannot take more memory than its messages justify.
//!
//! A template comes with a model from anywhere. The engine bounds how many instructions it runs, but not how large a
//! text one of them makes: forty times `{% set x = x ~ x %}` is a terabyte. So what a template makes is charged against
//! a budget *before* it is made. The engine has no hook for its own operators: once compiled, `+`, `~`, `*`, slices and
//! comparisons are replaced by filters of ours, and raw text by a constant that is emitted, since all that is emitted
//! passes the formatter, whether it goes to the output or into a variable. Filters and methods are charged by what they
//! are given.
//! Nothing is credited back, so the budget bounds time as well: no byte is copied that was not charged.

use minijinja::machinery::make_string_output;
use minijinja::machinery::{CompiledTemplate, Instruction, Instructions, TemplateConfig, Vm, WhitespaceConfig};
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, Expression, Output, State, Value, context, filters, functions,
};
use minijinja_contrib::pycompat;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use super::python_json;

/// Instructions that a template may spend on one conversation, at most: some thousands for each of the messages that a
/// server takes. A loop without end is over within a second.
pub(super) const FUEL: u64 = 10_000_000;
/// Bytes that a template may make, at most: these and so many times what the messages hold.
const MADE_LIMIT_BYTES: usize = 16 << 20;
const MADE_LIMIT_TIMES: usize = 64;
/// Lists in lists, at most: the engine follows them on the stack.
const DEPTH_LIMIT: usize = 64;

/// A compiled template.
pub(super) struct Metered {
    environment: Environment<'static>,
    instructions: Instructions<'static>,
    blocks: BTreeMap<&'static str, Instructions<'static>>,
}

impl Metered {
    pub fn new(source: &str) -> Result<Self, Error> {
        let ws_config = WhitespaceConfig { keep_trailing_newline: false, lstrip_blocks: true, trim_blocks: true };
        let default_auto_escape = Arc::new(|_: &str| AutoEscape::None);
        let config = TemplateConfig { syntax_config: Default::default(), ws_config, default_auto_escape };
        let compiled = CompiledTemplate::new("chat", interned(source), &config)?;
        let blocks = compiled.blocks.iter().map(|(name, block)| (*name, metered(block)));
        Ok(Self { environment: environment(), instructions: metered(&compiled.instructions), blocks: blocks.collect() })
    }

    /// What the template writes. `given`: bytes of the messages in `context`. Fails with [`ErrorKind::OutOfFuel`] and
    /// [`ErrorKind::WriteFailure`] where it takes more than is sensible.
    pub fn render(&self, context: Value, given: usize) -> Result<String, Error> {
        LEFT.set(MADE_LIMIT_BYTES + MADE_LIMIT_TIMES * given);
        let mut text = String::new();
        let mut output = make_string_output(&mut text);
        let vm = Vm::new(&self.environment);
        vm.eval(&self.instructions, context, &self.blocks, &mut output, AutoEscape::None)?;
        Ok(text)
    }
}

/// Compiled templates point into their source; a process has few of them, those of its models.
fn interned(source: &str) -> &'static str {
    static SOURCES: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut sources = SOURCES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = sources.get(source) {
        return known;
    }
    let kept = &*Box::leak(source.to_owned().into_boxed_str());
    sources.insert(kept);
    kept
}

/// No template can write these names, which the engine looks up without blanks.
const ADD: &str = "metered:+";
const CONCAT: &str = "metered:~";
const TIMES: &str = "metered:*";
const SLICE: &str = "metered:slice";
const BUILT: &str = "metered:list";
const IN: &str = "metered:in";
const EQUAL: &str = "metered:==";
const UNEQUAL: &str = "metered:!=";
/// No place in the engine's table of filters.
const BY_NAME: u8 = !0;

/// The same program, in which whatever makes a value asks for it.
fn metered(program: &Instructions<'static>) -> Instructions<'static> {
    let all: Vec<_> = (0..program.len() as u32).filter_map(|index| program.get(index)).collect();
    // Where each instruction is now, and behind the last of them the end.
    let moved: Vec<u32> = std::iter::once(0)
        .chain(all.iter().map(|one| if is_two(one) { 2 } else { 1 }))
        .scan(0, |at, size| {
            *at += size;
            Some(*at)
        })
        .collect();
    let to = |target: &u32| moved.get(*target as usize).copied().unwrap_or(*target);
    let mut rewritten = Instructions::new(program.name(), program.source());
    for (index, one) in (0..).zip(all) {
        let filter = |name, arguments| vec![Instruction::ApplyFilter(name, Some(arguments), BY_NAME)];
        let replaced = match one {
            Instruction::Add => filter(ADD, 2),
            Instruction::StringConcat => filter(CONCAT, 2),
            Instruction::Mul => filter(TIMES, 2),
            Instruction::Slice => filter(SLICE, 4),
            Instruction::In => filter(IN, 2),
            Instruction::Eq => filter(EQUAL, 2),
            Instruction::Ne => filter(UNEQUAL, 2),
            Instruction::EmitRaw(text) => {
                vec![Instruction::LoadConst(Value::from_safe_string((*text).to_owned())), Instruction::Emit]
            }
            Instruction::BuildList(_) | Instruction::BuildMap(_) => [vec![one.clone()], filter(BUILT, 1)].concat(),
            Instruction::Iterate(target) => vec![Instruction::Iterate(to(target))],
            Instruction::Jump(target) => vec![Instruction::Jump(to(target))],
            Instruction::JumpIfFalse(target) => vec![Instruction::JumpIfFalse(to(target))],
            Instruction::JumpIfFalseOrPop(target) => vec![Instruction::JumpIfFalseOrPop(to(target))],
            Instruction::JumpIfTrueOrPop(target) => vec![Instruction::JumpIfTrueOrPop(to(target))],
            Instruction::BuildMacro(name, start, flags) => vec![Instruction::BuildMacro(name, to(start), *flags)],
            other => vec![other.clone()],
        };
        for instruction in replaced {
            match (program.get_span(index), program.get_line(index)) {
                (Some(span), _) => rewritten.add_with_span(instruction, span),
                (None, Some(line)) => rewritten.add_with_line(instruction, line as u16),
                (None, None) => rewritten.add(instruction),
            };
        }
    }
    rewritten
}

fn is_two(instruction: &Instruction<'_>) -> bool {
    matches!(instruction, Instruction::EmitRaw(_) | Instruction::BuildList(_) | Instruction::BuildMap(_))
}

/// Filters that make something of what they are given, or look at all of it; the others give back one thing of it.
const MAKING: [&str; 34] = [
    "safe",
    "escape",
    "e",
    "lower",
    "upper",
    "title",
    "capitalize",
    "replace",
    "dictsort",
    "items",
    "reverse",
    "trim",
    "join",
    "split",
    "lines",
    "sort",
    "list",
    "string",
    "batch",
    "slice",
    "indent",
    "groupby",
    "unique",
    "chain",
    "zip",
    "pprint",
    "urlencode",
    "select",
    "reject",
    "selectattr",
    "rejectattr",
    "sum",
    "min",
    "max",
];

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(formatted);
    environment.set_unknown_method_callback(|state, value, method, arguments| {
        charge_for(method, &[std::slice::from_ref(value), arguments].concat())?;
        pycompat::unknown_method_callback(state, value, method, arguments)
    });
    environment.add_filter(ADD, added);
    environment.add_filter(CONCAT, joined);
    environment.add_filter(TIMES, repeated);
    environment.add_filter(SLICE, sliced);
    environment.add_filter(IN, contained);
    environment.add_filter(EQUAL, equal);
    environment.add_filter(UNEQUAL, |a: Value, b: Value| equal(a, b).map(|equal| !equal));
    environment.add_filter("map", mapped);
    environment.add_filter(BUILT, |list: Value| spend(size(&list)?).map(|()| list));
    for name in MAKING.into_iter().chain(["format", "tojson"]) {
        environment.add_filter(name, move |arguments: Rest<Value>| {
            charge_for(name, &arguments)?;
            PLAIN.empty_state().apply_filter(name, &arguments)
        });
    }
    environment.add_function("namespace", |defaults: Option<Value>| {
        spend(defaults.as_ref().map_or(Ok(0), size)?)?;
        functions::namespace(defaults)
    });
    environment.add_function("dict", |value: Option<Value>, more: Kwargs| {
        spend(value.as_ref().map_or(Ok(0), size)?)?;
        functions::dict(value, more)
    });
    // It writes down whatever there is.
    environment.remove_global("debug");
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment
}

/// Does what was paid for.
static PLAIN: LazyLock<Environment<'static>> = LazyLock::new(|| {
    let mut environment = Environment::new();
    environment.add_filter("tojson", python_json::tojson);
    environment
});

fn operator(source: &'static str) -> Result<Expression<'static, 'static>, String> {
    PLAIN.compile_expression(source).map_err(|error| error.to_string())
}

type Operator = LazyLock<Result<Expression<'static, 'static>, String>>;
static PLAIN_ADD: Operator = LazyLock::new(|| operator("a + b"));
static PLAIN_TIMES: Operator = LazyLock::new(|| operator("a * b"));
static PLAIN_SLICE: Operator = LazyLock::new(|| operator("a[b:c:d]"));
static PLAIN_IN: Operator = LazyLock::new(|| operator("a in b"));

fn evaluated(operator: &Operator, operands: Value) -> Result<Value, Error> {
    match &**operator {
        Ok(expression) => expression.eval(operands),
        Err(error) => Err(Error::new(ErrorKind::InvalidOperation, error.clone())),
    }
}

thread_local! {
    /// Bytes that the template which this thread renders may still make.
    static LEFT: Cell<usize> = const { Cell::new(0) };
}

fn spend(bytes: usize) -> Result<(), Error> {
    let left = LEFT.get().checked_sub(bytes).ok_or_else(too_much)?;
    LEFT.set(left);
    Ok(())
}

fn too_much() -> Error {
    Error::new(ErrorKind::WriteFailure, "the template makes more than is sensible of these messages")
}

/// Bytes of a value written out, at least as many as it takes. Looks at no more of it than may be spent.
fn size(value: &Value) -> Result<usize, Error> {
    let mut bytes = 0;
    measure(value, &mut bytes, DEPTH_LIMIT)?;
    Ok(bytes)
}

fn measure(value: &Value, bytes: &mut usize, depth: usize) -> Result<(), Error> {
    *bytes += size_of::<Value>() + value.as_str().map_or(0, str::len);
    let kind = value.kind();
    if depth == 0 || *bytes > LEFT.get() {
        return Err(too_much());
    }
    if matches!(kind, ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
        for item in value.try_iter()? {
            measure(&item, bytes, depth - 1)?;
            if kind == ValueKind::Map {
                measure(&value.get_item(&item)?, bytes, depth - 1)?;
            }
        }
    }
    Ok(())
}

/// Bytes of a list whose items are there already, or of a text.
fn length(value: &Value) -> Result<usize, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => Ok(text.len()),
        (None, ValueKind::Seq | ValueKind::Iterable) => match value.len() {
            Some(items) => Ok(items.saturating_mul(size_of::<Value>())),
            None => size(value),
        },
        _ => Ok(0),
    }
}

fn formatted(out: &mut Output<'_>, state: &State<'_, '_>, value: &Value) -> Result<(), Error> {
    spend(size(value)?)?;
    minijinja::escape_formatter(out, state, value)
}

fn added(a: Value, b: Value) -> Result<Value, Error> {
    spend(length(&a)?.saturating_add(length(&b)?))?;
    evaluated(&PLAIN_ADD, context! { a, b })
}

fn joined(a: Value, b: Value) -> Result<Value, Error> {
    spend(size(&a)? + size(&b)?)?;
    Ok(Value::from(format!("{a}{b}")))
}

fn repeated(a: Value, b: Value) -> Result<Value, Error> {
    let times = [&a, &b].into_iter().filter_map(Value::as_usize).max().unwrap_or(0);
    spend(length(&a)?.saturating_add(length(&b)?).saturating_mul(times))?;
    evaluated(&PLAIN_TIMES, context! { a, b })
}

fn sliced(a: Value, b: Value, c: Value, d: Value) -> Result<Value, Error> {
    spend(a.as_str().map_or(0, str::len))?;
    evaluated(&PLAIN_SLICE, context! { a, b, c, d })
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

/// Nothing is made, but each item is looked at, and a list is compared with each.
fn contained(a: Value, b: Value) -> Result<Value, Error> {
    let each = if is_list(&a) { size(&a)?.div_ceil(size_of::<Value>()) } else { 1 };
    spend(length(&b)?.saturating_mul(each))?;
    evaluated(&PLAIN_IN, context! { a, b })
}

fn equal(a: Value, b: Value) -> Result<bool, Error> {
    let looked_at = match (a.as_str(), b.as_str()) {
        (Some(a), Some(b)) if a.len() == b.len() => a.len(),
        _ if is_list(&a) && is_list(&b) => size(&a)?,
        _ => 0,
    };
    spend(looked_at)?;
    Ok(a == b)
}

/// The filter that it applies is one of these, which is charged as well.
fn mapped(state: &State<'_, '_>, list: Value, arguments: Rest<Value>) -> Result<Vec<Value>, Error> {
    spend(size(&list)?)?;
    filters::map(state, list, arguments)
}

/// What a filter or method makes of its arguments, the first of them being what it is applied to: hardly more than they
/// are, but for those that write one argument as often as another says.
fn charge_for(name: &str, arguments: &[Value]) -> Result<(), Error> {
    let mut given = 0usize;
    for argument in arguments {
        given += size(argument)?;
    }
    let text = |at: usize| arguments.get(at).and_then(Value::as_str).unwrap_or_default();
    let more = match name {
        "replace" => text(0).matches(text(1)).count().saturating_mul(text(2).len()),
        // Either may be the list.
        "join" => {
            let items = arguments.iter().filter_map(Value::len).max().unwrap_or(0);
            items.saturating_mul(text(0).len().max(text(1).len()))
        }
        "indent" | "batch" | "slice" | "tojson" => given.saturating_mul(numbers(arguments)?),
        "format" => widths(text(0)),
        "select" | "reject" | "selectattr" | "rejectattr" => tested(arguments)?,
        _ => 0,
    };
    spend(given.saturating_add(more))
}

/// Each item of a list is tested with all of the other arguments.
fn tested(arguments: &[Value]) -> Result<usize, Error> {
    let Some((list, others)) = arguments.split_first() else { return Ok(0) };
    let items = match list.len() {
        Some(items) => items,
        None => size(list)? / size_of::<Value>(),
    };
    let mut each = 0usize;
    for other in others {
        each += size(other)?;
    }
    Ok(items.saturating_mul(each))
}

/// The sum of all numbers among arguments, named ones too.
fn numbers(arguments: &[Value]) -> Result<usize, Error> {
    let mut sum = 0usize;
    for argument in arguments.iter().skip(1) {
        sum = sum.saturating_add(argument.as_usize().unwrap_or(0));
        if argument.is_kwargs() {
            for name in argument.try_iter()? {
                sum = sum.saturating_add(argument.get_item(&name)?.as_usize().unwrap_or(0));
            }
        }
    }
    Ok(sum)
}

/// The sum of all numbers in a format, which may be widths.
fn widths(format: &str) -> usize {
    let digits = format.split(|letter: char| !letter.is_ascii_digit()).filter(|digits| !digits.is_empty());
    digits.fold(0, |sum: usize, digits| sum.saturating_add(digits.parse().unwrap_or(usize::MAX)))
}
