//! Settings from the environment: `EVREPL__BATCH__LINGER=5ms` is `linger` of `[batch]`.
//!
//! Two underscores stand between the parts of a name, list elements go by index from 0
//! (`EVREPL__PEER__0__ADDRESS`), and a whole list or table may be written as in the file
//! (`EVREPL__KAFKA__BROKERS='["a:9092"]'`, or `a:9092,b:9092`). librdkafka's names have dots where a variable has single
//! underscores: `EVREPL__KAFKA__PROPERTIES__SASL_PASSWORD` is `sasl.password`.

use std::collections::BTreeMap;

use super::problem::{Place, Problem};
use super::tree::{Entry, Node, Table, Value};

/// What the names begin with. (`EVREPL_CONFIG`, with one underscore, is the command line's.)
pub(super) const PREFIX: &str = "EVREPL__";

/// Puts every `EVREPL__…` variable into the tree, over what the file says.
pub(super) fn apply(root: &mut Node, variables: impl Iterator<Item = (String, String)>, problems: &mut Vec<Problem>) {
    // In the order of their paths, so that `…__2` goes before `…__10` and a list can be made element by element.
    let mut overrides = BTreeMap::new();
    for (name, value) in variables {
        let Some(path) = name.strip_prefix(PREFIX) else {
            continue;
        };
        let path = Path::of(path);
        let place = Place::Variable(name);
        if path
            .0
            .iter()
            .any(|part| matches!(part, Part::Key(key) if key.is_empty()))
        {
            let what = "names no option; write `EVREPL__SECTION__OPTION`, as in `EVREPL__BATCH__LINGER`";
            problems.push(Problem {
                place,
                what: what.to_owned(),
            });
        } else if let Some((other, _)) = overrides.get(&path) {
            let what = format!("sets the same as {}; keep one of the two", named(other));
            problems.push(Problem { place, what });
        } else {
            overrides.insert(path, (place, value));
        }
    }
    for (path, (place, value)) in overrides {
        if let Err(what) = set(root, &path.0, &place, value) {
            problems.push(Problem { place, what });
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Path(Vec<Part>);

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Index(usize),
    Key(String),
}

impl Path {
    fn of(name: &str) -> Path {
        let parts: Vec<String> = name.split("__").map(str::to_lowercase).collect();
        if let [kafka, properties, name @ ..] = &parts[..]
            && kafka == "kafka"
            && properties == "properties"
            && !name.is_empty()
        {
            let property = name.join(".").replace('_', ".");
            return Path(vec![
                Part::Key("kafka".to_owned()),
                Part::Key("properties".to_owned()),
                Part::Key(property),
            ]);
        }
        let part = |text: String| text.parse().map_or(Part::Key(text), Part::Index);
        Path(parts.into_iter().map(part).collect())
    }
}

fn set(node: &mut Node, path: &[Part], place: &Place, text: String) -> Result<(), String> {
    let Some((part, rest)) = path.split_first() else {
        *node = Node {
            at: place.clone(),
            value: Value::Raw(text),
        };
        return Ok(());
    };
    match (&mut node.value, part) {
        // Its problem is reported; what it would have held cannot be known.
        (Value::Broken(_), _) => Ok(()),
        (Value::Table(table), part) => {
            let key = match part {
                Part::Key(key) => key.clone(),
                Part::Index(index) => index.to_string(),
            };
            let entry = table.entry(key).or_insert_with(|| Entry {
                key_at: place.clone(),
                node: room_for(rest, place),
            });
            if rest.is_empty() {
                entry.key_at = place.clone();
            }
            set(&mut entry.node, rest, place, text)
        }
        (Value::List(items), Part::Index(index)) => {
            if *index == items.len() {
                items.push(room_for(rest, place));
            }
            let count = items.len();
            let Some(item) = items.get_mut(*index) else {
                return Err(format!(
                    "sets element {index} of a list of {count}; write {count} to add one"
                ));
            };
            set(item, rest, place, text)
        }
        (Value::List(_), Part::Key(key)) => Err(format!(
            "names `{key}` in a list; name an element of it first, by its index from 0"
        )),
        (Value::Raw(_), _) => Err(format!(
            "sets a part of what {} sets as a whole; keep one of the two",
            named(&node.at)
        )),
        (value, _) => Err(format!(
            "sets a part of a value that has none ({}); set it as a whole",
            value.described()
        )),
    }
}

/// An empty value that the rest of the path can go into.
fn room_for(rest: &[Part], place: &Place) -> Node {
    let value = match rest.first() {
        Some(Part::Index(_)) => Value::List(Vec::new()),
        _ => Value::Table(Table::new()),
    };
    Node {
        at: place.clone(),
        value,
    }
}

fn named(place: &Place) -> &str {
    match place {
        Place::Variable(name) => name,
        Place::File { .. } => "the file",
    }
}
