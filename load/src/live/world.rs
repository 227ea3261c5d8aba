//! Two regions: memcached and `evrepl run` as processes, Kafka inside this one.

use std::sync::Arc;
use std::time::Duration;

use evrepl::telemetry::SERVICE_VARIABLE;
use evrepl_lab::{CacheSpec, KafkaClient, Region, RegionBuilder, TwoRegions, TwoRegionsSpec, holds_within};
use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;

use crate::stop::Stop;

/// The one cache of both regions.
pub const CACHE: &str = "sessions";

/// Memory of each memcached: what a demo of hours may write, so that nothing is evicted.
const MEMCACHED_MIB: &str = "512";

/// Partitions of each region's topic.
const PARTITIONS: i32 = 4;

/// A broker answers a waiting fetch as soon as there is something; the embedded one only when the wait is over. So the relays
/// wait 5 ms instead of their 100, or that would be the latency. It answers with one batch of a partition, too, and looks for it
/// among all that there are, from the first: with the Writer's linger of 1 ms latency would grow by a millisecond a second.
const PROPERTIES: (&str, &str) = (
    "kafka.properties",
    "{ \"fetch.wait.max.ms\" = \"5\", \"linger.ms\" = \"10\" }",
);

/// A first start on a machine that still compiles may take this long.
const READY_WITHIN: Duration = Duration::from_secs(60);

/// Everything the demo has started. Dropping it ends it: the regions first, then their Kafka.
pub struct World {
    regions: TwoRegions,
    _kafka: [MockCluster<'static, DefaultProducerContext>; 2],
}

impl World {
    /// Starts all of it and returns when both agents can take batches; `None` when somebody asked to stop. Both regions
    /// export to `traced`, an OTLP endpoint and the share of events that is traced.
    ///
    /// # Errors
    /// When something doesn't start, in words.
    ///
    /// # Panics
    /// When the lab can't start a process; the message says which and why.
    pub fn start(stop: &Stop, traced: Option<(String, f64)>) -> Result<Option<World>, String> {
        let kafka = || MockCluster::new(1).map_err(|error| format!("the embedded Kafka does not start: {error}"));
        let kafka = [kafka()?, kafka()?];
        let [us, eu] = [&kafka[0], &kafka[1]].map(|one| Arc::new(KafkaClient::new(&one.bootstrap_servers())));
        let spec = match traced {
            Some((endpoint, ratio)) => TwoRegionsSpec::new().telemetry(&endpoint, ratio),
            None => TwoRegionsSpec::new(),
        };
        let regions = spec
            .cache(CacheSpec::new(CACHE).memcached_args(&["-m", MEMCACHED_MIB]))
            .us(move |builder| dressed(builder, &us))
            .eu(move |builder| dressed(builder, &eu))
            .build();
        for (region, kafka) in regions.both().into_iter().zip(&kafka) {
            let topic = &region.cache(CACHE).topic;
            let made = kafka.create_topic(topic, PARTITIONS, 1);
            made.map_err(|error| format!("the embedded Kafka refuses topic {topic}: {error}"))?;
        }
        for region in regions.both() {
            region.spawn();
        }
        for region in regions.both() {
            ready(region, stop)?;
        }
        let world = World { regions, _kafka: kafka };
        Ok((!stop.asked()).then_some(world))
    }

    /// `us-east-1` and `eu-west-1`.
    pub fn regions(&self) -> [&Region; 2] {
        self.regions.both()
    }

    /// Whether both processes still run.
    ///
    /// # Errors
    /// Which one has ended, and the end of its log.
    pub fn check(&self) -> Result<(), String> {
        self.regions().into_iter().try_for_each(runs)
    }

    /// Asks both processes to drain, waits until they have, and ends everything else.
    pub fn end(self) {
        for region in self.regions() {
            if region.is_running() {
                region.signal(evrepl_lab::Signal::Terminate);
            }
        }
        for region in self.regions() {
            // What is left then is killed with its handle.
            region.exit_code(Duration::from_secs(10));
        }
    }
}

fn dressed(builder: RegionBuilder, kafka: &Arc<KafkaClient>) -> RegionBuilder {
    // Jaeger gives each service a colour, so each region is one.
    let service = format!("evrepl-{}", builder.name());
    let builder = builder.kafka(kafka).topics_exist().set(PROPERTIES.0, PROPERTIES.1);
    builder.env(SERVICE_VARIABLE, &service)
}

fn runs(region: &Region) -> Result<(), String> {
    if region.is_running() {
        return Ok(());
    }
    let log = region.log_tail(20);
    Err(format!(
        "evrepl of {} has ended; the end of its log:\n{log}",
        region.name()
    ))
}

fn ready(region: &Region, stop: &Stop) -> Result<(), String> {
    let answers = || matches!(region.get("/readyz"), Ok((200, _)));
    let came = holds_within(READY_WITHIN, || stop.asked() || !region.is_running() || answers());
    runs(region)?;
    match came {
        true => Ok(()),
        false => Err(format!(
            "evrepl of {} is not ready in {} s; the end of its log:\n{}",
            region.name(),
            READY_WITHIN.as_secs(),
            region.log_tail(20)
        )),
    }
}
