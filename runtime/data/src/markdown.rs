//! Which lines of a Markdown text are code.

/// A line of a text, and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// Outside of fenced code.
    Prose(&'a str),
    /// Opens or closes a fence.
    Fence(&'a str),
    Code(&'a str),
}

/// The lines of `text` without their ends. An unclosed fence reaches to the end of the text, as in CommonMark.
pub fn lines(text: &str) -> impl Iterator<Item = Line<'_>> {
    let mut open: Option<(char, usize)> = None;
    text.split('\n').map(move |line| match (open, fence(line)) {
        (None, Some((mark, length, _))) => {
            open = Some((mark, length));
            Line::Fence(line)
        }
        (Some((mark, length)), Some((other, more, ""))) if mark == other && more >= length => {
            open = None;
            Line::Fence(line)
        }
        (Some(_), _) => Line::Code(line),
        (None, None) => Line::Prose(line),
    })
}

/// The mark of a fence, its length and what follows it, without blanks around.
pub fn fence(line: &str) -> Option<(char, usize, &str)> {
    let line = line.trim();
    let mark = line.chars().next().filter(|mark| matches!(mark, '`' | '~'))?;
    let rest = line.trim_start_matches(mark);
    let length = line.len() - rest.len();
    // Three backticks around something in one line are inline code.
    let inline = mark == '`' && rest.contains('`');
    (length >= 3 && !inline).then(|| (mark, length, rest.trim()))
}

/// The text without its code.
pub fn prose(text: &str) -> impl Iterator<Item = &str> {
    lines(text).filter_map(|line| match line {
        Line::Prose(line) => Some(line),
        Line::Fence(_) | Line::Code(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_is_what_stands_between_fences_of_one_kind() {
        let text = "a\n```rust\nb\n~~~\n```\nc ```d```\n````\n```\ne";
        let seen: Vec<_> = lines(text).collect();
        use Line::{Code, Fence, Prose};
        let expected = [
            Prose("a"),
            Fence("```rust"),
            Code("b"),
            Code("~~~"),
            Fence("```"),
            Prose("c ```d```"),
            Fence("````"),
            Code("```"),
            Code("e"),
        ];
        assert_eq!(seen, expected);
        assert_eq!(prose(text).collect::<Vec<_>>(), ["a", "c ```d```"]);
    }
}
