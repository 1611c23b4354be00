//! JSON as Python writes it: what templates write of tools is what their models were trained on, blank for blank.

use minijinja::value::{Kwargs, Value};
use minijinja::{Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::io;

/// The filter as Hugging Face defines it for templates; of its options `indent` alone is in use.
pub fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let written = match indent {
        None => written(value, OneLine),
        Some(width) => written(value, PrettyFormatter::with_indent(" ".repeat(width.min(16)).as_bytes())),
    };
    written.map_err(|error| Error::new(ErrorKind::BadSerialization, "cannot be written as JSON").with_source(error))
}

fn written(value: &Value, formatter: impl Formatter) -> Result<String, serde_json::Error> {
    let mut text = Vec::new();
    value.serialize(&mut Serializer::with_formatter(&mut text, formatter))?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// A blank behind every comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    fn rendered(template: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", super::tojson);
        let value = json!({ "z": [1, 2.5, null, true], "a": { "text": "<é> \"'\n" }, "none": [], "nothing": {} });
        environment.render_str(template, minijinja::context! { value }).unwrap()
    }

    #[test]
    fn it_is_written_as_python_s_json_does_in_the_order_given() {
        let expected = r#"{"z": [1, 2.5, null, true], "a": {"text": "<é> \"'\n"}, "none": [], "nothing": {}}"#;
        assert_eq!(rendered("{{ value | tojson }}"), expected);
        let indented = rendered("{{ value | tojson(indent=4) }}");
        assert!(indented.starts_with("{\n    \"z\": [\n        1,\n"), "{indented}");
        assert!(indented.ends_with("    \"none\": [],\n    \"nothing\": {}\n}"), "{indented}");
    }
}
