//! Standard error, when whoever reads it has stopped. A pipe that nobody reads fills up, and then a log line would block the
//! thread that says it: an actor's, for ever. Here it waits a moment, once; then lines are left out until there is room
//! again, and counted.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::fmt::MakeWriter;

/// A pipe that is ready takes so much without blocking: Linux's and POSIX's atomic write.
const PIECE: usize = 4096;
/// How long the first line waits for a reader that is merely slow.
const PATIENCE: Duration = Duration::from_millis(250);

/// Where log lines go; one a process.
#[derive(Debug)]
pub struct Lines<W> {
    out: W,
    /// Who writes: two that found room for one piece would block.
    writing: Mutex<()>,
    stuck: AtomicBool,
    left_out: AtomicU64,
}

/// Standard error.
pub static STDERR: Lines<StandardError> = Lines::new(StandardError);

/// The process's own, whoever else writes there.
#[derive(Clone, Copy, Debug)]
pub struct StandardError;

impl AsFd for StandardError {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        rustix::stdio::stderr()
    }
}

impl<W: AsFd> Lines<W> {
    /// Lines that go out there.
    pub const fn new(out: W) -> Lines<W> {
        Lines {
            out,
            writing: Mutex::new(()),
            stuck: AtomicBool::new(false),
            left_out: AtomicU64::new(0),
        }
    }

    /// Writes a line, or leaves it out when nobody reads.
    fn say(&self, line: &[u8]) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.takes_more() {
            self.left_out.fetch_add(1, Relaxed);
            return;
        }
        let left_out = self.left_out.swap(0, Relaxed);
        if left_out > 0 {
            self.put(format!("({left_out} log lines were left out: nobody read standard error)\n").as_bytes());
        }
        self.put(line);
    }

    /// Piece by piece, so that none blocks; what there is no room for is left out.
    fn put(&self, line: &[u8]) {
        for piece in line.chunks(PIECE) {
            let mut rest = piece;
            while !rest.is_empty() {
                if !self.takes_more() {
                    return;
                }
                match rustix::io::write(&self.out, rest) {
                    Ok(written) => rest = &rest[written..],
                    Err(rustix::io::Errno::INTR) => {}
                    // Closed, or no longer there: nobody can be told.
                    Err(_) => return,
                }
            }
        }
    }

    /// Whether a piece can be written without waiting; waits for it the first time that it cannot.
    fn takes_more(&self) -> bool {
        let patience = match self.stuck.load(Relaxed) {
            true => Duration::ZERO,
            false => PATIENCE,
        };
        let mut fds = [PollFd::new(&self.out, PollFlags::OUT)];
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: patience.as_nanos() as _,
        };
        // An error of poll says nothing about room: writing tells.
        let ready = !matches!(poll(&mut fds, Some(&limit)), Ok(0));
        self.stuck.store(!ready, Relaxed);
        ready
    }
}

/// One line.
#[derive(Debug)]
pub struct Line<'a, W>(&'a Lines<W>);

impl<W: AsFd> io::Write for Line<'_, W> {
    /// The formatter gives whole lines.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.say(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for &'static Lines<StandardError> {
    type Writer = Line<'a, StandardError>;

    fn make_writer(&'a self) -> Self::Writer {
        Line(self)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn a_pipe_that_nobody_reads_holds_nobody_up_and_the_reader_hears_what_is_missing() {
        let (mut reader, writer) = io::pipe().unwrap();
        let lines = Lines::new(writer);
        let line = [b"x".repeat(999), b"\n".to_vec()].concat();
        // More than a pipe holds.
        for _ in 0..1_000 {
            Line(&lines).write_all(&line).unwrap();
        }
        let left_out = lines.left_out.load(Relaxed);
        assert!(left_out > 0 && left_out < 1_000, "{left_out}");
        let mut read = vec![0; 512 << 10];
        let count = reader.read(&mut read).unwrap();
        assert_eq!(
            read[..count].chunks(1_000).filter(|chunk| *chunk == line).count(),
            1_000 - left_out as usize
        );

        Line(&lines).write_all(b"again\n").unwrap();
        drop(lines);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(
            rest,
            format!("({left_out} log lines were left out: nobody read standard error)\nagain\n")
        );
    }
}
