//! Retry and dead-letter topics: made when absent, with as many partitions as the source; retry topics grow along with it.
//! Never in anyone's way.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::config::Config;
use crate::kafka::{KafkaError, Topics};

/// Between two looks: one small question for each topic.
const AGAIN: Duration = Duration::from_secs(2);
/// How long the broker may take to say what there is.
const ASK: Duration = Duration::from_secs(3);

/// Ends the thread when dropped.
pub struct Keeper {
    _stop: Sender<()>,
}

/// What a source topic needs beside it: its dead-letter topic, and a retry topic per peer that gets the cache.
pub fn companions(config: &Config, cache: usize) -> Vec<String> {
    let cache = &config.caches[cache];
    let peers = config
        .peers
        .iter()
        .filter(|peer| peer.address.is_some() && peer.caches.contains(&cache.name));
    let retries = peers.map(|peer| config.kafka.retry_topic_for(&cache.topic, &peer.region));
    retries
        .chain([config.kafka.dead_letter_topic_for(&cache.topic)])
        .collect()
}

/// Creates what is missing and lets retry topics grow with their sources, on a thread of its own, as long as the keeper is
/// there: a source topic may be made, or get more partitions, at any time.
pub fn keep(config: Arc<Config>) -> Option<Keeper> {
    if config.peers.iter().all(|peer| peer.address.is_none()) {
        return None;
    }
    let (stop, stopped) = channel();
    let run = move || {
        let topics = Topics::new(&config.kafka, &config.node);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let (topics, runtime) = match (topics, runtime) {
            (Ok(topics), Ok(runtime)) => (topics, runtime),
            (Err(error), _) => return tracing::warn!(%error, "no client to create topics with"),
            (_, Err(error)) => return tracing::warn!(%error, "no runtime to create topics with"),
        };
        let mut said = None;
        loop {
            match runtime.block_on(look(&config, &topics)) {
                Ok(()) => said = None,
                Err(error) => {
                    let text = error.to_string();
                    if said.as_ref() != Some(&text) {
                        tracing::warn!(%error, "retry and dead-letter topics are not all as they should be, trying on");
                        said = Some(text);
                    }
                }
            }
            if stopped.recv_timeout(AGAIN) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    };
    match std::thread::Builder::new().name("topics".to_owned()).spawn(run) {
        Ok(_) => Some(Keeper { _stop: stop }),
        Err(error) => {
            tracing::warn!(%error, "no thread to create topics with");
            None
        }
    }
}

/// One round through all topics. What one of them refuses keeps no other from being made; the first reason is given.
async fn look(config: &Config, topics: &Topics) -> Result<(), KafkaError> {
    let mut first = Ok(());
    for (n, cache) in config.caches.iter().enumerate() {
        let mut wanted = companions(config, n);
        let dead_letters = config.kafka.dead_letter_topic_for(&cache.topic);
        wanted.push(cache.topic.clone());
        let counts = topics.partitions(&wanted, ASK)?;
        // Without its source there is nothing to size the others by; the application makes that one.
        let Some(Some(partitions)) = counts.get(&cache.topic).copied() else {
            continue;
        };
        for topic in &wanted {
            let done = match counts.get(topic).copied().flatten() {
                None => {
                    let made = topics.create(&config.kafka, topic, partitions).await;
                    made.inspect(|()| tracing::info!(topic, partitions, "topic created"))
                }
                // Dead letters are few, and nobody waits for them.
                Some(has) if has < partitions && *topic != dead_letters => {
                    let grown = topics.add_partitions(topic, partitions).await;
                    grown.inspect(|()| tracing::info!(topic, partitions, "topic has as many partitions as its source"))
                }
                Some(_) => Ok(()),
            };
            first = first.and(done);
        }
    }
    first
}
