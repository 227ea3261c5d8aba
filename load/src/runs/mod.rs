//! Load runs: many events through a real Apache Kafka from region A (the *relay*'s) to region B (the *agent*'s).
//!
//! [`scenario`] says what is run; [`source`] is the application that writes; [`trial`] starts the processes, runs one
//! scenario once and reads the accounts; [`readable`] watches values arrive; [`verify`] compares every value;
//! [`report`] makes medians, tables and files of it, [`plot`] draws them side by side.

pub mod plot;
pub mod progress;
pub mod readable;
pub mod report;
pub mod scenario;
pub mod source;
pub mod trial;
pub mod verify;
