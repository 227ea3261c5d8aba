//! One real Apache Kafka for a test process, and more for tests that break theirs.

mod client;
mod mock;
mod producer;

pub use client::{KafkaClient, Record};
pub use mock::MockKafka;
pub use producer::{Outgoing, Producer};

use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::place::{Dir, free_port, target};
use crate::process::{Process, Signal};
use crate::proxy::FaultProxy;

/// A JVM that starts while two cores compile or test takes far longer than its usual three seconds.
const READY_WITHIN: Duration = Duration::from_secs(90);

/// Enough for a lab; its second compiler would only take CPU from what is tested.
const JVM: [&str; 2] = ["-Xmx512m", "-XX:TieredStopAtLevel=1"];

/// Base64 of `evrepl-lab-kafka`: 16 bytes, as a cluster id must have. Every lab broker is a cluster of its own.
const CLUSTER_ID: &str = "ZXZyZXBsLWxhYi1rYWZrYQ";

/// The broker that all tests of this process share; started on first use, ended with the process. Tests keep apart by
/// topics and group prefixes of their own ([`crate::place::unique`]) and never stop it: for that there is [`Broker::start`].
///
/// # Panics
/// When Kafka's jars or Java are missing, or it doesn't start.
pub fn broker() -> &'static Broker {
    static SHARED: OnceLock<Broker> = OnceLock::new();
    // Nobody kills this one, so nothing is gained by noticing its death soon. And on a machine that stalls for some seconds it
    // must not be fenced: it would name no brokers for a moment, which librdkafka 2.12 never recovers from (its issue 5301).
    let patient = [("broker.session.timeout.ms", "60000")];
    SHARED.get_or_init(|| Broker::start_with(&patient, &JVM))
}

/// A Kafka process in KRaft mode, broker and controller in one, on ports of its own. Dereferences to its [`KafkaClient`].
#[derive(Debug)]
pub struct Broker {
    client: Arc<KafkaClient>,
    properties: PathBuf,
    jvm: Vec<String>,
    process: Mutex<Option<Process>>,
    // Last, so that the process is gone before its data.
    dir: Dir,
}

impl Broker {
    /// A broker of its own for a test that stops, kills or freezes it.
    ///
    /// # Panics
    /// As [`broker`].
    pub fn start() -> Broker {
        Broker::start_with(&[], &JVM)
    }

    /// The same with further server properties, and other options for the JVM (load runs want its second compiler).
    ///
    /// # Panics
    /// As [`broker`].
    pub fn start_with(properties: &[(&str, &str)], jvm: &[&str]) -> Broker {
        Broker::start_at(free_port(), properties, jvm)
    }

    /// A broker whose heartbeats come through a proxy. Without them it is fenced after five seconds: it answers clients, and names
    /// them no brokers.
    ///
    /// # Panics
    /// As [`broker`].
    pub fn start_with_heartbeats() -> (Broker, FaultProxy) {
        let controller = free_port();
        let heartbeats = FaultProxy::start(&format!("127.0.0.1:{controller}"));
        let voters = format!("1@{}", heartbeats.address());
        let broker = Broker::start_at(controller, &[("controller.quorum.voters", &voters)], &JVM);
        (broker, heartbeats)
    }

    fn start_at(controller: u16, properties: &[(&str, &str)], jvm: &[&str]) -> Broker {
        let dir = Dir::new("kafka");
        let port = free_port();
        let file = dir.path().join("server.properties");
        fs::write(
            &file,
            server_properties(port, controller, &dir.path().join("data"), properties),
        )
        .unwrap_or_else(|error| panic!("cannot write {}: {error}", file.display()));
        let broker = Broker {
            client: Arc::new(KafkaClient::new(&format!("127.0.0.1:{port}"))),
            properties: file,
            jvm: jvm.iter().map(|option| option.to_string()).collect(),
            process: Mutex::new(None),
            dir,
        };
        broker.format();
        broker.start_again();
        broker
    }

    /// A handle for talking to it that regions and threads may keep.
    pub fn client(&self) -> Arc<KafkaClient> {
        Arc::clone(&self.client)
    }

    /// Starts it on the same address and data, after [`Broker::stop`] or [`Broker::kill`]; returns when it answers.
    ///
    /// # Panics
    /// When it doesn't come up; the message holds the end of its log.
    pub fn start_again(&self) {
        let mut slot = self.slot();
        assert!(
            slot.as_ref().is_none_or(|old| !old.is_running()),
            "the broker runs already"
        );
        let mut command = java();
        command
            .args(&self.jvm)
            .arg("-cp")
            .arg(class_path())
            .arg("kafka.Kafka")
            .arg(&self.properties);
        let process = Process::spawn("kafka", command, &self.log());
        let deadline = Instant::now() + READY_WITHIN;
        while !self.client.answers(Duration::from_millis(500)) {
            if let Some(status) = process.ended() {
                panic!("kafka ended with {status} while starting:\n{}", process.log_tail(40));
            }
            assert!(
                Instant::now() < deadline,
                "kafka is not ready in {READY_WITHIN:?}:\n{}",
                process.log_tail(40)
            );
        }
        *slot = Some(process);
    }

    /// An orderly shutdown.
    pub fn stop(&self) {
        if let Some(process) = self.slot().take() {
            process.signal(Signal::Continue);
            process.signal(Signal::Terminate);
            // Dropping kills what takes too long.
            process.wait(Duration::from_secs(30));
        }
    }

    /// SIGKILL, as when the machine fails. What it had acknowledged is in the page cache and survives.
    pub fn kill(&self) {
        if let Some(process) = self.slot().take() {
            process.kill();
        }
    }

    /// Stops answering while its connections stay open.
    pub fn freeze(&self) {
        self.signal(Signal::Stop);
    }

    /// Goes on after [`Broker::freeze`].
    pub fn thaw(&self) {
        self.signal(Signal::Continue);
    }

    fn signal(&self, signal: Signal) {
        self.slot().as_ref().expect("the broker runs").signal(signal);
    }

    fn slot(&self) -> MutexGuard<'_, Option<Process>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("kafka.log")
    }

    fn format(&self) {
        let output = java()
            .args(["-XX:TieredStopAtLevel=1", "-cp"])
            .arg(class_path())
            .args(["kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c"])
            .arg(&self.properties)
            .output()
            .unwrap_or_else(|error| panic!("java is missing ({error}): run `make setup`"));
        assert!(
            output.status.success(),
            "kafka's storage was not formatted: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

impl Deref for Broker {
    type Target = KafkaClient;

    fn deref(&self) -> &KafkaClient {
        &self.client
    }
}

fn java() -> Command {
    let home = std::env::var_os("JAVA_HOME").map(|home| Path::new(&home).join("bin/java"));
    let mut command = Command::new(home.filter(|java| java.exists()).unwrap_or_else(|| "java".into()));
    command.env("CLASSPATH", "");
    // At WARN, what explains a broker that doesn't start is all there is to read.
    command.arg("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn");
    command
}

/// The jars that `scripts/kafka-libs.sh` fetched, or those of the folder named by `EVREPL_KAFKA_LIBS`.
fn class_path() -> String {
    let libs = std::env::var_os("EVREPL_KAFKA_LIBS").map_or_else(|| target().join("kafka/libs"), PathBuf::from);
    let there = fs::read_dir(&libs).is_ok_and(|mut files| {
        files.any(|file| file.is_ok_and(|file| file.path().extension().is_some_and(|extension| extension == "jar")))
    });
    assert!(
        there,
        "Kafka's jars are not in {}: run `make test`, or `make setup` and scripts/kafka-libs.sh",
        libs.display()
    );
    format!("{}/*", libs.display())
}

fn server_properties(port: u16, controller: u16, data: &Path, more: &[(&str, &str)]) -> String {
    let mut text = format!(
        "process.roles=broker,controller\n\
         node.id=1\n\
         controller.quorum.voters=1@127.0.0.1:{controller}\n\
         listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller}\n\
         advertised.listeners=PLAINTEXT://127.0.0.1:{port}\n\
         controller.listener.names=CONTROLLER\n\
         listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT\n\
         log.dirs={}\n",
        data.display()
    );
    // One broker, so one replica of everything; one partition of the groups' topic, since 50 take seconds to make.
    text.push_str(
        "offsets.topic.replication.factor=1\noffsets.topic.num.partitions=1\n\
         transaction.state.log.replication.factor=1\ntransaction.state.log.min.isr=1\n\
         share.coordinator.state.topic.replication.factor=1\nshare.coordinator.state.topic.min.isr=1\n\
         group.initial.rebalance.delay.ms=0\n",
    );
    // Tests of dead members may choose a session timeout below Kafka's 6 s; the cleaner would only take 128 MB.
    text.push_str("group.min.session.timeout.ms=500\nlog.cleaner.enable=false\n");
    // A killed broker may register again only once its old session has ended; with Kafka's 9 s each restart takes as long.
    // Much less, and a broker that gets no CPU for a moment is fenced: its partitions are then without a leader.
    text.push_str("broker.session.timeout.ms=5000\nbroker.heartbeat.interval.ms=500\n");
    for (key, value) in more {
        text.push_str(&format!("{key}={value}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::unique;

    #[test]
    fn what_was_acknowledged_survives_a_killed_broker() {
        let broker = Broker::start();
        broker.create_topic("kept", 2, &[]);
        broker.produce("kept", Some(1), b"key", b"{\"v\":1}", &[("traceparent", b"00-x")]);
        broker.kill();
        broker.start_again();
        assert_eq!(broker.end_offsets("kept"), [(0, 0), (1, 1)]);
        let records = broker.read_all("kept");
        assert_eq!(records.len(), 1);
        assert_eq!((records[0].partition, records[0].offset), (1, 0));
        assert_eq!((records[0].key(), records[0].value()), (&b"key"[..], &b"{\"v\":1}"[..]));
        assert_eq!(records[0].header("traceparent"), Some(&b"00-x"[..]));
        broker.stop();
        broker.start_again();
        assert_eq!(broker.end_offsets("kept"), [(0, 0), (1, 1)]);
    }

    #[test]
    fn the_shared_broker_serves_topics_offsets_and_bulk_producers() {
        let topic = unique("bulk");
        broker().create_topic(&topic, 1, &[("retention.ms", "-1")]);
        broker().add_partitions(&topic, 3);
        assert_eq!(broker().end_offsets(&topic), [(0, 0), (1, 0), (2, 0)]);
        let producer = broker().producer(&[]);
        for n in 0..20_000_u32 {
            producer.send(Outgoing::new(&topic, &n.to_be_bytes(), b"{}"));
        }
        producer.flush();
        let end: i64 = broker().end_offsets(&topic).iter().map(|(_, end)| end).sum();
        assert_eq!(end, 20_000);
        assert_eq!(broker().read_all(&topic).len(), 20_000);
        assert_eq!(
            broker().committed(&unique("group"), &topic),
            [(0, None), (1, None), (2, None)]
        );
    }

    #[test]
    fn a_frozen_broker_answers_nobody_until_it_thaws() {
        let broker = Broker::start();
        broker.freeze();
        assert!(!broker.answers(Duration::from_millis(300)));
        broker.thaw();
        assert!(crate::wait::holds_within(Duration::from_secs(20), || broker.answers(Duration::from_millis(500))));
    }
}
