//! The generator's process: reads commands, obeys, and says what came of it. It ends when nobody writes to it any more.

use std::io::{self, BufRead, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Scope};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::keys::Keys;
use super::pipe::Pipe;
use super::readable::{Watch, watch};
use super::writer::{Paced, Writer};
use super::{Command, OpenLoop, Said, Spec};
use crate::values::Values;

/// How often it says how far it is.
const SAYS: Duration = Duration::from_millis(200);

/// The threads' names: what `/proc` shows their cost under.
pub const WRITER: &str = "load-writer";
pub const READER: &str = "load-reader";

/// Serves until `commands` end.
///
/// # Errors
/// A line that is no command, a memcached that is not there: in words. What comes later is said ([`Said::Failed`]).
pub fn serve(mut commands: impl BufRead, says: impl Write + Send) -> Result<(), String> {
    let mut first = String::new();
    commands.read_line(&mut first).map_err(|error| error.to_string())?;
    let spec: Spec = serde_json::from_str(&first).map_err(|error| format!("not a spec: {error}"))?;
    let at = |address: &str, error: io::Error| format!("memcached at {address}: {error}");
    let writer = Writer::connect(&spec).map_err(|error| at(&spec.memcached, error))?;
    let pipe = Pipe::connect(&spec.destination, Values::new(spec.value_bytes));
    let pipe = pipe.map_err(|error| at(&spec.destination, error))?;
    let (says, halted) = (Says(Mutex::new(says)), AtomicBool::new(false));
    thread::scope(|scope| {
        let (to_writer, for_writer) = channel();
        let (to_reader, for_reader) = channel();
        let (spec, says, halted) = (&spec, &says, &halted);
        spawn(scope, WRITER, says, move || write(writer, for_writer, says, halted));
        spawn(scope, READER, says, move || read(pipe, spec, for_reader, says, halted));
        says.say(&Said::Ready);
        for line in commands.lines() {
            let line = line.map_err(|error| error.to_string())?;
            let command = serde_json::from_str(&line).map_err(|error| format!("not a command: {error}"))?;
            halted.store(command == Command::Halt, Ordering::Relaxed);
            // Who is gone has said why.
            let gone = match command {
                Command::Halt => false,
                Command::Fill(count) => to_writer.send(Work::Fill(count)).is_err(),
                Command::OpenLoop(open) => {
                    let start = instant(open.start_unix_nanos);
                    to_writer.send(Work::OpenLoop(open, start)).is_err() || to_reader.send((open, start)).is_err()
                }
            };
            if gone {
                break;
            }
        }
        halted.store(true, Ordering::Relaxed);
        Ok(())
    })
}

/// What the writer has to do.
enum Work {
    Fill(u64),
    OpenLoop(OpenLoop, Instant),
}

fn write(mut writer: Writer, work: Receiver<Work>, says: &Says<impl Write>, halted: &AtomicBool) -> io::Result<()> {
    for work in work {
        let mut next = Instant::now();
        let progress = |written| {
            let now = Instant::now();
            if now >= next {
                next = now + SAYS;
                says.say(&Said::At(written));
            }
            halted.load(Ordering::Relaxed)
        };
        let wrote = match work {
            Work::Fill(count) => writer.fill(count, progress)?,
            Work::OpenLoop(open, start) => {
                let paced = Paced {
                    start,
                    rate: open.rate,
                    warm_up: open.warm_up,
                    count: open.warm_up + open.count,
                    tick: Duration::from_micros(open.tick_micros),
                };
                assert_eq!(open.first, writer.written(), "writes that were not made, or made twice");
                writer.open_loop(paced, progress)?
            }
        };
        says.say(&Said::Wrote(wrote));
    }
    Ok(())
}

fn read(
    mut pipe: Pipe,
    spec: &Spec,
    loops: Receiver<(OpenLoop, Instant)>,
    says: &Says<impl Write>,
    halted: &AtomicBool,
) -> io::Result<()> {
    let keys = Keys::new(spec.keys);
    for (open, start) in loops {
        let watched = Watch {
            first: open.first,
            warm_up: open.warm_up,
            count: open.count,
            rate: open.rate,
            every: open.watch_every,
            start,
            tick: Duration::from_micros(open.tick_micros),
        };
        says.say(&Said::Seen(watch(&mut pipe, &keys, watched, halted)?));
    }
    Ok(())
}

/// The output, a line at a time.
struct Says<W>(Mutex<W>);

impl<W: Write> Says<W> {
    /// Whoever listened may be gone; then the commands end too.
    fn say(&self, said: &Said) {
        let mut line = serde_json::to_vec(said).expect("what is said is plain data");
        line.push(b'\n');
        let mut out = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

/// A thread of that name; that it could not go on, by an error or a panic, is said.
fn spawn<'scope, 'env, W: Write + Send>(
    scope: &'scope Scope<'scope, 'env>,
    name: &str,
    says: &'env Says<W>,
    act: impl FnOnce() -> io::Result<()> + Send + 'scope,
) {
    let guarded = move || {
        let why = match catch_unwind(AssertUnwindSafe(act)) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("memcached: {error}"),
            Err(panic) => match panic.downcast::<String>() {
                Ok(text) => *text,
                Err(_) => "see above".into(),
            },
        };
        says.say(&Said::Failed(why));
    };
    let spawned = thread::Builder::new().name(name.into()).spawn_scoped(scope, guarded);
    spawned.expect("a thread for the generator");
}

/// That moment on this process's own clock.
fn instant(unix_nanos: u64) -> Instant {
    let (now, since_epoch) = (Instant::now(), SystemTime::now().duration_since(UNIX_EPOCH));
    let at = Duration::from_nanos(unix_nanos);
    let since_epoch = since_epoch.unwrap_or_default();
    match at.checked_sub(since_epoch) {
        Some(ahead) => now + ahead,
        None => now - (since_epoch - at),
    }
}
