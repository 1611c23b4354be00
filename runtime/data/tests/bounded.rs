//! Hostile input costs no more memory than it justifies.

#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/peak.rs"]
mod peak;
#[path = "support/tokenizer.rs"]
mod tokenizer;

use peak::peak_bytes;
use proptest::prelude::*;
use std::sync::LazyLock;
use tokenizers::Tokenizer;
use vicuna_data::template::NAMES;
use vicuna_data::{Reader, Template, TemplateError, Turn};

const MIB: usize = 1 << 20;

static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let tokens = [
        "<s>",
        "</s>",
        "<|begin_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|im_start|>",
        "<|im_end|>",
    ];
    Tokenizer::from_bytes(tokenizer::document(&tokens).to_string()).unwrap()
});

fn encoded(jinja: &str) -> Result<usize, TemplateError> {
    let encoder = Template::from_jinja(jinja, "<s>", "</s>")?.bind(&TOKENIZER)?;
    let turns = [Turn::user("a question"), Turn::assistant("a reply"), Turn::user("and another")];
    encoder.prompt_ids(&turns).map(|ids| ids.len())
}

/// A template that is well behaved but for `body`, which is in its way from the third message on.
fn hostile(body: &str) -> String {
    format!(
        "{{% set ns = namespace(x='aaaaaaaaaaaaaaaa', l=[1, 2]) %}}{{% set big = 'a' * 100000 %}}\
         {{% if messages|length > 2 %}}{body}{{% endif %}}\
         {{% for m in messages %}}{{{{ m['content'] + '</s>' }}}}{{% endfor %}}"
    )
}

#[test]
fn a_template_cannot_take_more_memory_than_its_messages_justify() {
    let stored: String =
        (0..1000).map(|number| format!("{{% set ns.l{number} = range(100000)|reject('string') %}}")).collect();
    for body in [
        stored.as_str(),
        "{% for i in range(90000) %}{% set ns.l = range(100000)|select|select|select %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.l = range(100000)|selectattr('x')|rejectattr('x') %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.l = range(100000)|map('abs') %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.x = range(100000)|sum + range(100000)|min + range(100000)|max %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.x = 'x' in range(100000) %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.x = range(100000) == range(100000) %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.x = big != big %}{% endfor %}",
        "{{ range(100000)|select('in', range(100000)|list) }}",
        "{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = ns.x * 9 %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = 9 * ns.x %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = (ns.l * 9)|list %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
        "{% for i in range(60) %}{% set ns.l = ns.l|chain(ns.l) %}{% endfor %}{% for i in ns.l %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = ns.x|replace('a', 'aaaaaaaa') %}{% endfor %}",
        "{% for i in range(60) %}{% set ns.x = ns.x.replace('', big) %}{% endfor %}",
        "{{ (range(90000)|list)|join(big) }}",
        "{{ big.join(range(90000)|list) }}",
        "{{ ([big] * 90000)|join }}",
        "{{ ([big] * 90000)|string }}",
        "{{ ([big] * 90000)|tojson }}",
        "{{ ([big] * 90000)|map('replace', 'a', big)|list }}",
        "{{ 'a\nb'|indent(9000000000) }}",
        "{{ 'a\nb'|indent(width=9000000000) }}",
        "{{ [1]|batch(9000000000, 'x') }}",
        "{{ [1]|slice(9000000000)|list }}",
        "{{ '%9000000000d'|format(1) }}",
        "{{ '{:9000000000}'.format(1) }}",
        "{% for i in range(90000) %}{% set ns.l = ns.l + [big[1:]] %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.l = ns.l + [big.upper()] %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.l = [ns.l] %}{% endfor %}",
        "{% for i in range(90000) %}{% set ns.l = namespace(x=ns.l) %}{% endfor %}",
        "{% set ns.x = ns %}{{ ns }}",
        "{% macro twice(x) %}{{ x }}{{ x }}{% endmacro %}{% for i in range(60) %}{% set ns.x = twice(ns.x) %}{% endfor %}",
        "{% set x %}{% for a in range(90000) %}{% for b in range(90000) %}text as it is, written again and again{% endfor %}{% endfor %}{% endset %}",
    ] {
        let (bytes, result) = peak_bytes(|| encoded(&hostile(body)));
        let error = result.expect_err(body);
        assert!(matches!(error, TemplateError::Endless { .. }), "{body}: {error}");
        assert!(bytes < 128 * MIB, "{body} took {} MiB", bytes / MIB);
    }
    assert!(encoded(&hostile("")).is_ok());
}

/// What a template is broken with.
fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        "[a-z'\"{}%\\[\\]()|.,+~*=<> \n0-9-]{1,3}",
        proptest::sample::select(vec![
            "{%",
            "%}",
            "{{",
            "}}",
            "{% for m in messages %}",
            "{% for i in range(9999) %}",
            "{% endfor %}",
            "{% set x = x ~ x %}",
            "{% if",
            "{% endif %}",
            " ~ ",
            " + ",
            " * 9999",
            "|trim",
            "|replace('', messages)",
            "|join",
            "[::-1]",
            "messages",
            "message",
            "loop",
            "system",
            "namespace(x=messages)",
            "{% macro m(x) %}",
            "{% endmacro %}",
            "{{ m(m) }}",
            "{% set x %}",
            "{% endset %}",
            "{# ",
            " #}",
            "{% raw %}",
            "recursive",
        ])
        .prop_map(str::to_owned),
    ]
}

proptest! {
    #[test]
    fn a_template_broken_anywhere_is_refused_or_ends(
        name in proptest::sample::select(NAMES.to_vec()),
        breaks in proptest::collection::vec((any::<proptest::sample::Index>(), 0usize..12, fragment()), 1..4),
    ) {
        let mut jinja: Vec<char> = Template::named(name).unwrap().jinja().chars().collect();
        for (at, gone, put) in breaks {
            let at = at.index(jinja.len() + 1);
            let end = (at + gone).min(jinja.len());
            jinja.splice(at..end, put.chars());
        }
        let jinja: String = jinja.into_iter().collect();
        let (bytes, _) = peak_bytes(|| encoded(&jinja));
        prop_assert!(bytes < 128 * MIB, "{} MiB", bytes / MIB);
    }
}

mod parquet_file {
    use parquet::data_type::{ByteArray, ByteArrayType};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::sync::Arc;

    /// Rows of conversations as JSON text, compressed.
    pub fn bytes(rows: usize) -> Vec<u8> {
        let schema = Arc::new(parse_message_type("message m { required binary conversations (UTF8); }").unwrap());
        let compression = parquet::basic::Compression::SNAPPY;
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut bytes = Vec::new();
        let mut writer = SerializedFileWriter::new(&mut bytes, schema, properties).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let row = r#"[{"from":"human","value":"Hi"},{"from":"gpt","value":"Ho"}]"#;
        let values: Vec<ByteArray> = (0..rows).map(|_| ByteArray::from(row)).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        group.close().unwrap();
        writer.close().unwrap();
        bytes
    }
}

proptest! {
    /// The footer and the page headers say how long things are; any of it may be a lie.
    #[test]
    fn a_parquet_file_whose_sizes_lie_takes_no_memory_for_them(
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>(), any::<bool>()), 1..6),
    ) {
        static WHOLE: LazyLock<Vec<u8>> = LazyLock::new(|| parquet_file::bytes(20));
        let mut bytes = WHOLE.clone();
        for (at, value, high) in changes {
            // Numbers are varints: bytes of their highest bit set go on.
            let at = 4 + at.index(bytes.len() - 4);
            bytes[at] = if high { value | 0x80 } else { value };
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("data.parquet");
        std::fs::write(&file, &bytes).unwrap();
        let (peak, read) = peak_bytes(|| Reader::open(&file).map_or(0, |reader| reader.take(1000).count()));
        prop_assert!(read < 1000);
        prop_assert!(peak < 64 * MIB, "{} MiB for a file of {} bytes", peak / MIB, bytes.len());
    }
}
