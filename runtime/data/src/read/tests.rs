use super::*;
use crate::conversation::Turn;
use ::parquet::data_type::{ByteArray, ByteArrayType};
use ::parquet::file::properties::WriterProperties;
use ::parquet::file::writer::SerializedFileWriter;
use ::parquet::schema::parser::parse_message_type;
use std::sync::Arc;

fn read(text: &str) -> Result<Vec<Conversation>, ReadError> {
    Reader::of_json(text.as_bytes().to_vec()).collect()
}

fn said(text: &str) -> String {
    read(text).unwrap_err().to_string()
}

fn folder(name: &str) -> tempfile::TempDir {
    tempfile::Builder::new().prefix(name).tempdir().unwrap()
}

#[test]
fn sharegpt_arrays_and_openai_lines_give_the_same_conversation() {
    let array = r#"[{"id":"a","conversations":[{"from":"human","value":"Hi"},{"from":"gpt","value":"Ho"}]}]"#;
    let lines = "\n{\"id\":\"a\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"Hi\"}]},{\"role\":\"assistant\",\"content\":\"Ho\"}]}\n\n";
    let expected = Conversation { id: "a".into(), turns: vec![Turn::user("Hi"), Turn::assistant("Ho")] };
    for text in [array, lines] {
        assert_eq!(read(text).unwrap(), std::slice::from_ref(&expected));
    }
}

#[test]
fn what_is_written_is_read_back() {
    let turns = vec![Turn::system("S"), Turn::user("U"), Turn::assistant("A")];
    let conversation = Conversation { id: "x".into(), turns };
    for record in [conversation.to_sharegpt(), conversation.to_messages()] {
        assert_eq!(read(&record.to_string()).unwrap(), std::slice::from_ref(&conversation));
    }
}

#[test]
fn a_reply_of_weight_0_is_not_to_be_learned_and_stays_so_when_written() {
    let text = r#"{"id":"x","messages":[{"role":"user","content":"U"},{"role":"assistant","content":"A","weight":0},
        {"role":"user","content":"V"},{"role":"assistant","content":"B","weight":1}]}"#;
    let read_once = read(&text.replace('\n', "")).unwrap().remove(0);
    assert_eq!(read_once.turns.iter().map(|turn| turn.learned).collect::<Vec<_>>(), [true, false, true, true]);
    for record in [read_once.to_sharegpt(), read_once.to_messages()] {
        assert_eq!(read(&record.to_string()).unwrap(), std::slice::from_ref(&read_once));
    }
    let half = said(r#"{"messages":[{"role":"assistant","content":"A","weight":0.5}]}"#);
    assert!(half.contains("messages[0].weight: is neither 0 nor 1"), "{half}");
}

#[test]
fn records_without_an_id_are_named_after_what_is_said() {
    let record = |text: &str| format!("{{\"messages\":[{{\"role\":\"user\",\"content\":\"{text}\"}}]}}");
    let ids = |texts: [&str; 2]| {
        let all = read(&texts.map(record).join("\n")).unwrap();
        (all[0].id.clone(), all[1].id.clone())
    };
    let (a, b) = ids(["x", "y"]);
    assert_ne!(a, b);
    let (a, b) = ids(["x", "x"]);
    assert_eq!(a, b);
}

#[test]
fn errors_say_where_and_what_to_do() {
    let broken = "{\"messages\":[]}\n{\"messages\":[{\"role\":\"tool\",\"content\":\"x\"}]}";
    assert!(
        said(broken).starts_with("the text: record 2 (line 2), field messages[0].role: \"tool\""),
        "{}",
        said(broken)
    );
    assert!(said("[{\"id\":1}]").starts_with("the text: record 1 (line 1), field conversations:"));
    assert!(said("{\"messages\":[]}\n{").contains("record 2 (line 2) is not JSON"));
    assert!(said("[{\"conversations\":\"[\"}]").contains("no JSON list of turns"));
    assert!(said("{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image\"}]}]}").contains("only text"));
    assert!(said(" \n").contains("it is empty"));
    assert!(said("[]").contains("it is empty"));
    let absent = Reader::open(Path::new("/nowhere/data.json")).unwrap_err().to_string();
    assert!(absent.starts_with("/nowhere/data.json: it cannot be read"), "{absent}");
}

#[test]
fn nothing_follows_an_error() {
    let mut reader = Reader::of_json(b"{\"messages\":[]}\n{\n{\"messages\":[]}".to_vec());
    assert!(reader.next().unwrap().is_ok());
    assert!(reader.next().unwrap().is_err());
    assert!(reader.next().is_none());
}

#[test]
fn what_is_no_conversation_is_told_and_does_not_hide_what_follows() {
    let good = r#"{"messages":[{"role":"user","content":"a"}]}"#;
    let lines = [good, "{\"id\":1}", "7", r#"{"messages":[{"role":"user","content":null}]}"#, good].join("\n");
    let read: Vec<_> = Reader::of_json(lines.into_bytes()).collect();
    assert_eq!(read.iter().map(Result::is_ok).collect::<Vec<_>>(), [true, false, false, false, true]);
    let of = |index: usize| read[index].as_ref().unwrap_err().problem.malformed().unwrap();
    assert_eq!((of(3).0.line, of(3).1.as_str()), (Some(4), "messages[].content is missing or not text"));
    let said = read[3].as_ref().unwrap_err().to_string();
    assert!(said.contains("field messages[0].content") && said.contains("`vicuna-data clean`"), "{said}");
    let nothing_else: Vec<_> = Reader::of_json(b"[7]".to_vec()).collect();
    assert_eq!(nothing_else.len(), 1, "a file of such records is not empty");
}

#[test]
fn a_text_in_the_wrong_place_is_neither_quoted_whole_nor_a_reason_of_its_own() {
    let long = "é;".repeat(10_000);
    for (record, expected) in [
        (format!(r#"{{"messages":[{{"role":"{long}","content":"a"}}]}}"#), "messages[].role is no known role"),
        (format!(r#"{{"messages":"\"{long}\""}}"#), "messages is a text that is no JSON list of turns"),
    ] {
        let error = Reader::of_json(record.into_bytes()).next().unwrap().unwrap_err();
        assert_eq!(error.problem.malformed().unwrap().1, expected);
        assert!(error.to_string().len() < 600, "{error}");
    }
}

#[test]
fn a_folder_is_its_data_files_by_name() {
    let folder = folder("files");
    std::fs::create_dir(folder.path().join("b")).unwrap();
    for name in ["z.json", "b/y.jsonl", "a.parquet", "c.JSONL", "b/data.csv", "README.md"] {
        std::fs::write(folder.path().join(name), "x").unwrap();
    }
    let names = |files: Vec<PathBuf>| -> Vec<String> {
        files.iter().map(|file| file.strip_prefix(folder.path()).unwrap().display().to_string()).collect()
    };
    let found = files(folder.path()).unwrap();
    assert_eq!(names(found.paths), ["a.parquet", "b/y.jsonl", "c.JSONL", "z.json"]);
    assert_eq!(found.skipped, ["README.md", "b/data.csv"]);
    for number in 0..SKIPPED_LIMIT {
        std::fs::write(folder.path().join(format!("{number}.png")), "x").unwrap();
    }
    let many = files(folder.path()).unwrap().skipped;
    assert_eq!((many.len(), many.last().unwrap().as_str()), (SKIPPED_LIMIT + 1, "and 2 more"));
    let empty = self::folder("empty");
    assert!(matches!(files(empty.path()).unwrap_err().problem, Problem::NoFiles));
}

/// One conversation of two turns in each of two rows; the second row's list has one turn.
fn write_nested(path: &Path, compression: ::parquet::basic::Compression) {
    let message = "message m { required binary id (UTF8); optional group conversations (LIST) { repeated group list { \
                   optional group element { optional binary from (UTF8); optional binary value (UTF8); } } } }";
    let schema = Arc::new(parse_message_type(message).unwrap());
    let properties = WriterProperties::builder().set_compression(compression).build();
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let values = |texts: &[&str]| texts.iter().map(|text| ByteArray::from(*text)).collect::<Vec<_>>();
    let columns = [
        (values(&["one", "two"]), None),
        (values(&["human", "gpt", "human"]), Some((vec![4, 4, 4], vec![0, 1, 0]))),
        (values(&["Hi", "Ho", "Bye"]), Some((vec![4, 4, 4], vec![0, 1, 0]))),
    ];
    for (values, levels) in columns {
        let mut column = group.next_column().unwrap().unwrap();
        let (definition, repetition) = levels.unzip();
        column.typed::<ByteArrayType>().write_batch(&values, definition.as_deref(), repetition.as_deref()).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_is_read_whatever_its_compression() {
    use ::parquet::basic::{Compression, GzipLevel, ZstdLevel};
    let folder = folder("parquet");
    for compression in [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::ZSTD(ZstdLevel::default()),
    ] {
        let path = folder.path().join("data.parquet");
        write_nested(&path, compression);
        let all: Vec<Conversation> = Reader::open(&path).unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(all[0].turns, [Turn::user("Hi"), Turn::assistant("Ho")]);
        assert_eq!((all[1].id.as_str(), all[1].turns.len()), ("two", 1));
    }
}

#[test]
fn broken_parquet_is_an_error_wherever_it_is_broken() {
    let folder = folder("broken");
    let path = folder.path().join("data.parquet");
    write_nested(&path, ::parquet::basic::Compression::SNAPPY);
    let whole = std::fs::read(&path).unwrap();
    for cut in (4..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..cut]).unwrap();
        let error = Reader::open(&path).unwrap_err().to_string();
        assert!(error.contains("is not readable Parquet"), "{error}");
    }
    for at in (4..whole.len()).step_by(3) {
        let mut changed = whole.clone();
        changed[at] ^= 0x55;
        std::fs::write(&path, &changed).unwrap();
        // An error or other text, but an end.
        if let Ok(reader) = Reader::open(&path) {
            assert!(reader.take(1000).count() < 1000);
        }
    }
}
