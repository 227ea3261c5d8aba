//! Child processes that never outlive their handle or the test process.
//!
//! A handle kills its process when it drops. Statics never drop, and a test runner may be killed: so the kernel is asked
//! to kill each child when its parent dies (`PR_SET_PDEATHSIG`). "Parent" means the *thread* that spawned it, and test
//! threads end with their test; hence one thread, which lives as long as the process, spawns all children.
//!
//! The only file of the lab with `unsafe`: `prctl` between fork and exec, and `kill`, are not in std.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often a process that should end is looked at.
const POLL: Duration = Duration::from_millis(5);

type SpawnRequest = (Command, Sender<io::Result<Child>>);

fn spawner() -> &'static Sender<SpawnRequest> {
    static SPAWNER: OnceLock<Sender<SpawnRequest>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (sender, requests) = channel::<SpawnRequest>();
        thread::Builder::new()
            .name("lab-spawner".into())
            .spawn(move || {
                for (mut command, reply) in requests {
                    // Whoever asked may be gone (a panicked test); then the child is dropped and must not stay.
                    if let Err(unclaimed) = reply.send(command.spawn())
                        && let Ok(mut child) = unclaimed.0
                    {
                        let _ = child.kill();
                        let _ = child.wait();
                    }
                }
            })
            .expect("a thread to spawn children from");
        sender
    })
}

fn spawn_bound_to_us(mut command: Command) -> io::Result<Child> {
    let us = std::process::id();
    // A Ctrl-C in the terminal is for the demo or the test runner, which then ends its children itself.
    command.process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; prctl, getppid and raise are, and nothing
    // here allocates or takes a lock.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(io::Error::last_os_error());
            }
            // The parent may have died before prctl took effect.
            if libc::getppid() as u32 != us {
                libc::raise(libc::SIGKILL);
            }
            Ok(())
        });
    }
    let (reply, answer) = channel();
    spawner()
        .send((command, reply))
        .expect("the spawner lives as long as the process");
    answer.recv().expect("the spawner answers every request")
}

/// A signal a test may send.
#[derive(Clone, Copy, Debug)]
pub enum Signal {
    /// SIGTERM: drain.
    Terminate,
    /// SIGINT, as Ctrl-C.
    Interrupt,
    /// SIGSTOP: freeze, like a machine that hangs; the kernel keeps its sockets open.
    Stop,
    /// SIGCONT: thaw.
    Continue,
    /// SIGKILL.
    Kill,
}

impl Signal {
    fn number(self) -> libc::c_int {
        match self {
            Signal::Terminate => libc::SIGTERM,
            Signal::Interrupt => libc::SIGINT,
            Signal::Stop => libc::SIGSTOP,
            Signal::Continue => libc::SIGCONT,
            Signal::Kill => libc::SIGKILL,
        }
    }
}

/// One running (or ended) child; its output goes to a log file.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    pid: u32,
    child: Mutex<Child>,
}

impl Process {
    /// Spawns `command` with stdout and stderr appended to `log`.
    ///
    /// # Panics
    /// When the program can't be started: nothing a test could go on with.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Process {
        let open = || OpenOptions::new().create(true).append(true).open(log);
        let (out, err) = (open(), open());
        let (out, err) = match (out, err) {
            (Ok(out), Ok(err)) => (out, err),
            (Err(error), _) | (_, Err(error)) => panic!("cannot write {}: {error}", log.display()),
        };
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        let program = command.get_program().to_os_string();
        let child = spawn_bound_to_us(command).unwrap_or_else(|error| panic!("cannot run {program:?}: {error}"));
        Process {
            name: name.into(),
            log: log.into(),
            pid: child.id(),
            child: Mutex::new(child),
        }
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The exit status, once it has ended.
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child().try_wait().expect("our own child can be waited for")
    }

    pub fn is_running(&self) -> bool {
        self.ended().is_none()
    }

    /// Sends a signal; nothing happens when the process has ended. After [`Signal::Stop`] every thread of it has stopped.
    pub fn signal(&self, signal: Signal) {
        let mut child = self.child();
        // While the lock is held and the child isn't reaped, its pid can't belong to another process.
        if child.try_wait().expect("our own child can be waited for").is_none() {
            // SAFETY: kill takes two integers; the pid is that of our own, unreaped child.
            unsafe { libc::kill(self.pid as libc::pid_t, signal.number()) };
        }
        if let Signal::Stop = signal {
            // The signal is only pending: a thread that runs on another core may still answer a request.
            let limit = Duration::from_secs(10);
            crate::wait::wait_until(&format!("{} has stopped", self.name), limit, || self.has_stopped());
        }
    }

    /// Whether each of its threads has stopped, or it has ended.
    fn has_stopped(&self) -> bool {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return true;
        };
        threads.flatten().all(|thread| {
            let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The state follows the name, which stands in parentheses and may hold any.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            state.is_none_or(|state| matches!(state, 'T' | 't' | 'Z' | 'X'))
        })
    }

    /// SIGKILL, and waits until it is gone. A frozen process dies too.
    pub fn kill(&self) {
        let mut child = self.child();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// The exit status if the process ends within `limit`.
    pub fn wait(&self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.ended() {
                return Some(status);
            }
            if Instant::now() >= deadline {
                return None;
            }
            thread::sleep(POLL);
        }
    }

    /// The exit code as a shell would say it: 128 + n for a process ended by signal n. `None`: still running after `limit`.
    pub fn exit_code(&self, limit: Duration) -> Option<i32> {
        self.wait(limit)
            .map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    /// Resident memory in bytes; 0 once it has ended.
    pub fn rss_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// A line of the kernel's status of the process that is in kB, as bytes.
    fn memory(&self, name: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        kib.unwrap_or(0) * 1024
    }

    /// The most memory that was ever resident, in bytes; 0 once it has ended.
    pub fn peak_rss_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// CPU time used so far, user and system, in seconds; 0 once it has ended.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // The second field is the program's name in parentheses and may hold spaces; utime and stime are fields 14 and 15.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks: u64 = after_name
            .split_whitespace()
            .skip(11)
            .take(2)
            .filter_map(|field| field.parse::<u64>().ok())
            .sum();
        // USER_HZ is 100 on every Linux that evrepl is built for.
        ticks as f64 / 100.0
    }

    /// The last lines of its output.
    pub fn log_tail(&self, lines: usize) -> String {
        tail(&self.log, lines)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            println!(
                "--- the end of {}'s log ({})\n{}",
                self.name,
                self.log.display(),
                self.log_tail(80)
            );
        }
    }
}

/// The last `lines` lines of a file, lossily decoded; empty when it can't be read.
pub(crate) fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Dir;

    #[test]
    fn a_child_is_gone_when_its_handle_drops_even_when_frozen() {
        let dir = Dir::new("process");
        let mut command = Command::new("sleep");
        command.arg("600");
        let process = Process::spawn("sleep", command, &dir.path().join("log"));
        let pid = process.pid();
        process.signal(Signal::Stop);
        assert!(process.is_running());
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_child_dies_with_a_parent_that_is_killed() {
        // This test binary runs itself as the parent: the inner test below, when told so by the environment.
        let dir = Dir::new("process");
        let note = dir.path().join("pid");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "process::tests::inner_parent", "--nocapture"])
            .env("LAB_INNER_PARENT", &note);
        let parent = Process::spawn("parent", command, &dir.path().join("log"));
        crate::wait::wait_until("the inner parent has a child", Duration::from_secs(20), || {
            std::fs::read_to_string(&note).is_ok_and(|text| text.ends_with('\n'))
        });
        let pid = std::fs::read_to_string(&note).unwrap().trim().to_string();
        assert!(running(&pid));
        parent.kill();
        crate::wait::wait_until("the grandchild is gone", Duration::from_secs(10), || !running(&pid));
    }

    /// Not a zombie that waits for whoever inherits it.
    fn running(pid: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
            !stat
                .rsplit_once(')')
                .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'))
        })
    }

    #[test]
    fn inner_parent() {
        let Ok(note) = std::env::var("LAB_INNER_PARENT") else {
            return;
        };
        let mut command = Command::new("sleep");
        command.arg("600");
        let child = Process::spawn("sleep", command, Path::new(&format!("{note}.log")));
        std::fs::write(&note, format!("{}\n", child.pid())).unwrap();
        child.wait(Duration::from_secs(600));
    }
}
