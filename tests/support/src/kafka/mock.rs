//! librdkafka's own broker, for what no real one does on demand: refusing.

use std::sync::Arc;

use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};

use super::KafkaClient;

/// More refusals than any test lives to see.
const ENDLESS: usize = 100_000;

/// A broker inside this process that other processes may use. It knows groups, commits and headers, but no admin calls, so
/// its topics are made here; and of no partition it keeps more than 100 000 records.
pub struct MockKafka {
    cluster: MockCluster<'static, DefaultProducerContext>,
    client: Arc<KafkaClient>,
}

impl std::fmt::Debug for MockKafka {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("MockKafka").field(&self.client).finish()
    }
}

impl MockKafka {
    /// # Panics
    /// When librdkafka can't start it.
    pub fn start() -> MockKafka {
        let cluster = MockCluster::new(1).unwrap_or_else(|error| panic!("the mock broker does not start: {error}"));
        let client = Arc::new(KafkaClient::new(&cluster.bootstrap_servers()));
        MockKafka { cluster, client }
    }

    /// A handle for talking to it that regions may keep.
    pub fn client(&self) -> Arc<KafkaClient> {
        Arc::clone(&self.client)
    }

    /// # Panics
    /// When it refuses.
    pub fn create_topic(&self, topic: &str, partitions: i32) {
        let made = self.cluster.create_topic(topic, partitions, 1);
        made.unwrap_or_else(|error| panic!("the mock broker refuses topic {topic}: {error}"));
    }

    /// From now on every record is refused: by turns for good as far as librdkafka can tell, and in a way that it repeats
    /// by itself.
    pub fn refuse_records(&self) {
        let errors = [
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
        ];
        let errors: Vec<_> = errors.into_iter().cycle().take(ENDLESS).collect();
        self.cluster.request_errors(RDKafkaApiKey::Produce, &errors);
    }

    /// Takes records again.
    pub fn take_records(&self) {
        self.cluster.clear_request_errors(RDKafkaApiKey::Produce);
    }
}
