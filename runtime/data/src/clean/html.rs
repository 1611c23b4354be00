//! Replies that are ShareGPT's page in HTML become Markdown, code kept as it is.
//!
//! Only replies that are HTML from their first to their last character: a reply about HTML, and one
//! that *is* an HTML document, stay. Text is not escaped: "snake_case" written as "snake\_case" is
//! what models then write, too.

use super::{Candidate, Step, Verdict, counters};
use crate::conversation::Role;
use htmd::element_handler::{HandlerResult, Handlers};
use htmd::options::{BulletListMarker, Options};
use htmd::{Element, HtmlToMarkdown as Converter, Node};
use markup5ever_rcdom::NodeData;
use std::rc::Rc;

/// Elements inside of each other, at most: they are walked recursively.
const DEPTH_LIMIT: usize = 256;

/// With what a rendered reply may begin. `html`, `head` and the like are left out: those are code.
const TAGS: [&str; 27] = [
    "a",
    "article",
    "b",
    "blockquote",
    "br",
    "code",
    "div",
    "em",
    "h1",
    "h2",
    "h3",
    "h4",
    "h5",
    "h6",
    "hr",
    "i",
    "img",
    "li",
    "ol",
    "p",
    "pre",
    "section",
    "span",
    "strong",
    "sup",
    "table",
    "ul",
];

/// What Markdown would escape, and html5ever's noncharacters that stand for it meanwhile.
const ESCAPED: [char; 14] = ['\\', '*', '_', '`', '[', ']', '<', '>', '&', '=', '~', '-', '+', '#'];
const DOT: char = '\u{fdef}';
const STAND_IN: u32 = 0xfdd0;

pub struct HtmlToMarkdown {
    converter: Converter,
}

impl Default for HtmlToMarkdown {
    fn default() -> Self {
        let options = Options {
            bullet_list_marker: BulletListMarker::Dash,
            ul_bullet_spacing: 1,
            ol_number_spacing: 1,
            ..Options::default()
        };
        let converter = Converter::builder()
            .options(options)
            .skip_tags(vec!["button", "script", "style", "svg"])
            .add_handler(vec!["pre"], code_block)
            .build();
        Self { converter }
    }
}

impl Step for HtmlToMarkdown {
    fn name(&self) -> &'static str {
        "HTML to Markdown"
    }

    fn apply(&mut self, candidate: &mut Candidate) -> Verdict {
        let mut failed = false;
        let changed = candidate.rewrite(Some(Role::Assistant), |text| {
            // The page's counter beside a reply is not part of its HTML.
            let stripped = counters::stripped(text);
            let text = stripped.as_deref().unwrap_or(text);
            let markdown = if is_html(text) { Some(self.convert(text)) } else { None };
            failed |= markdown == Some(None);
            markdown.flatten()
        });
        match failed {
            true => Verdict::dropped("HTML that is nested too deeply"),
            false => Verdict::changed(changed),
        }
    }
}

impl HtmlToMarkdown {
    fn convert(&self, html: &str) -> Option<String> {
        let plain: String = html.chars().filter(|letter| !is_stand_in(*letter)).collect();
        let tree = self.converter.html_to_tree(&plain).ok()?;
        protect(&tree)?;
        Some(self.converter.tree_to_markdown(&tree).chars().map(restored).collect::<String>().trim().to_owned())
    }
}

fn is_html(text: &str) -> bool {
    let text = text.trim();
    let Some(rest) = text.strip_prefix('<').filter(|_| text.ends_with('>')) else { return false };
    let end = rest.find(|letter: char| !letter.is_ascii_alphanumeric()).unwrap_or(rest.len());
    let (tag, after) = rest.split_at(end);
    after.starts_with([' ', '>', '/', '\n']) && TAGS.contains(&tag.to_ascii_lowercase().as_str())
}

/// Puts stand-ins for what would be escaped, outside of code. `None`: the tree is too deep.
fn protect(tree: &Rc<Node>) -> Option<()> {
    let mut pending = vec![(tree.clone(), 0, false)];
    while let Some((node, depth, in_code)) = pending.pop() {
        if depth > DEPTH_LIMIT {
            return None;
        }
        if let (NodeData::Text { contents }, false) = (&node.data, in_code) {
            let protected: String = contents.borrow().chars().map(stand_in).collect();
            contents.replace(protected.into());
        }
        let in_code = in_code || is_code(&node);
        pending.extend(node.children.borrow().iter().map(|child| (child.clone(), depth + 1, in_code)));
    }
    Some(())
}

fn is_code(node: &Node) -> bool {
    is_element(node, "pre") || is_element(node, "code")
}

fn is_element(node: &Node, tag: &str) -> bool {
    matches!(&node.data, NodeData::Element { name, .. } if &*name.local == tag)
}

fn is_stand_in(letter: char) -> bool {
    (STAND_IN..=DOT as u32).contains(&(letter as u32))
}

fn stand_in(letter: char) -> char {
    let place = ESCAPED.iter().position(|escaped| *escaped == letter);
    let other = place.and_then(|place| char::from_u32(STAND_IN + place as u32));
    other.unwrap_or(if letter == '.' { DOT } else { letter })
}

fn restored(letter: char) -> char {
    match letter {
        DOT => '.',
        letter if is_stand_in(letter) => {
            ESCAPED.get((letter as u32 - STAND_IN) as usize).copied().unwrap_or(char::REPLACEMENT_CHARACTER)
        }
        letter => letter,
    }
}

/// A fence around the text of the `code` in a `pre`. What else is in it (ShareGPT's bar with the language and the
/// button that copies) is not code.
fn code_block(_: &dyn Handlers, element: Element) -> Option<HandlerResult> {
    let inside = descendants(element.node);
    let code = inside.iter().find(|node| is_element(node, "code"));
    let source = code.map_or_else(|| text_of(&inside), |code| text_of(&descendants(code)));
    let language = code.and_then(language_class).or_else(|| language_class(element.node)).or_else(|| bar(&inside));
    let marks = "`".repeat(longest_run(&source).max(2) + 1);
    let source = source.strip_suffix('\n').unwrap_or(&source);
    Some(format!("\n\n{marks}{}\n{source}\n{marks}\n\n", language.unwrap_or_default()).into())
}

/// Everything below a node in the order of the document, less buttons.
fn descendants(node: &Rc<Node>) -> Vec<Rc<Node>> {
    let below = |node: &Rc<Node>| node.children.borrow().iter().rev().cloned().collect::<Vec<_>>();
    let mut pending = below(node);
    let mut found = Vec::new();
    while let Some(node) = pending.pop() {
        if !is_element(&node, "button") {
            pending.extend(below(&node));
            found.push(node);
        }
    }
    found
}

fn text_of(nodes: &[Rc<Node>]) -> String {
    let texts = nodes.iter().filter_map(|node| match &node.data {
        NodeData::Text { contents } => Some(contents.borrow().to_string()),
        _ => None,
    });
    texts.collect()
}

fn language_class(node: &Rc<Node>) -> Option<String> {
    let NodeData::Element { attrs, .. } = &node.data else { return None };
    let attrs = attrs.borrow();
    let class = attrs.iter().find(|attribute| &*attribute.name.local == "class")?;
    class.value.split_whitespace().find_map(|class| class.strip_prefix("language-")).map(str::to_owned)
}

/// The language in the bar above the code: the first `span` before it.
fn bar(inside: &[Rc<Node>]) -> Option<String> {
    let before = inside.iter().take_while(|node| !is_element(node, "code"));
    let span = before.into_iter().find(|node| is_element(node, "span"))?;
    let word = text_of(&descendants(span)).trim().to_owned();
    (!word.is_empty() && !word.contains(char::is_whitespace)).then_some(word)
}

fn longest_run(text: &str) -> usize {
    text.split(|letter| letter != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clean::tests::{S, candidate};

    fn markdown(html: &str) -> String {
        HtmlToMarkdown::default().convert(html).unwrap()
    }

    const PAGE_CODE: &str = "<pre><div class=\"bg-black\"><div class=\"flex\"><span class=\"\">python</span>\
        <button class=\"flex\"><svg></svg>Copy code</button></div><div class=\"p-4\"><code class=\"!whitespace-pre hljs\">\
        <span class=\"hljs-keyword\">def</span> snake_case(a):\n    <span>return</span> a &lt; 1 and \"&amp;\"\n</code></div></div></pre>";

    #[test]
    fn code_is_kept_as_it_is_with_its_language_and_without_the_button() {
        let html = format!("<div class=\"markdown\"><p>Run:</p>{PAGE_CODE}<p>Done.</p></div>");
        let expected = "Run:\n\n```python\ndef snake_case(a):\n    return a < 1 and \"&\"\n```\n\nDone.";
        assert_eq!(markdown(&html), expected);
        let classed = "<pre><code class=\"language-c\">a ``` b</code></pre>";
        assert_eq!(markdown(classed), "````c\na ``` b\n````");
        assert_eq!(markdown("<pre>plain</pre>"), "```\nplain\n```");
    }

    #[test]
    fn text_is_not_escaped() {
        let html = "<p>snake_case, 2 * 3 &lt; 7, [x], C:\\dir, a &amp; b</p><p>1. not a list</p><p># no heading</p>";
        assert_eq!(markdown(html), "snake_case, 2 * 3 < 7, [x], C:\\dir, a & b\n\n1. not a list\n\n# no heading");
        assert_eq!(markdown("<p>use <code>a_b</code> now</p>"), "use `a_b` now");
    }

    #[test]
    fn lists_keep_their_numbers_and_tables_their_columns() {
        assert_eq!(
            markdown("<ol><li>a</li><li>b</li></ol><p>x</p><ol start=\"3\"><li>c</li></ol>"),
            "1. a\n2. b\n\nx\n\n3. c"
        );
        assert_eq!(markdown("<ul><li>a</li><li><strong>b</strong></li></ul>"), "- a\n- **b**");
        let table =
            "<table><thead><tr><th>A</th><th>B</th></tr></thead><tbody><tr><td>1</td><td>2</td></tr></tbody></table>";
        let table = markdown(table);
        assert!(table.starts_with("| A ") && table.lines().count() == 3, "{table}");
    }

    #[test]
    fn only_replies_that_are_html_throughout_are_converted() {
        for html in ["<p>a</p>", " <div class=\"x\">a</div>\n", "<BR/>a<p>b</p>"] {
            assert!(is_html(html), "{html}");
        }
        for text in [
            "a <p>b</p>",
            "<p> is a tag",
            "<html><p>a</p></html>",
            "<!DOCTYPE html><p>",
            "<divan>",
            "a < b",
            "<T>x</T>",
        ] {
            assert!(!is_html(text), "{text}");
        }
        let mut asked = candidate(&[S::Human("<p>Why?</p>"), S::Bot("<p>So.</p>")]);
        assert_eq!(HtmlToMarkdown::default().apply(&mut asked), Verdict::Changed(1));
        assert_eq!(asked, candidate(&[S::Human("<p>Why?</p>"), S::Bot("So.")]));
    }

    #[test]
    fn the_page_s_counter_before_html_does_not_keep_it_html() {
        let mut told = candidate(&[S::Human("a"), S::Bot("2 / 2\n\n<div><p>So <b>it</b> is.</p></div>")]);
        assert_eq!(HtmlToMarkdown::default().apply(&mut told), Verdict::Changed(1));
        assert_eq!(told, candidate(&[S::Human("a"), S::Bot("So **it** is.")]));
        let mut fraction = candidate(&[S::Human("a"), S::Bot("2 / 2\n\nIt is <b>so</b>.")]);
        assert_eq!(HtmlToMarkdown::default().apply(&mut fraction), Verdict::Unchanged);
    }

    #[test]
    fn html_without_bottom_is_refused() {
        for tag in ["div", "pre", "span"] {
            let deep = format!("{}x{}", format!("<{tag}>").repeat(5000), format!("</{tag}>").repeat(5000));
            let verdict = HtmlToMarkdown::default().apply(&mut candidate(&[S::Human("a"), S::Bot(&deep)]));
            assert_eq!(verdict, Verdict::dropped("HTML that is nested too deeply"), "{tag}");
        }
    }
}
