//! Where the lab puts things: folders that go away, ports that stay ours, names nobody else has.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The workspace's `target` folder, with Kafka's jars and the lab's own files.
pub fn target() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target")
}

/// `<name>-<pid>-<n>`: used by nobody else on this machine, for topics and group prefixes on a shared broker.
pub fn unique(name: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
}

/// A folder under `target/lab/<pid>/` that is removed when the handle drops, unless a test panics: then one may look.
#[derive(Debug)]
pub struct Dir {
    path: PathBuf,
}

impl Dir {
    /// # Panics
    /// When it can't be made.
    pub fn new(name: &str) -> Dir {
        static SWEPT: OnceLock<()> = OnceLock::new();
        let root = target().join("lab");
        SWEPT.get_or_init(|| sweep(&root));
        let path = root.join(std::process::id().to_string()).join(unique(name));
        fs::create_dir_all(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        // Absolute and without `..`: programs with another working directory get this path.
        Dir {
            path: path.canonicalize().unwrap_or(path),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// Removes what processes that have ended left behind: statics never drop, and failed tests keep their files until now.
fn sweep(root: &Path) {
    let Ok(entries) = fs::read_dir(root) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let pid = name.to_string_lossy().parse::<u32>();
        if pid.is_ok_and(|pid| pid != std::process::id() && !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// A TCP port on 127.0.0.1 that belongs to this process until it ends, also while nothing listens on it.
///
/// Ports come from below the kernel's ephemeral range, not from `bind(0)`: a port of that range can be taken as the source of
/// any outgoing connection while its server is down, and a client dialling it can even connect to itself. A locked file per
/// port keeps test processes that run at the same time apart.
///
/// # Panics
/// When no port is free.
pub fn free_port() -> u16 {
    static LOCKS: Mutex<Vec<File>> = Mutex::new(Vec::new());
    static NEXT: AtomicU32 = AtomicU32::new(0);
    // Above most well-known services; below 32768, where Linux's ephemeral range begins.
    const FIRST: u32 = 12_000;
    // Jaeger's page, where the demo's Jaeger tries to listen first.
    const NOT_OURS: u16 = 16_686;
    let last = ephemeral_start().unwrap_or(32_768).clamp(FIRST + 1_000, 60_000);
    let span = last - FIRST;
    let locks = std::env::temp_dir().join("evrepl-lab-ports");
    let _ = fs::create_dir_all(&locks);
    // Processes begin at different places, so that they seldom meet; 7919 is a prime larger than what one test run takes.
    let start = std::process::id().wrapping_mul(7_919);
    for _ in 0..span {
        let port = (FIRST + start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % span) as u16;
        if port == NOT_OURS {
            continue;
        }
        let Ok(lock) = File::options()
            .create(true)
            .append(true)
            .open(locks.join(port.to_string()))
        else {
            continue;
        };
        if lock.try_lock().is_err() || TcpListener::bind(("127.0.0.1", port)).is_err() {
            continue;
        }
        LOCKS.lock().unwrap_or_else(PoisonError::into_inner).push(lock);
        return port;
    }
    panic!(
        "no free port between {FIRST} and {last} (locks are in {})",
        locks.display()
    );
}

fn ephemeral_start() -> Option<u32> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    range.split_whitespace().next()?.parse().ok()
}
