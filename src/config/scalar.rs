//! The forms of single values: numbers, sizes, times, words and names.

use std::time::Duration;

use bytesize::ByteSize;
use schemars::{Schema, json_schema};

use super::codec::{Codec, refuse};
use super::names;
use super::problem::near_miss;
use super::section::Reading;
use super::tree::{Node, Value};

/// A form of single values.
pub(super) trait Scalar<T> {
    fn shape() -> String;
    fn parse(value: &Value) -> Option<T>;
    fn show(value: &T) -> String;
    fn schema() -> Schema;

    /// What was probably meant.
    fn hint(_: &Value) -> Option<String> {
        None
    }
}

impl<T, S: Scalar<T>> Codec<T> for S {
    fn shape(_: &str) -> String {
        <S as Scalar<T>>::shape()
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<T> {
        let parsed = S::parse(&node.value);
        if parsed.is_none() {
            let hint = S::hint(&node.value).map_or_else(String::new, |hint| format!("{hint} "));
            refuse::<T, S>(&node, path, reading, &hint);
        }
        parsed
    }

    fn write(value: &T) -> Option<String> {
        Some(S::show(value))
    }

    fn schema() -> Schema {
        S::schema()
    }
}

/// A string as TOML writes it. JSON's escapes are TOML's; only DEL needs one more.
pub(super) fn quoted(text: &str) -> String {
    let json = serde_json::Value::from(text).to_string();
    json.replace('\u{7f}', "\\u007f")
}

/// A whole number.
pub(super) struct Count<const LEAST: i64, const MOST: i64 = { u32::MAX as i64 }>;

impl<T: TryFrom<i64> + Copy + ToString, const LEAST: i64, const MOST: i64> Scalar<T> for Count<LEAST, MOST> {
    fn shape() -> String {
        match MOST {
            // Nobody means to go there; it only keeps sums of such numbers far from overflowing.
            most if most == i64::from(u32::MAX) => format!("a whole number of at least {LEAST}"),
            _ => format!("a whole number from {LEAST} to {MOST}"),
        }
    }

    fn parse(value: &Value) -> Option<T> {
        let number = value.integer().filter(|number| (LEAST..=MOST).contains(number))?;
        T::try_from(number).ok()
    }

    fn hint(value: &Value) -> Option<String> {
        let number = match value {
            Value::Raw(text) => text.trim().parse::<i128>().ok()?,
            value => value.integer()?.into(),
        };
        // Where the shape does not say so.
        let too_large = MOST == i64::from(u32::MAX) && number > i128::from(MOST);
        too_large.then(|| format!("{MOST} is the most;"))
    }

    fn show(value: &T) -> String {
        value.to_string()
    }

    fn schema() -> Schema {
        json_schema!({ "type": "integer", "minimum": LEAST, "maximum": MOST })
    }
}

/// Bytes, with a unit. At least one, for no limit of this program can do with none.
pub(super) struct Size;

impl Scalar<usize> for Size {
    fn shape() -> String {
        "a size of at least one byte, like `\"256KiB\"`".to_owned()
    }

    fn parse(value: &Value) -> Option<usize> {
        let bytes = match value {
            Value::Integer(bytes) => u64::try_from(*bytes).ok()?,
            value => value.text()?.trim().parse::<ByteSize>().ok()?.as_u64(),
        };
        // Beyond this, bytesize has cut the number off.
        usize::try_from(bytes)
            .ok()
            .filter(|bytes| (1..=isize::MAX as usize).contains(bytes))
    }

    fn show(value: &usize) -> String {
        let units = [(1usize << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        let unit = units
            .into_iter()
            .find(|(size, _)| *value > 0 && value.is_multiple_of(*size));
        let (size, name) = unit.unwrap_or((1, "B"));
        format!("\"{}{name}\"", value / size)
    }

    fn schema() -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "pattern": "^\\s*[0-9]+(\\.[0-9]+)?\\s*([KkMmGgTtPpEe][Ii]?)?[Bb]?\\s*$",
            "minimum": 1,
            "examples": ["256KiB", "64MiB"],
        })
    }
}

/// A time with its unit, of at least so many milliseconds.
pub(super) struct Time<const LEAST_MS: u64 = 1, const MOST_MS: u64 = LONGEST_MS>;

/// No timer of this program means more; and an instant plus this never overflows.
const LONGEST_MS: u64 = 30 * 24 * 60 * 60 * 1000;

impl<const LEAST_MS: u64, const MOST_MS: u64> Scalar<Duration> for Time<LEAST_MS, MOST_MS> {
    fn shape() -> String {
        let least = humantime::format_duration(Duration::from_millis(LEAST_MS));
        let longest = humantime::format_duration(Duration::from_millis(MOST_MS));
        format!("a time with its unit, like `\"2ms\"` or `\"1m 30s\"`, from {least} to {longest}")
    }

    fn parse(value: &Value) -> Option<Duration> {
        let time = humantime::parse_duration(value.text()?.trim()).ok()?;
        (Duration::from_millis(LEAST_MS)..=Duration::from_millis(MOST_MS))
            .contains(&time)
            .then_some(time)
    }

    fn show(value: &Duration) -> String {
        quoted(&humantime::format_duration(*value).to_string())
    }

    fn schema() -> Schema {
        // The units are humantime's, from ns to years in several spellings each.
        let pattern = "^\\s*(0|([0-9]+(\\.[0-9]+)?\\s*[A-Za-zµ]+\\s*)+)\\s*$";
        json_schema!({ "type": "string", "pattern": pattern, "examples": ["2ms", "1m 30s"] })
    }
}

/// A part of one.
pub(super) struct Ratio;

impl Scalar<f64> for Ratio {
    fn shape() -> String {
        "a number from 0 to 1".to_owned()
    }

    fn parse(value: &Value) -> Option<f64> {
        value.float().filter(|ratio| (0.0..=1.0).contains(ratio))
    }

    fn show(value: &f64) -> String {
        format!("{value:?}")
    }

    fn schema() -> Schema {
        json_schema!({ "type": "number", "minimum": 0, "maximum": 1 })
    }
}

/// Yes or no.
pub(super) struct Switch;

impl Scalar<bool> for Switch {
    fn shape() -> String {
        "`true` or `false`".to_owned()
    }

    fn parse(value: &Value) -> Option<bool> {
        match value {
            Value::Boolean(truth) => Some(*truth),
            Value::Raw(text) => text.trim().parse().ok(),
            _ => None,
        }
    }

    fn show(value: &bool) -> String {
        value.to_string()
    }

    fn schema() -> Schema {
        json_schema!({ "type": "boolean" })
    }
}

/// An enum whose variants have names in the file. `choice!` makes one.
pub(super) trait Choices: Copy + PartialEq + 'static {
    /// Each with its name and what it means.
    const ALL: &'static [(&'static str, Self, &'static str)];
}

/// One of several words.
pub(super) struct Choice;

impl<T: Choices> Scalar<T> for Choice {
    fn shape() -> String {
        T::ALL
            .iter()
            .map(|(name, ..)| format!("`\"{name}\"`"))
            .collect::<Vec<_>>()
            .join(" or ")
    }

    fn parse(value: &Value) -> Option<T> {
        let written = value.text()?;
        T::ALL
            .iter()
            .find(|(name, ..)| *name == written)
            .map(|(_, choice, _)| *choice)
    }

    fn hint(value: &Value) -> Option<String> {
        let meant = near_miss(value.text()?, T::ALL.iter().map(|(name, ..)| *name))?;
        Some(format!("did you mean `{meant}`?"))
    }

    fn show(value: &T) -> String {
        let name = T::ALL
            .iter()
            .find(|(_, choice, _)| choice == value)
            .map_or("", |(name, ..)| name);
        quoted(name)
    }

    fn schema() -> Schema {
        let choices = T::ALL
            .iter()
            .map(|(name, _, about)| serde_json::json!({ "const": name, "description": about }));
        json_schema!({ "oneOf": choices.collect::<Vec<_>>() })
    }
}

/// Declares an enum of words: `Variant = "word"`, each documented.
macro_rules! choice {
    (
        $(#[doc = $about:literal])*
        pub enum $Name:ident { $( $(#[doc = $doc:literal])* $Variant:ident = $word:literal ),* $(,)? }
    ) => {
        $(#[doc = $about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $Name { $( $(#[doc = $doc])* $Variant ),* }

        impl $Name {
            /// The word in the file.
            pub fn as_str(self) -> &'static str {
                match self { $( $Name::$Variant => $word ),* }
            }
        }

        impl $crate::config::scalar::Choices for $Name {
            const ALL: &'static [(&'static str, Self, &'static str)] =
                &[$( ($word, $Name::$Variant, concat!($($doc),*).trim_ascii()) ),*];
        }
    };
}
pub(super) use choice;

/// Declares a form of text: what it must be, the test and the schema's pattern.
macro_rules! text {
    ($(#[doc = $about:literal])* $Form:ident, $valid:expr, $pattern:literal, $shape:literal) => {
        $(#[doc = $about])*
        pub(super) struct $Form;

        impl Scalar<String> for $Form {
            fn shape() -> String {
                $shape.to_owned()
            }

            fn parse(value: &Value) -> Option<String> {
                value.text().filter(|text| $valid(text)).map(str::to_owned)
            }

            fn show(value: &String) -> String {
                quoted(value)
            }

            fn schema() -> Schema {
                json_schema!({ "type": "string", "pattern": $pattern })
            }
        }
    };
}

text!(
    /// The name of a region.
    Label, names::is_label, "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
    "a DNS label: lower-case letters, digits and `-`, like `\"us-east-1\"`"
);
text!(
    /// What a certificate names.
    DnsName, names::is_dns_name, "^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$",
    "a DNS name in lower case, like `\"eu-west-1.evrepl.example\"`"
);
text!(
    /// What Kafka accepts as a topic, and as a member's name.
    Topic, names::is_topic, "^[A-Za-z0-9._-]{1,249}$",
    "a name that Kafka accepts: letters, digits, `.`, `_` and `-`, at most 249, like `\"evrepl.sessions\"`"
);
text!(
    /// A topic made from another.
    DeadLetterTemplate, |text: &str| names::is_template(text, &["{topic}"]), "\\{topic\\}",
    "a topic's name with `{topic}` in it and nothing else in braces, like `\"{topic}.dead-letter\"`"
);
text!(
    /// A topic made from another, for a peer.
    RetryTemplate, |text: &str| names::is_template(text, &["{topic}", "{peer}"]), "\\{topic\\}.*\\{peer\\}|\\{peer\\}.*\\{topic\\}",
    "a topic's name with `{topic}` and `{peer}` in it and nothing else in braces, like `\"{topic}.retry.{peer}\"`"
);
text!(
    /// Where something else listens.
    Address, |text: &str| names::port_of(text).is_some_and(|port| port > 0), "^(\\[[0-9A-Fa-f:.%a-z]+\\]|[^\\s:/\\[\\]]+):[0-9]{1,5}$",
    "a host and a port, like `\"10.0.0.5:11211\"` or `\"[::1]:11211\"`"
);
text!(
    /// Where this process listens; port 0 takes a free one.
    Listen, |text: &str| names::port_of(text).is_some(), "^(\\[[0-9A-Fa-f:.%a-z]+\\]|[^\\s:/\\[\\]]+):[0-9]{1,5}$",
    "a host and a port, like `\"127.0.0.1:7101\"` or `\"[::]:7101\"`"
);
/// Where a front door listens: `host:port`, of which port 0 takes a free one, or `unix:` and a path, which is joined to the
/// configuration's folder.
pub(super) struct Door;

impl Codec<String> for Door {
    fn shape(_: &str) -> String {
        "a host and a port, like `\"127.0.0.1:11311\"`, or a socket's path, like `\"unix:/run/evrepl/sessions.sock\"`"
            .to_owned()
    }

    fn read(node: Node, path: &str, reading: &mut Reading) -> Option<String> {
        let text = node.value.text().unwrap_or_default();
        let read = match text.strip_prefix("unix:") {
            Some(socket) => names::socket_path(socket, &reading.folder).map(|socket| format!("unix:{socket}")),
            None if names::port_of(text).is_some() => Ok(text.to_owned()),
            None => Err(String::new()),
        };
        match read {
            Ok(door) => Some(door),
            Err(why) => {
                let hint = if why.is_empty() { why } else { format!("{why} ") };
                refuse::<String, Door>(&node, path, reading, &hint);
                None
            }
        }
    }

    fn write(value: &String) -> Option<String> {
        Some(quoted(value))
    }

    fn schema() -> Schema {
        let pattern = "^(unix:[^@].*|(\\[[0-9A-Fa-f:.%a-z]+\\]|[^\\s:/\\[\\]]+):[0-9]{1,5})$";
        json_schema!({ "type": "string", "pattern": pattern })
    }
}

text!(
    /// A command that may only fill a cache.
    FillCommand, |text: &str| ["set", "add", "replace", "cas", "ms"].contains(&text), "^(set|add|replace|cas|ms)$",
    "a command: `\"set\"`, `\"add\"`, `\"replace\"`, `\"cas\"` or `\"ms\"`"
);
text!(
    /// An OTLP/gRPC receiver.
    Url, names::is_url, "^https?://[^\\s/]+/?$",
    "the URL of an OTLP/gRPC receiver without a path, like `\"http://127.0.0.1:4317\"`"
);
text!(
    /// The beginning of a meta command's opaque.
    Opaque, |text: &str| (1..=31).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()), "^[!-~]{1,31}$",
    "1 to 31 printable ASCII characters without blanks, in quotes"
);
text!(
    /// Text that something else has a meaning for.
    Words, |text: &str| !text.is_empty(), ".",
    "a text that is not empty, in quotes"
);
