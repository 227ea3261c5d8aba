//! Applications with clients that no one here wrote change nothing but an address: what pymemcache, pylibmc, spymemcached and
//! gomemcache write in one region, they read in the other.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use evrepl_lab::place::target;
use evrepl_lab::{CacheSpec, Region, TwoRegions, TwoRegionsSpec, accounted, assert_same, settle, shared};

const SESSIONS: &str = "sessions";
const LIMIT: Duration = Duration::from_secs(60);

/// A program in tests/clients, on its own client library.
struct Application {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Application {
    /// At the front door of this region.
    fn at(region: &Region, client: &str) -> Application {
        let clients = target().join("clients");
        let mut command = match client {
            "spymemcached" | "spymemcached-binary" => {
                let mut java = Command::new("java");
                java.args(["-cp", &format!("{0}:{0}/*", clients.join("java").display()), "Client"]);
                java
            }
            "gomemcache" => Command::new(clients.join("gomemcache")),
            _ => {
                let mut python = Command::new(target().join("venv/bin/python"));
                python.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/client.py"));
                python
            }
        };
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child =
            child.unwrap_or_else(|error| panic!("{client} cannot be run (`make client-programs python`?): {error}"));
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut application = Application {
            child,
            stdin,
            stdout: BufReader::new(stdout),
        };
        let protocol = match client {
            "spymemcached" => "text",
            "spymemcached-binary" => "binary",
            other => other,
        };
        let address = region.cache(SESSIONS).front_door();
        application.say(&format!("{protocol} {}", address.replace(':', " ")));
        application
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        answer.trim_end().to_owned()
    }

    fn store(&mut self, how: &str, key: &str, value: &str) -> String {
        self.ask(&format!("{how} {key} {}", STANDARD.encode(value)))
    }

    fn get(&mut self, key: &str) -> Option<String> {
        let said = self.ask(&format!("get {key}"));
        (said != "-")
            .then(|| String::from_utf8(STANDARD.decode(&said).unwrap_or_else(|_| panic!("{key}: {said}"))).unwrap())
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pair() -> TwoRegions {
    let spec = || CacheSpec::new(SESSIONS).servers(2).front_door();
    TwoRegionsSpec::new()
        .us(move |us| us.cache(spec()))
        .eu(move |eu| eu.cache(spec()))
        .start()
}

fn settled(pair: &TwoRegions) {
    for region in pair.both() {
        region.wait_until("events are acknowledged", LIMIT, |status| {
            status["front_doors"][0]["queued_events"] == 0
        });
    }
    settle(&pair.both());
}

/// Writes in one region with everything that clients do, and reads in the other with the same client.
fn replicates(client: &str) {
    let _gate = shared();
    let pair = pair();
    let (mut us, mut eu) = (Application::at(&pair.us, client), Application::at(&pair.eu, client));
    let large = "x".repeat(200_000);
    for n in 0..60 {
        assert_eq!(us.store("set", &format!("user:{n}"), &format!("value of {n}")), "true");
    }
    assert_eq!(us.store("set", "large", &large), "true");
    assert_eq!(us.store("add", "user:0", "other"), "false");
    assert_eq!(us.store("add", "added", "added"), "true");
    assert_eq!(us.store("set", "number", "41"), "true");
    assert_eq!(us.ask("incr number 1"), "42");
    assert_eq!(us.store("append", "added", "!"), "true");
    assert_eq!(us.ask("touch user:1 1000"), "true");
    settled(&pair);
    for n in 0..60 {
        assert_eq!(eu.get(&format!("user:{n}")).unwrap(), format!("value of {n}"));
    }
    assert_eq!(eu.get("large").unwrap(), large);
    assert_eq!(eu.get("added").unwrap(), "added!");
    assert_eq!(eu.get("number").unwrap().trim_end(), "42");
    // And back.
    assert_eq!(eu.ask("delete user:2"), "true");
    assert_eq!(eu.ask("delete nothing"), "false");
    assert_eq!(eu.store("set", "user:3", "from there"), "true");
    settled(&pair);
    assert_eq!(us.get("user:2"), None);
    assert_eq!(us.get("user:3").unwrap(), "from there");
    accounted(&pair.both());
    let keys: Vec<String> = (0..60)
        .map(|n| format!("user:{n}"))
        .chain(["large", "added", "number"].map(str::to_owned))
        .collect();
    assert_same(&pair.both(), SESSIONS, &keys);
}

#[test]
fn pymemcache_replicates() {
    replicates("pymemcache");
}

#[test]
fn pylibmc_in_text_replicates() {
    replicates("pylibmc");
}

#[test]
fn pylibmc_in_binary_replicates() {
    replicates("pylibmc-binary");
}

#[test]
fn spymemcached_in_text_replicates() {
    replicates("spymemcached");
}

#[test]
fn spymemcached_in_binary_replicates() {
    replicates("spymemcached-binary");
}

#[test]
fn gomemcache_replicates() {
    replicates("gomemcache");
}
