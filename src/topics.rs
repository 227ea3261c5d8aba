//! Retry and dead-letter topics: made when absent, with as many partitions as the source. Never in anyone's way.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use crate::config::Config;
use crate::kafka::{KafkaError, Topics};

/// Between two looks while something is missing.
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

/// Creates what is missing, on a thread of its own, again and again until all is there.
pub fn keep(config: Arc<Config>) -> Option<Keeper> {
    if config.peers.iter().all(|peer| peer.address.is_none()) {
        return None;
    }
    let (stop, stopped) = channel();
    let run = move || {
        let mut said = None;
        loop {
            match create_missing(&config) {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    let text = error.to_string();
                    if said.as_ref() != Some(&text) {
                        tracing::warn!(%error, "retry and dead-letter topics are not all there yet, trying on");
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

/// One round; true when nothing is missing any more.
fn create_missing(config: &Config) -> Result<bool, KafkaError> {
    let topics = Topics::new(&config.kafka, &config.node)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| KafkaError::Broker(error.to_string()))?;
    let mut complete = true;
    for (n, cache) in config.caches.iter().enumerate() {
        let mut wanted = companions(config, n);
        wanted.push(cache.topic.clone());
        let counts = topics.partitions(&wanted, ASK)?;
        // Without its source there is nothing to size the others by; the application makes that one.
        let Some(Some(partitions)) = counts.get(&cache.topic).copied() else {
            complete = false;
            continue;
        };
        for topic in wanted
            .iter()
            .filter(|topic| counts.get(*topic).copied().flatten().is_none())
        {
            runtime.block_on(topics.create(&config.kafka, topic, partitions))?;
            tracing::info!(topic, partitions, "topic created");
        }
    }
    Ok(complete)
}
