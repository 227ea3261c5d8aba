//! Relays, links, an agent and its memcached servers, in simulated microseconds.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::Duration;

use evrepl::stamps::{SessionId, Verdict};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::time::Instant;

use crate::tables::{Rule, Table};

const KEYS: usize = 8;
const WRITES: usize = 60;
pub const SERVERS: usize = 2;
/// A run takes a tenth of this; one that takes all of it never settles.
const MAX_STEPS: u64 = 50_000;

/// What travels. A value is the number of the write that made it, so a smaller one is older.
#[derive(Clone, Debug)]
pub struct Item {
    pub relay: usize,
    /// Which of the relay's sessions, and which agent's life, it belongs to.
    pub life: u32,
    pub agent_life: u32,
    pub session: SessionId,
    pub key: usize,
    pub value: u32,
    pub looked_at: u64,
    pub clock: i64,
}

enum Event {
    Write {
        key: usize,
    },
    Look {
        relay: usize,
        key: usize,
    },
    /// The source server runs the read; its answer is seen at `seen`.
    Read {
        item: Item,
        seen: u64,
    },
    Seen {
        item: Item,
    },
    Arrive {
        item: Item,
    },
    /// memcached runs one command of a batch, whoever still waits for it.
    Run {
        key: usize,
        value: u32,
    },
    /// The batch is over: answered, or its connection died and nothing of it can run any more.
    Over {
        agent_life: u32,
        server: usize,
        answered: bool,
    },
    StartBatch {
        agent_life: u32,
        server: usize,
    },
    Ack {
        item: Item,
        applied: bool,
        tick: u64,
    },
    Cut {
        relay: usize,
    },
    LinkLost {
        relay: usize,
        life: u32,
    },
    Hello {
        relay: usize,
        life: u32,
    },
    HelloAck {
        relay: usize,
        life: u32,
        agent_life: u32,
        session: SessionId,
        tick: u64,
    },
    RestartAgent,
}

#[derive(Default)]
struct Relay {
    life: u32,
    session: Option<(u32, SessionId)>,
    heard: u64,
    /// Keys looked at and not yet acked in this session, once per look.
    open: Vec<usize>,
    dirty: BTreeSet<usize>,
    clock_skew: i64,
}

struct CacheWriter {
    table: Table,
    pending: VecDeque<Item>,
    batch: Vec<Item>,
    /// Until when commands of the batch may run, even if nobody waits.
    runs_until: u64,
    not_before: u64,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub differs: bool,
    pub stepped_back: bool,
    pub unsettled: bool,
    pub refused: u32,
    pub applied: u32,
    pub unknown: u32,
    pub abandoned: u32,
    pub resessioned: u32,
    pub restarts: u32,
}

impl Seen {
    pub fn wrong(&self) -> bool {
        self.differs || self.stepped_back || self.unsettled
    }
}

pub struct World {
    rule: Rule,
    random: StdRng,
    begin: Instant,
    now: u64,
    steps: u64,
    events: BTreeMap<(u64, u64), Event>,
    /// What shares a connection keeps its order: the latest time given out for each.
    in_order: HashMap<(&'static str, usize, u32), u64>,
    source: [u32; KEYS],
    destination: [u32; KEYS],
    relays: Vec<Relay>,
    agent_life: u32,
    sessions: SessionId,
    tick: u64,
    writers: Vec<CacheWriter>,
    seen: Seen,
}

impl World {
    fn new(rule: Rule, seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let relays = random.random_range(2..5);
        let relays = (0..relays).map(|_| Relay {
            clock_skew: random.random_range(-20_000..20_000),
            ..Relay::default()
        });
        let relays = relays.collect();
        let writer = |_| CacheWriter {
            table: Table::new(rule),
            pending: VecDeque::new(),
            batch: Vec::new(),
            runs_until: 0,
            not_before: 0,
        };
        Self {
            rule,
            random,
            begin: Instant::now(),
            now: 0,
            steps: 0,
            events: BTreeMap::new(),
            in_order: HashMap::new(),
            source: [0; KEYS],
            destination: [0; KEYS],
            relays,
            agent_life: 0,
            sessions: 0,
            tick: 0,
            writers: (0..SERVERS).map(writer).collect(),
            seen: Seen::default(),
        }
    }

    /// One run: 60 writes in about 120 ms with cut links and restarts among them, then until all is quiet.
    pub fn run(rule: Rule, seed: u64) -> Seen {
        let mut world = World::new(rule, seed);
        for relay in 0..world.relays.len() {
            world.at(0, Event::Hello { relay, life: 0 });
        }
        let mut time = 0;
        for _ in 0..WRITES {
            time += world.between(0, 4_000);
            let key = world.random.random_range(0..KEYS);
            world.at(time, Event::Write { key });
        }
        for _ in 0..world.random.random_range(0..5) {
            let (at, relay) = (
                world.between(0, 200_000),
                world.random.random_range(0..world.relays.len()),
            );
            world.at(at, Event::Cut { relay });
        }
        for _ in 0..world.random.random_range(0..3) {
            let at = world.between(0, 200_000);
            world.at(at, Event::RestartAgent);
        }
        while let Some(((at, _), event)) = world.events.pop_first() {
            if world.steps > MAX_STEPS {
                world.seen.unsettled = true;
                break;
            }
            world.now = at;
            world.happen(event);
        }
        world.seen.unsettled |= world
            .relays
            .iter()
            .any(|relay| !relay.open.is_empty() || !relay.dirty.is_empty());
        world.seen.differs = world.source != world.destination;
        world.seen
    }

    fn at(&mut self, time: u64, event: Event) {
        self.steps += 1;
        self.events.insert((time, self.steps), event);
    }

    /// A time from now, in microseconds.
    fn after(&mut self, choices: &[u64]) -> u64 {
        self.now + choices[self.random.random_range(0..choices.len())]
    }

    fn between(&mut self, least: u64, most: u64) -> u64 {
        self.random.random_range(least..=most)
    }

    fn in_order(&mut self, connection: (&'static str, usize, u32), time: u64) -> u64 {
        let last = self.in_order.entry(connection).or_default();
        *last = time.max(*last);
        *last
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Write { key } => {
                self.source[key] += 1;
                let at = self.now + self.between(0, 10_000);
                // Any relay: partitions move, and writers partition as they like. Now and then two: a replay.
                for _ in 0..=u8::from(self.random.random_ratio(1, 4)) {
                    let relay = self.random.random_range(0..self.relays.len());
                    self.at(at, Event::Look { relay, key });
                }
            }
            Event::Look { relay, key } => self.look(relay, key),
            Event::Read { mut item, seen } => {
                item.value = self.source[item.key];
                self.at(seen, Event::Seen { item });
            }
            Event::Seen { item } => self.ship(item),
            Event::Arrive { item } if item.agent_life == self.agent_life => {
                let server = item.key % SERVERS;
                self.writers[server].pending.push_back(item);
                self.start_batch(server);
            }
            Event::Run { key, value } => {
                self.seen.stepped_back |= value < self.destination[key];
                self.destination[key] = value;
            }
            Event::Over {
                agent_life,
                server,
                answered,
            } if agent_life == self.agent_life => {
                self.tick += 1;
                self.writers[server].table.written(self.tick);
                for item in std::mem::take(&mut self.writers[server].batch) {
                    self.ack(item, answered);
                }
                self.start_batch(server);
            }
            Event::StartBatch { agent_life, server } if agent_life == self.agent_life => self.start_batch(server),
            Event::Ack { item, applied, tick } if item.life == self.relays[item.relay].life => {
                let relay = &mut self.relays[item.relay];
                relay.heard = relay.heard.max(tick);
                let open = relay
                    .open
                    .iter()
                    .position(|key| *key == item.key)
                    .expect("an ack for an open look");
                relay.open.swap_remove(open);
                if !applied {
                    self.at(
                        self.now + 1_000,
                        Event::Look {
                            relay: item.relay,
                            key: item.key,
                        },
                    );
                }
            }
            Event::Cut { relay } => self.end_session(relay),
            Event::LinkLost { relay, life } if life == self.relays[relay].life => self.end_session(relay),
            Event::Hello { relay, life } if life == self.relays[relay].life => {
                self.sessions += 1;
                let (session, tick, agent_life) = (self.sessions, self.tick, self.agent_life);
                let at = self.after(&[1_000, 20_000]);
                self.at(
                    at,
                    Event::HelloAck {
                        relay,
                        life,
                        agent_life,
                        session,
                        tick,
                    },
                );
            }
            Event::HelloAck {
                relay,
                life,
                agent_life,
                session,
                tick,
            } if life == self.relays[relay].life => {
                let keep = self.rule == Rule::TickOutlivesSession;
                let it = &mut self.relays[relay];
                it.session = Some((agent_life, session));
                it.heard = if keep { it.heard.max(tick) } else { tick };
                for key in std::mem::take(&mut it.dirty) {
                    self.look(relay, key);
                }
            }
            Event::RestartAgent => self.restart_agent(),
            // What belongs to a session or an agent that is gone falls on the floor.
            _ => {}
        }
    }

    /// The stamp is taken, then the read is sent; the server runs it some time before its answer is seen.
    fn look(&mut self, relay: usize, key: usize) {
        let it = &mut self.relays[relay];
        let Some((agent_life, session)) = it.session else {
            it.dirty.insert(key);
            return;
        };
        it.open.push(key);
        let clock = self.now as i64 + it.clock_skew;
        let item = Item {
            relay,
            life: it.life,
            agent_life,
            session,
            key,
            value: 0,
            looked_at: it.heard,
            clock,
        };
        let answer = self.after(&[300, 500, 1_000, 20_000, 60_000]);
        let seen = self.in_order(("answer", relay, key as u32), answer);
        let run = self.between(self.now, seen);
        let run = self.in_order(("read", relay, key as u32), run).min(seen);
        self.at(run, Event::Read { item, seen });
    }

    fn ship(&mut self, mut item: Item) {
        let relay = &mut self.relays[item.relay];
        if item.life != relay.life {
            // Its key went dirty when the session ended.
            let Some((agent_life, session)) = relay.session.filter(|_| self.rule == Rule::LooksOutliveSession) else {
                return;
            };
            (item.life, item.agent_life, item.session) = (relay.life, agent_life, session);
            relay.open.push(item.key);
        }
        if self.rule == Rule::StampedLate {
            item.looked_at = relay.heard;
        }
        // Now and then a relay freezes and wakes up.
        let arrival = if self.random.random_ratio(1, 50) {
            self.now + 300_000
        } else {
            self.after(&[200, 1_000, 5_000, 50_000])
        };
        let at = self.in_order(("link", item.relay, item.life), arrival);
        self.at(at, Event::Arrive { item });
    }

    /// One batch at a time per server, of what has come meanwhile from all sessions.
    fn start_batch(&mut self, server: usize) {
        let now = self.begin + Duration::from_micros(self.now);
        let (agent_life, not_before) = (self.agent_life, self.writers[server].not_before);
        if self.now < not_before {
            return self.at(not_before, Event::StartBatch { agent_life, server });
        }
        while self.writers[server].batch.is_empty() && !self.writers[server].pending.is_empty() {
            for _ in 0..self.between(1, 6) {
                let writer = &mut self.writers[server];
                let Some(item) = writer.pending.pop_front() else { break };
                match writer.table.admit(&item, now) {
                    Verdict::Apply => writer.batch.push(item),
                    Verdict::LookAgain => {
                        self.seen.refused += 1;
                        self.ack(item, false);
                    }
                }
            }
            if !self.writers[server].batch.is_empty() && self.random.random_ratio(1, 20) {
                self.seen.abandoned += 1;
                self.writers[server].table.abandoned();
                for item in std::mem::take(&mut self.writers[server].batch) {
                    self.ack(item, false);
                }
            } else if !self.writers[server].batch.is_empty() {
                self.send_batch(server);
            }
        }
    }

    /// The commands run in order some time before the batch is over; of one whose result is unknown only the first few.
    fn send_batch(&mut self, server: usize) {
        let answered = !self.random.random_ratio(1, 15);
        let over = if answered {
            self.after(&[200, 300, 1_000, 15_000])
        } else {
            self.after(&[20_000, 100_000])
        };
        self.seen.unknown += u32::from(!answered);
        let batch: Vec<_> = self.writers[server]
            .batch
            .iter()
            .map(|item| (item.key, item.value))
            .collect();
        let runs = if answered {
            batch.len()
        } else {
            self.random.random_range(0..=batch.len())
        };
        let mut times: Vec<_> = (0..runs).map(|_| self.between(self.now, over)).collect();
        times.sort_unstable();
        for ((key, value), time) in batch.into_iter().zip(times) {
            self.at(time, Event::Run { key, value });
        }
        self.writers[server].runs_until = over;
        self.at(
            over,
            Event::Over {
                agent_life: self.agent_life,
                server,
                answered,
            },
        );
    }

    fn ack(&mut self, item: Item, applied: bool) {
        self.seen.applied += u32::from(applied);
        let at = self.after(&[200, 500, 2_000, 20_000]);
        let at = self.in_order(("ack", item.relay, item.life), at);
        self.at(
            at,
            Event::Ack {
                item,
                applied,
                tick: self.tick,
            },
        );
    }

    /// What the relay had, sent or not, becomes dirty keys; what is on the way may still arrive.
    fn end_session(&mut self, relay: usize) {
        self.seen.resessioned += 1;
        let it = &mut self.relays[relay];
        it.life += 1;
        it.session = None;
        it.dirty.extend(it.open.drain(..));
        let (life, at) = (it.life, self.now + self.between(1_000, 30_000));
        self.at(at, Event::Hello { relay, life });
    }

    /// Table, ticks and sessions start anew; a batch in flight still runs, and the new agent waits until it has.
    fn restart_agent(&mut self) {
        self.seen.restarts += 1;
        self.agent_life += 1;
        (self.tick, self.sessions) = (0, 0);
        for writer in &mut self.writers {
            if !writer.batch.is_empty() && self.rule != Rule::NotSettled {
                writer.not_before = writer.runs_until + 1;
            }
            writer.table = Table::new(self.rule);
            writer.pending.clear();
            writer.batch.clear();
        }
        for relay in 0..self.relays.len() {
            let (life, at) = (self.relays[relay].life, self.now + self.between(500, 20_000));
            self.at(at, Event::LinkLost { relay, life });
        }
    }
}
