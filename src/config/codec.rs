//! The forms an option's value can have: how each is read, written and described. Single values are in
//! [`super::scalar`]; here are those made of others.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::{Schema, json_schema};

use super::names;
use super::options::Server;
use super::problem::Place;
use super::scalar::{Address, Scalar, quoted};
use super::section::{Reading, Section, join, listed};
use super::tree::{self, Node, Value};

/// A form of values of type `T`.
pub(super) trait Codec<T> {
    /// What to write for the option at this path, as in "write …".
    fn shape(path: &str) -> String;

    /// `None`: it is wrong, and `reading` knows.
    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<T>;

    /// As it stands behind `key =`; `None` if it isn't written so, or is absent.
    fn write(_: &T) -> Option<String> {
        None
    }

    /// Appends a value that is a table of its own.
    fn write_tables(_: &T, _path: &str, _out: &mut String) {}

    fn schema() -> Schema;
}

pub(super) fn refuse<T, C: Codec<T>>(node: &Node, path: &str, reading: &mut Reading, hint: &str) {
    match &node.value {
        Value::Broken(why) => reading.improve(path, &node.at, format!("{why}; write {}", C::shape(path))),
        value => {
            let what = format!("`{path}` is {}; {hint}write {}", value.described(), C::shape(path));
            reading.fail(path, &node.at, what);
        }
    }
}

/// A value that may be left out. An empty environment variable leaves it out too.
pub(super) struct Maybe<C>(std::marker::PhantomData<C>);

impl<T, C: Codec<T>> Codec<Option<T>> for Maybe<C> {
    fn shape(path: &str) -> String {
        C::shape(path)
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<Option<T>> {
        match &node.value {
            Value::Raw(text) if text.is_empty() => Some(None),
            _ => C::read(node, path, reading).map(Some),
        }
    }

    fn write(value: &Option<T>) -> Option<String> {
        value.as_ref().and_then(C::write)
    }

    fn schema() -> Schema {
        C::schema()
    }
}

/// A file; it is joined to the configuration's folder.
pub(super) struct File;

impl Codec<PathBuf> for File {
    fn shape(_: &str) -> String {
        "a path, relative to this file's folder, like `\"certs/ca.pem\"`".to_owned()
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<PathBuf> {
        match node.value.text() {
            Some(text) if !text.is_empty() => Some(reading.folder.join(text)),
            _ => {
                refuse::<PathBuf, File>(&node, path, reading, "");
                None
            }
        }
    }

    fn write(value: &PathBuf) -> Option<String> {
        Some(quoted(&value.to_string_lossy()))
    }

    fn schema() -> Schema {
        json_schema!({ "type": "string", "minLength": 1 })
    }
}

/// Several values. A variable holds them with commas between, or as TOML in brackets.
pub(super) struct List<C>(std::marker::PhantomData<C>);

impl<T: Default, C: Codec<T>> Codec<Vec<T>> for List<C> {
    fn shape(path: &str) -> String {
        format!("a list in brackets, each element {}", C::shape(path))
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<Vec<T>> {
        let items = match opened(node, path, reading)? {
            Node {
                value: Value::List(items),
                ..
            } => items,
            Node {
                value: Value::Raw(text),
                at,
            } => {
                let item = |text: &str| Node {
                    at: at.clone(),
                    value: Value::Raw(text.trim().to_owned()),
                };
                text.split(',')
                    .filter(|text| !text.trim().is_empty())
                    .map(item)
                    .collect()
            }
            node => {
                refuse::<Vec<T>, Self>(&node, path, reading, "");
                return None;
            }
        };
        // What is wrong leaves a blank, so that the others keep their index.
        let mut read_item = |(index, item): (usize, Node)| {
            let path = format!("{path}[{index}]");
            reading.wrote(&path, &item.at);
            C::read(item, &path, reading).unwrap_or_default()
        };
        Some(items.into_iter().enumerate().map(&mut read_item).collect())
    }

    fn write(value: &Vec<T>) -> Option<String> {
        Some(format!(
            "[{}]",
            value.iter().filter_map(C::write).collect::<Vec<_>>().join(", ")
        ))
    }

    fn schema() -> Schema {
        // A list that may be empty is left out instead.
        json_schema!({ "type": "array", "items": C::schema(), "minItems": 1 })
    }
}

/// A variable that holds a list or table as TOML, opened up; everything else as it is.
fn opened(node: Node, path: &str, reading: &mut Reading) -> Option<Node> {
    match &node.value {
        Value::Raw(text) if text.trim_start().starts_with(['[', '{']) => match tree::from_variable(text, &node.at) {
            Ok(value) => Some(Node { at: node.at, value }),
            Err(why) => {
                let what = format!(
                    "`{path}` is {:?}, which is not TOML ({why}); write it as in the file",
                    text
                );
                reading.fail(path, &node.at, what);
                None
            }
        },
        _ => Some(node),
    }
}

/// A `[section]`. `section!` makes it a form of its struct, out of these:
pub(super) struct Sub;

impl Sub {
    pub fn shape_of<S: Section>(path: &str) -> String {
        match S::required().as_slice() {
            [] => format!("one `[{path}]`"),
            required => format!("one `[{path}]` with {}", listed(required.iter().copied())),
        }
    }

    pub fn read_as<S: Section>(node: Node, path: &str, reading: &mut Reading) -> Option<S>
    where
        Sub: Codec<S>,
    {
        match opened(node, path, reading)? {
            Node {
                value: Value::Table(table),
                ..
            } => Some(S::read(table, path, reading)),
            node => {
                refuse::<S, Sub>(&node, path, reading, "");
                None
            }
        }
    }
}

/// Any number of `[[section]]`s.
pub(super) struct Each;

impl<S: Section> Codec<Vec<S>> for Each
where
    Sub: Codec<S>,
{
    fn shape(path: &str) -> String {
        format!("a `[[{path}]]` for each, with {}", listed(S::required().into_iter()))
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<Vec<S>> {
        match opened(node, path, reading)? {
            node @ Node {
                value: Value::List(_), ..
            } => List::<Sub>::read(node, path, reading),
            node => {
                refuse::<Vec<S>, Each>(&node, path, reading, "");
                None
            }
        }
    }

    fn write_tables(value: &Vec<S>, path: &str, out: &mut String) {
        for section in value {
            out.push_str(&format!("\n[[{path}]]\n"));
            section.write(path, out);
        }
    }

    fn schema() -> Schema {
        json_schema!({ "type": "array", "items": S::schema() })
    }
}

/// A memcached server: its address, or a table that says more about it.
pub(super) struct OneLine;

impl Codec<Server> for OneLine {
    fn shape(_: &str) -> String {
        let keys = listed(Server::KEYS.iter().copied());
        format!("{}, or a table of {keys}", <Address as Scalar<String>>::shape())
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<Server> {
        match opened(node, path, reading)? {
            Node {
                value: Value::Table(table),
                ..
            } => Some(Server::read(table, path, reading)),
            node => {
                let address = Address::parse(&node.value);
                if address.is_none() {
                    refuse::<Server, OneLine>(&node, path, reading, "");
                }
                address.map(|address| Server {
                    address,
                    ..Server::default()
                })
            }
        }
    }

    fn write(value: &Server) -> Option<String> {
        if value.ring_name.is_none() && value.weight == 1 {
            return Some(quoted(&value.address));
        }
        let pairs = value.pairs().into_iter().map(|(key, text)| format!("{key} = {text}"));
        Some(format!("{{ {} }}", pairs.collect::<Vec<_>>().join(", ")))
    }

    fn schema() -> Schema {
        json_schema!({ "anyOf": [<Address as Scalar<String>>::schema(), Server::schema()] })
    }
}

/// librdkafka's properties.
pub(super) struct Properties;

impl Codec<BTreeMap<String, String>> for Properties {
    fn shape(_: &str) -> String {
        "a table of librdkafka properties, like `{ \"security.protocol\" = \"ssl\" }`".to_owned()
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<BTreeMap<String, String>> {
        match opened(node, path, reading)? {
            Node {
                value: Value::Table(table),
                ..
            } => {
                let mut properties = BTreeMap::new();
                flatten(table, "", path, reading, &mut properties);
                Some(properties)
            }
            node => {
                refuse::<_, Properties>(&node, path, reading, "");
                None
            }
        }
    }

    fn write(value: &BTreeMap<String, String>) -> Option<String> {
        let pairs: Vec<_> = value
            .iter()
            .map(|(key, text)| format!("{} = {}", quoted(key), quoted(text)))
            .collect();
        Some(if pairs.is_empty() {
            "{}".to_owned()
        } else {
            format!("{{ {} }}", pairs.join(", "))
        })
    }

    fn schema() -> Schema {
        // A table in it is a name with a dot, written without quotes.
        json_schema!({ "type": "object", "additionalProperties": { "type": ["string", "integer", "boolean", "object"] } })
    }
}

/// `ssl.ca.location = …` without quotes around the key is tables within tables to TOML; the same is meant.
fn flatten(
    table: tree::Table,
    prefix: &str,
    path: &str,
    reading: &mut Reading,
    properties: &mut BTreeMap<String, String>,
) {
    for (key, entry) in table {
        let name = join(prefix, &key);
        let option = join(path, &name);
        let Node { value, at } = entry.node;
        let text = match value {
            Value::Table(inner) => {
                flatten(inner, &name, path, reading, properties);
                continue;
            }
            Value::Text(text) | Value::Raw(text) => text,
            Value::Integer(number) => number.to_string(),
            Value::Boolean(truth) => truth.to_string(),
            Value::Broken(_) => {
                reading.failed(&option);
                continue;
            }
            other => {
                let what = format!("`{option}` is {}; write a text in quotes", other.described());
                reading.fail(&option, &at, what);
                continue;
            }
        };
        // Both ways of writing a name may meet when a variable sets it: the variable wins.
        let by_variable = |place: Option<&Place>| matches!(place, Some(Place::Variable(_)));
        if properties.contains_key(&name) && by_variable(reading.place(&option)) {
            continue;
        }
        reading.wrote(&option, &at);
        properties.insert(name.clone(), names::located(&name, text, &reading.folder));
    }
}
