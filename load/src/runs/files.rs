//! The files of load/scenarios: one scenario each, or a family that differs in one number.

use std::path::{Path, PathBuf};

use toml_span::de_helpers::TableHelper;
use toml_span::{DeserError, Deserialize, Error, ErrorKind, Value};

use super::generate::keys::KeySpec;
use super::scenario::{Group, Kind, Point, Scenario};

/// What a family may differ in.
const AXES: [&str; 6] = ["value_bytes", "partitions", "lanes", "rate", "peers", "relays"];

/// As evrepl's own Writer: an event waits a millisecond for others.
const LINGER_MS: f64 = 1.0;

/// Everything is measured with telemetry, unless told otherwise.
const TRACES: f64 = 0.001;

/// As many keys as there is room for, up to here: enough that no cache of the processor holds them.
const KEYS: u64 = 4_000_000;

/// The folder of the scenarios.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios")
}

/// All scenarios, by file, families in the order of their values.
///
/// # Errors
/// When a file can't be read, or something is wrong with it, in words.
pub fn all() -> Result<Vec<Scenario>, String> {
    let folder = folder();
    let files = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let toml = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "toml");
    let mut paths: Vec<PathBuf> = files.flatten().map(|file| file.path()).filter(toml).collect();
    paths.sort_unstable();
    let mut scenarios = Vec::new();
    for path in paths {
        let named = |error: String| format!("{}: {error}", path.display());
        let text = std::fs::read_to_string(&path).map_err(|error| named(error.to_string()))?;
        let stem = path.file_stem().unwrap_or_default().to_string_lossy();
        scenarios.extend(parse(&stem, &text).map_err(named)?);
    }
    Ok(scenarios)
}

/// The scenarios of these names, in that order; the name of a family's file stands for all of it.
///
/// # Errors
/// When there is none of a name, in words.
pub fn named(all: &[Scenario], names: &[String]) -> Result<Vec<Scenario>, String> {
    let mut found = Vec::new();
    for name in names {
        let family =
            |one: &&Scenario| one.point.is_some() && one.name.rsplit_once('-').is_some_and(|(of, _)| of == name);
        let these: Vec<_> = all
            .iter()
            .filter(|one| one.name == *name || family(one))
            .cloned()
            .collect();
        if these.is_empty() {
            let known: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
            return Err(format!("no scenario {name:?}; there are: {}", known.join(", ")));
        }
        found.extend(these);
    }
    Ok(found)
}

/// The scenarios of a file of that name.
fn parse(stem: &str, text: &str) -> Result<Vec<Scenario>, String> {
    let mut document = toml_span::parse(text).map_err(|error| error.to_string())?;
    let (mut scenario, varied) = from_table(stem, &mut document).map_err(|error| error.to_string())?;
    let Some((axis, values)) = varied else {
        settle(&mut scenario)?;
        return Ok(vec![scenario]);
    };
    if !AXES.contains(&axis.as_str()) || values.is_empty() {
        return Err(format!("vary needs values, and one of {}", AXES.join(", ")));
    }
    let one = |value: u64| {
        let mut one = scenario.clone();
        match axis.as_str() {
            "value_bytes" => one.value_bytes = value as usize,
            "partitions" => one.partitions = value as i32,
            "lanes" => one.lanes = value as u32,
            "rate" => one.rate = value,
            "peers" => one.peers = value as usize,
            _ => one.relays = value as usize,
        }
        one.name = format!("{stem}-{}", short(value));
        one.point = Some(Point {
            axis: axis.clone(),
            value,
        });
        settle(&mut one).map(|()| one)
    };
    values.into_iter().map(one).collect()
}

/// What follows from the rest; and whether it can be run.
fn settle(scenario: &mut Scenario) -> Result<(), String> {
    if scenario.keys.count == 0 {
        scenario.keys.count = scenario.most_keys().min(KEYS);
    }
    scenario.events = scenario.events.min(scenario.most_events());
    let named = |error| format!("{}: {error}", scenario.name);
    scenario.check().map_err(named)
}

/// 1k for 1 000 and for 1 024.
fn short(value: u64) -> String {
    match value {
        1_024.. if value.is_multiple_of(1_024) => format!("{}k", value / 1_024),
        1_000.. if value.is_multiple_of(1_000) => format!("{}k", value / 1_000),
        _ => value.to_string(),
    }
}

type Varied = Option<(String, Vec<u64>)>;

fn from_table(name: &str, document: &mut Value<'_>) -> Result<(Scenario, Varied), DeserError> {
    let mut table = TableHelper::new(document)?;
    // What is missing or wrong is kept by the table and said by `finalize`; the stand-ins here are never used.
    let kind = table.required("kind").unwrap_or(Kind::Drain);
    let group = table.optional("group").unwrap_or(Group::Goal);
    let vary: Option<String> = table.optional("vary");
    let values: Vec<u64> = table.optional("values").unwrap_or_default();
    let keys = KeySpec {
        count: table.optional("keys").unwrap_or_default(),
        zipf: table.optional("zipf").unwrap_or_default(),
    };
    let varies = |axis: &str| vary.as_deref() == Some(axis);
    let scenario = Scenario {
        name: name.into(),
        group,
        kind,
        point: None,
        events: table.optional("events").unwrap_or_default(),
        bytes: table.optional("bytes").unwrap_or(u64::MAX),
        expect: table.optional("expect").unwrap_or_default(),
        seconds: table.optional("seconds").unwrap_or_default(),
        warm_up_seconds: table.optional("warm_up_seconds").unwrap_or(5),
        rate: table.optional("rate").unwrap_or_default(),
        half_of: table.optional("half_of"),
        value_bytes: match varies("value_bytes") {
            true => 0,
            false => table.required("value_bytes").unwrap_or_default(),
        },
        keys,
        partitions: match varies("partitions") {
            true => 1,
            false => table.required("partitions").unwrap_or_default(),
        },
        lanes: table.optional("lanes").unwrap_or(1),
        peers: table.optional("peers").unwrap_or(1),
        relays: table.optional("relays").unwrap_or(1),
        linger_ms: table.optional("linger_ms").unwrap_or(LINGER_MS),
        traces: TRACES,
        settings: table.optional("settings").unwrap_or_default(),
    };
    table.finalize(None)?;
    Ok((scenario, vary.map(|axis| (axis, values))))
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize(value: &mut Value<'de>) -> Result<Kind, DeserError> {
        word(value, &Kind::ALL)
    }
}

impl<'de> Deserialize<'de> for Group {
    fn deserialize(value: &mut Value<'de>) -> Result<Group, DeserError> {
        word(value, &Group::ALL)
    }
}

/// One of these words.
fn word<T: Copy>(value: &mut Value<'_>, words: &[(&'static str, T)]) -> Result<T, DeserError> {
    let said = value.take_string(None)?;
    match words.iter().find(|(word, _)| *word == said) {
        Some((_, meaning)) => Ok(*meaning),
        None => {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let wrong = ErrorKind::Custom(format!("{said:?} is none of {}", known.join(", ")).into());
            Err(Error::from((wrong, value.span)).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "kind = \"drain\"\nevents = 10\nexpect = 5\nvalue_bytes = 100\npartitions = 4\n";

    #[test]
    fn every_scenario_in_the_folder_can_be_run_and_says_what_for() {
        let all = all().unwrap();
        let names: Vec<&str> = all.iter().map(|one| one.name.as_str()).collect();
        for name in ["drain-100", "drain-1k", "fixed-100", "fixed-1k"] {
            assert!(names.contains(&name), "{name} of {names:?}");
        }
        for scenario in &all {
            let kind = Kind::ALL.iter().find(|(_, kind)| *kind == scenario.kind).unwrap().0;
            assert!(
                scenario.group != Group::Goal || scenario.name.starts_with(kind) || kind == "fixed" || kind == "drain"
            );
        }
        for file in std::fs::read_dir(folder()).unwrap() {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap();
            assert!(text.starts_with("# "), "{text}");
        }
    }

    #[test]
    fn a_family_is_a_scenario_for_each_of_its_values() {
        let family = format!(
            "{}vary = \"partitions\"\nvalues = [4, 512]\n",
            RIGHT.replace("partitions = 4\n", "")
        );
        let family = parse("parts", &family).unwrap();
        let parts: Vec<_> = family.iter().map(|one| (one.name.as_str(), one.partitions)).collect();
        assert_eq!(parts, [("parts-4", 4), ("parts-512", 512)]);
        assert_eq!(named(&family, &["parts".into()]).unwrap(), family);
        assert_eq!(named(&family, &["parts-512".into()]).unwrap(), family[1..]);
        let sizes = format!(
            "{}vary = \"value_bytes\"\nvalues = [100, 1024, 65536]\nbytes = 100_000\n",
            RIGHT.replace("value_bytes = 100\n", "")
        );
        let sizes = parse("size", &sizes).unwrap();
        let sized: Vec<_> = sizes.iter().map(|one| (one.name.as_str(), one.events)).collect();
        assert_eq!(sized, [("size-100", 10), ("size-1k", 10), ("size-64k", 1)]);
        assert!(sizes.iter().all(|one| one.keys.count <= one.most_keys()));
    }

    #[test]
    fn what_is_wrong_with_a_scenario_is_said() {
        assert!(parse("x", RIGHT).is_ok());
        for (wrong, word) in [
            (RIGHT.replace("drain", "dripp"), "drain"),
            (RIGHT.replace("drain", "fixed"), "events"),
            (RIGHT.replace("events = 10\n", ""), "events"),
            (RIGHT.replace("events", "event"), "event"),
            (RIGHT.replace("partitions = 4", "partitions = 0"), "partitions"),
            (RIGHT.replace("partitions = 4\n", ""), "partitions"),
            (RIGHT.replace("100", "2000000"), "value_bytes"),
            (format!("{RIGHT}rate = 1\n"), "rate"),
            (format!("{RIGHT}group = \"best\"\n"), "growth"),
            (format!("{RIGHT}keys = 100_000_000\n"), "keys"),
            (format!("{RIGHT}vary = \"speed\"\nvalues = [1]\n"), "lanes"),
        ] {
            let error = parse("x", &wrong).unwrap_err();
            assert!(error.contains(word), "{wrong}: {error}");
        }
        let error = named(&all().unwrap(), &["none".into()]).unwrap_err();
        assert!(error.contains("drain-100"), "{error}");
    }
}
