//! Whether librdkafka takes what a configuration asks for, before anything runs, and what it refuses in the configuration's words.

use std::fmt;

use rdkafka::admin::AdminClient;
use rdkafka::client::DefaultClientContext;
use rdkafka::config::{ClientConfig, FromClientConfig};
use rdkafka::consumer::BaseConsumer;
use rdkafka::error::KafkaError as RdKafkaError;
use rdkafka::producer::BaseProducer;

use crate::config::Config;
use crate::front_door::announcer::event_linger;

use super::events::events_config;
use super::{Prefetch, client_config, end_elsewhere, flow_config, producer_config};

/// What librdkafka does not take, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Refused {
    /// The options that say it, such as `kafka.properties.linger.ms`; none where librdkafka does not tell.
    pub options: Vec<String>,
    /// Which of evrepl's clients cannot be so; empty if none can.
    pub clients: Vec<&'static str>,
    /// What librdkafka says.
    pub why: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let options: Vec<String> = self.options.iter().map(|option| format!("`{option}`")).collect();
        let (what, then) = match options.as_slice() {
            [] => ("what `[kafka]` says".to_owned(), "change it"),
            [one] if self.options[0].starts_with(PROPERTIES) => (one.clone(), "change or remove it"),
            [one] => (one.clone(), "change it"),
            several => (several.join(" with "), "change one of them"),
        };
        write!(f, "librdkafka refuses {what}")?;
        if !self.clients.is_empty() {
            write!(f, " for {}", self.clients.join(" and "))?;
        }
        write!(f, ": {}; {then}", self.why)
    }
}

const PROPERTIES: &str = "kafka.properties.";

/// The properties that evrepl makes of options.
const MADE_OF: &[(&str, &str)] = &[
    ("bootstrap.servers", "kafka.brokers"),
    ("client.id", "node"),
    ("group.id", "kafka.group_prefix"),
    ("group.instance.id", "node"),
    ("queued.max.messages.kbytes", "flow.max_in_flight_bytes"),
    ("session.timeout.ms", "kafka.session_timeout"),
];
/// For the events of front doors alone.
const MADE_FOR_EVENTS: &[(&str, &str)] = &[
    ("linger.ms", "front_door.event_linger"),
    ("message.timeout.ms", "front_door.event_timeout"),
    ("queue.buffering.max.messages", "front_door.max_queued_events"),
];
const EVENTS: &str = "the front door's producer";

/// Sets each property by itself, and then makes each kind of client that `run` would make, without brokers, so that nobody is
/// asked: a property that librdkafka does not know, a value that it does not take, or two that do not go together. No file is
/// read: certificates and keys are perhaps on another machine.
///
/// # Errors
/// Everything that it refuses; what no client could be, else what each could not.
pub fn try_settings(config: &Config) -> Result<(), Vec<Refused>> {
    let alone: Vec<Refused> = config
        .kafka
        .properties
        .iter()
        .filter_map(|(name, value)| {
            let one = ClientConfig::from_iter([(name.clone(), value.clone())]);
            let error = one.create_native_config().err()?;
            Some(in_options(config, &error, None))
        })
        .collect();
    // These would be told of every client once more, of one or the other as it happens.
    if !alone.is_empty() {
        return Err(alone);
    }
    let mut kafka = config.kafka.clone();
    kafka.properties.retain(|name, _| !name.ends_with(".location"));
    let kafka = &kafka;
    let node = &config.node;
    let mut clients: Vec<(&'static str, Trial, ClientConfig)> = vec![
        (
            "the client that looks for topics",
            try_one::<AdminClient<DefaultClientContext>>,
            client_config(kafka, node),
        ),
        (
            "the producer of dead letters",
            try_one::<BaseProducer>,
            producer_config(kafka, node),
        ),
    ];
    if config.peers.iter().any(|peer| peer.address.is_some()) {
        for (what, retry) in [("a flow's consumer", false), ("a retry topics' consumer", true)] {
            let prefetch = Prefetch::of(kafka, config.flow.max_in_flight_bytes, retry);
            let flow = flow_config(kafka, &kafka.group_prefix, node, prefetch);
            clients.push((what, try_one::<BaseConsumer>, flow));
        }
    }
    if config.has_front_door() {
        let door = &config.front_door;
        let (most, timeout, linger) = (door.max_queued_events, door.event_timeout, event_linger(door));
        let events = events_config(kafka, node, most, timeout, linger);
        clients.push((EVENTS, try_one::<BaseProducer>, events));
    }
    let count = clients.len();
    let mut refused: Vec<Refused> = Vec::new();
    for (client, attempt, settings) in clients {
        let Some(error) = attempt(settings) else { continue };
        let new = in_options(config, &error, Some(client));
        match refused
            .iter_mut()
            .find(|known| (&known.options, &known.why) == (&new.options, &new.why))
        {
            Some(known) => known.clients.extend(new.clients),
            None => refused.push(new),
        }
    }
    for one in &mut refused {
        if one.clients.len() == count {
            one.clients.clear();
        }
    }
    if refused.is_empty() { Ok(()) } else { Err(refused) }
}

type Trial = fn(ClientConfig) -> Option<RdKafkaError>;

fn try_one<C: FromClientConfig + Send + 'static>(mut config: ClientConfig) -> Option<RdKafkaError> {
    config.remove("bootstrap.servers");
    match config.create::<C>() {
        Ok(client) => {
            // Its end takes a tenth of a second, and as long as a clock is wrong if that is faked for this process alone.
            end_elsewhere(client);
            None
        }
        Err(error) => Some(error),
    }
}

fn in_options(config: &Config, error: &RdKafkaError, client: Option<&'static str>) -> Refused {
    let (named, why) = match error {
        RdKafkaError::ClientConfig(_, why, name, _) => (name.as_str(), why.clone()),
        RdKafkaError::ClientCreation(why) => (why.as_str(), why.clone()),
        other => ("", other.to_string()),
    };
    Refused {
        options: options_in(config, named, client == Some(EVENTS)),
        clients: client.into_iter().collect(),
        why,
    }
}

/// What [`super::KafkaError::Settings`] says, with the options that it is about. No client is named: whoever asks knows.
pub(crate) fn explain(config: &Config, said: &str) -> Refused {
    Refused {
        options: options_in(config, said, false),
        clients: Vec::new(),
        why: said.to_owned(),
    }
}

/// The options behind the properties that a text names, in its order.
fn options_in(config: &Config, text: &str, of_events: bool) -> Vec<String> {
    let mut options: Vec<String> = Vec::new();
    let within = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    for word in text.split(|c| !within(c)).map(|word| word.trim_end_matches('.')) {
        let made = MADE_OF.iter().chain(if of_events { MADE_FOR_EVENTS } else { &[] });
        let option = match config.kafka.properties.contains_key(word) {
            true => Some(format!("{PROPERTIES}{word}")),
            false => made
                .into_iter()
                .find(|(name, _)| *name == word)
                .map(|(_, option)| (*option).to_owned()),
        };
        options.extend(option.filter(|option| !options.contains(option)));
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kafka::IN_FLIGHT;

    fn config(more: &str) -> Config {
        let rest = format!(
            r#"cache = [{{ name = "sessions", topic = "s", servers = ["127.0.0.1:9"], listen = "127.0.0.1:8" }}]
            peer = [{{ region = "eu-west-1", address = "127.0.0.1:7" }}]
            {more}"#
        );
        crate::config::for_tests(&rest)
    }

    fn refused(kafka: &str, more: &str) -> Vec<String> {
        let text = format!("kafka = {{ brokers = [\"127.0.0.1:9092\"], {kafka} }}\n{more}");
        let refused = try_settings(&config(&text)).err().unwrap_or_default();
        refused.iter().map(ToString::to_string).collect()
    }

    /// Both names are set on one client otherwise, and which of them counts is chance.
    #[test]
    fn a_property_by_its_second_name_is_the_configurations_too() {
        for (name, alias, value) in [
            ("linger.ms", "queue.buffering.max.ms", "7"),
            (IN_FLIGHT.0, "max.in.flight", "3"),
        ] {
            for written in [name, alias] {
                let config = config(&format!(
                    "kafka = {{ brokers = [\"127.0.0.1:9092\"], properties = {{ \"{written}\" = \"{value}\" }} }}"
                ));
                let made = producer_config(&config.kafka, "node");
                let both = [name, alias].map(|name| made.get(name));
                assert_eq!(both, [name, alias].map(|name| (name == written).then_some(value)));
            }
        }
    }

    #[test]
    fn a_property_that_no_client_takes_is_named_without_one() {
        assert_eq!(refused("", ""), [""; 0]);
        let two = refused(
            "properties = { \"linger.mss\" = \"1\", \"fetch.wait.max.ms\" = \"often\", \"linger.ms\" = \"5\" }",
            "",
        );
        assert_eq!(
            two,
            [
                "librdkafka refuses `kafka.properties.fetch.wait.max.ms`: Invalid value for configuration property \
                 \"fetch.wait.max.ms\"; change or remove it",
                "librdkafka refuses `kafka.properties.linger.mss`: No such configuration property: \"linger.mss\"; change or remove it",
            ]
        );
        // No single one is wrong; no client can be so.
        let pair = refused(
            "properties = { \"security.protocol\" = \"sasl_plaintext\", \"sasl.mechanisms\" = \"NOPE\" }",
            "",
        );
        assert_eq!(pair.len(), 1, "{pair:?}");
        assert!(!pair[0].contains(" for "), "{pair:?}");
    }

    #[test]
    fn clients_are_named_where_only_these_refuse() {
        assert_eq!(
            refused("properties = { \"linger.ms\" = \"6000\" }", ""),
            [
                "librdkafka refuses `front_door.event_timeout` with `kafka.properties.linger.ms` for the front door's producer: \
                 `message.timeout.ms` must be greater than `linger.ms`; change one of them"
            ]
        );
        let fetch = refused("properties = { \"fetch.max.bytes\" = \"1000\" }", "");
        assert_eq!(fetch.len(), 1, "{fetch:?}");
        assert!(
            fetch[0].starts_with(
                "librdkafka refuses `kafka.properties.fetch.max.bytes` for a flow's consumer and a retry topics' consumer: "
            ),
            "{fetch:?}"
        );
    }

    #[test]
    fn an_option_of_evrepls_own_is_named_as_such() {
        let timeout = refused("", "front_door = { event_timeout = \"30days\" }");
        assert_eq!(timeout.len(), 1, "{timeout:?}");
        assert!(
            timeout[0].starts_with("librdkafka refuses `front_door.event_timeout` for the front door's producer: "),
            "{timeout:?}"
        );
        let session = refused("session_timeout = \"2h\"", "");
        assert_eq!(session.len(), 1, "{session:?}");
        assert!(
            session[0].starts_with("librdkafka refuses `kafka.session_timeout` for a flow's consumer and"),
            "{session:?}"
        );
    }

    #[test]
    fn what_only_a_file_shows_names_its_property_too() {
        let text =
            "kafka = { brokers = [\"127.0.0.1:9092\"], properties = { \"ssl.ca.location\" = \"/nowhere.pem\" } }";
        let said = "Client creation error: ssl.ca.location failed: error:80000002:system library::No such file";
        let refused = explain(&config(text), said).to_string();
        assert!(
            refused.starts_with("librdkafka refuses `kafka.properties.ssl.ca.location`: Client"),
            "{refused}"
        );
        assert!(refused.ends_with("change or remove it"), "{refused}");
    }
}
