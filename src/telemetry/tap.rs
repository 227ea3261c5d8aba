//! The tap: events shown to whoever asks, one by one, as they end.
//!
//! Nobody looks most of the time, so the path of an event asks only [`Taps::active`], once a chunk. Somebody who looks
//! never holds an event up: each subscriber has a bounded queue, and what does not fit is lost to it, counted, and told.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use tokio::sync::mpsc::{self, Receiver, Sender};

/// Who may look at once: each costs every event that passes a comparison.
pub const MOST_SUBSCRIBERS: usize = 4;

/// Lines that wait for one subscriber: some tenths of a second of a busy flow, a few hundred kilobytes.
const WAITING_LINES: usize = 1024;

/// An event that ended, as a tap shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PassedEvent {
    /// `us-east-1->eu-west-1`.
    pub flow: String,
    /// The cache's name.
    pub cache: String,
    /// The whole key; shown with [`escaped`].
    #[serde(serialize_with = "as_escaped")]
    pub key: Bytes,
    /// `set`, `delete` or `touch`.
    pub op: &'static str,
    /// How it ended (DESIGN section 5).
    pub outcome: &'static str,
    /// Milliseconds since the epoch.
    pub produced_at_ms: i64,
    /// From produced-at to its end, microseconds.
    pub total_us: u64,
    /// Microseconds in each stage that it passed, in the order of the path.
    #[serde(rename = "stages_us", serialize_with = "as_map")]
    pub stages: Vec<(&'static str, u64)>,
    /// What else befell it: looked at again, superseded, a breaker that opened.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// Its trace, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trace_id: Option<String>,
}

fn as_escaped<S: Serializer>(key: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&escaped(key))
}

fn as_map<S: Serializer>(stages: &[(&'static str, u64)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(stages.len()))?;
    for (stage, us) in stages {
        map.serialize_entry(stage, us)?;
    }
    map.end()
}

/// A key in printable ASCII without spaces, everything else percent-encoded: it can be read, and handed back as a filter.
pub fn escaped(key: &[u8]) -> String {
    let mut text = String::with_capacity(key.len());
    for byte in key {
        match byte {
            b'%' | 0..=b' ' | 0x7f.. => text.push_str(&format!("%{byte:02X}")),
            _ => text.push(char::from(*byte)),
        }
    }
    text
}

/// What one subscriber wants to see.
#[derive(Clone, Debug, PartialEq)]
pub struct TapFilter {
    /// Only of this cache.
    pub cache: Option<String>,
    /// Which of its events.
    pub pick: Pick,
}

/// Which events a subscriber wants.
#[derive(Clone, Debug, PartialEq)]
pub enum Pick {
    /// Those of this key, all of them.
    Key(Bytes),
    /// Such a part of all, from 0 to 1, drawn at random.
    Ratio(f64),
}

impl TapFilter {
    fn is_of(&self, cache: &str) -> bool {
        self.cache.as_deref().is_none_or(|wanted| wanted == cache)
    }
}

/// There are [`MOST_SUBSCRIBERS`] already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MOST_SUBSCRIBERS} others look already; end one of them first")]
pub struct TooManySubscribers;

/// Everybody who looks; one a process.
#[derive(Debug, Default)]
pub struct Taps {
    /// How many there are, or at least were a moment ago.
    active: AtomicUsize,
    subscribers: RwLock<Vec<Arc<Subscriber>>>,
}

#[derive(Debug)]
struct Subscriber {
    filter: TapFilter,
    lines: Sender<Arc<PassedEvent>>,
    lost: AtomicU64,
}

impl Taps {
    /// Whether anybody looks: one relaxed load, asked once a chunk.
    pub fn active(&self) -> bool {
        self.active.load(Relaxed) > 0
    }

    /// Whether somebody wants this event; asked once for each, and only while [`Taps::active`].
    pub fn wants(&self, cache: &str, key: &[u8]) -> bool {
        let subscribers = self.subscribers.read().unwrap_or_else(PoisonError::into_inner);
        if subscribers.iter().any(|one| one.wants_key(cache, key)) {
            return true;
        }
        let most = largest_ratio(&subscribers, cache);
        most > 0.0 && rand::random::<f64>() < most
    }

    /// Shows an event that was wanted. Never blocks.
    pub fn say(&self, passed: PassedEvent) {
        let subscribers = self.subscribers.read().unwrap_or_else(PoisonError::into_inner);
        let (cache, key) = (passed.cache.as_str(), passed.key.as_ref());
        // An event that came by its key was drawn for nobody; the others were drawn with the largest ratio, and whoever
        // asked for less gets its part of them.
        let drawn = match subscribers.iter().any(|one| one.wants_key(cache, key)) {
            true => 1.0,
            false => largest_ratio(&subscribers, cache),
        };
        let mut wanting = subscribers.iter().filter(|one| match &one.filter.pick {
            Pick::Key(_) => one.wants_key(cache, key),
            Pick::Ratio(ratio) => one.filter.is_of(cache) && rand::random::<f64>() * drawn < *ratio,
        });
        let Some(first) = wanting.next() else { return };
        let rest: Vec<_> = wanting.collect();
        let passed = Arc::new(passed);
        for subscriber in rest {
            subscriber.hand(passed.clone());
        }
        first.hand(passed);
    }

    /// Begins to look. It ends when the tap is dropped.
    ///
    /// # Errors
    ///
    /// [`TooManySubscribers`].
    pub fn subscribe(self: &Arc<Self>, filter: TapFilter) -> Result<Tap, TooManySubscribers> {
        self.subscribe_with(filter, WAITING_LINES)
    }

    fn subscribe_with(self: &Arc<Self>, filter: TapFilter, room: usize) -> Result<Tap, TooManySubscribers> {
        let mut subscribers = self.subscribers.write().unwrap_or_else(PoisonError::into_inner);
        if subscribers.len() >= MOST_SUBSCRIBERS {
            return Err(TooManySubscribers);
        }
        let (lines, waiting) = mpsc::channel(room);
        let subscriber = Arc::new(Subscriber {
            filter,
            lines,
            lost: AtomicU64::new(0),
        });
        subscribers.push(subscriber.clone());
        self.active.store(subscribers.len(), Relaxed);
        Ok(Tap {
            taps: self.clone(),
            subscriber,
            waiting,
        })
    }
}

fn largest_ratio(subscribers: &[Arc<Subscriber>], cache: &str) -> f64 {
    let ratios = subscribers.iter().filter_map(|one| match one.filter.pick {
        Pick::Ratio(ratio) if one.filter.is_of(cache) => Some(ratio),
        _ => None,
    });
    ratios.fold(0.0, f64::max)
}

impl Subscriber {
    fn wants_key(&self, cache: &str, key: &[u8]) -> bool {
        matches!(&self.filter.pick, Pick::Key(wanted) if wanted == key) && self.filter.is_of(cache)
    }

    fn hand(&self, passed: Arc<PassedEvent>) {
        if self.lines.try_send(passed).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
    }
}

/// One subscriber's end.
#[derive(Debug)]
pub struct Tap {
    taps: Arc<Taps>,
    subscriber: Arc<Subscriber>,
    waiting: Receiver<Arc<PassedEvent>>,
}

/// What a subscriber hears.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// An event passed.
    Passed(Arc<PassedEvent>),
    /// So many others passed that there was no room for, since this was last said.
    Lost(u64),
}

impl Tap {
    /// The next thing to show. It never ends by itself.
    pub async fn next(&mut self) -> Heard {
        let lost = self.subscriber.lost.swap(0, Relaxed);
        if lost > 0 {
            return Heard::Lost(lost);
        }
        match self.waiting.recv().await {
            Some(passed) => Heard::Passed(passed),
            // Its sender is held by this very tap.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let mut subscribers = self.taps.subscribers.write().unwrap_or_else(PoisonError::into_inner);
        subscribers.retain(|one| !Arc::ptr_eq(one, &self.subscriber));
        self.taps.active.store(subscribers.len(), Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(cache: &str, key: &'static str) -> PassedEvent {
        PassedEvent {
            flow: "a->b".to_owned(),
            cache: cache.to_owned(),
            key: Bytes::from_static(key.as_bytes()),
            op: "set",
            outcome: "applied",
            produced_at_ms: 1_700_000_000_000,
            total_us: 1_500,
            stages: vec![("kafka", 900), ("look", 600)],
            notes: Vec::new(),
            trace_id: None,
        }
    }

    fn filter(cache: Option<&str>, pick: Pick) -> TapFilter {
        TapFilter {
            cache: cache.map(str::to_owned),
            pick,
        }
    }

    fn of_key(key: &'static str) -> Pick {
        Pick::Key(Bytes::from_static(key.as_bytes()))
    }

    /// What waits for it now.
    fn heard(tap: &mut Tap) -> Vec<Heard> {
        use futures_util::FutureExt as _;
        std::iter::from_fn(|| tap.next().now_or_never()).collect()
    }

    /// As an event passes: asked, and shown if wanted.
    fn pass(taps: &Taps, cache: &str, key: &'static str) -> bool {
        let wanted = taps.active() && taps.wants(cache, key.as_bytes());
        if wanted {
            taps.say(passed(cache, key));
        }
        wanted
    }

    #[test]
    fn nothing_is_wanted_while_nobody_looks() {
        let taps = Arc::new(Taps::default());
        assert!(!taps.active() && !taps.wants("c", b"k"));
        let tap = taps.subscribe(filter(None, Pick::Ratio(1.0))).unwrap();
        assert!(taps.active() && taps.wants("c", b"k"));
        drop(tap);
        assert!(!taps.active() && !taps.wants("c", b"k"));
        taps.say(passed("c", "k"));
    }

    #[test]
    fn a_key_shows_its_own_events_and_no_others() {
        let taps = Arc::new(Taps::default());
        let mut anywhere = taps.subscribe(filter(None, of_key("k"))).unwrap();
        let mut there = taps.subscribe(filter(Some("there"), of_key("k"))).unwrap();
        assert!(pass(&taps, "here", "k") && pass(&taps, "there", "k"));
        assert!(!pass(&taps, "here", "kk") && !pass(&taps, "here", ""));
        let shown = |cache| Heard::Passed(Arc::new(passed(cache, "k")));
        assert_eq!(heard(&mut anywhere), [shown("here"), shown("there")]);
        assert_eq!(heard(&mut there), [shown("there")]);
    }

    #[test]
    fn a_ratio_shows_about_its_part_whoever_else_looks() {
        let taps = Arc::new(Taps::default());
        let room = 40_000;
        let subscribe = |cache, pick| taps.subscribe_with(filter(cache, pick), room).unwrap();
        let mut half = subscribe(None, Pick::Ratio(0.5));
        let mut tenth = subscribe(None, Pick::Ratio(0.1));
        let mut all_there = subscribe(Some("there"), Pick::Ratio(1.0));
        let mut key = subscribe(None, of_key("k"));
        for _ in 0..10_000 {
            pass(&taps, "here", "k");
            pass(&taps, "here", "x");
            pass(&taps, "there", "x");
        }
        // Far beyond what chance explains: the standard deviations are 87 and 52.
        let (half, tenth) = (heard(&mut half).len(), heard(&mut tenth).len());
        assert!((14_300..15_700).contains(&half), "{half} of 30000");
        assert!((2_600..3_400).contains(&tenth), "{tenth} of 30000");
        assert_eq!((heard(&mut all_there).len(), heard(&mut key).len()), (10_000, 10_000));
    }

    #[test]
    fn a_subscriber_that_is_slow_loses_lines_and_is_told_how_many() {
        let taps = Arc::new(Taps::default());
        let mut slow = taps.subscribe_with(filter(None, of_key("k")), 2).unwrap();
        let mut fast = taps.subscribe_with(filter(None, of_key("k")), 9).unwrap();
        for _ in 0..5 {
            pass(&taps, "c", "k");
        }
        let line = Heard::Passed(Arc::new(passed("c", "k")));
        assert_eq!(heard(&mut slow), [Heard::Lost(3), line.clone(), line.clone()]);
        assert_eq!(heard(&mut fast).len(), 5);
        pass(&taps, "c", "k");
        assert_eq!(heard(&mut slow), [line], "said once");
    }

    #[test]
    fn only_a_few_may_look_and_who_leaves_makes_room() {
        let taps = Arc::new(Taps::default());
        let subscribe = || taps.subscribe(filter(None, Pick::Ratio(1.0)));
        let mut looking: Vec<_> = (0..MOST_SUBSCRIBERS).map(|_| subscribe().unwrap()).collect();
        assert_eq!(subscribe().unwrap_err(), TooManySubscribers);
        looking.pop();
        subscribe().unwrap();
    }

    #[test]
    fn a_line_has_its_stages_in_order_and_a_key_that_can_be_read() {
        let mut event = passed("c", "");
        event.key = Bytes::from_static(b"user:1 \x00%\xff~");
        event.stages = vec![("queue", 1), ("apply", 2), ("look", 3)];
        let json = serde_json::to_string(&event).unwrap();
        assert!(json.contains(r#""key":"user:1%20%00%25%FF~""#), "{json}");
        assert!(json.contains(r#""stages_us":{"queue":1,"apply":2,"look":3}"#), "{json}");
        assert!(!json.contains("notes") && !json.contains("trace_id"), "{json}");
    }
}
