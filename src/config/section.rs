//! One table drives everything about a section: `section!` declares each option once, with its documentation, type,
//! form ([`Codec`]) and default, and makes of it the struct, its reading, its writing and its JSON Schema.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use schemars::{Schema, json_schema};

use super::codec::Codec;
use super::problem::{Place, Problem, near_miss};
use super::tree::Table;

/// A table of the configuration.
pub(super) trait Section: Sized + Default {
    const KEYS: &'static [&'static str];

    /// The keys without which the section means nothing.
    fn required() -> Vec<&'static str>;

    /// Reads every option, reports what is wrong into `reading`, and stands a default in for it.
    fn read(table: Table, path: &str, reading: &mut Reading) -> Self;

    /// The options that are written as `key = value`, in the order of their declaration.
    fn pairs(&self) -> Vec<(&'static str, String)>;

    /// Appends the options that are tables of their own.
    fn write_tables(&self, path: &str, out: &mut String);

    fn schema() -> Schema;

    fn write(&self, path: &str, out: &mut String) {
        for (key, value) in self.pairs() {
            out.push_str(&format!("{key} = {value}\n"));
        }
        self.write_tables(path, out);
    }
}

/// What is known while a configuration is read: what was wrong, and where everything was written.
pub(super) struct Reading {
    /// The folder of the file; paths are relative to it.
    pub folder: PathBuf,
    pub problems: Vec<Problem>,
    places: BTreeMap<String, Place>,
    /// Options whose value is a stand-in, because what was written is wrong.
    failed: BTreeSet<String>,
}

impl Reading {
    pub fn new(folder: PathBuf, problems: Vec<Problem>) -> Reading {
        Reading {
            folder,
            problems,
            places: BTreeMap::new(),
            failed: BTreeSet::new(),
        }
    }

    pub fn wrote(&mut self, path: &str, place: &Place) {
        self.places.insert(path.to_owned(), place.clone());
    }

    /// Marks the option as one that must not be judged further.
    pub fn failed(&mut self, path: &str) {
        self.failed.insert(path.to_owned());
    }

    pub fn fail(&mut self, path: &str, place: &Place, what: String) {
        self.failed(path);
        self.problems.push(Problem {
            place: place.clone(),
            what,
        });
    }

    /// Says more about the one problem that the line of `place` has already: it isn't TOML.
    pub fn improve(&mut self, path: &str, place: &Place, what: String) {
        self.failed(path);
        let line_of = |place: &Place| match place {
            Place::File { line, .. } => Some(*line),
            Place::Variable(_) => None,
        };
        if let Some(problem) = self
            .problems
            .iter_mut()
            .find(|problem| line_of(&problem.place) == line_of(place))
        {
            problem.what = what;
        }
    }

    pub fn has_failed(&self, path: &str) -> bool {
        let within = |outer: &str, inner: &str| {
            inner
                .strip_prefix(outer)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        };
        self.failed
            .iter()
            .any(|failed| within(failed, path) || within(path, failed))
    }

    /// Where the option was written, if it was.
    pub fn place(&self, path: &str) -> Option<&Place> {
        self.places.get(path)
    }

    /// Where the option was written, or else what it belongs to.
    pub fn place_near(&self, path: &str) -> Place {
        let mut path = path;
        loop {
            match (self.places.get(path), path.rfind(['.', '['])) {
                (Some(place), _) => return place.clone(),
                (None, Some(end)) => path = &path[..end],
                (None, None) => return self.places.get("").cloned().unwrap_or(Place::TOP),
            }
        }
    }
}

/// The path of an option: its keys, with dots between them, and indexes in brackets.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() {
        key.to_owned()
    } else {
        format!("{path}.{key}")
    }
}

/// The options of one table while they are taken out of it.
pub(super) struct Options<'a> {
    table: Table,
    path: &'a str,
    reading: &'a mut Reading,
}

impl<'a> Options<'a> {
    pub fn new(table: Table, path: &'a str, reading: &'a mut Reading) -> Options<'a> {
        Options { table, path, reading }
    }

    pub fn optional<T, C: Codec<T>>(&mut self, key: &str, default: fn() -> T) -> T {
        let path = join(self.path, key);
        let Some(entry) = self.table.remove(key) else {
            return default();
        };
        self.reading.wrote(&path, &entry.node.at);
        C::read(entry.node, &path, self.reading).unwrap_or_else(default)
    }

    pub fn required<T: Default, C: Codec<T>>(&mut self, key: &str) -> T {
        if !self.table.contains_key(key) {
            let path = join(self.path, key);
            let place = self.reading.place_near(self.path);
            self.reading
                .fail(&path, &place, format!("`{path}` is missing; write {}", C::shape(&path)));
        }
        self.optional::<T, C>(key, T::default)
    }

    /// Reports what is left in the table.
    pub fn finish(self, keys: &[&str]) {
        for (key, entry) in self.table {
            let path = join(self.path, &key);
            let advice = match near_miss(&key, keys.iter().copied()) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None => format!("write one of {}", listed(keys.iter().copied())),
            };
            self.reading
                .fail(&path, &entry.key_at, format!("`{path}` is not an option; {advice}"));
        }
    }
}

/// `` `a`, `b`, `c` ``
pub(super) fn listed<'a>(words: impl Iterator<Item = &'a str>) -> String {
    words.map(|word| format!("`{word}`")).collect::<Vec<_>>().join(", ")
}

/// One option in the schema.
pub(super) struct OptionSchema {
    pub key: &'static str,
    pub about: &'static str,
    pub schema: Schema,
    /// The default, as it would be written in the file.
    pub default: Option<String>,
}

pub(super) fn section_schema(about: &str, required: &[&str], options: Vec<OptionSchema>) -> Schema {
    let mut properties = serde_json::Map::new();
    for mut option in options {
        option
            .schema
            .insert("description".to_owned(), tidy(option.about).into());
        // What is written is JSON too, but for tables; a blank default is one that depends on something else.
        let default = option
            .default
            .and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
        if let Some(default) = default.filter(|value| !matches!(value.as_str(), Some("")) && !is_empty(value)) {
            option.schema.insert("default".to_owned(), default);
        }
        properties.insert(option.key.to_owned(), option.schema.into());
    }
    json_schema!({
        "type": "object",
        "description": tidy(about),
        "properties": properties,
        "required": required,
        "additionalProperties": false,
    })
}

fn is_empty(value: &serde_json::Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(serde_json::Map::is_empty)
}

/// A doc comment as running text: its lines joined, the space in front of each taken away.
fn tidy(about: &str) -> String {
    let lines: Vec<&str> = about.lines().map(str::trim).collect();
    lines
        .split(|line| line.is_empty())
        .map(|paragraph| paragraph.join(" "))
        .collect::<Vec<_>>()
        .join("\n\n")
}

/// Declares a section of the configuration: `pub FIELD("KEY"): TYPE as CODEC = DEFAULT`. The key is the field's name
/// unless given; an option without default is required.
macro_rules! section {
    (
        $(#[doc = $about:literal])*
        $(#[derive($($derived:ident),*)])?
        pub struct $Name:ident {
            $(
                $(#[doc = $doc:literal])*
                pub $field:ident $(($key:literal))?: $T:ty as $Form:ty $(= $default:expr)?
            ),* $(,)?
        }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, PartialEq $($(, $derived)*)?)]
        pub struct $Name {
            $( $(#[doc = $doc])* pub $field: $T, )*
        }

        /// Every option at its default. One that has no default is blank, which reading would refuse.
        impl Default for $Name {
            fn default() -> Self {
                Self { $( $field: section!(@or_blank $($default)?), )* }
            }
        }

        impl $crate::config::section::Section for $Name {
            const KEYS: &'static [&'static str] = &[$( section!(@key $field $($key)?) ),*];

            fn required() -> Vec<&'static str> {
                let required = [$( section!(@required $($default)?) ),*];
                Self::KEYS.iter().zip(required).filter_map(|(key, required)| required.then_some(*key)).collect()
            }

            fn read(
                table: $crate::config::tree::Table,
                path: &str,
                reading: &mut $crate::config::section::Reading,
            ) -> Self {
                let mut options = $crate::config::section::Options::new(table, path, reading);
                let section = Self {
                    $( $field: section!(@read options, section!(@key $field $($key)?), $T, $Form $(, $default)?), )*
                };
                options.finish(Self::KEYS);
                section
            }

            fn pairs(&self) -> Vec<(&'static str, String)> {
                let pairs = [$( (
                    section!(@key $field $($key)?),
                    <$Form as $crate::config::codec::Codec<$T>>::write(&self.$field),
                ) ),*];
                pairs.into_iter().filter_map(|(key, value)| Some((key, value?))).collect()
            }

            fn write_tables(&self, path: &str, out: &mut String) {
                $(
                    let at = $crate::config::section::join(path, section!(@key $field $($key)?));
                    <$Form as $crate::config::codec::Codec<$T>>::write_tables(&self.$field, &at, out);
                )*
            }

            fn schema() -> schemars::Schema {
                let options = vec![$( $crate::config::section::OptionSchema {
                    key: section!(@key $field $($key)?),
                    about: concat!($($doc, "\n"),*),
                    schema: <$Form as $crate::config::codec::Codec<$T>>::schema(),
                    default: section!(@default $T, $Form $(, $default)?),
                } ),*];
                $crate::config::section::section_schema(concat!($($about, "\n"),*), &Self::required(), options)
            }
        }

        impl $crate::config::codec::Codec<$Name> for $crate::config::codec::Sub {
            fn shape(path: &str) -> String {
                Self::shape_of::<$Name>(path)
            }

            fn read(
                node: $crate::config::tree::Node,
                path: &str,
                reading: &mut $crate::config::section::Reading,
            ) -> Option<$Name> {
                Self::read_as(node, path, reading)
            }

            fn write_tables(value: &$Name, path: &str, out: &mut String) {
                out.push_str(&format!("\n[{path}]\n"));
                $crate::config::section::Section::write(value, path, out);
            }

            fn schema() -> schemars::Schema {
                <$Name as $crate::config::section::Section>::schema()
            }
        }
    };

    (@key $field:ident) => { stringify!($field) };
    (@key $field:ident $key:literal) => { $key };
    (@or_blank) => { Default::default() };
    (@or_blank $default:expr) => { $default };
    (@required) => { true };
    (@required $default:expr) => { false };
    (@read $options:ident, $key:expr, $T:ty, $Form:ty) => { $options.required::<$T, $Form>($key) };
    (@read $options:ident, $key:expr, $T:ty, $Form:ty, $default:expr) => {
        $options.optional::<$T, $Form>($key, || $default)
    };
    (@default $T:ty, $Form:ty) => { None };
    (@default $T:ty, $Form:ty, $default:expr) => { <$Form as $crate::config::codec::Codec<$T>>::write(&$default) };
}
pub(super) use section;
