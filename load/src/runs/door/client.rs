//! The client of the front door's figures, a process of its own: one thread, sockets that never block, requests made beforehand.
//! Closed loop: each connection asks as soon as it has its answers. Open loop: commands are due at a rate, and latency counts
//! from then.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use crate::latency::{Latencies, Quantiles};

/// What a client does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// `host:port`.
    pub address: String,
    /// `get` or `set`.
    pub command: String,
    /// How many connections it has.
    pub connections: usize,
    /// Commands that each sends at once.
    pub pipelined: usize,
    /// Commands a second of an open loop; none: a closed one.
    pub rate: Option<u64>,
    /// Keys that it asks for, all of which are there.
    pub keys: u64,
    /// Bytes of each value.
    pub value_bytes: usize,
    /// How long it lasts, in seconds, after one that does not count.
    pub seconds: f64,
}

/// What it has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Seen {
    /// Commands answered.
    pub commands: u64,
    /// In this time.
    pub seconds: f64,
    /// From when a command was due, or sent.
    pub latency: Quantiles,
}

/// Requests that are sent as one, and how many bytes answer them.
struct Batch {
    request: Vec<u8>,
    answer: usize,
}

struct Connection {
    stream: TcpStream,
    /// What is still to be sent, of which batch.
    sending: VecDeque<(usize, usize)>,
    /// Bytes that are to come for each batch, and when it was due.
    waiting: VecDeque<(usize, Instant)>,
}

/// Batches of which one after the other is sent; enough that memcached's caches are not what is measured.
const BATCHES: usize = 512;

/// A key of this number; all are as long.
pub fn key(number: u64) -> String {
    format!("door:{number:010}")
}

fn batches(asked: &Asked) -> Vec<Batch> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let value = "v".repeat(asked.value_bytes);
    let count = BATCHES.max(20_000 / asked.pipelined.max(1));
    let batch = |_| {
        let mut batch = Batch {
            request: Vec::new(),
            answer: 0,
        };
        for _ in 0..asked.pipelined {
            let key = key(random() % asked.keys);
            let length = asked.value_bytes;
            if asked.command == "get" {
                batch.request.extend_from_slice(format!("get {key}\r\n").as_bytes());
                batch.answer += format!("VALUE {key} 0 {length}\r\n").len() + length + 2 + "END\r\n".len();
            } else {
                batch
                    .request
                    .extend_from_slice(format!("set {key} 0 0 {length}\r\n{value}\r\n").as_bytes());
                batch.answer += "STORED\r\n".len();
            }
        }
        batch
    };
    (0..count).map(batch).collect()
}

/// Does what is asked.
///
/// # Errors
/// What stood in the way.
pub fn run(asked: &Asked) -> Result<Seen, String> {
    let failed = |error: std::io::Error| format!("{}: {error}", asked.address);
    let batches = batches(asked);
    let mut connections = Vec::new();
    for _ in 0..asked.connections {
        let stream = TcpStream::connect(&asked.address).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_nonblocking(true).map_err(failed)?;
        connections.push(Connection {
            stream,
            sending: VecDeque::new(),
            waiting: VecDeque::new(),
        });
    }
    let mut latencies = Latencies::default();
    let mut buffer = vec![0; 256 << 10];
    let began = Instant::now();
    let counts_from = began + Duration::from_secs(1);
    let ends = counts_from + Duration::from_secs_f64(asked.seconds);
    let every = asked
        .rate
        .map(|rate| Duration::from_secs_f64(asked.pipelined as f64 / rate as f64));
    let (mut next_batch, mut next_connection, mut due) = (0, 0, began);
    let mut seen = Seen::default();
    loop {
        let now = Instant::now();
        if now >= ends {
            break;
        }
        match every {
            Some(every) => {
                while due <= now {
                    let connection = &mut connections[next_connection];
                    next_connection = (next_connection + 1) % asked.connections;
                    connection.ask(&batches, next_batch, due).map_err(failed)?;
                    next_batch = (next_batch + 1) % batches.len();
                    due += every;
                }
            }
            None => {
                for connection in &mut connections {
                    if connection.waiting.is_empty() {
                        connection.ask(&batches, next_batch, now).map_err(failed)?;
                        next_batch = (next_batch + 1) % batches.len();
                    }
                }
            }
        }
        let flags = |connection: &Connection| match connection.sending.is_empty() {
            true => PollFlags::IN,
            false => PollFlags::IN | PollFlags::OUT,
        };
        let ready: Vec<usize> = {
            let mut fds: Vec<PollFd<'_>> = connections
                .iter()
                .map(|connection| PollFd::new(&connection.stream, flags(connection)))
                .collect();
            let wait = every.map_or(Duration::from_millis(100), |_| {
                due.saturating_duration_since(Instant::now())
            });
            let wait = Timespec::try_from(wait).map_err(|error| error.to_string())?;
            poll(&mut fds, Some(&wait)).map_err(|error| error.to_string())?;
            (0..fds.len()).filter(|&n| !fds[n].revents().is_empty()).collect()
        };
        for n in ready {
            let connection = &mut connections[n];
            connection.send(&batches).map_err(failed)?;
            let answered = connection.read(&mut buffer).map_err(failed)?;
            let now = Instant::now();
            for due in answered {
                if now >= counts_from {
                    seen.commands += asked.pipelined as u64;
                    latencies.record(now - due);
                }
            }
        }
    }
    seen.seconds = counts_from.elapsed().as_secs_f64();
    seen.latency = latencies.quantiles();
    Ok(seen)
}

impl Connection {
    fn ask(&mut self, batches: &[Batch], number: usize, due: Instant) -> std::io::Result<()> {
        self.sending.push_back((number, 0));
        self.waiting.push_back((batches[number].answer, due));
        self.send(batches)
    }

    fn send(&mut self, batches: &[Batch]) -> std::io::Result<()> {
        while let Some((number, sent)) = self.sending.front_mut() {
            match self.stream.write(&batches[*number].request[*sent..]) {
                Ok(count) => {
                    *sent += count;
                    if *sent == batches[*number].request.len() {
                        self.sending.pop_front();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads what is there; gives when the batches were due that are answered now.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<Vec<Instant>> {
        let mut answered = Vec::new();
        loop {
            let mut count = match self.stream.read(buffer) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(answered),
                Err(error) => return Err(error),
            };
            if buffer.starts_with(b"SERVER_ERROR") || buffer.starts_with(b"ERROR") {
                return Err(std::io::Error::other(
                    String::from_utf8_lossy(&buffer[..count.min(200)]).into_owned(),
                ));
            }
            let whole = count < buffer.len();
            while let Some((left, due)) = self.waiting.front_mut() {
                let some = count.min(*left);
                (*left, count) = (*left - some, count - some);
                if *left > 0 {
                    break;
                }
                answered.push(*due);
                self.waiting.pop_front();
            }
            if count > 0 {
                return Err(std::io::Error::other("more was answered than was asked"));
            }
            if whole {
                return Ok(answered);
            }
        }
    }
}
