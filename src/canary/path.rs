//! The way from this region to a peer, for one cache, as canaries show it: what was written, what arrived, and whether the
//! path is dead. A plain type without clock or I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

/// A path whose partitions are with other nodes says nothing any more after this: a rebalance is over by then, and a flow that
/// went down has its partitions back.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(30);
/// A call that takes longer is worth naming.
const SLOW: Duration = Duration::from_secs(1);

/// What a canary is waiting for while it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The set in this region's memcached.
    Memcached,
    /// The acknowledgement of its event.
    Kafka,
}

impl Step {
    /// The public name, a reason why a canary was not written.
    pub fn name(self) -> &'static str {
        match self {
            Step::Memcached => "memcached",
            Step::Kafka => "kafka",
        }
    }
}

/// Where the next canary is to be produced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// To this partition, whose acks are heard here.
    Own(i32),
    /// To the partition of its key: another node has them all, but that it can be written is worth knowing.
    Elsewhere,
    /// Nowhere: the flow has had no partition yet, and its topic may not exist.
    Nowhere,
}

/// What became of a canary that was in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Index of its cache.
    pub cache: u16,
    /// When it was produced, milliseconds since the epoch.
    pub produced_at_ms: i64,
    /// Why it was dropped; `None` when the peer has applied it.
    pub lost: Option<&'static str>,
}

/// The path has just died, or lives again.
#[derive(Clone, Debug, PartialEq)]
pub enum Turn {
    /// Why.
    Died(String),
    /// After so long.
    Lives(Duration),
}

#[derive(Clone, Copy, Debug)]
struct Arrival {
    produced_at_ms: i64,
    at: Instant,
    lag: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Path {
    /// Nothing arrives for so long: dead.
    limit: Duration,
    /// Partitions of the cache's topic that this node has, by the partition consumer that has each.
    owned: BTreeMap<u32, i32>,
    turn: usize,
    /// Since when canaries are to arrive here.
    expected: Option<Instant>,
    /// Since when this node has had no partition; `None` also when it never had one.
    alone: Option<Instant>,
    /// The attempt at hand.
    writing: Option<(Instant, Step)>,
    /// When the first attempt began behind which none has succeeded.
    unwritten: Option<Instant>,
    /// Why the last attempt failed, until one succeeds.
    failure: Option<String>,
    /// Since when the flow cannot read Kafka, and what it says.
    trouble: Option<(String, Instant)>,
    written: u64,
    failed: BTreeMap<&'static str, u64>,
    arrived: u64,
    lost: BTreeMap<&'static str, u64>,
    in_flight: u64,
    newest: Option<Arrival>,
    /// When the last one arrived.
    heard: Option<Instant>,
    last_lost: Option<&'static str>,
    dead: Option<Instant>,
}

/// A path as it is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct PathView {
    /// Since when it is dead.
    pub dead: Option<Instant>,
    /// How it fares, in words.
    pub why: String,
    /// Canaries are to arrive at this node.
    pub expected: bool,
    /// Now minus the time at which the newest that arrived was written.
    pub age: Option<Duration>,
    /// From produced-at to the ack, of the last that arrived.
    pub lag: Option<Duration>,
    /// Canaries that Kafka has acknowledged.
    pub written: u64,
    /// Attempts that failed, by reason.
    pub failed: BTreeMap<&'static str, u64>,
    /// Canaries that the peer has applied.
    pub arrived: u64,
    /// Canaries that were taken from Kafka and dropped, by reason.
    pub lost: BTreeMap<&'static str, u64>,
}

impl Path {
    /// A path that is dead when nothing arrives for `limit`.
    pub fn new(limit: Duration) -> Path {
        Path {
            limit,
            ..Path::default()
        }
    }

    /// A partition consumer of this node has this partition of the cache's topic.
    pub fn own(&mut self, consumer: u32, partition: i32, now: Instant) {
        self.owned.insert(consumer, partition);
        self.expected.get_or_insert(now);
        self.alone = None;
    }

    /// The partition of this consumer was given back.
    pub fn disown(&mut self, consumer: u32, now: Instant) {
        if self.owned.remove(&consumer).is_some() && self.owned.is_empty() {
            self.alone = Some(now);
            self.expected = None;
        }
    }

    /// The flow went down with all it had, and is built anew: canaries are still to arrive.
    pub fn went_down(&mut self, now: Instant) {
        if !self.owned.is_empty() {
            self.owned.clear();
            self.alone = Some(now);
        }
        let dropped = std::mem::take(&mut self.in_flight);
        if dropped > 0 {
            *self.lost.entry("flow_rebuilt").or_default() += dropped;
        }
    }

    /// Where the next canary goes: each partition of this node in turn.
    pub fn target(&mut self) -> Target {
        if self.owned.is_empty() {
            return match self.alone {
                Some(_) => Target::Elsewhere,
                None => Target::Nowhere,
            };
        }
        self.turn = (self.turn + 1) % self.owned.len();
        match self.owned.values().nth(self.turn) {
            Some(partition) => Target::Own(*partition),
            None => Target::Nowhere,
        }
    }

    /// A canary is being written, and waits for this.
    pub fn writes(&mut self, step: Step, now: Instant) {
        self.writing = Some((now, step));
        self.unwritten.get_or_insert(now);
    }

    /// Kafka has acknowledged it.
    pub fn wrote(&mut self) {
        self.written += 1;
        (self.writing, self.unwritten, self.failure) = (None, None, None);
    }

    /// It could not be written.
    pub fn failed(&mut self, step: Step, why: String) {
        self.writing = None;
        *self.failed.entry(step.name()).or_default() += 1;
        self.failure = Some(why);
    }

    /// One was taken from Kafka and handed on.
    pub fn taken(&mut self) {
        self.in_flight += 1;
    }

    /// One that was in flight has ended; `lag` is now minus produced-at.
    pub fn ended(&mut self, ended: &Ended, lag: Duration, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        if let Some(reason) = ended.lost {
            self.dropped(reason);
            return;
        }
        self.arrived += 1;
        self.heard = Some(now);
        // What was lost before it says nothing about what comes next.
        self.last_lost = None;
        if self
            .newest
            .is_none_or(|newest| newest.produced_at_ms <= ended.produced_at_ms)
        {
            self.newest = Some(Arrival {
                produced_at_ms: ended.produced_at_ms,
                at: now,
                lag,
            });
        }
    }

    /// One was dropped before it was in flight.
    pub fn dropped(&mut self, reason: &'static str) {
        *self.lost.entry(reason).or_default() += 1;
        self.last_lost = Some(reason);
    }

    /// Looks whether the path is dead; says so when that has changed. `trouble` is what keeps its flow from reading Kafka.
    pub fn judge(&mut self, trouble: Option<(String, Instant)>, now: Instant) -> Option<Turn> {
        self.trouble = trouble;
        if self.alone.is_some_and(|alone| now - alone >= FORGOTTEN_AFTER) {
            self.expected = None;
        }
        let over = |since: Instant| now.saturating_duration_since(since) > self.limit;
        let silent = self.silent_since().is_some_and(over);
        let unwritten = self.unwritten.is_some_and(over);
        let unread = self.owned.is_empty() && self.trouble.as_ref().is_some_and(|(_, since)| over(*since));
        let fails = silent || unwritten || unread;
        match self.dead {
            None if fails => {
                self.dead = Some(now);
                Some(Turn::Died(self.why(now)))
            }
            Some(since) if !fails => {
                let heard = self.heard.is_some_and(|heard| heard > since);
                // With its partitions elsewhere nothing will be heard here: then it is enough that it can be written.
                let forgotten =
                    self.expected.is_none() && self.alone.is_none_or(|alone| now - alone >= FORGOTTEN_AFTER);
                if !heard && !forgotten {
                    return None;
                }
                self.dead = None;
                Some(Turn::Lives(now - since))
            }
            _ => None,
        }
    }

    /// Since when nothing has arrived that was to arrive here.
    fn silent_since(&self) -> Option<Instant> {
        let expected = self.expected?;
        Some(self.heard.map_or(expected, |heard| heard.max(expected)))
    }

    /// How it fares, in words.
    fn why(&self, now: Instant) -> String {
        let ago = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        if let Some((since, step)) = self.writing
            && now.saturating_duration_since(since) >= SLOW
        {
            return format!(
                "cannot be written: {} has not answered for {:.1} s",
                step.name(),
                ago(since)
            );
        }
        if let Some(failure) = &self.failure {
            return format!("cannot be written: {failure}");
        }
        let expected = match (self.silent_since(), &self.trouble) {
            (_, Some((trouble, since))) if self.owned.is_empty() => {
                return format!("kafka cannot be read for {:.1} s: {trouble}", ago(*since));
            }
            (None, _) if self.alone.is_none() => {
                return "no partition of this flow has come to this node yet".to_owned();
            }
            (None, _) => return "other nodes have all partitions, nothing arrives here".to_owned(),
            (Some(since), _) => since,
        };
        let lost = self
            .last_lost
            .map_or_else(String::new, |reason| format!(", the last that was lost: {reason}"));
        match self.heard {
            _ if self.dead.is_some() || ago(expected) > self.limit.as_secs_f64() => {
                format!("written, none has arrived for {:.1} s{lost}", ago(expected))
            }
            Some(heard) => {
                let lag = self.newest.map_or(0.0, |newest| newest.lag.as_secs_f64());
                format!(
                    "arrived {:.1} s ago, {:.0} ms after it was produced",
                    ago(heard),
                    lag * 1e3
                )
            }
            None => "none has arrived yet".to_owned(),
        }
    }

    /// Everything, as it is at `now`.
    pub fn view(&self, now: Instant) -> PathView {
        PathView {
            dead: self.dead,
            why: self.why(now),
            expected: self.expected.is_some(),
            age: self
                .newest
                .map(|newest| newest.lag + now.saturating_duration_since(newest.at)),
            lag: self.newest.map(|newest| newest.lag),
            written: self.written,
            failed: self.failed.clone(),
            arrived: self.arrived,
            lost: self.lost.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(4);

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn arrived(produced_at_ms: i64) -> Ended {
        Ended {
            cache: 0,
            produced_at_ms,
            lost: None,
        }
    }

    /// A path that has a partition and heard a canary at `now`.
    fn alive(now: Instant) -> Path {
        let mut path = Path::new(LIMIT);
        path.own(7, 3, now);
        path.writes(Step::Memcached, now);
        path.wrote();
        path.taken();
        path.ended(&arrived(1_000), seconds(0.02), now);
        path
    }

    #[test]
    fn silence_kills_a_path_and_one_arrival_brings_it_back() {
        let now = Instant::now();
        let mut path = alive(now);
        assert_eq!(path.judge(None, now + LIMIT), None);
        let died = path.judge(None, now + seconds(4.1));
        let Some(Turn::Died(why)) = died else {
            panic!("{died:?}")
        };
        assert_eq!(why, "written, none has arrived for 4.1 s");
        assert_eq!(path.judge(None, now + seconds(9.0)), None, "said once");
        path.dropped("later");
        assert!(
            path.view(now + seconds(9.0))
                .why
                .ends_with("the last that was lost: later")
        );
        path.ended(&arrived(9_000), seconds(0.5), now + seconds(9.5));
        assert_eq!(
            path.judge(None, now + seconds(9.6)),
            Some(Turn::Lives(seconds(9.6) - seconds(4.1)))
        );
        let view = path.view(now + seconds(10.0));
        assert_eq!((view.dead, view.arrived, view.lag), (None, 2, Some(seconds(0.5))));
        assert_eq!(view.age, Some(seconds(1.0)));
    }

    #[test]
    fn an_older_canary_that_arrives_late_shows_that_the_path_lives_but_makes_nothing_younger() {
        let now = Instant::now();
        let mut path = alive(now);
        path.ended(&arrived(10), seconds(60.0), now + seconds(3.0));
        assert_eq!(path.view(now + seconds(3.0)).age, Some(seconds(3.02)));
        assert_eq!(path.judge(None, now + seconds(6.0)), None);
    }

    #[test]
    fn what_cannot_be_written_is_dead_and_says_why() {
        let now = Instant::now();
        let mut path = alive(now);
        path.writes(Step::Memcached, now + seconds(1.0));
        path.failed(Step::Memcached, "memcached 10.0.0.1:11211: gone".to_owned());
        let Some(Turn::Died(why)) = path.judge(None, now + seconds(4.1)) else {
            panic!("alive")
        };
        assert_eq!(why, "cannot be written: memcached 10.0.0.1:11211: gone");
        path.writes(Step::Kafka, now + seconds(5.0));
        assert_eq!(
            path.view(now + seconds(7.5)).why,
            "cannot be written: kafka has not answered for 2.5 s"
        );
        assert_eq!(path.view(now).failed, BTreeMap::from([("memcached", 1)]));
    }

    #[test]
    fn a_node_without_partitions_reports_no_dead_path_but_what_it_cannot_write() {
        let now = Instant::now();
        let mut path = Path::new(LIMIT);
        assert_eq!(path.target(), Target::Nowhere);
        assert_eq!(path.judge(None, now + seconds(100.0)), None);
        let unread = Some(("all brokers down".to_owned(), now));
        assert!(matches!(path.judge(unread, now + seconds(5.0)), Some(Turn::Died(why)) if why.contains("all brokers")));

        let mut path = alive(now);
        assert_eq!(path.target(), Target::Own(3));
        path.disown(7, now);
        assert_eq!(path.target(), Target::Elsewhere);
        for second in 0..60 {
            path.writes(Step::Memcached, now + seconds(second as f64));
            path.wrote();
            assert_eq!(path.judge(None, now + seconds(second as f64)), None);
        }
        path.writes(Step::Memcached, now + seconds(60.0));
        path.failed(Step::Kafka, "no broker".to_owned());
        assert!(matches!(path.judge(None, now + seconds(65.0)), Some(Turn::Died(_))));
        path.writes(Step::Memcached, now + seconds(66.0));
        path.wrote();
        assert!(matches!(path.judge(None, now + seconds(66.0)), Some(Turn::Lives(_))));
    }

    #[test]
    fn partitions_that_come_back_give_the_path_its_time_again() {
        let now = Instant::now();
        let mut path = alive(now);
        path.disown(7, now + seconds(1.0));
        path.own(8, 3, now + seconds(20.0));
        assert_eq!(path.judge(None, now + seconds(23.0)), None);
        assert!(matches!(path.judge(None, now + seconds(24.1)), Some(Turn::Died(_))));
    }

    #[test]
    fn a_path_that_died_with_kafka_lives_only_when_a_canary_arrives() {
        let now = Instant::now();
        let mut path = alive(now);
        path.writes(Step::Kafka, now + seconds(1.0));
        assert!(matches!(path.judge(None, now + seconds(5.1)), Some(Turn::Died(_))));
        // librdkafka gives its partitions back after the session timeout, and gets them again later.
        path.disown(7, now + seconds(6.0));
        path.wrote();
        assert_eq!(path.judge(None, now + seconds(7.0)), None);
        path.own(8, 3, now + seconds(8.0));
        assert_eq!(path.judge(None, now + seconds(8.1)), None);
        path.ended(&arrived(8_000), seconds(0.1), now + seconds(9.0));
        assert!(matches!(path.judge(None, now + seconds(9.1)), Some(Turn::Lives(_))));
    }

    #[test]
    fn a_flow_that_went_down_is_waited_for_and_what_it_carried_is_lost() {
        let now = Instant::now();
        let mut path = alive(now);
        path.taken();
        path.went_down(now + seconds(1.0));
        assert_eq!(path.view(now).lost, BTreeMap::from([("flow_rebuilt", 1)]));
        assert!(matches!(path.judge(None, now + seconds(4.1)), Some(Turn::Died(_))));
        // Other nodes may have its partitions by now.
        path.writes(Step::Memcached, now + seconds(31.0));
        path.wrote();
        assert!(matches!(path.judge(None, now + seconds(31.1)), Some(Turn::Lives(_))));
    }

    #[test]
    fn each_partition_gets_its_turn() {
        let now = Instant::now();
        let mut path = Path::new(LIMIT);
        for (consumer, partition) in [(1, 5), (2, 6), (3, 9)] {
            path.own(consumer, partition, now);
        }
        let mut targets: Vec<_> = (0..3).map(|_| path.target()).collect();
        targets.sort_by_key(|target| format!("{target:?}"));
        assert_eq!(targets, [Target::Own(5), Target::Own(6), Target::Own(9)]);
    }
}
