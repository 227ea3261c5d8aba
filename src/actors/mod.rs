//! Everything with a mailbox, one actor per file, in flow order. The number on an edge is its capacity.
//!
//! ```text
//!  Kafka ─▶ poll threads ═ mailbox.partition_consumer (chunks) ══▶ PartitionConsumer ──┐ permits: flow.max_in_flight_events,
//!    source topics, and retry topics in a group of their own                           │ half of them for one server at most
//!      ┌── mailbox.cache_reader (messages) ◀───────────────────────────────────────────┘
//!      ▼
//!  CacheReader ── mailbox.batch_coalescer (messages) ──▶ BatchCoalescer ── mailbox.remote_link (batches) ──▶ RemoteLink
//!   │ flow.max_in_flight_bytes                                                                              │ window
//!   │ flow.max_dirty_keys, more are parked: to the retry topic, 8192 on their way                           ▼
//!   ▼                                                                                              mutual TLS, to the peer
//!  memcached (looks)                                                                                        │
//!                                                                                                           ▼
//!  memcached (writes) ◀── CacheWriter ◀── mailbox.cache_writer (parts) ── AgentSession ◀── mailbox.agent_session (frames)
//!                                                                            ▲
//!                                                             AgentListener ─┘ 64 greetings at once
//!
//!  upstream, as facts that take no slot: acks, outcomes, dirty keys, session starts and ends
//!
//!  clients ─▶ FrontDoorListener ─▶ FrontDoorSession ◀══ reads and answers ══▶ FrontDoorUpstream ─▶ memcached
//!             front_door.max_connections  │ front_door.max_pipelined commands      │
//!                                         ▼ front_door.max_buffered_bytes          ▼ front_door.max_queued_events ─▶ Kafka
//! ```
//!
//! The supervision tree, with its strategies:
//!
//! ```text
//! RegionSupervisor                  more than supervision.max_restarts within supervision.within: give up, exit 70
//! ├── FlowSupervisor                one per peer; rebuilt whole from its last committed offsets
//! │   ├── poll threads              of the source and of the retry topics; an unexpected end rebuilds the flow
//! │   ├── PartitionConsumer ...     one per assigned partition; ends with the assignment; its panic rebuilds the flow;
//! │   │                             what was in flight in two panics it hands on apart, until the culprit stands alone
//! │   └── lane 0..n                 one arbiter; a panic of an inner actor rebuilds the flow
//! │       ├── CacheReader ...       one per memcached server; its connection is a state behind a circuit breaker
//! │       ├── BatchCoalescer
//! │       └── RemoteLink            restarts alone after every lost session or failed dial, without end or count
//! ├── agent                         agent.threads arbiters; rebuilt whole when a CacheWriter panics (sessions end, peers look again)
//! │   ├── AgentListener             restarts alone
//! │   ├── AgentSession ...          one per inbound link; just ends, the peer dials again
//! │   └── CacheWriter ...           one per memcached server; its connection is a state behind a circuit breaker
//! └── front door                    front_door.threads arbiters; rebuilt whole when a FrontDoorUpstream panics (clients dial again)
//!     ├── FrontDoorListener ...     one per place to listen; restarts alone
//!     ├── FrontDoorSession ...      one per client; just ends
//!     └── FrontDoorUpstream ...     one per thread and memcached server, and one more for binary; its connection is a state
//! ```
//!
//! Every actor, thread and poll thread keeps a [pulse](crate::pulse), which the root looks at. A stage that has work, waits for
//! nobody and has not moved for `supervision.stalled_after` is restarted as if it had panicked: the flow, or the agent. What
//! hangs is abandoned after [a moment](crate::threads::JOIN_LIMIT): the accounts hear nothing of partition consumers below a
//! floor, and the agent's [fence](crate::agent::Fence) lets none of its writers through. A root that hangs ends the process.

pub mod region_supervisor;

pub mod flow_supervisor;

pub mod partition_consumer;

pub mod cache_reader;

pub mod batch_coalescer;

pub mod remote_link;

pub mod agent_listener;

pub mod agent_session;

pub mod cache_writer;

pub mod front_door_listener;

pub mod front_door_session;

pub mod front_door_upstream;
