//! Real memcached processes, and a blocking client of the lab's own to write and look with.

mod client;
mod ring;

pub use client::{MetaClient, Put, Value};
pub use ring::Ring;

use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::place::{Dir, free_port};
use crate::process::{Process, Signal};
use crate::wait::holds_within;

/// A memcached process on a port of 127.0.0.1 that stays its own, also while it is dead.
#[derive(Debug)]
pub struct Memcached {
    port: u16,
    arguments: Vec<String>,
    process: Mutex<Option<Process>>,
    dir: Dir,
}

impl Memcached {
    /// A memcached of 64 MB.
    ///
    /// # Panics
    /// When memcached is not installed or doesn't start.
    pub fn start() -> Memcached {
        Memcached::start_with(&[])
    }

    /// The same with further arguments, which win over the lab's: `&["-m", "1024", "-I", "2m"]`.
    ///
    /// # Panics
    /// As [`Memcached::start`].
    pub fn start_with(arguments: &[&str]) -> Memcached {
        let memcached = Memcached {
            port: free_port(),
            arguments: arguments.iter().map(|argument| argument.to_string()).collect(),
            process: Mutex::new(None),
            dir: Dir::new("memcached"),
        };
        memcached.spawn();
        memcached
    }

    /// `127.0.0.1:<port>`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// SIGKILL. From now on connections are refused; what it held is gone.
    pub fn kill(&self) {
        if let Some(process) = self.slot().take() {
            process.kill();
        }
    }

    /// Starts it anew on the same port, empty; kills it before if it still runs.
    pub fn restart(&self) {
        self.kill();
        self.spawn();
    }

    /// Stops answering while its connections stay open; what is sent to it waits in the kernel, and runs after a thaw.
    pub fn freeze(&self) {
        self.signal(Signal::Stop);
    }

    /// Goes on after [`Memcached::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::Continue);
    }

    /// Whether the process is there (a frozen one is).
    pub fn is_running(&self) -> bool {
        self.slot().as_ref().is_some_and(Process::is_running)
    }

    /// Resident memory in bytes.
    pub fn rss_bytes(&self) -> u64 {
        self.slot().as_ref().map_or(0, Process::rss_bytes)
    }

    /// A new connection's worth of client; connects on first use.
    pub fn client(&self) -> MetaClient {
        MetaClient::new(&self.address())
    }

    fn spawn(&self) {
        let mut command = Command::new("memcached");
        command.args([
            "-l",
            "127.0.0.1",
            "-p",
            &self.port.to_string(),
            "-U",
            "0",
            "-m",
            "64",
            "-t",
            "2",
            "-c",
            "1024",
        ]);
        // As root it insists on a user. Changing to another one would clear the kernel's note to kill it with us; as
        // somebody else it ignores this.
        command.args(["-u", "root"]).args(&self.arguments);
        let process = Process::spawn("memcached", command, &self.dir.path().join("memcached.log"));
        let ready = holds_within(Duration::from_secs(20), || {
            !process.is_running() || self.client().ping().is_ok()
        });
        assert!(
            ready && process.is_running(),
            "memcached did not start (`make setup`?):\n{}",
            process.log_tail(20)
        );
        *self.slot() = Some(process);
    }

    fn signal(&self, signal: Signal) {
        self.slot().as_ref().expect("the memcached runs").signal(signal);
    }

    fn slot(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restarted_memcached_is_empty_and_on_the_same_port() {
        let memcached = Memcached::start_with(&["-m", "128"]);
        let mut client = memcached.client();
        client.set(b"key", b"value", 7, 0).unwrap();
        assert_eq!(client.get(b"key").unwrap(), Some((b"value".to_vec(), 7)));
        assert_eq!(client.stats().unwrap()["limit_maxbytes"], (128 << 20).to_string());
        memcached.kill();
        assert!(client.get(b"key").is_err());
        memcached.restart();
        assert_eq!(client.get(b"key").unwrap(), None);
    }

    #[test]
    fn the_client_carries_every_byte_of_keys_and_values() {
        let memcached = Memcached::start();
        let mut client = memcached.client();
        let binary: Vec<u8> = (0..=185).map(|n| (n * 7) as u8).collect();
        for key in [
            &b"plain"[..],
            b"with space",
            b"\r\n",
            "schl\u{fc}ssel".as_bytes(),
            b"\x00",
            &binary,
            &[b'k'; 250],
        ] {
            for value in [&b""[..], b"\r\nEN\r\n", &[0xff; 100_000]] {
                client.set(key, value, u32::MAX, 0).unwrap();
                assert_eq!(client.get(key).unwrap(), Some((value.to_vec(), u32::MAX)), "{key:?}");
            }
            assert_eq!(client.ttl(key).unwrap(), Some(-1));
            client.touch(key, 100).unwrap();
            assert!((98..=100).contains(&client.ttl(key).unwrap().unwrap()));
            assert!(client.delete(key).unwrap());
            assert!(!client.delete(key).unwrap());
            assert_eq!(client.ttl(key).unwrap(), None);
        }
        assert!(client.set(b"large", &vec![0; 2 << 20], 0, 0).is_err());
        client.set(b"after an error", b"1", 0, 0).unwrap();
        client.flush().unwrap();
        assert_eq!(client.get(b"after an error").unwrap(), None);
    }

    #[test]
    fn many_keys_are_written_and_read_in_one_go() {
        let memcached = Memcached::start();
        let mut client = memcached.client();
        let keys: Vec<Vec<u8>> = (0..100_000).map(|n| format!("key:{n}").into_bytes()).collect();
        let puts: Vec<Put> = keys
            .iter()
            .map(|key| Put {
                key,
                value: key,
                flags: 1,
                exptime: 0,
            })
            .collect();
        client.set_many(&puts).unwrap();
        let found = client
            .get_many(keys.iter().map(Vec::as_slice).chain([&b"absent"[..]]))
            .unwrap();
        assert_eq!(found.len(), 100_001);
        assert!(
            keys.iter()
                .zip(&found)
                .all(|(key, found)| found.as_ref() == Some(&(key.clone(), 1)))
        );
        assert_eq!(found[100_000], None);
    }

    #[test]
    fn a_frozen_memcached_keeps_its_callers_waiting_and_runs_their_writes_after_the_thaw() {
        let memcached = Memcached::start();
        let mut client = memcached.client();
        client.set_timeout(Duration::from_millis(200));
        client.ping().unwrap();
        memcached.freeze();
        assert!(client.set(b"key", b"late", 0, 0).is_err());
        memcached.thaw();
        let mut other = memcached.client();
        assert!(holds_within(Duration::from_secs(5), || other
            .get(b"key")
            .unwrap()
            .is_some()));
    }
}
