//! What evrepl promises, each file a guarantee, against real Kafka, TLS, memcached and `evrepl run` processes.
//!
//! One binary, so that all of them share one broker; tests that need the machine to themselves say so with
//! `evrepl_lab::exclusive()`, all others take `evrepl_lab::shared()`.

#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "drives processes from plain threads: wall time and pacing on purpose"
)]

mod a_fenced_broker;
mod a_frozen_memcached;
mod accounts_balance;
mod arrives_as_it_left;
mod canaries;
mod collectors;
mod dashboards;
mod faults;
mod front_door;
mod front_door_clients;
mod front_door_differential;
mod front_door_limits;
mod front_door_ways_in;
mod goes_on_whoever_ends;
mod kafka_refuses;
mod keys_are_found_by_other_clients;
mod mass_misses;
mod memory_keeps_to_its_limit;
mod metrics_tell;
mod nothing_is_lost;
mod one_dead_peer_slows_no_other;
mod one_event_takes_no_flow_down;
mod order_per_key;
mod other_programs_write_events;
mod parking;
mod poison_harms_nothing_else;
mod polling_goes_on;
mod replay;
mod retention_passed_us;
mod stages;
mod strangers_are_refused;
mod supervision;
mod survives_a_dead_peer;
mod tools;
mod traces;
mod what_hangs_is_restarted;
mod windows_are_kept;
