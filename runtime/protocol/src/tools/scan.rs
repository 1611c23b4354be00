//! A call's JSON while it is being written: what of it is certain already.

/// What a text begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scan<'a> {
    /// May still become a call.
    Open,
    /// Is none, whatever follows.
    Other,
    /// `length`: of the whole object, once it is there.
    Call { name: String, arguments: Arguments<'a>, length: Option<usize> },
}

/// As they were written; only those within a string are rewritten.
pub type Arguments<'a> = std::borrow::Cow<'a, str>;

/// A part of a text that is read.
enum Part<'a> {
    Whole(&'a str),
    /// The text ends within it.
    Begun(&'a str),
    Wrong,
}

/// An object `{"name": …, "arguments": …}`, where `parameters` is another word for the arguments.
pub fn call(text: &str) -> Scan<'_> {
    let mut cursor = Cursor { text, at: 0 };
    let (mut name, mut arguments) = (None, None);
    match cursor.next() {
        None => return Scan::Open,
        Some('{') => cursor.at += 1,
        Some(_) => return Scan::Other,
    }
    loop {
        let key = match cursor.member() {
            Ok(key) => key,
            Err(unfinished) => return told(name, arguments, None, unfinished),
        };
        let value = cursor.value();
        let (text, whole) = match value {
            Part::Whole(text) => (text, true),
            Part::Begun(text) => (text, false),
            Part::Wrong => return told(name, arguments, None, Scan::Other),
        };
        match key.as_str() {
            "name" if whole && name.is_none() => match serde_json::from_str::<String>(text) {
                Ok(text) => name = Some(text),
                Err(_) => return Scan::Other,
            },
            "arguments" | "parameters" if arguments.is_some() => {}
            "arguments" | "parameters" if text.starts_with('{') => arguments = Some(Arguments::Borrowed(text)),
            "arguments" | "parameters" if whole => match serde_json::from_str::<String>(text) {
                Ok(text) => arguments = Some(Arguments::Owned(text)),
                Err(_) => return Scan::Other,
            },
            _ => {}
        }
        if !whole {
            return told(name, arguments, None, Scan::Open);
        }
        match cursor.next() {
            Some(',') => cursor.at += 1,
            Some('}') => return told(name, arguments, Some(cursor.at + 1), Scan::Other),
            Some(_) => return told(name, arguments, None, Scan::Other),
            None => return told(name, arguments, None, Scan::Open),
        }
    }
}

/// What has been told stays told, whatever comes behind it.
fn told<'a>(
    name: Option<String>,
    arguments: Option<Arguments<'a>>,
    length: Option<usize>,
    otherwise: Scan<'a>,
) -> Scan<'a> {
    match (name, arguments) {
        (Some(name), Some(arguments)) => Scan::Call { name, arguments, length },
        _ => otherwise,
    }
}

/// The arguments alone, behind a name that is known: as far as they are there, and their length once they are whole.
pub fn arguments(text: &str) -> Option<(&str, Option<usize>)> {
    let mut cursor = Cursor { text, at: 0 };
    if cursor.next() != Some('{') {
        return None;
    }
    match cursor.value() {
        Part::Whole(arguments) => Some((arguments, Some(cursor.at))),
        Part::Begun(arguments) => Some((arguments, None)),
        Part::Wrong => None,
    }
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next letter that is no white space; the cursor stands on it.
    fn next(&mut self) -> Option<char> {
        let rest = &self.text[self.at..];
        let rest = rest.trim_start();
        self.at = self.text.len() - rest.len();
        rest.chars().next()
    }

    /// A key and its colon; otherwise what that makes of the object.
    fn member(&mut self) -> Result<String, Scan<'a>> {
        match self.next() {
            Some('"') => {}
            None => return Err(Scan::Open),
            Some(_) => return Err(Scan::Other),
        }
        let key = match self.string() {
            Part::Whole(text) => serde_json::from_str(text).map_err(|_| Scan::Other)?,
            Part::Begun(_) => return Err(Scan::Open),
            Part::Wrong => return Err(Scan::Other),
        };
        match self.next() {
            Some(':') => self.at += 1,
            None => return Err(Scan::Open),
            Some(_) => return Err(Scan::Other),
        }
        Ok(key)
    }

    fn value(&mut self) -> Part<'a> {
        match self.next() {
            None => Part::Begun(""),
            Some('"') => self.string(),
            Some('{' | '[') => self.nested(),
            Some(_) => self.word(),
        }
    }

    /// From one quotation mark to the next.
    fn string(&mut self) -> Part<'a> {
        let start = self.at;
        let mut escaped = false;
        for (offset, byte) in self.text.as_bytes()[start + 1..].iter().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    self.at = start + 1 + offset + 1;
                    return Part::Whole(&self.text[start..self.at]);
                }
                _ => {}
            }
        }
        Part::Begun(&self.text[start..])
    }

    /// From one bracket to the one that closes it.
    fn nested(&mut self) -> Part<'a> {
        let start = self.at;
        let mut depth = 0usize;
        while let Some(byte) = self.text.as_bytes().get(self.at) {
            match byte {
                b'"' => match self.string() {
                    Part::Whole(_) => continue,
                    _ => return Part::Begun(&self.text[start..]),
                },
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth -= 1,
                _ => {}
            }
            self.at += 1;
            if depth == 0 {
                return Part::Whole(&self.text[start..self.at]);
            }
        }
        Part::Begun(&self.text[start..])
    }

    /// A number, true, false or null.
    fn word(&mut self) -> Part<'a> {
        let start = self.at;
        let rest = &self.text[start..];
        let length = rest.find(|letter: char| !letter.is_ascii_alphanumeric() && !matches!(letter, '.' | '-' | '+'));
        match length {
            Some(0) => Part::Wrong,
            Some(length) => {
                self.at += length;
                Part::Whole(&rest[..length])
            }
            None => Part::Begun(rest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Option<(String, String, Option<usize>)> {
        match call(text) {
            Scan::Call { name, arguments, length } => Some((name, arguments.into_owned(), length)),
            _ => None,
        }
    }

    #[test]
    fn arguments_are_told_while_they_are_written() {
        let whole = r#" {"name": "f", "arguments": {"x": "}\"", "y": [1]}} behind"#;
        let told: Vec<_> = (0..whole.len()).filter_map(|end| found(&whole[..end])).collect();
        assert_eq!(told.first().unwrap().1, "{");
        assert!(told.windows(2).all(|pair| pair[1].1.starts_with(&pair[0].1)));
        assert_eq!(found(whole), Some(("f".into(), r#"{"x": "}\"", "y": [1]}"#.into(), Some(whole.len() - 7))));
    }

    #[test]
    fn the_order_of_the_members_does_not_matter_nor_do_others() {
        let told = found(r#"{"type": "function", "parameters": {"x": 1}, "id": 7, "name": "f"}"#);
        assert_eq!(told.map(|(name, arguments, _)| (name, arguments)), Some(("f".into(), r#"{"x": 1}"#.into())));
    }

    #[test]
    fn arguments_within_a_string_are_taken_out_of_it() {
        assert_eq!(found(r#"{"name": "f", "arguments": "{\"x\": 1}"}"#).unwrap().1, r#"{"x": 1}"#);
    }

    #[test]
    fn what_cannot_become_a_call_is_known_at_once() {
        for text in ["x", "[", "{x", r#"{"name": 5,"#, r#"{"answer": 42}"#, r#"{"name": "f", "arguments": 3,"#] {
            assert_eq!(call(text), Scan::Other, "{text}");
        }
        for text in ["", " ", "{", r#"{"na"#, r#"{"name": "f""#, r#"{"answer": 4"#, r#"{"name": "f", "arguments""#] {
            assert_eq!(call(text), Scan::Open, "{text}");
        }
    }
}
