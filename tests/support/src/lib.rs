//! lab
pub mod kafka;
pub mod memcached;
pub mod place;
pub mod process;
pub mod proxy;
pub mod wait;
