//! A real memcached per test, gone when the test ends.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tokio::time::Instant;

use super::Connection;

pub(crate) struct TestServer {
    process: Child,
    address: String,
    port_file: std::path::PathBuf,
}

impl TestServer {
    pub fn start() -> TestServer {
        TestServer::start_with(&[])
    }

    /// With more arguments, of which the last of a kind counts.
    pub fn start_with(arguments: &[&str]) -> TestServer {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let port_file = std::env::temp_dir().join(format!("evrepl-memcached-{}-{n}", std::process::id()));
        let _ = std::fs::remove_file(&port_file);
        let mut process = Command::new("/usr/bin/memcached")
            .args([
                "-u",
                "root",
                "-l",
                "127.0.0.1",
                "-p",
                "-1",
                "-U",
                "0",
                "-m",
                "64",
                "-t",
                "2",
            ])
            .args(arguments)
            .env("MEMCACHED_PORT_FILENAME", &port_file)
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need memcached at /usr/bin/memcached: apt-get install memcached");
        // memcached writes this file when it listens, under another name first.
        let limit = Instant::now() + Duration::from_secs(20);
        let port = loop {
            if let Ok(text) = std::fs::read_to_string(&port_file) {
                break text
                    .lines()
                    .find_map(|line| line.strip_prefix("TCP INET: ")?.parse::<u16>().ok())
                    .expect(&text);
            }
            assert_eq!(process.try_wait().unwrap(), None, "memcached ended at once");
            assert!(Instant::now() < limit, "memcached did not begin to listen");
            #[expect(clippy::disallowed_methods, reason = "polls a process that has just been started")]
            std::thread::sleep(Duration::from_millis(5));
        };
        TestServer {
            process,
            address: format!("127.0.0.1:{port}"),
            port_file,
        }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    pub async fn connect(&self) -> Connection {
        Connection::connect(&self.address, Duration::from_secs(5))
            .await
            .unwrap()
    }

    /// Sends lines as any client would, and returns the lines that come until `mn` is answered.
    pub async fn say(&self, text: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(&self.address).await.unwrap();
        stream.write_all(format!("{text}\r\nmn\r\n").as_bytes()).await.unwrap();
        let mut reply = Vec::new();
        while !reply.ends_with(b"MN\r\n") {
            assert_ne!(stream.read_buf(&mut reply).await.unwrap(), 0);
        }
        String::from_utf8_lossy(&reply)
            .trim_end_matches("MN\r\n")
            .trim_end()
            .to_owned()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.port_file);
    }
}
