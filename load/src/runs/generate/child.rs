//! The generator as its parent sees it. It ends with this handle, and with the parent, which alone writes to its input.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command as Program, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::readable::Seen;
use super::{Command, OpenLoop, Said, Spec, Wrote};

/// The subcommand of this program that is the generator.
pub const SUBCOMMAND: &str = "generate";

/// A generator that is silent for so long, while it should say something, is broken.
const SAYS_WITHIN: Duration = Duration::from_secs(180);

/// A running generator.
#[derive(Debug)]
pub struct Generator {
    child: Child,
    commands: Option<ChildStdin>,
    said: Receiver<Said>,
    written: u64,
    wrote: Option<Wrote>,
    seen: Option<Seen>,
}

impl Generator {
    /// Starts one and waits until it is ready. `program` is `evrepl-load`.
    ///
    /// # Panics
    /// When it can't be started, or reaches no memcached.
    pub fn start(program: &Path, spec: &Spec) -> Generator {
        let mut child = Program::new(program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // A Ctrl-C in the terminal is for the parent, which then ends it.
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("the generator can't be started: {error}"));
        let output = BufReader::new(child.stdout.take().expect("its output is piped"));
        let (to_us, said) = channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let said = serde_json::from_str(&line).unwrap_or_else(|error| Said::Failed(format!("{line}: {error}")));
                if to_us.send(said).is_err() {
                    break;
                }
            }
        });
        let mut generator = Generator {
            commands: child.stdin.take(),
            child,
            said,
            written: 0,
            wrote: None,
            seen: None,
        };
        generator.tell(spec);
        match generator.hear(SAYS_WITHIN) {
            Some(Said::Ready) => generator,
            other => panic!("the generator is not ready: {other:?}"),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many writes it has made, as far as it has said.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes so many more at full speed and returns when Kafka has acknowledged all. `progress` hears how many there are
    /// and says whether to stop.
    ///
    /// # Panics
    /// When it fails.
    pub fn fill(&mut self, count: u64, mut progress: impl FnMut(u64) -> bool) -> Wrote {
        self.wrote = None;
        self.tell(&Command::Fill(count));
        loop {
            if let Some(wrote) = self.wrote.take() {
                return wrote;
            }
            self.listen(SAYS_WITHIN);
            if progress(self.written) {
                self.halt();
            }
        }
    }

    /// Begins an open loop; see [`Generator::wrote`] and [`Generator::seen`].
    ///
    /// # Panics
    /// When it fails.
    pub fn open_loop(&mut self, open: OpenLoop) {
        (self.wrote, self.seen) = (None, None);
        self.tell(&Command::OpenLoop(open));
    }

    /// Ends what is under way.
    ///
    /// # Panics
    /// When it fails.
    pub fn halt(&mut self) {
        self.tell(&Command::Halt);
    }

    /// Hears what it says for at most `time`, or until it has said something.
    ///
    /// # Panics
    /// When it says that it failed, or is gone.
    pub fn listen(&mut self, time: Duration) {
        match self.hear(time) {
            None | Some(Said::Ready) => {}
            Some(Said::At(written)) => self.written = written,
            Some(Said::Wrote(wrote)) => {
                self.written = wrote.written;
                self.wrote = Some(wrote);
            }
            Some(Said::Seen(seen)) => self.seen = Some(seen),
            Some(Said::Failed(why)) => panic!("the generator failed: {why}"),
        }
    }

    /// The end of the open loop's writing, once it has come.
    pub fn wrote(&self) -> Option<Wrote> {
        self.wrote
    }

    /// What its reader saw, once it has seen everything or has given up.
    pub fn seen(&self) -> Option<&Seen> {
        self.seen.as_ref()
    }

    fn hear(&mut self, time: Duration) -> Option<Said> {
        match self.said.recv_timeout(time) {
            Ok(said) => Some(said),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the generator has ended: {:?}", self.child.wait()),
        }
    }

    fn tell(&mut self, what: &impl serde::Serialize) {
        let mut line = serde_json::to_vec(what).expect("what is told is plain data");
        line.push(b'\n');
        let commands = self
            .commands
            .as_mut()
            .expect("its input is piped, and open until it ends");
        if let Err(error) = commands.write_all(&line) {
            panic!("the generator hears nothing: {error}");
        }
    }
}

impl Drop for Generator {
    fn drop(&mut self) {
        // The end of its input is the end of it, unless it hangs.
        drop(self.commands.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
