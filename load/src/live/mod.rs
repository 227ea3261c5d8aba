//! The demo: two regions on this machine, written to, watched and compared.
//!
//! ```text
//!              ╭─ application ─▶ memcached, Kafka ─▶ evrepl ══ TLS ══▶ evrepl ─▶ memcached ◀─ watcher ─╮
//!  us-east-1 ──┤  (each write into the ledger)                                  (reads the ledger) ├── eu-west-1
//!              ╰─ watcher ─▶ memcached ◀─ evrepl ══ TLS ══ evrepl ◀─ Kafka, memcached ◀─ application ─╯
//! ```
//!
//! [`world`] starts the regions, with a Kafka for each inside this process. [`application`] writes one region's cache
//! through [`evrepl::writer::Writer`] and notes in a [`ledger`] what every key must hold. [`watcher`] looks at the *other*
//! region's memcached: how long probes take to become readable, and which keys are overdue. [`compare`] reads every key in
//! both regions at the end. [`screen`] shows it, and [`jaeger`] the traces that both regions export. No number comes from the relays but those named *replicated* and *in
//! flight*, which are their accounts.

pub mod application;
pub mod compare;
pub mod jaeger;
pub mod ledger;
pub mod screen;
pub mod show;
pub mod watcher;
pub mod world;
