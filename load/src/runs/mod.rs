//! Load runs: many events through a real Apache Kafka from one region (the *relay*'s) to others (the *agents*').
//!
//! [`files`] reads what is run, a [`scenario`] each; [`generate`] is the application that writes, a process of its own. A
//! [`trial`] starts the processes of a [`world`], lets a [`drain`] happen, an [`open`] loop or a [`climb`] to the highest rate
//! ([`search`], [`lag`]), counts [`costs`] and compares every key ([`verify`]). What was [`measured`] becomes medians and
//! files in [`report`]. [`tools`] makes a [`table`] of files, says what they say of the [`goals`], [`compare`]s them, and draws
//! [`curves`] ([`chart`]) or bars ([`plot`]). [`door`] has the figures of the front door.

pub mod arguments;
pub mod chart;
pub mod climb;
pub mod compare;
pub mod costs;
pub mod curves;
pub mod door;
pub mod drain;
pub mod files;
pub mod generate;
pub mod goals;
pub mod lag;
pub mod measured;
pub mod open;
pub mod plot;
pub mod progress;
pub mod report;
pub mod scenario;
pub mod search;
pub mod table;
pub mod tools;
pub mod trial;
pub mod verify;
pub mod warm;
pub mod world;
