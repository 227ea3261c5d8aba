use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Event {
    cache: u16,
    key: Bytes,
    offset: u64,
    attempts: u16,
}

impl DirtyEvent for Event {
    fn key(&self) -> &Bytes {
        &self.key
    }
    fn cache(&self) -> u16 {
        self.cache
    }
    fn attempts(&self) -> u16 {
        self.attempts
    }
    fn set_attempts(&mut self, attempts: u16) {
        self.attempts = attempts;
    }
    fn supersedes(&self, other: &Self) -> bool {
        self.offset > other.offset
    }
}

fn event(key: &str, offset: u64) -> Event {
    Event {
        cache: 1,
        key: Bytes::copy_from_slice(key.as_bytes()),
        offset,
        attempts: 0,
    }
}

fn later(server: &str) -> Dirtied {
    Dirtied::Later { server: server.into() }
}

fn take(set: &mut DirtySet<Event>, now: Instant, max: usize) -> Vec<Event> {
    let mut out = Vec::new();
    assert_eq!(set.take_due(now, max, &mut out), out.len());
    out
}

fn offsets(events: &[Event]) -> Vec<u64> {
    events.iter().map(|event| event.offset).collect()
}

fn set_of(events: impl IntoIterator<Item = (Event, Dirtied)>) -> (DirtySet<Event>, Instant) {
    let (mut set, now) = (DirtySet::new(42), Instant::now());
    for (event, reason) in events {
        assert_eq!(set.insert(event, reason, now), None);
    }
    (set, now)
}

#[test]
fn the_newer_of_two_events_stays_and_the_older_is_handed_back() {
    let (mut set, now) = set_of([(event("a", 5), Dirtied::SourceAway)]);
    assert_eq!(set.insert(event("a", 3), Dirtied::SourceAway, now).unwrap().offset, 3);
    assert_eq!(set.join(event("a", 9)).unwrap().offset, 5);
    assert_eq!(set.join(event("a", 7)).unwrap().offset, 7, "older than what is held");
    assert_eq!(set.join(event("b", 9)).unwrap_err().offset, 9);
    let other_cache = Event {
        cache: 2,
        ..event("a", 1)
    };
    assert_eq!(set.insert(other_cache, Dirtied::SourceAway, now), None);
    assert_eq!(
        (
            set.len(),
            set.contains(2, &event("a", 0).key),
            set.contains(3, &event("a", 0).key)
        ),
        (2, true, false)
    );
    assert_eq!(
        (set.source_back(), offsets(&take(&mut set, now, 9)), set.is_empty()),
        (2, vec![9, 1], true)
    );
}

#[test]
fn a_refused_key_waits_longer_each_time_also_for_a_newer_event() {
    let (mut set, mut now) = set_of([]);
    let mut next = event("a", 0);
    for wait in [1, 2, 4, 8, 16, 32, 64, 100, 100] {
        set.insert(next, Dirtied::LookAgain, now);
        assert_eq!(set.next_due(), Some(now + wait * MS));
        now += wait * MS - Duration::from_nanos(1);
        assert_eq!(take(&mut set, now, 9), []);
        now += Duration::from_nanos(1);
        let older = set.join(event("a", wait as u64)).unwrap();
        assert!(older.offset < u64::from(wait) || wait == 100);
        next = take(&mut set, now, 9).remove(0);
    }
    assert_eq!(next.attempts, 9);
    set.insert(
        Event {
            attempts: u16::MAX,
            ..next
        },
        Dirtied::LookAgain,
        now,
    );
    assert_eq!(set.next_due(), Some(now + 100 * MS), "attempts do not wrap");
}

#[test]
fn a_refusal_while_the_longest_wait_goes_on_starts_it_anew() {
    let (mut set, now) = set_of([(
        Event {
            attempts: 20,
            ..event("a", 0)
        },
        Dirtied::LookAgain,
    )]);
    set.insert(event("a", 1), Dirtied::LookAgain, now + 40 * MS);
    assert_eq!(set.next_due(), Some(now + 140 * MS));
}

#[test]
fn keys_of_a_source_that_is_away_wait_until_it_is_back() {
    let (mut set, now) = set_of([
        (event("a", 0), Dirtied::SourceAway),
        (event("b", 1), Dirtied::SessionLost),
    ]);
    assert_eq!(offsets(&take(&mut set, now + 3_600_000 * MS, 9)), [1]);
    assert_eq!((set.next_due(), set.waiting_for_source()), (None, 1));
    assert_eq!((set.source_back(), set.waiting_for_source()), (1, 0));
    assert_eq!(
        (set.next_due() <= Some(now), offsets(&take(&mut set, now, 9))),
        (true, vec![0])
    );
}

#[test]
fn one_key_probes_a_dead_destination_server_and_the_others_wait() {
    let (mut set, mut now) = set_of((0..10).map(|i| (event(&i.to_string(), i), later("m1"))));
    let mut waits = Vec::new();
    for round in 0..12 {
        let due = set.next_due().unwrap();
        waits.push((due - now).as_millis());
        now = due;
        let mut probes = take(&mut set, now, 99);
        assert_eq!(offsets(&probes), [round % 10], "the oldest goes, and one only");
        assert_eq!(take(&mut set, now + 4999 * MS, 99), [], "until it has come back");
        set.insert(probes.remove(0), later("m1"), now);
    }
    for (wait, whole) in waits
        .iter()
        .zip([50, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000, 5000])
    {
        assert!(*wait >= whole / 2 && *wait <= whole, "{waits:?}");
    }
    let waiting: Vec<_> = set
        .waiting_for()
        .map(|waiting| (waiting.server.to_string(), waiting.keys))
        .collect();
    assert_eq!(waiting, [("m1".to_owned(), 10)]);
}

#[test]
fn a_server_that_answered_releases_all_its_keys_and_only_its() {
    let (mut set, now) = set_of((0..10).map(|i| (event(&i.to_string(), i), later(if i < 6 { "m1" } else { "m2" }))));
    assert_eq!(
        (
            set.server_answered("m3"),
            set.server_answered("m1"),
            set.server_answered("m1")
        ),
        (0, 6, 0)
    );
    assert_eq!(
        (offsets(&take(&mut set, now, 4)), offsets(&take(&mut set, now, 4))),
        (vec![0, 1, 2, 3], vec![4, 5])
    );
    assert_eq!((set.len(), set.waiting_for().count()), (4, 1));

    let then = set.next_due().unwrap();
    let probe = take(&mut set, then, 9).remove(0);
    assert_eq!(set.key_answered(1, &event("7", 0).key), 0, "not the probe");
    assert_eq!((set.key_answered(1, &probe.key), set.waiting_for().count()), (3, 0));
    assert_eq!(set.key_answered(1, &probe.key), 0);
}

#[test]
fn a_server_whose_keys_were_all_parked_has_been_away_ever_since_it_stopped_to_answer() {
    let (mut set, began) = set_of([(event("a", 0), later("m1"))]);
    let since = |set: &DirtySet<Event>| set.waiting_for().next().map(|waiting| waiting.since);
    let mut now = began;
    for _ in 0..3 {
        now += Duration::from_secs(30);
        let mut parked = Vec::new();
        set.take_where(now, 9, |_| true, &mut parked);
        assert_eq!(since(&set), None, "nobody waits");
        now += Duration::from_secs(60);
        set.insert(parked.remove(0), later("m1"), now);
        assert_eq!(since(&set), Some(began));
    }
    set.server_answered("m1");
    set.insert(event("b", 1), later("m1"), now);
    assert_eq!(since(&set), Some(now), "it had answered");
    set.take_where(now, 9, |_| true, &mut Vec::new());
    now += LEFT_COUNTS;
    set.insert(event("c", 2), later("m1"), now);
    assert_eq!(since(&set), Some(now), "nothing was heard of it for too long");
}

#[test]
fn a_probe_that_never_comes_back_does_not_wedge_its_server() {
    let (mut set, now) = set_of([(event("a", 0), later("m1")), (event("b", 1), later("m1"))]);
    assert_eq!(offsets(&take(&mut set, now + 50 * MS, 9)), [0]);
    assert_eq!(set.next_due(), Some(now + 50 * MS + PROBE_LOST));
    assert_eq!(offsets(&take(&mut set, now + 50 * MS + PROBE_LOST, 9)), [1]);
    assert_eq!(take(&mut set, now + 50 * MS + PROBE_LOST * 2, 9), []);
    assert_eq!(
        (set.waiting_for().count(), set.probes.len()),
        (0, 0),
        "and with no key left it is forgotten"
    );
}

#[test]
fn a_probe_that_fails_for_another_reason_lets_the_next_go() {
    let (mut set, now) = set_of([(event("a", 0), later("m1")), (event("b", 1), later("m1"))]);
    let probe = take(&mut set, now + 50 * MS, 9).remove(0);
    set.insert(probe, Dirtied::SessionLost, now + 60 * MS);
    assert_eq!(offsets(&take(&mut set, now + 60 * MS, 9)), [1, 0]);
}

#[test]
fn everything_is_handed_back_when_drained() {
    let (mut set, now) = set_of([
        (event("a", 0), Dirtied::SessionLost),
        (event("b", 1), Dirtied::LookAgain),
        (event("c", 2), Dirtied::SourceAway),
        (event("d", 3), later("m1")),
    ]);
    let mut drained = offsets(&set.drain_all());
    drained.sort_unstable();
    assert_eq!(
        (drained, set.len(), set.next_due(), set.waiting_for().count()),
        (vec![0, 1, 2, 3], 0, None, 0)
    );
    assert_eq!(set.insert(event("a", 5), Dirtied::SessionLost, now), None);
}

#[derive(Clone, Debug)]
enum Step {
    /// A fresh event (or an older one) of a key goes dirty.
    Insert(u8, u64, u8),
    /// One that was taken comes back.
    Return(usize, u8),
    Join(u8, u64),
    Take(usize),
    Wait(u64),
    SourceBack,
    ServerAnswered(u8),
    KeyAnswered(u8),
    /// What has an offset that this divides is parked, so many at most.
    Park(u64, usize),
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => (0u8..12, 0u64..50, 0u8..7).prop_map(|(key, age, why)| Step::Insert(key, age, why)),
        20 => (0usize..8, 0u8..7).prop_map(|(which, why)| Step::Return(which, why)),
        10 => (0u8..12, 0u64..50).prop_map(|(key, age)| Step::Join(key, age)),
        25 => (0usize..6).prop_map(Step::Take),
        25 => (0u64..200).prop_map(Step::Wait),
        2 => (4000u64..9000).prop_map(Step::Wait),
        1 => Just(Step::Wait(100_000)),
        2 => Just(Step::SourceBack),
        3 => (0u8..4).prop_map(Step::ServerAnswered),
        5 => (0u8..12).prop_map(Step::KeyAnswered),
        3 => (2u64..5, 0usize..6).prop_map(|(part, max)| Step::Park(part, max)),
        1 => Just(Step::Drain),
    ]
}

fn reason(why: u8) -> Dirtied {
    match why {
        0 => Dirtied::SessionLost,
        1 | 2 => Dirtied::LookAgain,
        3 => Dirtied::SourceAway,
        server => later(&format!("m{server}")),
    }
}

/// Where a key waits, as one would say it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Waits {
    Not,
    Until(Instant),
    ForSource,
    For(Arc<str>),
}

struct NaiveServer {
    since: Instant,
    due: Instant,
    backoff: Backoff,
    probe: Option<Bytes>,
}

/// The dirty set with no structure at all: one list in the order of waiting, searched from end to end.
struct Naive {
    keys: Vec<(Event, Waits)>,
    servers: BTreeMap<Arc<str>, NaiveServer>,
    /// Since when those did not answer that are remembered no more, and when that was.
    left: BTreeMap<Arc<str>, (Instant, Instant)>,
    /// Only for its numbers.
    random: DirtySet<Event>,
}

impl Naive {
    fn keep_newer(&mut self, at: usize, event: Event) -> Event {
        let held = self.keys[at].0.clone();
        let attempts = held.attempts.max(event.attempts);
        let (newer, older) = if event.offset > held.offset {
            (event, held)
        } else {
            (held, event)
        };
        self.keys[at].0 = Event { attempts, ..newer };
        older
    }

    fn position(&self, key: &Bytes) -> Option<usize> {
        self.keys.iter().position(|(event, _)| event.key == key)
    }

    fn insert(&mut self, event: Event, reason: Dirtied, now: Instant) -> Option<Event> {
        for (name, server) in &mut self.servers {
            if server.probe.as_ref() == Some(&event.key) {
                server.probe = None;
                let random = self.random.next_random();
                let again = matches!(&reason, Dirtied::Later { server } if server == name);
                server.due = if again { now + server.backoff.next(random) } else { now };
            }
        }
        let key = event.key.clone();
        let older = match self.position(&key) {
            Some(at) => Some(self.keep_newer(at, event)),
            None => {
                self.keys.push((event, Waits::ForSource));
                None
            }
        };
        let is_new = older.is_none();
        let at = self.position(&key).unwrap();
        let (mut event, waited) = self.keys.remove(at);
        let waits = match reason {
            Dirtied::SessionLost => Waits::Not,
            Dirtied::SourceAway => Waits::ForSource,
            Dirtied::LookAgain => {
                event.attempts += 1;
                Waits::Until(now + MS * [1, 2, 4, 8, 16, 32, 64, 100][usize::from(event.attempts - 1).min(7)])
            }
            Dirtied::Later { server } => {
                if !self.servers.contains_key(&server) {
                    let mut backoff = LATER;
                    let due = now + backoff.next(self.random.next_random());
                    self.servers.insert(
                        server.clone(),
                        NaiveServer {
                            since: match self.left.get(&server) {
                                Some((since, left)) if now - *left < LEFT_COUNTS => *since,
                                _ => now,
                            },
                            due,
                            backoff,
                            probe: None,
                        },
                    );
                }
                Waits::For(server)
            }
        };
        let stays = !is_new && waits == waited;
        self.keys
            .insert(if stays { at } else { self.keys.len() }, (event, waits));
        self.tidy(now);
        older
    }

    /// A server is remembered while a key waits for it or probes it.
    fn tidy(&mut self, now: Instant) {
        let (keys, left) = (&self.keys, &mut self.left);
        self.servers.retain(|name, server| {
            let stays = server.probe.is_some() || keys.iter().any(|(_, waits)| *waits == Waits::For(name.clone()));
            if !stays {
                left.insert(name.clone(), (server.since, now));
            }
            stays
        });
    }

    fn release(&mut self, which: Waits) -> usize {
        let (mut released, kept): (Vec<_>, Vec<_>) = self.keys.drain(..).partition(|(_, waits)| *waits == which);
        self.keys = kept;
        released.iter_mut().for_each(|(_, waits)| *waits = Waits::Not);
        let count = released.len();
        self.keys.extend(released);
        count
    }

    fn answered(&mut self, server: &str) -> usize {
        self.left.remove(server);
        self.servers
            .remove(server)
            .map_or(0, |_| self.release(Waits::For(server.into())))
    }

    /// What may be taken now: the probes, the keys to look at again, and what is ready, in order.
    fn due(&mut self, now: Instant) -> [Vec<Event>; 3] {
        for server in self.servers.values_mut().filter(|server| server.due <= now) {
            server.probe = None;
        }
        self.tidy(now);
        let pick = |of: &dyn Fn(&Waits) -> bool| {
            self.keys
                .iter()
                .filter(|(_, waits)| of(waits))
                .map(|(event, _)| event.clone())
                .collect::<Vec<_>>()
        };
        let due = self.servers.iter().filter(|(_, server)| server.due <= now);
        let probes = due.filter_map(|(name, _)| pick(&|waits| *waits == Waits::For(name.clone())).into_iter().next());
        let again = pick(&|waits| matches!(waits, Waits::Until(due) if *due <= now));
        [probes.collect(), again, pick(&|waits| *waits == Waits::Not)]
    }

    fn took(&mut self, event: &Event, now: Instant) {
        let (_, waits) = self.keys.remove(self.position(&event.key).unwrap());
        if let Waits::For(name) = waits {
            let server = self.servers.get_mut(&name).unwrap();
            (server.due, server.probe) = (now + PROBE_LOST, Some(event.key.clone()));
        }
    }

    fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.keys.iter().filter_map(|(_, waits)| match waits {
            Waits::Not => Some(now),
            Waits::Until(due) => Some(*due),
            Waits::ForSource => None,
            Waits::For(name) => Some(self.servers[name].due),
        });
        due.min()
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn it_does_what_a_plain_list_would(steps in prop::collection::vec(step(), 1..200), seed in any::<u64>()) {
        let mut set = DirtySet::new(seed);
        let mut naive = Naive { keys: Vec::new(), servers: BTreeMap::new(), left: BTreeMap::new(), random: DirtySet::new(seed) };
        let (mut now, mut offset, mut taken) = (Instant::now(), 100, Vec::new());
        for step in steps {
            offset += 1;
            let fresh = |key: u8, age: u64| event(&key.to_string(), offset * 2 - age * 3);
            match step {
                Step::Insert(key, age, why) => {
                    let event = fresh(key, age);
                    prop_assert_eq!(set.insert(event.clone(), reason(why), now), naive.insert(event, reason(why), now));
                }
                Step::Return(which, why) if which < taken.len() => {
                    let event: Event = taken.swap_remove(which);
                    prop_assert_eq!(set.insert(event.clone(), reason(why), now), naive.insert(event, reason(why), now));
                }
                Step::Return(..) => {}
                Step::Join(key, age) => {
                    let event = fresh(key, age);
                    let joined = naive.position(&event.key).map(|at| naive.keep_newer(at, event.clone()));
                    prop_assert_eq!(set.join(event.clone()), joined.ok_or(event));
                }
                Step::Take(max) => {
                    let due = naive.due(now);
                    let out = take(&mut set, now, max);
                    prop_assert_eq!(out.len(), max.min(due.iter().map(Vec::len).sum()));
                    let classes = out.iter().map(|event| due.iter().position(|class| class.contains(event)));
                    prop_assert!(classes.clone().all(|class| class.is_some()), "{:?} of {:?}", out, due);
                    prop_assert!(classes.is_sorted(), "probes, then again, then ready");
                    let ready: Vec<_> = out.iter().filter(|event| due[2].contains(event)).collect();
                    prop_assert!(ready.iter().zip(&due[2]).all(|(got, want)| *got == want), "ready keys in order");
                    out.iter().for_each(|event| naive.took(event, now));
                    taken.extend(out);
                }
                Step::Wait(ms) => now += Duration::from_millis(ms),
                Step::SourceBack => prop_assert_eq!(set.source_back(), naive.release(Waits::ForSource)),
                Step::ServerAnswered(server) => {
                    let server = format!("m{}", server + 4);
                    prop_assert_eq!(set.server_answered(&server), naive.answered(&server));
                }
                Step::KeyAnswered(key) => {
                    let key = fresh(key, 0).key;
                    let mut probed = naive.servers.iter().filter(|(_, server)| server.probe.as_ref() == Some(&key));
                    let server = probed.next().map(|(name, _)| name.clone());
                    prop_assert_eq!(set.key_answered(1, &key), server.map_or(0, |name| naive.answered(&name)));
                }
                Step::Park(part, max) => {
                    let parked = |event: &Event| event.offset.is_multiple_of(part);
                    let mut out = Vec::new();
                    set.take_where(now, max, parked, &mut out);
                    let wanted = naive.keys.iter().filter(|(event, _)| parked(event)).count();
                    prop_assert_eq!(out.len(), wanted.min(max));
                    for event in out {
                        prop_assert!(parked(&event));
                        let at = naive.position(&event.key).unwrap();
                        prop_assert_eq!(naive.keys.remove(at).0, event);
                    }
                    naive.tidy(now);
                }
                Step::Drain => {
                    let (mut all, mut want) = (set.drain_all(), naive.keys.drain(..).map(|(event, _)| event).collect::<Vec<_>>());
                    all.sort_by_key(|event| event.key.clone());
                    want.sort_by_key(|event| event.key.clone());
                    prop_assert_eq!(all, want);
                    naive.servers.clear();
                    naive.left.clear();
                    naive.random = DirtySet::new(naive.random.next_random());
                }
            }
            prop_assert_eq!((set.len(), set.is_empty()), (naive.keys.len(), naive.keys.is_empty()));
            prop_assert!((0..12).map(|key| event(&key.to_string(), 0).key).all(|key| set.contains(1, &key) == naive.position(&key).is_some()));
            prop_assert_eq!(set.next_due().map(|due| due.max(now)), naive.next_due(now).map(|due| due.max(now)));
            let mut waiting: Vec<_> = set.waiting_for().map(|it| (it.server.clone(), it.keys, it.since)).collect();
            waiting.sort();
            let wanted: Vec<_> = naive.servers.iter().map(|(name, server)| {
                (name.clone(), naive.keys.iter().filter(|(_, waits)| *waits == Waits::For(name.clone())).count(), server.since)
            }).collect();
            prop_assert_eq!(waiting, wanted);
        }
    }
}

#[test]
fn one_key_asks_whether_the_source_is_back_while_the_others_wait_on() {
    let (mut set, now) = set_of([
        (event("a", 1), Dirtied::SourceAway),
        (event("b", 2), Dirtied::SourceAway),
    ]);
    assert_eq!(set.take_source_probe().unwrap().offset, 1);
    assert!(take(&mut set, now, 9).is_empty());
    assert_eq!((set.waiting_for_source(), set.len()), (1, 1));
    assert_eq!(set.take_source_probe().unwrap().offset, 2);
    assert!(set.take_source_probe().is_none());
}
