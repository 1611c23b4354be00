//! The label of ShareGPT's copy button, which lies in code that was copied from the page.
//!
//! It stands in the line after the fence, behind the language ("pythonCopy code"), or before the
//! first line of the code. Elsewhere the words are somebody's.

use super::{Candidate, Step, Verdict};
use crate::markdown::{Line, fence, lines};

const LABEL: &str = "Copy code";
/// Letters of the longest name of a language that stands before the label.
const LANGUAGE_LIMIT: usize = 24;

pub struct CopyCode;

impl Step for CopyCode {
    fn name(&self) -> &'static str {
        "\"Copy code\" in fences"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        Verdict::changed(candidate.rewrite(None, repaired))
    }
}

fn repaired(text: &str) -> Option<String> {
    if !text.contains(LABEL) {
        return None;
    }
    let mut repaired: Vec<String> = Vec::new();
    let mut opened = false;
    let mut in_code = false;
    let mut changed = false;
    for line in lines(text) {
        let (Line::Prose(content) | Line::Fence(content) | Line::Code(content)) = line;
        let label = if opened { labelled(content) } else { None };
        opened = matches!(line, Line::Fence(_)) && !in_code;
        if let Line::Fence(_) = line {
            in_code = !in_code;
        }
        let on_fence = if opened { fence_with_label(content) } else { None };
        if let Some(kept) = on_fence {
            repaired.push(kept);
            changed = true;
        } else if let Some((language, code)) = label {
            name_language(repaired.last_mut(), language);
            repaired.extend((!code.is_empty()).then(|| code.to_owned()));
            changed = true;
        } else {
            repaired.push(content.to_owned());
        }
    }
    changed.then(|| repaired.join("\n"))
}

/// Language and code of a line like "pythonCopy codeprint(1)".
fn labelled(line: &str) -> Option<(&str, &str)> {
    let (language, code) = line.trim_start().split_once(LABEL)?;
    let language = language.trim();
    is_language(language).then_some((language, code))
}

/// An opening fence with the label behind its language, without it.
fn fence_with_label(line: &str) -> Option<String> {
    let (_, _, info) = fence(line)?;
    let language = info.strip_suffix(LABEL)?.trim();
    let marks = &line[..line.find(info)?];
    is_language(language).then(|| format!("{marks}{language}"))
}

fn is_language(word: &str) -> bool {
    let part = |letter: char| letter.is_alphanumeric() || matches!(letter, '+' | '#' | '-' | '_' | '.');
    word.len() <= LANGUAGE_LIMIT && word.chars().all(part)
}

/// Puts the language behind a fence that has none.
fn name_language(fence_line: Option<&mut String>, language: &str) {
    if let Some(line) = fence_line
        && fence(line).is_some_and(|(_, _, info)| info.is_empty())
    {
        line.truncate(line.trim_end().len());
        line.push_str(language);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_button_s_label_goes_and_its_language_stays() {
        let cases = [
            ("```\npythonCopy codeprint(1)\nx\n```", "```python\nprint(1)\nx\n```"),
            ("a\n```python\nCopy code\nprint(1)\n```\nb", "a\n```python\nprint(1)\n```\nb"),
            ("```cssCopy code\na {}\n```", "```css\na {}\n```"),
            ("  ```\n  Copy code\n  x\n  ```", "  ```\n  x\n  ```"),
            ("```rust\nrustCopy code\nfn f() {}", "```rust\nfn f() {}"),
        ];
        for (dirty, clean) in cases {
            assert_eq!(repaired(dirty).as_deref(), Some(clean), "{dirty}");
        }
    }

    #[test]
    fn the_words_stay_where_somebody_wrote_them() {
        for text in [
            "Press Copy code.",
            "```\nx\nCopy code\n```",
            "```\nlet label = \"Copy code\";\n```",
            "```\nx\n```\nCopy code",
        ] {
            assert_eq!(repaired(text), None, "{text}");
        }
    }
}
