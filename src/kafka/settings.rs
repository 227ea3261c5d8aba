//! Whether librdkafka takes what a configuration asks for, before anything runs.

use rdkafka::admin::AdminClient;
use rdkafka::client::DefaultClientContext;
use rdkafka::config::{ClientConfig, FromClientConfig};
use rdkafka::consumer::BaseConsumer;
use rdkafka::producer::BaseProducer;

use crate::config::Config;
use crate::front_door::announcer::event_linger;

use super::events::events_config;
use super::{KafkaError, Prefetch, client_config, flow_config, producer_config};

/// Makes each kind of client that `run` would make, without brokers, so that nobody is asked: a property that librdkafka does
/// not know, a value that it does not take, or two that do not go together. No file is read: certificates and keys are perhaps on
/// another machine.
///
/// # Errors
/// [`KafkaError::Settings`] for the first client that it refuses, with which one that is.
pub fn try_settings(config: &Config) -> Result<(), KafkaError> {
    let mut kafka = config.kafka.clone();
    kafka.properties.retain(|name, _| !name.ends_with(".location"));
    let kafka = &kafka;
    try_one::<AdminClient<DefaultClientContext>>(
        "the client that looks for topics",
        client_config(kafka, &config.node),
    )?;
    try_one::<BaseProducer>("the producer of dead letters", producer_config(kafka, &config.node))?;
    if config.peers.iter().any(|peer| peer.address.is_some()) {
        for (what, retry) in [("a flow's consumer", false), ("a retry topics' consumer", true)] {
            let prefetch = Prefetch::of(kafka, config.flow.max_in_flight_bytes, retry);
            try_one::<BaseConsumer>(what, flow_config(kafka, &kafka.group_prefix, &config.node, prefetch))?;
        }
    }
    if config.has_front_door() {
        let door = &config.front_door;
        let (most, timeout, linger) = (door.max_queued_events, door.event_timeout, event_linger(door));
        let events = events_config(kafka, &config.node, most, timeout, linger);
        try_one::<BaseProducer>("the front door's producer", events)?;
    }
    Ok(())
}

fn try_one<C: FromClientConfig>(what: &str, mut config: ClientConfig) -> Result<(), KafkaError> {
    config.remove("bootstrap.servers");
    match config.create::<C>() {
        Ok(_) => Ok(()),
        Err(error) => Err(KafkaError::Settings(format!("{error} ({what})"))),
    }
}
