//! Every name that traces use: spans, their attributes and events. Where OpenTelemetry's semantic conventions have a name it
//! is theirs (messaging, database and server, as of version 1.36); the rest begins with `evrepl.`.

/// The instrumentation scope of all spans and metrics.
pub const SCOPE: &str = "evrepl";

/// The target of `tracing` spans that are exported, beside what is traced per event: dials, sessions, rebalances, drains.
pub const SPAN_TARGET: &str = "evrepl::span";

/// Attributes that the messaging conventions name.
pub mod messaging {
    /// Always `kafka`.
    pub const SYSTEM: &str = "messaging.system";
    /// The topic.
    pub const DESTINATION: &str = "messaging.destination.name";
    /// The partition, as a string.
    pub const PARTITION: &str = "messaging.destination.partition.id";
    /// The record's offset.
    pub const OFFSET: &str = "messaging.kafka.offset";
    /// What is done, in the system's words.
    pub const OPERATION_NAME: &str = "messaging.operation.name";
    /// `process` or `send`.
    pub const OPERATION_TYPE: &str = "messaging.operation.type";
    /// The consumer group.
    pub const GROUP: &str = "messaging.consumer.group.name";
    /// Items of a batch.
    pub const BATCH_COUNT: &str = "messaging.batch.message_count";
    /// Bytes on the wire.
    pub const BODY_SIZE: &str = "messaging.message.envelope.size";
}

/// Attributes that the database conventions name.
pub mod db {
    /// Always `memcached`.
    pub const SYSTEM: &str = "db.system.name";
    /// The cache.
    pub const NAMESPACE: &str = "db.namespace";
    /// `get`, `set`, `touch` or `delete`.
    pub const OPERATION: &str = "db.operation.name";
}

/// General attributes of the conventions.
pub mod general {
    /// The host of a memcached server.
    pub const SERVER_ADDRESS: &str = "server.address";
    /// Its port.
    pub const SERVER_PORT: &str = "server.port";
    /// The other end of a link.
    pub const PEER: &str = "peer.service";
    /// Why a span failed, in one word.
    pub const ERROR_TYPE: &str = "error.type";
}

/// Attributes of our own.
pub mod own {
    /// `us-east-1->eu-west-1`.
    pub const FLOW: &str = "evrepl.flow";
    /// The cache's name.
    pub const CACHE: &str = "evrepl.cache";
    /// The event's op.
    pub const OP: &str = "evrepl.op";
    /// The first half of the key's MD5, in hex: what `printf %s KEY | md5sum | cut -c1-16` prints.
    pub const KEY_HASH: &str = "evrepl.key.hash";
    /// The key itself, only with `telemetry.trace_keys`.
    pub const KEY: &str = "evrepl.key";
    /// How the event ended.
    pub const OUTCOME: &str = "evrepl.outcome";
    /// Seconds from produced-at to the event's end.
    pub const LAG: &str = "evrepl.lag_seconds";
    /// Why the trace was made although it was not sampled: `slow` or `failed`.
    pub const KEPT_FOR: &str = "evrepl.trace.kept_for";
    /// The span's times are another process's durations, as it reported them.
    pub const REPORTED: &str = "evrepl.trace.reported_by_peer";
    /// Bytes of the value that was seen.
    pub const VALUE_BYTES: &str = "evrepl.value.bytes";
    /// Which stage of the path a span is.
    pub const STAGE: &str = "evrepl.stage";
    /// How the agent answered an item.
    pub const ANSWER: &str = "evrepl.answer";
    /// Why a key is looked at again.
    pub const REASON: &str = "evrepl.reason";
    /// What a key waits for.
    pub const WAITS_FOR: &str = "evrepl.waits_for";
    /// What made a batch leave.
    pub const TRIGGER: &str = "evrepl.batch.trigger";
    /// Bytes of a batch before compression.
    pub const RAW_BYTES: &str = "evrepl.batch.raw_bytes";
    /// Items of a batch whose traces are sampled.
    pub const TRACED_ITEMS: &str = "evrepl.batch.traced_items";
    /// The region that a span belongs to.
    pub const REGION: &str = "evrepl.region";
}

/// Names of span events.
pub mod events {
    /// The key became dirty.
    pub const LOOK_AGAIN: &str = "looked at again";
    /// There was no value yet: the event may be ahead of its write.
    pub const NOT_THERE_YET: &str = "no value yet";
    /// The circuit breaker of a memcached server is open.
    pub const BREAKER_OPEN: &str = "circuit breaker open";
    /// A newer event of the key took its place.
    pub const SUPERSEDED: &str = "superseded by a newer write";
    /// The event went to the retry topic.
    pub const PARKED: &str = "parked on the retry topic";
    /// The trace has more stages than are kept.
    pub const SHORTENED: &str = "further stages are not shown";
}
