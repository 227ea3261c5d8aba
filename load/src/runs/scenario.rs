//! What a load run does: a file `load/scenarios/<name>.toml`, changed by the command line.

use std::path::{Path, PathBuf};

use serde::Serialize;
use toml_span::de_helpers::TableHelper;
use toml_span::{DeserError, Deserialize, Error, ErrorKind, Value};

/// How the events get to the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Everything is written while the relay is stopped; then it starts and drains a full topic.
    Drain,
    /// An application writes at a fixed rate, whatever evrepl makes of it.
    Fixed,
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize(value: &mut Value<'de>) -> Result<Kind, DeserError> {
        match value.take_string(Some("\"drain\" or \"fixed\""))?.as_ref() {
            "drain" => Ok(Kind::Drain),
            "fixed" => Ok(Kind::Fixed),
            other => {
                let kind = ErrorKind::UnexpectedValue {
                    expected: &["drain", "fixed"],
                    value: Some(other.into()),
                };
                let span = value.span;
                Err(DeserError::from(Error {
                    kind,
                    span,
                    line_info: None,
                }))
            }
        }
    }
}

/// One scenario.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    /// The file's name without `.toml`.
    pub name: String,
    pub kind: Kind,
    /// How many events, each of a key of its own.
    pub events: u64,
    pub value_bytes: usize,
    /// Writes a second; 0 in a drain.
    pub rate: u64,
    /// Of the topic.
    pub partitions: i32,
    /// Further evrepl settings for both regions, as TOML: `[table]` headers and one `key = value` a line.
    pub settings: String,
}

impl Scenario {
    /// The folder of the scenarios.
    pub fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
    }

    /// The names of all scenarios, in order.
    ///
    /// # Errors
    /// When the folder can't be read, in words.
    pub fn names() -> Result<Vec<String>, String> {
        let folder = Scenario::folder();
        let files = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let name = |path: PathBuf| {
            let toml = path.extension().is_some_and(|extension| extension == "toml");
            toml.then(|| path.file_stem().map(|stem| stem.to_string_lossy().into_owned()))?
        };
        let mut names: Vec<String> = files.flatten().filter_map(|file| name(file.path())).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Reads a scenario by its name.
    ///
    /// # Errors
    /// When there is none, or something is wrong with it, in words.
    pub fn named(name: &str) -> Result<Scenario, String> {
        let path = Scenario::folder().join(format!("{name}.toml"));
        match std::fs::read_to_string(&path) {
            Ok(text) => Scenario::parse(name, &text).map_err(|error| format!("{}: {error}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(format!(
                "no scenario {name:?}; there are: {}",
                Scenario::names()?.join(", ")
            )),
            Err(error) => Err(format!("{}: {error}", path.display())),
        }
    }

    fn parse(name: &str, text: &str) -> Result<Scenario, String> {
        let mut document = toml_span::parse(text).map_err(|error| error.to_string())?;
        let scenario = Scenario::from_table(name, &mut document).map_err(|error| error.to_string())?;
        scenario.check()?;
        Ok(scenario)
    }

    fn from_table(name: &str, document: &mut Value<'_>) -> Result<Scenario, DeserError> {
        let mut table = TableHelper::new(document)?;
        // What is missing or wrong is kept by the table and said by `finalize`; the stand-ins here are never used.
        let kind = table.required("kind").unwrap_or(Kind::Drain);
        let events = table.required("events").unwrap_or_default();
        let value_bytes = table.required("value_bytes").unwrap_or_default();
        let rate = table.optional("rate").unwrap_or_default();
        let partitions = table.required("partitions").unwrap_or_default();
        let settings = table.optional("settings").unwrap_or_default();
        table.finalize(None)?;
        Ok(Scenario {
            name: name.into(),
            kind,
            events,
            value_bytes,
            rate,
            partitions,
            settings,
        })
    }

    /// Whether it can be run.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn check(&self) -> Result<(), String> {
        match self.kind {
            Kind::Fixed if self.rate == 0 => Err("a fixed run needs a rate above 0".into()),
            Kind::Drain if self.rate != 0 => Err("a drain has no rate".into()),
            _ if self.events == 0 => Err("events must be above 0".into()),
            _ if self.partitions < 1 => Err("partitions must be above 0".into()),
            // memcached's limit for an item is 1 MiB with its key and header.
            _ if self.value_bytes > 1_000_000 => Err("value_bytes must be at most 1000000".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_scenario_in_the_folder_can_be_run() {
        let names = Scenario::names().unwrap();
        assert_eq!(names, ["drain-100", "drain-1k", "fixed-100", "fixed-1k"]);
        for name in names {
            let scenario = Scenario::named(&name).unwrap();
            assert_eq!(scenario.kind == Kind::Fixed, scenario.name.starts_with("fixed"));
        }
    }

    #[test]
    fn what_is_wrong_with_a_scenario_is_said() {
        let right = "kind = \"drain\"\nevents = 10\nvalue_bytes = 100\npartitions = 4\n";
        assert!(Scenario::parse("x", right).is_ok());
        for (wrong, word) in [
            (right.replace("drain", "dripp"), "drain"),
            (right.replace("drain", "fixed"), "rate"),
            (right.replace("events = 10\n", ""), "events"),
            (right.replace("events", "event"), "event"),
            (right.replace("partitions = 4", "partitions = 0"), "partitions"),
            (right.replace("100", "2000000"), "value_bytes"),
            (format!("{right}rate = 1\n"), "rate"),
        ] {
            let error = Scenario::parse("x", &wrong).unwrap_err();
            assert!(error.contains(word), "{wrong}: {error}");
        }
        assert!(Scenario::named("none").unwrap_err().contains("drain-100"));
    }
}
