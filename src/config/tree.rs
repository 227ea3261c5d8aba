//! The file as a tree of values that know where they were written. Environment variables join the same tree, so
//! that whatever reads a value needs not know which of the two it came from.

use std::collections::BTreeMap;

use toml_span::value::ValueInner;
use toml_span::{ErrorKind, Span};

use super::problem::{Place, Problem};

/// A value and where it was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub at: Place,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Text(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    List(Vec<Node>),
    Table(Table),
    /// What an environment variable holds: whoever reads it knows what it should be.
    Raw(String),
    /// Not TOML, and why. A problem of this line says so already; whoever knows what should be here improves it.
    Broken(String),
}

pub(super) type Table = BTreeMap<String, Entry>;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub key_at: Place,
    pub node: Node,
}

impl Value {
    /// The text, if it may be read as one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Value::Text(text) | Value::Raw(text) => Some(text),
            _ => None,
        }
    }

    pub fn integer(&self) -> Option<i64> {
        match self {
            Value::Integer(number) => Some(*number),
            Value::Raw(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    pub fn float(&self) -> Option<f64> {
        match self {
            Value::Float(number) => Some(*number),
            Value::Integer(number) => Some(*number as f64),
            Value::Raw(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    /// How a message shows it.
    pub fn described(&self) -> String {
        // Long enough for any sensible value, short enough that what to write instead stays in sight.
        const SHOWN: usize = 60;
        match self {
            Value::Text(text) | Value::Raw(text) if text.chars().count() > SHOWN => {
                format!("{:?}…", text.chars().take(SHOWN).collect::<String>())
            }
            Value::Text(text) | Value::Raw(text) => format!("{text:?}"),
            Value::Integer(number) => number.to_string(),
            Value::Float(number) => format!("{number:?}"),
            Value::Boolean(truth) => truth.to_string(),
            Value::List(_) => "a list".to_owned(),
            Value::Table(_) => "a table".to_owned(),
            Value::Broken(why) => why.clone(),
        }
    }
}

/// Reads TOML. TOML ends at its first error, but the usual one, a text without quotes, spoils only its own line: such a
/// line is taken out and reading goes on. `None`: an error that leaves nothing sensible to go on with.
pub(super) fn from_toml(text: &str, problems: &mut Vec<Problem>) -> Option<Node> {
    let mut text = text.to_owned();
    let mut broken = BTreeMap::new();
    loop {
        let lines = Lines::of(&text);
        let error = match toml_span::parse(&text) {
            Ok(value) => return Some(tree(value, &Source::File { lines, broken: &broken })),
            Err(error) => error,
        };
        // An error at the end of a line is found at its line break, which still belongs to the line.
        let (line, column) = lines.position(error.span.start.min(text.trim_end().len()));
        let duplicate = matches!(error.kind, ErrorKind::DuplicateKey { .. });
        let mended = Assignment::on(lines.line(line)).filter(|_| duplicate || !broken.contains_key(&line));
        let place = Place::File {
            line: line + 1,
            column: column + 1,
        };
        let described = described(&error, &lines);
        let Some(Assignment { key, value, value_at }) = mended else {
            problems.push(Problem {
                place,
                what: format!("{described} (what follows is checked once this is mended)"),
            });
            return None;
        };
        let range = lines.range(line);
        if duplicate {
            problems.push(Problem { place, what: described });
            text.replace_range(range, "");
            continue;
        }
        let why = match value {
            "" => format!("`{key}` has no value"),
            value if value.starts_with(['"', '\'', '[', '{']) => {
                format!("the value of `{key}` is malformed ({described})")
            }
            value => format!("`{key}` is {value}, which is not a TOML value"),
        };
        problems.push(Problem {
            place,
            what: format!("{why}; write text, sizes and times in quotes"),
        });
        // A stand-in, so that the option does not count as missing.
        text.replace_range(range.start + value_at..range.end, " 0");
        broken.insert(line, why);
    }
}

/// Reads one value written as TOML in an environment variable, such as a list in brackets.
pub(super) fn from_variable(text: &str, at: &Place) -> Result<Value, String> {
    let document = format!("value = {text}");
    let parsed = toml_span::parse(&document).map_err(|error| error.to_string())?;
    match tree(parsed, &Source::Variable(at)).value {
        Value::Table(mut table) if table.len() == 1 => table
            .remove("value")
            .map(|entry| entry.node.value)
            .ok_or_else(|| "it is not one value".to_owned()),
        _ => Err("it is not one value".to_owned()),
    }
}

fn described(error: &toml_span::Error, lines: &Lines) -> String {
    let line_of = |span: &Span| lines.position(span.start).0 + 1;
    match &error.kind {
        ErrorKind::DuplicateKey { key, first } => {
            format!(
                "`{key}` is set a second time, first in line {}; keep one of the two",
                line_of(first)
            )
        }
        ErrorKind::DuplicateTable { name, first } => {
            format!(
                "`{name}` appears a second time, first in line {}; put all its keys under one",
                line_of(first)
            )
        }
        ErrorKind::InvalidCharInString('\n') => "a string does not end on its line".to_owned(),
        _ => format!("not TOML: {error}"),
    }
}

/// A line `key = value` that stands for itself: no bracket or long string goes on in the next line.
struct Assignment<'a> {
    key: &'a str,
    value: &'a str,
    /// Where in the line the value begins, just behind the `=`.
    value_at: usize,
}

impl<'a> Assignment<'a> {
    fn on(line: &'a str) -> Option<Assignment<'a>> {
        let (key, value) = line.split_once('=')?;
        let value_at = key.len() + 1;
        let key = key.trim();
        let named = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '"' | '\'');
        let count = |c: char| value.matches(c).count();
        let complete = count('[') == count(']') && count('{') == count('}');
        let long = value.contains("\"\"\"") || value.contains("'''");
        if key.is_empty() || !key.chars().all(named) || !complete || long {
            return None;
        }
        let value = value.split('#').next().unwrap_or_default().trim();
        Some(Assignment { key, value, value_at })
    }
}

/// Where the lines of a text begin.
struct Lines<'a> {
    text: &'a str,
    starts: Vec<usize>,
}

impl<'a> Lines<'a> {
    fn of(text: &'a str) -> Lines<'a> {
        let starts = std::iter::once(0)
            .chain(text.match_indices('\n').map(|(at, _)| at + 1))
            .collect();
        Lines { text, starts }
    }

    /// Line and column of a byte, both from 0; the column counts characters.
    fn position(&self, byte: usize) -> (usize, usize) {
        let line = self.starts.partition_point(|start| *start <= byte).saturating_sub(1);
        let before = self
            .text
            .get(self.starts[line]..byte.min(self.text.len()))
            .unwrap_or_default();
        (line, before.chars().count())
    }

    /// The bytes of a line without its line break.
    fn range(&self, line: usize) -> std::ops::Range<usize> {
        let start = self.starts[line];
        start
            ..self.text[start..]
                .find('\n')
                .map_or(self.text.len(), |length| start + length)
    }

    fn line(&self, line: usize) -> &'a str {
        &self.text[self.range(line)]
    }
}

/// What the places of a parsed text are.
enum Source<'a> {
    File {
        lines: Lines<'a>,
        broken: &'a BTreeMap<usize, String>,
    },
    Variable(&'a Place),
}

impl Source<'_> {
    fn place(&self, byte: usize) -> Place {
        match self {
            Source::Variable(place) => (*place).clone(),
            Source::File { lines, .. } => {
                let (line, column) = lines.position(byte);
                Place::File {
                    line: line + 1,
                    column: column + 1,
                }
            }
        }
    }

    /// The span of a string begins behind its quotes, that of a table may begin with the line break before it.
    fn place_of(&self, span: Span, value: &Value) -> Place {
        let mut byte = span.start;
        if let Source::File { lines, .. } = self {
            let before = lines.text.get(..byte).unwrap_or_default();
            match value {
                Value::Text(_) if before.ends_with("\"\"\"") || before.ends_with("'''") => byte -= 3,
                Value::Text(_) if before.ends_with(['"', '\'']) => byte -= 1,
                Value::Table(_) | Value::List(_) => {
                    let rest = lines.text.get(byte..).unwrap_or_default();
                    byte += rest.len() - rest.trim_start().len();
                }
                _ => {}
            }
        }
        self.place(byte)
    }

    /// Why the line is broken on which the value stands, if it is.
    fn broken(&self, span: Span) -> Option<&String> {
        match self {
            Source::File { lines, broken } => broken.get(&lines.position(span.start).0),
            Source::Variable(_) => None,
        }
    }
}

fn tree(mut parsed: toml_span::Value<'_>, source: &Source) -> Node {
    let span = parsed.span;
    let value = match parsed.take() {
        ValueInner::String(text) => Value::Text(text.into_owned()),
        // Only the stand-in of a mended line can be an integer on that line.
        ValueInner::Integer(number) => match source.broken(span) {
            Some(why) => Value::Broken(why.clone()),
            None => Value::Integer(number),
        },
        ValueInner::Float(number) => Value::Float(number),
        ValueInner::Boolean(truth) => Value::Boolean(truth),
        ValueInner::Array(items) => Value::List(items.into_iter().map(|item| tree(item, source)).collect()),
        ValueInner::Table(entries) => Value::Table(
            entries
                .into_iter()
                .map(|(key, item)| {
                    let entry = Entry {
                        key_at: source.place(key.span.start),
                        node: tree(item, source),
                    };
                    (key.name.into_owned(), entry)
                })
                .collect(),
        ),
    };
    Node {
        at: source.place_of(span, &value),
        value,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Option<Node>, Vec<String>) {
        let mut problems = Vec::new();
        let node = from_toml(text, &mut problems);
        let shown = |problem: Problem| match problem.place {
            Place::File { line, column } => format!("{line}:{column}: {}", problem.what),
            Place::Variable(name) => format!("{name}: {}", problem.what),
        };
        (node, problems.into_iter().map(shown).collect())
    }

    fn at<'a>(node: &'a Node, path: &[&str]) -> &'a Node {
        path.iter().fold(node, |node, key| match &node.value {
            Value::Table(table) => &table[*key].node,
            Value::List(items) => &items[key.parse::<usize>().unwrap()],
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn a_value_knows_its_line_and_column() {
        let (node, problems) = read("region = \"ä\"\n[[cache]]\n  servers = ['é', 'b']\n\n[flow]\nlanes = 2\n");
        let node = node.unwrap();
        assert!(problems.is_empty());
        assert_eq!(at(&node, &["region"]).at, Place::File { line: 1, column: 10 });
        assert_eq!(at(&node, &["cache", "0"]).at, Place::File { line: 2, column: 1 });
        assert_eq!(
            at(&node, &["cache", "0", "servers", "1"]).at,
            Place::File { line: 3, column: 19 }
        );
        assert_eq!(at(&node, &["flow"]).at, Place::File { line: 5, column: 1 });
        assert_eq!(at(&node, &["flow", "lanes"]).at, Place::File { line: 6, column: 9 });
    }

    #[test]
    fn one_unquoted_value_does_not_hide_the_rest_of_the_file() {
        let (node, problems) =
            read("linger = 2ms # soon\nregion = eu-west-1\nx =\ny = [127.0.0.1:1]\nz = 'a'\nz = 2\n");
        let node = node.unwrap();
        assert_eq!(
            problems,
            [
                "1:10: `linger` is 2ms, which is not a TOML value; write text, sizes and times in quotes",
                "2:10: `region` is eu-west-1, which is not a TOML value; write text, sizes and times in quotes",
                "3:4: `x` has no value; write text, sizes and times in quotes",
                "4:11: the value of `y` is malformed (not TOML: expected a right bracket, found a period); write text, \
                 sizes and times in quotes",
                "6:1: `z` is set a second time, first in line 5; keep one of the two",
            ]
        );
        assert!(matches!(at(&node, &["linger"]).value, Value::Broken(_)));
        assert!(matches!(at(&node, &["y"]).value, Value::Broken(_)));
        assert_eq!(at(&node, &["z"]).value, Value::Text("a".to_owned()));
    }

    #[test]
    fn an_error_that_leaves_no_sense_is_reported_alone() {
        let (node, problems) = read("[kafka\nbrokers = []\n");
        assert_eq!(node, None);
        assert_eq!(problems.len(), 1);
        assert!(problems[0].starts_with("1:7: not TOML: "), "{problems:?}");
        let (node, problems) = read("[flow]\nlanes = 1\n[flow]\n");
        assert_eq!(node, None);
        assert!(
            problems[0].starts_with("3:1: `flow` appears a second time, first in line 1"),
            "{problems:?}"
        );
    }

    proptest::proptest! {
        #[test]
        fn whatever_the_file_holds_reading_it_ends_without_a_panic(
            lines in proptest::collection::vec("(\\[{0,2}[ab.]{0,3}\\]{0,2}|[ab.\" ]{0,4}=? ?[0-9a\"'\\[\\]{},=#é.]{0,8})", 0..12)
        ) {
            let mut problems = Vec::new();
            let node = from_toml(&lines.join("\n"), &mut problems);
            proptest::prop_assert!(node.is_some() || !problems.is_empty());
        }
    }
}
