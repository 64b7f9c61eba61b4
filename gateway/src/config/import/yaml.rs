//! As much YAML as configurations of the ancestor have: maps by indentation,
//! scalars, quotes, comments. Whatever else there is is refused with its line,
//! never guessed at.

use super::ImportError;

/// Deepest nesting and longest file; both are far more than there can be.
const DEEPEST: usize = 16;
const LONGEST: usize = 1 << 20;

/// A value, and where it began.
#[derive(Debug)]
pub(super) struct Node {
    line: usize,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Scalar(String),
    Map(Vec<(String, Node)>),
}

impl Node {
    pub(super) fn empty() -> Node {
        Node {
            line: 0,
            value: Value::Map(Vec::new()),
        }
    }

    pub(super) fn line(&self) -> usize {
        self.line
    }

    pub(super) fn scalar(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(text) => Some(text),
            Value::Map(_) => None,
        }
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, &Node)> {
        let all = match &self.value {
            Value::Map(all) => all.as_slice(),
            Value::Scalar(_) => &[],
        };
        all.iter().map(|(key, node)| (key.as_str(), node))
    }

    /// Keys were written in any case: the library that read them did not care.
    pub(super) fn get(&self, key: &str) -> Option<&Node> {
        let mut entries = self.entries();
        let found = entries.find(|(k, _)| k.eq_ignore_ascii_case(key));
        found.map(|(_, node)| node)
    }
}

struct Line<'a> {
    number: usize,
    depth: usize,
    text: &'a str,
}

fn refused<T>(line: usize, what: &str) -> Result<T, ImportError> {
    Err(ImportError::Syntax {
        line,
        what: what.to_owned(),
    })
}

pub(super) fn parse(text: &str) -> Result<Node, ImportError> {
    if text.len() > LONGEST {
        return refused(1, "the file is too long for a configuration");
    }
    let mut lines = Vec::new();
    for (at, whole) in text.lines().enumerate() {
        let number = at + 1;
        let text = whole.trim_start_matches(' ');
        if text.trim().is_empty() || text.starts_with('#') || (at == 0 && text == "---") {
            continue;
        }
        if text.starts_with('\t') {
            return refused(number, "a tab indents; use spaces");
        }
        lines.push(Line {
            number,
            depth: whole.len() - text.len(),
            text: text.trim_end(),
        });
    }
    let mut rest = lines.as_slice();
    let root = map(&mut rest, 0, 0)?;
    match rest.first() {
        Some(line) => refused(line.number, "this is indented less than what it belongs to"),
        None => Ok(root),
    }
}

/// All lines of one depth, with what is below them.
fn map(lines: &mut &[Line<'_>], depth: usize, nested: usize) -> Result<Node, ImportError> {
    let first = lines.first().map_or(0, |l| l.number);
    if nested > DEEPEST {
        return refused(first, "this is nested too deeply for a configuration");
    }
    let mut all: Vec<(String, Node)> = Vec::new();
    while let [line, below @ ..] = *lines {
        if line.depth < depth {
            break;
        }
        if line.depth > depth {
            return refused(line.number, "this is indented more than what is before it");
        }
        *lines = below;
        let (key, rest) = key(line)?;
        if all.iter().any(|(k, _)| *k == key) {
            return refused(line.number, &format!("{key} is there twice"));
        }
        let text = scalar(line, rest)?;
        let deeper = below.first().map(|l| l.depth).filter(|d| *d > depth);
        let node = match (text, deeper) {
            (None, Some(deeper)) => Node {
                line: line.number,
                ..map(lines, deeper, nested + 1)?
            },
            (text, None) => Node {
                line: line.number,
                value: Value::Scalar(text.unwrap_or_default()),
            },
            (Some(_), Some(_)) => {
                return refused(line.number, "a value and more below it; only one can be");
            }
        };
        all.push((key, node));
    }
    Ok(Node {
        line: first,
        value: Value::Map(all),
    })
}

fn key<'a>(line: &Line<'a>) -> Result<(String, &'a str), ImportError> {
    let colon = |rest: &'a str| {
        let rest = rest.trim_start().strip_prefix(':')?;
        (rest.is_empty() || rest.starts_with(' ')).then_some(rest)
    };
    if line.text.starts_with(['"', '\'']) {
        let (key, rest) = quoted(line, line.text)?;
        return match colon(rest) {
            Some(rest) => Ok((key, rest)),
            None => refused(line.number, "a colon is missing behind the key"),
        };
    }
    if line
        .text
        .starts_with(['-', '[', '{', '&', '*', '!', '?', '|', '>', '%', '@', '`'])
    {
        return refused(
            line.number,
            "only maps of keys and values are read here, as KEY: VALUE",
        );
    }
    let end = line
        .text
        .find(": ")
        .or_else(|| line.text.ends_with(':').then(|| line.text.len() - 1));
    match end.map(|at| line.text.split_at(at)) {
        Some((key, rest)) if !key.trim().is_empty() => {
            Ok((key.trim_end().to_owned(), colon(rest).unwrap_or_default()))
        }
        _ => refused(
            line.number,
            "a key with a colon and a blank behind it is missing",
        ),
    }
}

/// `None` if there is nothing but a comment.
fn scalar(line: &Line<'_>, text: &str) -> Result<Option<String>, ImportError> {
    let text = text.trim_start();
    if text.is_empty() || text.starts_with('#') {
        return Ok(None);
    }
    if text.starts_with(['"', '\'']) {
        let (value, rest) = quoted(line, text)?;
        let rest = rest.trim_start();
        return match rest.is_empty() || rest.starts_with('#') {
            true => Ok(Some(value)),
            false => refused(line.number, "something is behind the closing quote"),
        };
    }
    if text.starts_with(['[', '{', '&', '*', '!', '|', '>', '%', '@', '`']) {
        return refused(line.number, "only plain and quoted values are read here");
    }
    let value = text.split_once(" #").map_or(text, |(value, _)| value);
    Ok(Some(value.trim_end().to_owned()))
}

/// What is between quotes, and what is behind them.
fn quoted<'a>(line: &Line<'a>, text: &'a str) -> Result<(String, &'a str), ImportError> {
    let mut letters = text.char_indices().peekable();
    let Some((_, quote)) = letters.next() else {
        return refused(line.number, "a quote is missing");
    };
    let mut value = String::new();
    while let Some((at, letter)) = letters.next() {
        match letter {
            '\'' if quote == '\'' && letters.next_if(|(_, l)| *l == '\'').is_some() => {
                value.push('\'');
            }
            letter if letter == quote => return Ok((value, &text[at + 1..])),
            '\\' if quote == '"' => match letters.next() {
                Some((_, plain @ ('"' | '\\' | '/'))) => value.push(plain),
                Some((_, 'n')) => value.push('\n'),
                Some((_, 't')) => value.push('\t'),
                _ => return refused(line.number, "this escape is not read here"),
            },
            letter => value.push(letter),
        }
    }
    refused(line.number, "the closing quote is missing")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at<'a>(root: &'a Node, path: &[&str]) -> Option<&'a str> {
        let start = Some(root);
        path.iter().fold(start, |n, key| n?.get(key))?.scalar()
    }

    #[test]
    fn maps_scalars_quotes_and_comments() {
        let root = parse(
            "---\n# one\na:\n    b: x y # two\n    c: 'it''s'\n    e: http://h:1/#2\n'd:e': \"\\\"#\\\\\"\nf:\n",
        )
        .unwrap();
        assert_eq!(at(&root, &["a", "b"]), Some("x y"));
        assert_eq!(at(&root, &["A", "C"]), Some("it's"));
        assert_eq!(at(&root, &["a", "e"]), Some("http://h:1/#2"));
        assert_eq!(at(&root, &["d:e"]), Some("\"#\\"));
        assert_eq!(at(&root, &["f"]), Some(""));
    }

    #[test]
    fn whatever_else_yaml_has_is_refused_with_its_line() {
        for (text, line) in [
            ("a:\n  - b\n", 2),
            ("a: [1]\n", 1),
            ("a: &x 1\n", 1),
            ("a: |\n  text\n", 1),
            ("a: 1\n  b: 2\n", 1),
            ("a:\n    b: 1\n  c: 2\n", 3),
            ("a: 1\na: 2\n", 2),
            ("a: \"open\n", 1),
            ("a: 'x' y\n", 1),
            ("a: \"\\u0041\"\n", 1),
            ("\ta: 1\n", 1),
            ("a\n", 1),
            ("  a: 1\n", 1),
            ("{}\n", 1),
        ] {
            match parse(text) {
                Err(ImportError::Syntax { line: found, .. }) => assert_eq!(found, line, "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn deep_nesting_ends() {
        let deep: String = (0..2000)
            .map(|n| format!("{}a:\n", " ".repeat(n % 900)))
            .collect();
        assert!(parse(&deep).is_err());
    }
}
