//! The configuration: a TOML file, and over it the environment.
//!
//! [`load`] reads it, [`schema`] describes it to editors, [`Config::to_toml`] writes it down with every default filled
//! in. Whatever is wrong is said at once ([`ConfigError`]): each problem with its place and what to write instead.
//!
//! ```text
//! file ──tree──▶ values with places ──section, codec, scalar──▶ Config ──rules──▶ Config, or every problem
//! environment ─────────┘
//! ```
//!
//! `options.rs` declares each option once; its documentation there is also the schema's.

mod address;
mod codec;
mod environment;
mod names;
mod options;
mod problem;
mod rules;
mod scalar;
mod section;
mod tree;

#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

pub use options::{
    Admin, Agent, Batch, Cache, Canary, Compression, Config, DoorTls, Drain, EventAck, Flow, FrontDoor, HashKind,
    Kafka, Link, LogFormat, Mailbox, Memcached, OnKafkaDown, OnSet, Peer, Server, StartAt, Supervision, Telemetry, Tls,
};
pub use problem::{ConfigError, Place, Problem};

use section::{Reading, Section};
use tree::{Node, Table, Value};

/// Reads the file at `path`, with the settings of `env` ([`environment`]) over it.
///
/// # Errors
/// [`ConfigError::Unreadable`] if there is no such file, [`ConfigError::Invalid`] with every problem otherwise.
pub fn load(path: &Path, env: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigError> {
    let bytes = std::fs::read(path).map_err(|source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    match String::from_utf8(bytes) {
        Ok(text) => parse(&text, path, env),
        Err(error) => {
            let readable = String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]).into_owned();
            let line = readable.split('\n').count();
            let column = readable.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
            let what = "is not UTF-8; save the file as UTF-8".to_owned();
            let problems = vec![Problem {
                place: Place::File { line, column },
                what,
            }];
            Err(ConfigError::Invalid {
                file: path.to_owned(),
                problems,
            })
        }
    }
}

/// The variables of this process that can be read as text, for [`load`].
pub fn environment() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Reads `text` as the file `file_name`, to whose folder paths are relative.
///
/// # Errors
/// [`ConfigError::Invalid`] with every problem.
pub fn parse(text: &str, file_name: &Path, env: impl Iterator<Item = (String, String)>) -> Result<Config, ConfigError> {
    parse_on(host_name().as_deref(), text, file_name, env)
}

/// `host` is this machine's name, if it has one.
fn parse_on(
    host: Option<&str>,
    text: &str,
    file_name: &Path,
    env: impl Iterator<Item = (String, String)>,
) -> Result<Config, ConfigError> {
    let mut problems = Vec::new();
    let root = tree::from_toml(text, &mut problems);
    let unreadable = root.is_none();
    let mut root = root.unwrap_or_else(|| Node {
        at: Place::TOP,
        value: Value::Table(Table::new()),
    });
    environment::apply(&mut root, env, &mut problems);
    if unreadable {
        return Err(ConfigError::Invalid {
            file: file_name.to_owned(),
            problems,
        });
    }
    let mut reading = Reading::new(folder_of(file_name), problems);
    reading.wrote("", &Place::TOP);
    let table = match root.value {
        Value::Table(table) => table,
        _ => Table::new(),
    };
    let mut config = Config::read(table, "", &mut reading);
    rules::check(&config, &mut reading);
    complete(&mut config, host, &mut reading);
    if reading.problems.is_empty() {
        return Ok(config);
    }
    let mut problems = reading.problems;
    problems.sort();
    problems.dedup();
    Err(ConfigError::Invalid {
        file: file_name.to_owned(),
        problems,
    })
}

/// Fills in the defaults that depend on other options.
fn complete(config: &mut Config, host: Option<&str>, reading: &mut Reading) {
    if config.node.is_empty() && !reading.has_failed("node") {
        let port = names::port_of(&config.agent.listen).unwrap_or_default();
        match host.and_then(|host| names::as_node(host, port)) {
            Some(node) => config.node = node,
            None => {
                let what = "`node` is missing and this host has no name to make one of; write one, like `\"relay-1\"`";
                reading.fail("node", &Place::TOP, what.to_owned());
            }
        }
    }
    let every_cache: Vec<String> = config.caches.iter().map(|cache| cache.name.clone()).collect();
    for peer in &mut config.peers {
        if peer.identity.is_empty() {
            peer.identity.clone_from(&peer.region);
        }
        if peer.caches.is_empty() {
            peer.caches.clone_from(&every_cache);
        }
    }
}

/// Absolute, so that a path joined to it means the same wherever it is read again.
fn folder_of(file: &Path) -> PathBuf {
    let folder = file.parent().unwrap_or(Path::new(""));
    let folder = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    std::path::absolute(folder).unwrap_or_else(|_| folder.to_owned())
}

/// Read where Linux shows it, for the call itself is unsafe in Rust; elsewhere from the shell's variable.
fn host_name() -> Option<String> {
    let shown = ["/proc/sys/kernel/hostname", "/etc/hostname"]
        .iter()
        .find_map(|file| std::fs::read_to_string(file).ok());
    shown.or_else(|| std::env::var("HOSTNAME").ok())
}

/// The JSON Schema (2020-12) of the file, with the documentation and default of every option.
pub fn schema() -> String {
    let mut schema = Config::schema();
    schema.insert(
        "$schema".to_owned(),
        "https://json-schema.org/draft/2020-12/schema".into(),
    );
    schema.insert("title".to_owned(), "evrepl".into());
    serde_json::to_string_pretty(&schema).unwrap_or_default()
}

impl Config {
    /// The configuration in force as a file, every default filled in, paths absolute. It reads back as an equal one.
    /// Passwords stand in it as they are; see [`Config::without_secrets`].
    pub fn to_toml(&self) -> String {
        let mut out = String::new();
        self.write("", &mut out);
        out
    }

    /// The same with every password and key among the librdkafka properties replaced by `…`, to be shown to people.
    pub fn without_secrets(&self) -> Config {
        let mut config = self.clone();
        let properties = config
            .kafka
            .properties
            .iter_mut()
            .filter(|(name, _)| names::is_secret(name));
        properties.for_each(|(_, value)| *value = "…".to_owned());
        config
    }

    /// The peer of this region, if there is one.
    pub fn peer(&self, region: &str) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.region == region)
    }

    /// The cache of this name, if there is one.
    pub fn cache(&self, name: &str) -> Option<&Cache> {
        self.caches.iter().find(|cache| cache.name == name)
    }
}

/// What tests of other modules run with: a node that has a name and certificates, and `rest`.
///
/// # Panics
/// With every problem that it has.
#[cfg(test)]
pub(crate) fn for_tests(rest: &str) -> Config {
    let tls = r#"certificate = "a.pem", private_key = "a.key", ca = "ca.pem""#;
    let text = format!("region = \"us-east-1\"\nnode = \"relay-1\"\ntls = {{ {tls} }}\n{rest}");
    let config = parse(&text, "/etc/evrepl.toml".as_ref(), std::iter::empty());
    config.unwrap_or_else(|error| panic!("{error}"))
}
