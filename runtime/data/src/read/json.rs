//! JSON arrays and JSON lines, cut into records without being held.

use super::{Place, Problem, RECORD_LIMIT_BYTES, record};
use crate::conversation::Conversation;
use serde_json::Value;
use std::io::{BufRead, Read};

/// Bytes of one record, and where it begins.
type Raw = (Place, Vec<u8>);

pub fn conversations(input: impl BufRead + 'static) -> impl Iterator<Item = Result<Conversation, Problem>> {
    Records::new(input).map(|raw| {
        let (at, bytes) = raw?;
        record::conversation(at, &parse(at, &bytes)?)
    })
}

fn parse(at: Place, bytes: &[u8]) -> Result<Value, Problem> {
    serde_json::from_slice(bytes).map_err(|error| Problem::Json { at, detail: in_file(at, &error) })
}

/// The parser counts lines from the start of the record.
fn in_file(at: Place, error: &serde_json::Error) -> String {
    let said = error.to_string();
    let what = said.split(" at line ").next().unwrap_or_default();
    let line = at.line.unwrap_or(1) + error.line().saturating_sub(1);
    format!("{what} at line {line}, column {}", error.column())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Unknown,
    Array,
    Lines,
    Ended,
}

/// Records of one input, as bytes.
struct Records<R> {
    input: R,
    shape: Shape,
    record: usize,
    line: usize,
}

impl<R: BufRead> Records<R> {
    fn new(input: R) -> Self {
        Self { input, shape: Shape::Unknown, record: 0, line: 1 }
    }

    fn here(&self) -> Place {
        Place { record: self.record + 1, line: Some(self.line) }
    }

    fn begin(&mut self) -> Result<(), Problem> {
        if self.input.fill_buf()?.starts_with(b"\xef\xbb\xbf") {
            self.input.consume(3);
        }
        self.shape = match self.skip_blank()? {
            Some(b'[') => {
                self.input.consume(1);
                Shape::Array
            }
            Some(_) => Shape::Lines,
            None => Shape::Ended,
        };
        Ok(())
    }

    /// The next byte that is no white space; it is not consumed.
    fn skip_blank(&mut self) -> Result<Option<u8>, Problem> {
        loop {
            let buffer = self.input.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let next = buffer.get(blank).copied();
            self.line += newlines(&buffer[..blank]);
            self.input.consume(blank);
            if next.is_some() {
                return Ok(next);
            }
        }
    }

    fn line(&mut self) -> Result<Option<Raw>, Problem> {
        if self.skip_blank()?.is_none() {
            self.shape = Shape::Ended;
            return Ok(None);
        }
        let at = self.here();
        let mut bytes = Vec::new();
        let limit = RECORD_LIMIT_BYTES as u64 + 1;
        self.input.by_ref().take(limit).read_until(b'\n', &mut bytes)?;
        if bytes.len() > RECORD_LIMIT_BYTES {
            return Err(Problem::TooLong { at });
        }
        self.line += newlines(&bytes);
        self.record += 1;
        Ok(Some((at, bytes)))
    }

    fn element(&mut self) -> Result<Option<Raw>, Problem> {
        self.skip_blank()?;
        let at = self.here();
        let (bytes, end) = self.scan(at)?;
        let blank = bytes.trim_ascii().is_empty();
        if end == b']' {
            self.shape = Shape::Ended;
            if self.skip_blank()?.is_some() {
                return Err(Problem::Array { at: self.here(), detail: "something follows the array; remove it" });
            }
            if blank && self.record == 0 {
                return Ok(None);
            }
        }
        if blank {
            return Err(Problem::Array { at, detail: "there is a comma but no record; remove the comma" });
        }
        self.record += 1;
        Ok(Some((at, bytes)))
    }

    /// The bytes up to the comma or bracket that ends an element, which is consumed too.
    fn scan(&mut self, at: Place) -> Result<(Vec<u8>, u8), Problem> {
        let mut bytes = Vec::new();
        let mut nesting = Nesting::default();
        loop {
            let buffer = self.input.fill_buf()?;
            if buffer.is_empty() {
                let detail = "the file ends inside of the array: it is cut off; copy it again";
                return Err(Problem::Array { at, detail });
            }
            let end = buffer.iter().position(|byte| nesting.ends_at(*byte));
            let taken = end.unwrap_or(buffer.len());
            bytes.extend_from_slice(&buffer[..taken]);
            self.line += newlines(&buffer[..taken]);
            let found = end.map(|end| buffer[end]);
            self.input.consume(taken + usize::from(found.is_some()));
            if bytes.len() > RECORD_LIMIT_BYTES {
                return Err(Problem::TooLong { at });
            }
            if let Some(end) = found {
                return Ok((bytes, end));
            }
        }
    }

    fn advance(&mut self) -> Result<Option<Raw>, Problem> {
        if self.shape == Shape::Unknown {
            self.begin()?;
        }
        match self.shape {
            Shape::Array => self.element(),
            Shape::Lines => self.line(),
            Shape::Unknown | Shape::Ended => Ok(None),
        }
    }
}

impl<R: BufRead> Iterator for Records<R> {
    type Item = Result<Raw, Problem>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance().transpose()
    }
}

/// How deep in brackets and strings a byte is.
#[derive(Default)]
struct Nesting {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Nesting {
    /// Whether this byte, outside of everything, ends an element of the array.
    fn ends_at(&mut self, byte: u8) -> bool {
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return false;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' if self.depth > 0 => self.depth -= 1,
            b',' | b']' if self.depth == 0 => return true,
            _ => {}
        }
        false
    }
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::BufReader;

    /// Reads through a buffer so small that every boundary is met.
    fn records(text: &[u8]) -> Result<Vec<Raw>, Problem> {
        Records::new(BufReader::with_capacity(3, text)).collect()
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<i32>().prop_map(Value::from),
            "[\\PC\"\\\\\\[\\]{},\n]{0,8}".prop_map(Value::from),
            Just(Value::Null),
        ];
        leaf.prop_recursive(3, 16, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map("[a-z\"\\[]{0,3}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_array_is_cut_where_its_elements_end(values in proptest::collection::vec(json(), 0..6), pretty: bool) {
            let text = if pretty { serde_json::to_vec_pretty(&values) } else { serde_json::to_vec(&values) }.unwrap();
            let cut: Vec<Value> =
                records(&text).unwrap().iter().map(|(at, bytes)| parse(*at, bytes).unwrap()).collect();
            prop_assert_eq!(cut, values);
        }

        #[test]
        fn lines_are_records(values in proptest::collection::vec(json(), 1..6)) {
            // A line that begins with a bracket would make the file an array.
            let lines: Vec<String> = values.iter().map(|value| format!("{{\"v\":{value}}}")).collect();
            let cut = records(lines.join("\n\n").as_bytes()).unwrap();
            let back: Vec<Value> = cut.iter().map(|(at, bytes)| parse(*at, bytes).unwrap()["v"].clone()).collect();
            prop_assert_eq!(back, values);
            prop_assert_eq!(cut.last().unwrap().0.line, Some(2 * lines.len() - 1));
        }

        #[test]
        fn no_bytes_break_the_scanner(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for result in conversations(std::io::Cursor::new([b"[".as_slice(), &bytes].concat())).take(300) {
                if result.is_err() { break }
            }
            drop(records(&bytes));
        }
    }

    #[test]
    fn places_are_those_of_the_file() {
        let at = |text: &str| records(text.as_bytes()).unwrap().iter().map(|raw| raw.0).collect::<Vec<_>>();
        let lines = |places: Vec<Place>| places.iter().map(|place| place.line.unwrap()).collect::<Vec<_>>();
        assert_eq!(lines(at("\n[\n1,\n\n {\"a\":\n2} , 3]\n")), [3, 5, 6]);
        assert_eq!(lines(at("\u{feff}{}\n\n{}\n")), [1, 3]);
        assert_eq!(at("[1, 2]")[1].record, 2);
    }

    #[test]
    fn what_is_wrong_with_an_array_is_said() {
        let said = |text: &str| records(text.as_bytes()).unwrap_err().to_string();
        assert!(said("[1,\n2").contains("record 2 (line 2): the file ends"), "{}", said("[1,\n2"));
        assert!(said("[1,,2]").contains("comma but no record"));
        assert!(said("[1,]").contains("comma but no record"));
        assert!(said("[1] 2").contains("something follows"));
        assert!(records(b" [ ] ").unwrap().is_empty());
        assert!(records(b" ").unwrap().is_empty());
    }

    #[test]
    fn a_parser_s_complaint_is_placed_in_the_file() {
        let place = Place { record: 4, line: Some(10) };
        let said = parse(place, b"{\"a\":\n\n oops}").unwrap_err().to_string();
        assert!(said.starts_with("record 4 (line 10) is not JSON: expected") && said.contains("at line 12,"), "{said}");
    }
}
