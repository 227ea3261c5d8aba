//! Under a steady stream of writes actors panic, processes are replaced in order, and one is frozen past its session: every key
//! ends equal, none steps back on the way, and the accounts are balanced.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use evrepl_lab::faults::history::check;
use evrepl_lab::faults::load::{Load, LoadControl, LoadSpec};
use evrepl_lab::faults::watcher::Watchers;
use evrepl_lab::*;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

const EU: &str = "eu-west-1";

const COMMITS: &str = "[kafka]\ncommit_interval = \"10ms\"\n";

/// A writer in one region and a reader in the other.
struct Stream<'a> {
    to: &'a Region,
    load: Load,
    watchers: Watchers,
}

impl<'a> Stream<'a> {
    fn start(from: &Region, to: &'a Region, rate: u32) -> Stream<'a> {
        let spec = LoadSpec {
            rate,
            ..LoadSpec::default()
        };
        let (watchers, mut senders) = Watchers::start(to.cache("sessions"), spec);
        let sender = senders.remove(0);
        let tell = Box::new(move |key, at| _ = sender.send((key, at)));
        let load = Load::start(spec, 7, Arc::new(LoadControl::default()), from.writer("sessions"), tell);
        Stream { to, load, watchers }
    }

    /// Ends it: nothing stepped back, and both regions hold the same. Gives the p50 and p99 of the keys written once.
    fn finish(self, from: &Region, settled: impl FnOnce()) -> (Duration, Duration) {
        let history = self.load.finish().unwrap();
        settled();
        let keys: Vec<String> = history.keys().iter().map(ToString::to_string).collect();
        assert_same(&[from, self.to], "sessions", &keys);
        let watched = self.watchers.finish();
        let mut waits = Vec::new();
        for watched in watched {
            let violations = check(&history, &watched.sightings, &[]);
            assert!(
                violations.is_empty(),
                "{}, the first: {:?}",
                violations.len(),
                violations.first()
            );
            assert_eq!(watched.awaited, 0, "keys written once never came");
            waits.extend(watched.arrivals.iter().map(|one| one.seen - one.written));
        }
        waits.sort_unstable();
        println!("{} writes, {} of keys written once", history.writes(), waits.len());
        let at = |share: usize| waits[waits.len() * share / 100];
        (at(50), at(99))
    }
}

#[test]
fn a_panic_of_every_kind_of_actor_under_load_loses_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().lanes(2).extra(COMMITS).build();
    pair.both().into_iter().for_each(Region::start);
    let sampler = Sampler::start(&pair.both());
    let stream = Stream::start(&pair.us, &pair.eu, 1_000);
    // A process each, so that none has to be timed by what another one does; each has been at work for a moment.
    let relay = [
        ("partition_consumer", "partition_consumer_chunk=20*off"),
        ("cache_reader", "cache_reader_read=50*off"),
        ("batch_coalescer", "batch_coalescer_advance=50*off"),
        ("remote_link", "remote_link_ship=20*off"),
        ("flow_supervisor", "flow_supervisor_watch=20*off"),
    ];
    // The listener over the second lane's session; a session just ends and is counted nowhere.
    let agent = [
        ("agent_listener", "agent_listener_accept=1*off"),
        ("agent_session", "agent_session_batch=20*off"),
        ("cache_writer", "cache_writer_apply=20*off"),
    ];
    let both = relay
        .map(|it| (&pair.us, it))
        .into_iter()
        .chain(agent.map(|it| (&pair.eu, it)));
    for (region, (actor, failpoint)) in both {
        assert_eq!(region.terminate(), 0, "{}", region.log_tail(20));
        let panics = region.log().matches("panicked at").count();
        region.set_env("FAILPOINTS", Some(&format!("{failpoint}->1*panic(a test)->off")));
        region.start();
        wait_until(&format!("{actor} has panicked"), LIMIT, || {
            region.log().matches("panicked at").count() == panics + 1
        });
        let restarts = match actor {
            "agent_session" => json!({}),
            _ => json!({ actor: 1 }),
        };
        region.wait_until("what panicked was restarted", LIMIT, |status| {
            status["restarts"] == restarts
        });
        let before = pair.us.flow(EU).finished();
        pair.us.wait_until("events are finished", LIMIT, |status| {
            flows(status).is_ok_and(|flows| flows[0].finished() > before + 300)
        });
        assert_eq!(region.status()["restarts"], restarts);
    }
    sampler.finish();
    for region in pair.both() {
        balanced(&region.status()).unwrap();
    }

    // The ninth is the root: nobody is above it, so the process ends, and the next one does the work.
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
    pair.us.set_env(
        "FAILPOINTS",
        Some("region_supervisor_watch=30*off->1*panic(a test)->off"),
    );
    pair.us.start();
    assert_eq!(pair.us.exit_code(LIMIT), Some(70), "{}", pair.us.log_tail(20));
    pair.us.set_env("FAILPOINTS", None);
    pair.us.start();
    let (p50, p99) = stream.finish(&pair.us, || settle(&pair.both()));
    println!("with nine panics: p50 {p50:?}, p99 {p99:?}");
    for region in pair.both() {
        balanced(&region.status()).unwrap();
    }
}

#[test]
fn a_rolling_restart_of_both_regions_under_load_loses_nothing_and_steps_nothing_back() {
    let _gate = exclusive();
    let pair = TwoRegionsSpec::new().extra(COMMITS).start();
    let second = pair.us.another_node("relay-2");
    second.start();
    let group = pair.us.group(EU);
    let members = || pair.us.kafka().group(&group);
    let two = || {
        wait_until("both relays share the group", LIMIT, || {
            members() == Some(("Stable".into(), 2))
        })
    };
    two();
    let sampler = Sampler::start(&[&pair.us, &second, &pair.eu]);
    let stream = Stream::start(&pair.us, &pair.eu, 1_000);
    let goes_on = || {
        let finished = || -> u64 {
            let nodes = [&pair.us, &second].into_iter().filter_map(Region::try_status);
            let flows = nodes.filter_map(|status| flows(&status).ok());
            flows.map(|flows| flows[0].finished()).sum()
        };
        let before = finished();
        wait_until("events are finished", LIMIT, || finished() > before + 500);
    };
    goes_on();
    for round in 1..=2 {
        for region in [&pair.us, &second, &pair.eu] {
            let told = Instant::now();
            let code = region.terminate();
            println!(
                "round {round}: {} of {} drained in {:?}",
                region.node(),
                region.name(),
                told.elapsed()
            );
            assert_eq!(
                code,
                0,
                "{} of {}\n{}",
                region.node(),
                region.name(),
                region.log_tail(30)
            );
            region.start();
            two();
            goes_on();
        }
    }
    let (p50, p99) = stream.finish(&pair.us, || settle(&[&pair.us, &second, &pair.eu]));
    println!("with six processes replaced, one by one: p50 {p50:?}, p99 {p99:?}");
    sampler.finish();
}

/// True once it is dropped, also by a test that fails: the thread that looks at it ends.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

#[test]
fn a_frozen_relay_that_wakes_up_behind_its_successor_commits_nothing_back_and_steps_nothing_back() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(COMMITS).proxied().start();
    // So far apart that it is frozen with work in its hands.
    pair.us_to_eu().latency(Duration::from_millis(20));
    let second = pair.us.another_node("relay-2");
    second.start();
    let (group, kafka) = (pair.us.group(EU), pair.us.kafka());
    let topic = &pair.us.cache("sessions").topic;
    let members = |number: usize| {
        wait_until("the group has its members", LIMIT, || {
            kafka.group(&group) == Some(("Stable".into(), number))
        })
    };
    members(2);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Whoever commits, and whenever: no partition's offset ever goes back.
        let commits = scope.spawn(|| {
            let (mut highest, mut looks, mut back) = (HashMap::new(), 0, Vec::new());
            while !over.load(Relaxed) {
                for (partition, committed) in kafka.committed(&group, topic) {
                    let reached = highest.entry(partition).or_insert(None);
                    if committed < *reached {
                        back.push(format!("{partition}: from {reached:?} to {committed:?}"));
                    }
                    *reached = committed.max(*reached);
                }
                looks += 1;
                thread::sleep(Duration::from_millis(20));
            }
            (looks, back)
        });
        let done = Over(&over);
        let stream = Stream::start(&pair.us, &pair.eu, 1_000);
        pair.us.wait_until("it has work in its hands", LIMIT, |status| {
            flows(status).is_ok_and(|flows| flows[0].finished() > 500 && flows[0].in_flight > 0)
        });
        pair.us.freeze();
        // Its session times out, and the other one takes all partitions over, with what it had not committed.
        members(1);
        let before = second.flow(EU).finished();
        second.wait_until("the other one does all of the work", LIMIT, |status| {
            flows(status).is_ok_and(|flows| flows[0].finished() > before + 3_000)
        });
        pair.us.thaw();
        members(2);
        let before = pair.us.flow(EU).finished();
        pair.us.wait_until("it works again", LIMIT, |status| {
            flows(status).is_ok_and(|flows| flows[0].finished() > before + 500)
        });
        // It was no stage's fault: nothing is restarted for it.
        assert_eq!(pair.us.status()["restarts"], json!({}));
        stream.finish(&pair.us, || settle(&[&pair.us, &second, &pair.eu]));
        drop(done);
        let (looks, back) = commits.join().unwrap();
        println!("{looks} looks at the committed offsets");
        assert_eq!(back, Vec::<String>::new());
    });
    for region in [&pair.us, &second] {
        balanced(&region.status()).unwrap();
    }
}
