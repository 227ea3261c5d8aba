//! A network that misbehaves on demand, in front of any TCP address.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Read at once; a batch fits a few of these.
const PIECE: usize = 64 << 10;

/// Pieces under way per direction of a connection: 16 MiB, more than any latency × rate of a test.
const UNDER_WAY: usize = 256;

/// A TCP proxy on 127.0.0.1. It passes everything until told otherwise; every fault holds for all connections.
#[derive(Debug)]
pub struct FaultProxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    listening: bool,
    closed: bool,
    cut: bool,
    stalled: bool,
    latency: Duration,
    bytes_per_second: Option<u64>,
    corrupt: u32,
    corrupted: u32,
    /// Of a thousand pieces, how many reset their connection instead of passing; and the state of that lottery.
    resets: u32,
    lottery: u64,
    /// Connections that end without an orderly close, and how many there were.
    reset: Vec<u64>,
    were_reset: u64,
    accepted: u64,
    /// (id, both ends) of open connections.
    open: Vec<(u64, TcpStream, TcpStream)>,
    /// When the link is free again, for a limited rate; one for each direction.
    free_at: [Option<Instant>; 2],
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits as long as `condition` holds.
    fn wait_while(&self, condition: impl FnMut(&mut State) -> bool) -> MutexGuard<'_, State> {
        self.changed
            .wait_while(self.state(), condition)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultProxy {
    /// A proxy in front of `target` (`host:port`), which needs not be there yet.
    ///
    /// # Panics
    /// When `target` is not an address, or no port can be had.
    pub fn start(target: &str) -> FaultProxy {
        FaultProxy::start_on(crate::place::free_port(), target)
    }

    /// The same on a port chosen by the caller.
    pub fn start_on(port: u16, target: &str) -> FaultProxy {
        let target = target
            .parse()
            .unwrap_or_else(|error| panic!("{target} is not an address: {error}"));
        let shared = Arc::new(Shared {
            target,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let proxy = FaultProxy {
            port,
            shared: Arc::clone(&shared),
        };
        thread::Builder::new()
            .name(format!("proxy-{port}"))
            .spawn(move || accept(&shared, port))
            .expect("a thread for the proxy");
        drop(proxy.shared.wait_while(|state| !state.listening));
        proxy
    }

    /// `127.0.0.1:<port>`: what clients dial.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Passes everything again: ends a cut, a stall, latency, resets and rate limit.
    pub fn pass(&self) {
        self.change(|state| {
            state.cut = false;
            state.resets = 0;
            state.stalled = false;
            state.latency = Duration::ZERO;
            state.bytes_per_second = None;
            state.free_at = [None; 2];
        });
        drop(self.shared.wait_while(|state| !state.listening && !state.closed));
    }

    /// Closes all connections and refuses new ones, like a host whose process has died.
    pub fn cut(&self) {
        self.change(|state| {
            state.cut = true;
            close_all(state);
        });
        // The thread sits in accept; it drops its listener once it has seen the cut.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        drop(self.shared.wait_while(|state| state.listening));
    }

    /// Closes the connections of this moment; new ones pass.
    pub fn close_connections(&self) {
        self.change(close_all);
    }

    /// Moves no byte in either direction and keeps connections open, new ones too: a hanging host, a silent firewall.
    pub fn stall(&self) {
        self.change(|state| state.stalled = true);
    }

    /// Delivers every byte this much later (one way; a round trip takes twice as long), in order, without limiting the rate.
    pub fn latency(&self, latency: Duration) {
        self.change(|state| state.latency = latency);
    }

    /// Lets this many bytes per second pass in each direction, all connections together; `None`: as fast as it goes.
    pub fn limit_rate(&self, bytes_per_second: Option<u64>) {
        self.change(|state| {
            state.bytes_per_second = bytes_per_second;
            state.free_at = [None; 2];
        });
    }

    /// Of a thousand pieces that pass from now on, this many reset their connection instead, in either direction.
    pub fn resets(&self, per_mille: u32) {
        self.change(|state| state.resets = per_mille);
    }

    /// Tells the target on every connection of this moment that the client will send nothing more; answers still pass.
    pub fn half_close(&self) {
        self.change(|state| {
            for (.., server) in &state.open {
                let _ = server.shutdown(Shutdown::Write);
            }
        });
    }

    /// Flips a bit of one byte in the next piece that a client sends.
    pub fn corrupt_one_byte(&self) {
        self.change(|state| state.corrupt += 1);
    }

    /// How many bytes were corrupted so far.
    pub fn corrupted(&self) -> u32 {
        self.shared.state().corrupted
    }

    /// How many connections were reset so far.
    pub fn were_reset(&self) -> u64 {
        self.shared.state().were_reset
    }

    /// How many connections were ever accepted.
    pub fn accepted(&self) -> u64 {
        self.shared.state().accepted
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.shared.state().open.len()
    }

    fn change(&self, act: impl FnOnce(&mut State)) {
        act(&mut self.shared.state());
        self.shared.changed.notify_all();
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.change(|state| {
            state.closed = true;
            close_all(state);
        });
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn close_all(state: &mut State) {
    for (_, client, server) in state.open.drain(..) {
        let _ = client.shutdown(Shutdown::Both);
        let _ = server.shutdown(Shutdown::Both);
    }
}

/// Listens on a port of ours, which somebody else may have by chance for a moment: a client that dials a port nobody listens on.
fn bind(port: u16) -> io::Result<TcpListener> {
    let limit = Instant::now() + Duration::from_secs(10);
    loop {
        match TcpListener::bind(("127.0.0.1", port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < limit => {
                thread::sleep(Duration::from_millis(10));
            }
            done => return done,
        }
    }
}

fn accept(shared: &Arc<Shared>, port: u16) {
    loop {
        if shared.wait_while(|state| state.cut && !state.closed).closed {
            return;
        }
        let listener = bind(port).unwrap_or_else(|error| {
            // Or whoever waits for it would wait for ever.
            shared.state().closed = true;
            shared.changed.notify_all();
            panic!("proxy on {port}: {error}")
        });
        shared.state().listening = true;
        shared.changed.notify_all();
        for client in listener.incoming() {
            let state = shared.state();
            if state.cut || state.closed {
                break;
            }
            drop(state);
            let Ok(client) = client else { continue };
            let shared = Arc::clone(shared);
            // Dialling the target may take its time; the next client shouldn't wait for it.
            thread::spawn(move || carry(&shared, client));
        }
        // Dropped before it is said: who waits for the cut may count on being refused.
        drop(listener);
        shared.state().listening = false;
        shared.changed.notify_all();
    }
}

fn carry(shared: &Arc<Shared>, client: TcpStream) {
    let id = {
        let mut state = shared.state();
        state.accepted += 1;
        state.accepted
    };
    // A stalled network doesn't reach the target either; the client believes to be connected, as with a full backlog.
    drop(shared.wait_while(|state| state.stalled && !state.cut && !state.closed));
    let connected = TcpStream::connect_timeout(&shared.target, Duration::from_secs(5)).and_then(|server| {
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        let copies = (client.try_clone()?, server.try_clone()?);
        Ok((server, copies))
    });
    // Dropping the client closes it: as if the target itself had refused.
    let Ok((server, copies)) = connected else { return };
    {
        let mut state = shared.state();
        if state.cut || state.closed {
            return;
        }
        state.open.push((id, copies.0, copies.1));
    }
    let directions = (client.try_clone(), server.try_clone());
    if let (Ok(client_again), Ok(server_again)) = directions {
        let back = {
            let shared = Arc::clone(shared);
            thread::spawn(move || pump(&shared, server_again, client_again, (id, 1)))
        };
        pump(shared, client, server, (id, 0));
        let _ = back.join();
    }
    let mut state = shared.state();
    state.open.retain(|(open, ..)| *open != id);
    state.reset.retain(|reset| *reset != id);
}

/// Moves bytes one way until an end closes; then closes the other way's writing end, as TCP does.
fn pump(shared: &Arc<Shared>, mut from: TcpStream, to: TcpStream, (id, direction): (u64, usize)) {
    let (sender, pieces) = sync_channel(UNDER_WAY);
    let writer = {
        let shared = Arc::clone(shared);
        thread::spawn(move || deliver(&shared, to, &pieces, (id, direction)))
    };
    // An error ends the connection like an orderly close: the other end hears of it either way.
    let _ = take(shared, &mut from, &sender, (id, direction));
    drop(sender);
    let _ = writer.join();
}

fn take(
    shared: &Shared,
    from: &mut TcpStream,
    sender: &SyncSender<(Instant, Vec<u8>)>,
    (id, direction): (u64, usize),
) -> io::Result<()> {
    let mut buffer = vec![0; PIECE];
    loop {
        drop(shared.wait_while(|state| state.stalled && !state.cut && !state.closed));
        let count = from.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        let mut piece = buffer[..count].to_vec();
        let mut state = shared.state();
        if direction == 0 && state.corrupt > 0 {
            state.corrupt -= 1;
            state.corrupted += 1;
            piece[count / 2] ^= 0x10;
        }
        if state.resets > 0 && crate::faults::random::draw(&mut state.lottery, 1_000) < state.resets {
            reset(&mut state, id);
            return Ok(());
        }
        let due = Instant::now() + state.latency;
        drop(state);
        if sender.send((due, piece)).is_err() {
            return Ok(());
        }
    }
}

fn deliver(shared: &Shared, mut to: TcpStream, pieces: &Receiver<(Instant, Vec<u8>)>, (id, direction): (u64, usize)) {
    for (due, piece) in pieces {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let wait = {
            let mut state = shared.wait_while(|state| state.stalled && !state.cut && !state.closed);
            state.bytes_per_second.map(|rate| {
                let now = Instant::now();
                let start = state.free_at[direction].map_or(now, |free| free.max(now));
                let end = start + Duration::from_secs_f64(piece.len() as f64 / rate.max(1) as f64);
                state.free_at[direction] = Some(end);
                end - now
            })
        };
        if let Some(wait) = wait {
            // Waits for its turn on the link, but a `pass()` or a cut ends the wait.
            let deadline = Instant::now() + wait;
            let mut state = shared.state();
            while state.bytes_per_second.is_some() && !state.cut && !state.closed && Instant::now() < deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                state = shared
                    .changed
                    .wait_timeout(state, left)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0;
            }
        }
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    if shared.state().reset.contains(&id) {
        // An orderly close would come before the reset, which the last handle of the socket sends when it drops.
        return;
    }
    // Nothing more will come this way. Reading from the same socket is the other direction's business.
    let _ = to.shutdown(Shutdown::Write);
}

/// Ends a connection as a router does that has forgotten it: both ends get a reset, whatever is under way is lost.
fn reset(state: &mut State, id: u64) {
    state.reset.push(id);
    state.were_reset += 1;
    let Some(at) = state.open.iter().position(|(open, ..)| *open == id) else {
        return;
    };
    let (_, client, server) = state.open.swap_remove(at);
    for end in [client, server] {
        let _ = socket2::SockRef::from(&end).set_linger(Some(Duration::ZERO));
        // Wakes whoever reads from it, and tells the other end nothing.
        let _ = end.shutdown(Shutdown::Read);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wait::wait_until;

    const LIMIT: Duration = Duration::from_secs(10);

    /// Sends back what it gets.
    fn echo() -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || io::copy(&mut stream.try_clone().unwrap(), &mut &stream));
            }
        });
        address
    }

    fn connect(proxy: &FaultProxy) -> TcpStream {
        let stream = TcpStream::connect(proxy.address()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn ask(stream: &mut TcpStream, text: &[u8]) -> io::Result<Vec<u8>> {
        stream.write_all(text)?;
        let mut answer = vec![0; text.len()];
        stream.read_exact(&mut answer)?;
        Ok(answer)
    }

    #[test]
    fn a_cut_closes_what_is_open_and_refuses_what_is_new_until_it_passes_again() {
        let proxy = FaultProxy::start(&echo());
        let mut stream = connect(&proxy);
        assert_eq!(ask(&mut stream, b"one").unwrap(), b"one");
        proxy.cut();
        assert!(ask(&mut stream, b"two").is_err());
        assert!(TcpStream::connect(proxy.address()).is_err());
        proxy.pass();
        assert_eq!(ask(&mut connect(&proxy), b"three").unwrap(), b"three");
        assert_eq!(proxy.accepted(), 2);
        proxy.close_connections();
        wait_until("the connections are forgotten", LIMIT, || proxy.open() == 0);
        assert_eq!(ask(&mut connect(&proxy), b"four").unwrap(), b"four");
    }

    #[test]
    fn a_stall_holds_bytes_back_and_loses_none() {
        let proxy = FaultProxy::start(&echo());
        let mut stream = connect(&proxy);
        assert_eq!(ask(&mut stream, b"one").unwrap(), b"one");
        proxy.stall();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        assert!(ask(&mut stream, b"two").is_err());
        proxy.pass();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = [0; 3];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"two");
    }

    #[test]
    fn one_byte_is_corrupted_when_asked_for() {
        let proxy = FaultProxy::start(&echo());
        let mut stream = connect(&proxy);
        proxy.corrupt_one_byte();
        let answer = ask(&mut stream, b"abc").unwrap();
        assert_eq!(answer.iter().zip(b"abc").filter(|(got, sent)| got != sent).count(), 1);
        assert_eq!(proxy.corrupted(), 1);
        assert_eq!(ask(&mut stream, b"abc").unwrap(), b"abc");
    }

    #[test]
    fn a_reset_is_no_orderly_close_and_a_half_close_lets_answers_pass() {
        let proxy = FaultProxy::start(&echo());
        let mut stream = connect(&proxy);
        assert_eq!(ask(&mut stream, b"one").unwrap(), b"one");
        proxy.half_close();
        // The echo server ends when it hears of the end; that end passes as well.
        assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        let mut stream = connect(&proxy);
        assert_eq!(ask(&mut stream, b"two").unwrap(), b"two");
        proxy.resets(1_000);
        let error = ask(&mut stream, b"three").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        proxy.pass();
        assert_eq!(ask(&mut connect(&proxy), b"four").unwrap(), b"four");
        wait_until("the connections are forgotten", LIMIT, || {
            proxy.shared.state().reset.is_empty()
        });
    }

    #[test]
    fn latency_delays_and_a_rate_limit_slows() {
        let proxy = FaultProxy::start(&echo());
        let mut stream = connect(&proxy);
        proxy.latency(Duration::from_millis(50));
        let start = Instant::now();
        ask(&mut stream, b"there and back").unwrap();
        // Only the least it must take: how long a busy machine takes on top is not ours to say.
        assert!(start.elapsed() >= Duration::from_millis(100));
        proxy.pass();
        proxy.limit_rate(Some(1_000_000));
        let start = Instant::now();
        ask(&mut stream, &[7; 100_000]).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(100));
    }
}
