//! Every option: what it means, its unit, its default. The names in the file are the fields' names, but for `[[cache]]`
//! and `[[peer]]`.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::codec::{Each, File, List, Maybe, OneLine, Properties, Sub};
use super::names;
use super::scalar::{
    Address, Choice, Count, DeadLetterTemplate, DnsName, Door, FillCommand, Label, Listen, Opaque, Ratio,
    RetryTemplate, Size, Switch, Time, Topic, Url, Words, choice,
};
use super::section::section;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// librdkafka's own limit of `queue.buffering.max.messages`.
const MOST_QUEUED: i64 = i32::MAX as i64;

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

section! {
    /// The configuration of one evrepl process.
    #[derive(Debug)]
    pub struct Config {
        /// This region's name, a DNS label. Its peers know it by this name.
        pub region: String as Label,
        /// Names this process in the consumer groups, so that its partitions wait for it while it restarts. No two
        /// processes of a region may share it. Letters, digits, `.`, `_`, `-`. Default: the host's name and the agent's
        /// port, such as `relay-1-7101`.
        pub node: String as Topic = String::new(),
        /// The Kafka that this region's writers produce their events to.
        pub kafka: Kafka as Sub,
        /// The caches of this region; at least one.
        pub caches("cache"): Vec<Cache> as Each,
        /// The regions that events go to, come from, or both. Default: none.
        pub peers("peer"): Vec<Peer> as Each = Vec::new(),
        /// The receiving half.
        pub agent: Agent as Sub = Agent::default(),
        /// Who this process is to its peers, and whom it believes.
        pub tls: Tls as Sub,
        /// Health, metrics and status over HTTP.
        pub admin: Admin as Sub = Admin::default(),
        /// Logs and traces.
        pub telemetry: Telemetry as Sub = Telemetry::default(),
        /// What clients may do at the front doors of the caches.
        pub front_door: FrontDoor as Sub = FrontDoor::default(),
        /// The bounds of each flow.
        pub flow: Flow as Sub = Flow::default(),
        /// When a batch leaves.
        pub batch: Batch as Sub = Batch::default(),
        /// The connections to the peers.
        pub link: Link as Sub = Link::default(),
        /// Messages (chunks or batches) waiting in front of each kind of actor.
        pub mailbox: Mailbox as Sub = Mailbox::default(),
        /// When restarting no longer helps.
        pub supervision: Supervision as Sub = Supervision::default(),
        /// Stopping.
        pub drain: Drain as Sub = Drain::default(),
        /// The connections to this region's own memcached servers.
        pub memcached: Memcached as Sub = Memcached::default(),
        /// When it is worth a warning that keys are missing.
        pub misses: Misses as Sub = Misses::default(),
        /// Writes of evrepl's own that show whether each path lives, and its lag without traffic.
        pub canary: Canary as Sub = Canary::default(),
    }
}

section! {
    /// The Kafka that this region's writers produce their events to.
    pub struct Kafka {
        /// Brokers to begin with, each `host:port`; at least one.
        pub brokers: Vec<String> as List<Address>,
        /// librdkafka properties, for consumers and producers, but for those that evrepl owns. Paths in them are
        /// relative to this file too. Default: `{}`.
        pub properties: BTreeMap<String, String> as Properties = BTreeMap::new(),
        /// The consumer group of a flow is `<group_prefix>.<region>.<peer>`, and for its retry topics that with `.retry`
        /// behind it. Default: `"evrepl"`.
        pub group_prefix: String as Topic = "evrepl".to_owned(),
        /// Where a flow begins that has committed nothing yet. Partitions added later begin at their first event.
        /// Default: `"earliest"`.
        pub start_at: StartAt as Choice = StartAt::Earliest,
        /// The topic that parked events go to, for each topic and peer. Default: `"{topic}.retry.{peer}"`.
        pub retry_topic: String as RetryTemplate = "{topic}.retry.{peer}".to_owned(),
        /// The topic that events go to that cannot be decoded or are refused for good. Default: `"{topic}.dead-letter"`.
        pub dead_letter_topic: String as DeadLetterTemplate = "{topic}.dead-letter".to_owned(),
        /// How long the partitions of a killed process wait for it before others take them over. A broker allows no
        /// less than its `group.min.session.timeout.ms`, 6 s unless told otherwise. Default: `"6s"`.
        pub session_timeout: Duration as Time<1000> = seconds(6),
        /// How often watermarks are committed: what a crash replays is at most so old. Default: `"1s"`.
        pub commit_interval: Duration as Time = seconds(1),
    }
}

choice! {
    /// Where a flow begins that has committed nothing yet.
    pub enum StartAt {
        /// With the oldest event that Kafka holds.
        Earliest = "earliest",
        /// With what is produced from now on.
        Latest = "latest",
    }
}

section! {
    /// A named set of memcached servers with one topic and one policy.
    #[derive(Debug)]
    pub struct Cache {
        /// Its name, the same in every region. Letters, digits, `.`, `_`, `-`.
        pub name: String as Topic,
        /// The topic of its events; no other cache has it.
        pub topic: String as Topic,
        /// Its memcached servers: each `"host:port"`, or a table with `address`, `ring_name` and `weight`; at least one.
        pub servers: Vec<Server> as List<OneLine>,
        /// How its clients choose the server of a key. Default: `"ketama"`.
        pub hash: HashKind as Choice = HashKind::Ketama,
        /// What a set does at the peers. Default: `"replicate"`.
        pub on_set: OnSet as Choice = OnSet::Replicate,
        /// Larger values, in bytes, are removed at the peers instead of sent. Default: `"1MiB"`, memcached's own limit
        /// for an item.
        pub max_value_bytes: usize as Size = MIB,
        /// Where the front door of this cache listens: any memcached client that connects there writes the servers above, and
        /// what it writes is replicated. `host:port`, or `unix:` and a path of at most 107 bytes, relative to this file. Left out:
        /// there is none.
        pub listen: Option<String> as Maybe<Door> = None,
        /// The same for clients that only fill the cache, from a database: where a cache has `on_set = "invalidate"`, no
        /// peer's copy is removed for what is written here. With `"replicate"` it is an address as `listen` is.
        pub listen_fills: Option<String> as Maybe<Door> = None,
        /// Commands that only fill the cache at `listen` too, such as `["add"]`; `add` is also `ms` with the mode `E`. With
        /// `on_set = "replicate"` they are as any other. Default: none.
        pub fill_commands: Vec<String> as List<FillCommand> = Vec::new(),
        /// Whether these clients speak TLS, to the certificate of `[tls]`; those of a unix socket never do. Default: `"off"`.
        pub listen_tls: DoorTls as Choice = DoorTls::Off,
    }
}

impl Config {
    /// Whether a cache has a front door.
    pub fn has_front_door(&self) -> bool {
        self.caches.iter().any(Cache::has_front_door)
    }
}

impl Cache {
    /// Where its front door listens: the option that says so, the address, and whether clients there only fill the cache.
    pub fn doors(&self) -> impl Iterator<Item = (&'static str, &str, bool)> {
        let doors = [
            ("listen", &self.listen, false),
            ("listen_fills", &self.listen_fills, true),
        ];
        doors
            .into_iter()
            .filter_map(|(option, address, fills)| Some((option, address.as_deref()?, fills)))
    }

    /// Whether it has a front door.
    pub fn has_front_door(&self) -> bool {
        self.doors().next().is_some()
    }

    /// Whether its writes remove the peers' copies instead of bringing values.
    pub fn invalidates(&self) -> bool {
        self.on_set == OnSet::Invalidate
    }

    /// Whether this command only fills the cache, by [`Cache::fill_commands`].
    pub fn fills(&self, command: &str) -> bool {
        self.fill_commands.iter().any(|fills| fills == command)
    }
}

choice! {
    /// Whether the clients of a front door speak TLS.
    pub enum DoorTls {
        /// They do not.
        Off = "off",
        /// They do, and need no certificate.
        Server = "server",
        /// They do, with a certificate of the CA in `[tls]`.
        Mutual = "mutual",
    }
}

section! {
    /// A memcached server.
    #[derive(Debug)]
    pub struct Server {
        /// Where it listens, `host:port`. Its clients hash this text as it stands here.
        pub address: String as Address,
        /// The name that it has in the ring when its clients know it by another one. Default: its address.
        pub ring_name: Option<String> as Maybe<Words> = None,
        /// Its share of the keys, relative to the others'. Default: `1`.
        pub weight: u32 as Count<1> = 1,
    }
}

choice! {
    /// How clients choose the server of a key.
    pub enum HashKind {
        /// libmemcached's weighted MD5 ring: pylibmc `ketama_weighted`, php `LIBKETAMA_COMPATIBLE`, EVCache.
        Ketama = "ketama",
        /// libmemcached's one-at-a-time ring: pylibmc `ketama`, php `DISTRIBUTION_CONSISTENT`.
        Consistent = "consistent",
    }
}

choice! {
    /// What a set does at the peers.
    pub enum OnSet {
        /// The value is written there too.
        Replicate = "replicate",
        /// The peer's copy is removed, and filled again from that region's own database.
        Invalidate = "invalidate",
    }
}

section! {
    /// Another region.
    #[derive(Debug)]
    pub struct Peer {
        /// Its name, a DNS label.
        pub region: String as Label,
        /// The DNS name in its certificate. Default: its region.
        pub identity: String as DnsName = String::new(),
        /// Where its agent listens, `host:port`. Left out: this region only receives from it.
        pub address: Option<String> as Maybe<Address> = None,
        /// The caches sent to it and taken from it, by name. Default: every cache.
        pub caches: Vec<String> as List<Topic> = Vec::new(),
    }
}

section! {
    /// The receiving half.
    #[derive(Debug)]
    pub struct Agent {
        /// Where the peers' links arrive, `host:port`; `0.0.0.0` for every address. Default: `"127.0.0.1:7101"`.
        pub listen: String as Listen = "127.0.0.1:7101".to_owned(),
        /// Threads that the sessions and the writers of memcached servers share; more than both together are idle. Default: `1`.
        pub threads: usize as Count<1, 256> = 1,
        /// Bytes in flight of all sessions together. Default: `"256MiB"`.
        pub max_in_flight_bytes: usize as Size = 256 * MIB,
        /// The receive window of one session: bytes that a link may have sent and not seen acked. Default: `"16MiB"`,
        /// which fills 1 Gbit/s at a round trip of 130 ms.
        pub session_window: usize as Size = 16 * MIB,
        /// A session from which nothing comes for so long is closed. Shorter than `kafka.session_timeout`, so that a
        /// frozen relay's session ends before another relay takes its partitions over. Default: `"5s"`.
        pub idle_timeout: Duration as Time = seconds(5),
        /// How long a new writing connection waits, once memcached has answered it, for what an abandoned one has left
        /// there to run. Default: `"200ms"`.
        pub settle: Duration as Time<0> = ms(200),
    }
}

section! {
    /// Who this process is to its peers, and whom it believes. Files in PEM, paths relative to this file.
    #[derive(Debug)]
    pub struct Tls {
        /// This region's certificate, with its identity as a DNS name, and what is between it and the CA.
        pub certificate: PathBuf as File,
        /// The certificate's private key.
        pub private_key: PathBuf as File,
        /// The CA that the peers' certificates come from.
        pub ca: PathBuf as File,
    }
}

section! {
    /// Health, metrics and status over HTTP.
    #[derive(Debug)]
    pub struct Admin {
        /// Where `/livez`, `/readyz`, `/metrics` and `/status` are served, `host:port`. There is no password: keep it
        /// where only you can reach it. Default: `"127.0.0.1:7100"`.
        pub listen: String as Listen = "127.0.0.1:7100".to_owned(),
    }
}

section! {
    /// Logs and traces.
    #[derive(Debug)]
    pub struct Telemetry {
        /// An OTLP/gRPC receiver for traces and metrics, such as `http://127.0.0.1:4317`. Left out: nothing is exported.
        pub otlp_endpoint: Option<String> as Maybe<Url> = None,
        /// The part, from 0 to 1, that is traced of the events that carry no sampling decision of their own.
        /// Default: `0.001`.
        pub trace_ratio: f64 as Ratio = 0.001,
        /// Traces show keys as they are, not only their hash. Keys may say who somebody is. Default: `false`.
        pub trace_keys: bool as Switch = false,
        /// An event that takes longer from produced-at to its ack is traced although it was not sampled; `"0s"`: none is.
        /// Default: `"1s"`.
        pub slow_after: Duration as Time<0> = seconds(1),
        /// Traces of slow events that were not sampled, in a second, at most; and as many of failed ones. Default: `10`.
        pub slow_traces_per_second: u32 as Count<0> = 10,
        /// How log lines look. Default: `"text"`.
        pub log_format: LogFormat as Choice = LogFormat::Text,
    }
}

choice! {
    /// How log lines look.
    pub enum LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

section! {
    /// What clients may do at the front doors of the caches (`listen` of a `[[cache]]`), and how sure their events are.
    #[derive(Debug)]
    pub struct FrontDoor {
        /// When a client is told that its write is done: when the event waits to be sent to Kafka, or when Kafka has it. In the
        /// first case a crash of this process loses the events of the last milliseconds. Default: `"queued"`.
        pub event_ack: EventAck as Choice = EventAck::Queued,
        /// What happens to writes while Kafka takes no events. Default: `"serve"`.
        pub on_kafka_down: OnKafkaDown as Choice = OnKafkaDown::Serve,
        /// How long Kafka may take to acknowledge an event, before its key is remembered instead. Longer than a partition
        /// needs to find a new leader. Default: `"5s"`.
        pub event_timeout: Duration as Time<100> = seconds(5),
        /// How long an event waits for others that go to Kafka with it: each request costs the broker the same, however few are in
        /// it. At most `"50ms"`. Default: `"5ms"`, and `"1ms"` where a client waits for Kafka (`event_ack = "acked"`).
        pub event_linger: Option<Duration> as Maybe<Time<0, 50>> = None,
        /// Events that wait to be acknowledged, `2147483647` at most. Default: `100000`.
        pub max_queued_events: usize as Count<1, MOST_QUEUED> = 100_000,
        /// Keys that are remembered because Kafka did not take their events; the events of more are lost, counted and said.
        /// Default: `1000000`, about 100 MB.
        pub max_unsent_keys: usize as Count<1> = 1_000_000,
        /// Threads that serve clients; each has connections of its own to the servers. Default: `1`.
        pub threads: usize as Count<1, 256> = 1,
        /// `get`s of one key that are sent to a server at the same moment, of whichever clients, travel as one command, which
        /// costs memcached much less. Default: `true`.
        pub merge_gets: bool as Switch = true,
        /// Clients at once, of all caches. Default: `10000`.
        pub max_connections: usize as Count<1> = 10_000,
        /// Commands of one client that are not answered yet; of more it is not read. Default: `1024`.
        pub max_pipelined: u32 as Count<1> = 1024,
        /// Bytes held for all clients: commands under way, and answers that they have not read. One value must fit, of each cache
        /// that has a front door. Default: `"256MiB"`.
        pub max_buffered_bytes: usize as Size = 256 * MIB,
        /// A client from which nothing comes for so long is disconnected; `"0s"`: none is. Default: `"0s"`, as memcached.
        pub idle_timeout: Duration as Time<0> = Duration::ZERO,
        /// Lets front doors listen without TLS where others than this machine can connect. Default: `false`.
        pub allow_plaintext: bool as Switch = false,
        /// The part, from 0 to 1, of writes whose trace begins at the front door. Default: `0.0`: it begins at the relay, with
        /// `telemetry.trace_ratio`.
        pub trace_ratio: f64 as Ratio = 0.0,
        /// A meta command whose opaque begins with this is traced. Left out: none is for that.
        pub trace_opaque: Option<String> as Maybe<Opaque> = None,
    }
}

choice! {
    /// When a client of a front door is told that its write is done.
    pub enum EventAck {
        /// When its event is in the queue to Kafka.
        Queued = "queued",
        /// When Kafka has acknowledged its event.
        Acked = "acked",
    }
}

choice! {
    /// What happens to a front door's writes while Kafka takes no events.
    pub enum OnKafkaDown {
        /// They succeed; their keys are remembered, and produced when Kafka is back.
        Serve = "serve",
        /// They fail with `SERVER_ERROR`.
        Refuse = "refuse",
    }
}

section! {
    /// The bounds of each flow, which is everything that carries events to one peer.
    #[derive(Debug)]
    pub struct Flow {
        /// Ordered pipelines side by side, each with a thread and a link of its own. Default: `1`.
        pub lanes: usize as Count<1, 1024> = 1,
        /// Events in flight, that is permits. Default: `65536`. A chunk holds at most a
        /// quarter of them, and another quarter is kept for dirty keys.
        pub max_in_flight_events: usize as Count<4> = 65536,
        /// Bytes of values in flight. Default: `"64MiB"`.
        pub max_in_flight_bytes: usize as Size = 64 * MIB,
        /// Events that come from Kafka within so long of others are gathered until it is over, so that what is few is read and
        /// sent together. After a pause as long they go on at once. Default: `"2ms"`, at most `"1s"`.
        pub gather: Duration as Time<0, 1000> = ms(2),
        /// Dirty keys of one memcached server here, in one lane; the events of more are parked. Default: `100000`.
        pub max_dirty_keys: usize as Count<1> = 100_000,
        /// How long a dirty key of a peer that is there may wait before its event is parked on the retry topic, so that
        /// offsets can be committed behind it. Default: `"30s"`.
        pub retry_budget: Duration as Time<0> = seconds(30),
        /// How long a parked event stays on the retry topic; it doubles each time the event is parked again.
        /// Default: `"1s"`.
        pub retry_backoff_initial: Duration as Time = seconds(1),
        /// The longest that a parked event stays on the retry topic. Default: `"1m"`.
        pub retry_backoff_max: Duration as Time = seconds(60),
        /// How long a revoked partition waits for what is in flight before it parks what is dirty and lets go.
        /// Default: `"1s"`.
        pub revoke_timeout: Duration as Time<0> = seconds(1),
    }
}

section! {
    /// When a batch leaves: with whichever comes first.
    #[derive(Debug)]
    pub struct Batch {
        /// Items in it. Default: `1024`.
        pub max_items: usize as Count<1, 65_536> = 1024,
        /// Bytes in it, before compression. Default: `"256KiB"`.
        pub max_bytes: usize as Size = 256 * KIB,
        /// How long its first item waits for others while batches are under way to the peer. Default: `"2ms"`, little beside the
        /// way between two regions.
        pub linger: Duration as Time<0> = ms(2),
        /// The same while nothing is under way, no longer than `linger`. Default: `"0s"`.
        pub idle_linger: Duration as Time<0> = ms(0),
        /// Compression, skipped where it does not pay. Default: `"lz4"`.
        pub compression: Compression as Choice = Compression::Lz4,
        /// The share of a batch's bytes, from 0 to 1, that compression must save to pay. LZ4 is a fifth of what an event costs the
        /// relay; write less where the way between the regions is dear. Default: `0.2`.
        pub min_saving: f64 as Ratio = 0.2,
    }
}

choice! {
    /// How batches are compressed.
    pub enum Compression {
        /// Not at all.
        None = "none",
        /// LZ4 blocks.
        Lz4 = "lz4",
    }
}

section! {
    /// The connections to the peers.
    #[derive(Debug)]
    pub struct Link {
        /// For connecting and the TLS handshake together. Default: `"3s"`.
        pub connect_timeout: Duration as Time = seconds(3),
        /// The wait before the second dial; it doubles with each that fails. Default: `"50ms"`.
        pub backoff_initial: Duration as Time = ms(50),
        /// The longest wait between dials. Default: `"5s"`.
        pub backoff_max: Duration as Time = seconds(5),
        /// How often the peer is pinged. Default: `"1s"`.
        pub ping_interval: Duration as Time = seconds(1),
        /// A session from which nothing comes for so long is over. Shorter than `kafka.session_timeout`.
        /// Default: `"5s"`, five pings.
        pub idle_timeout: Duration as Time = seconds(5),
    }
}

section! {
    /// The connections to this region's own memcached servers.
    #[derive(Debug)]
    pub struct Memcached {
        /// For connecting. Default: `"1s"`.
        pub connect_timeout: Duration as Time = seconds(1),
        /// For all replies to one pipelined batch. Default: `"1s"`.
        pub timeout: Duration as Time = seconds(1),
        /// A call that takes longer counts as a failure for the circuit breaker, answered or not; after a third of it nothing
        /// else waits behind the call. Default: `"300ms"`.
        pub slow_after: Duration as Time = ms(300),
        /// Keys in one pipelined read; fewer of large values, an eighth of `flow.max_in_flight_bytes` at most. Default: `1024`.
        pub max_read_keys: usize as Count<1> = 1024,
        /// Failures in a row that open a server's circuit breaker. Default: `3`.
        pub breaker_failures: u32 as Count<1> = 3,
        /// The wait before an open breaker's first probe; it doubles with each that fails. Default: `"50ms"`.
        pub backoff_initial: Duration as Time = ms(50),
        /// The longest wait between probes. Default: `"5s"`.
        pub backoff_max: Duration as Time = seconds(5),
    }
}

section! {
    /// Messages (chunks or batches) waiting in front of each kind of actor.
    #[derive(Debug)]
    pub struct Mailbox {
        /// Chunks in front of a PartitionConsumer. Default: `4`.
        pub partition_consumer: usize as Count<1> = 4,
        /// Chunks in front of a CacheReader. Default: `4`.
        pub cache_reader: usize as Count<1> = 4,
        /// Reads in front of a BatchCoalescer. Default: `8`.
        pub batch_coalescer: usize as Count<1> = 8,
        /// Batches in front of a RemoteLink. Default: `16`.
        pub remote_link: usize as Count<1> = 16,
        /// Batches in front of an AgentSession. Default: `16`.
        pub agent_session: usize as Count<1> = 16,
        /// Batches in front of a CacheWriter. Default: `16`.
        pub cache_writer: usize as Count<1> = 16,
    }
}

section! {
    /// When restarting no longer helps: more restarts within a time than this end the process (exit code 70).
    #[derive(Debug)]
    pub struct Supervision {
        /// Restarts, of any actors, that are borne; two that narrow down which event panics a flow count as one.
        /// Default: `10`.
        pub max_restarts: u32 as Count<0> = 10,
        /// The time in which they are counted. Default: `"1m"`.
        pub within: Duration as Time = seconds(60),
        /// A stage that has work, waits for nobody and has not moved for so long is restarted, and counts. Default: `"30s"`.
        pub stalled_after: Duration as Time = seconds(30),
    }
}

section! {
    /// Stopping.
    #[derive(Debug)]
    pub struct Drain {
        /// How long what is in flight may take to finish; what does not is replayed (exit code 75). Default: `"25s"`,
        /// less than the 30 s that Kubernetes gives.
        pub grace_period: Duration as Time<0> = seconds(25),
    }
}

section! {
    /// When it is worth a warning that keys which were set are missing in this region's own memcached servers: a wrong ring,
    /// evictions, or a server that was restarted.
    #[derive(Debug)]
    pub struct Misses {
        /// The share of misses, from 0 to 1, among the looks at one server. Default: `0.5`.
        pub share: f64 as Ratio = 0.5,
        /// Fewer looks say nothing. Default: `100`.
        pub min_events: usize as Count<1> = 100,
        /// The time in which looks are counted. Default: `"10s"`.
        pub within: Duration as Time = seconds(10),
    }
}

section! {
    /// Writes of evrepl's own that go the whole way to each peer: they show whether each path lives, and its lag without
    /// traffic.
    #[derive(Debug)]
    pub struct Canary {
        /// How often one is written for each cache and peer; `0s` writes none, and else it is `100ms` at least. A path is dead
        /// when none has arrived for three of these and half a second. Default: `"0s"`.
        pub interval: Duration as Time<0> = Duration::ZERO,
    }
}

impl Canary {
    /// Canaries are written.
    pub fn is_on(&self) -> bool {
        !self.interval.is_zero()
    }
}

impl Memcached {
    /// A call that takes so long is a failure.
    pub fn slow_limit(&self) -> Duration {
        self.slow_after.min(self.timeout)
    }

    /// A call that has taken so long keeps nobody waiting behind it.
    pub fn stuck_limit(&self) -> Duration {
        self.slow_limit() / 3
    }

    /// How often a call is looked at: often enough to see that it has reached its limits.
    pub fn look_at_calls_every(&self) -> Duration {
        (self.stuck_limit() / 2).max(ms(1))
    }
}

impl Kafka {
    /// The topic that events of `topic` are parked in for `peer`.
    pub fn retry_topic_for(&self, topic: &str, peer: &str) -> String {
        self.retry_topic.replace("{topic}", topic).replace("{peer}", peer)
    }

    /// The topic that events of `topic` go to when they are refused for good.
    pub fn dead_letter_topic_for(&self, topic: &str) -> String {
        self.dead_letter_topic.replace("{topic}", topic)
    }

    /// The consumer group in which the same flow reads its retry topics.
    pub fn retry_group_for(&self, region: &str, peer: &str) -> String {
        format!("{}.retry", self.group_for(region, peer))
    }

    /// The consumer group of the flow from `region` to `peer`.
    pub fn group_for(&self, region: &str, peer: &str) -> String {
        format!("{}.{region}.{peer}", self.group_prefix)
    }
}

/// As derived, but without what passwords and keys are.
impl fmt::Debug for Kafka {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |(name, value)| (name, if names::is_secret(name) { "…" } else { value });
        let properties = self
            .properties
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .map(shown);
        f.debug_struct("Kafka")
            .field("brokers", &self.brokers)
            .field("properties", &properties.collect::<BTreeMap<_, _>>())
            .field("group_prefix", &self.group_prefix)
            .field("start_at", &self.start_at)
            .field("retry_topic", &self.retry_topic)
            .field("dead_letter_topic", &self.dead_letter_topic)
            .field("session_timeout", &self.session_timeout)
            .field("commit_interval", &self.commit_interval)
            .finish()
    }
}
