//! What breaks inside is rebuilt from the committed offsets, and counted; what is merely away is waited for, and is not.
//! Panics come from failpoints, which only a build with the feature `failpoints` has.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use evrepl::outcome::Outcome;
use evrepl_lab::*;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

const EU: &str = "eu-west-1";

/// Writes while an actor panics: enough chunks, reads and batches for the panic to come in the middle.
const WRITES: usize = 20_000;

/// Writes all keys in pieces, so that they make many chunks.
fn write_all(region: &Region, keys: &[String], value: &str) {
    region.writer("sessions").set_in_pieces(keys, value);
}

fn restarts(region: &Region) -> BTreeMap<String, u64> {
    serde_json::from_value(region.status()["restarts"].clone()).unwrap()
}

fn no_restarts(region: &Region) {
    assert_eq!(restarts(region), BTreeMap::new(), "{} counted restarts", region.name());
}

/// How often the log says that something was rebuilt.
fn rebuilds(region: &Region) -> usize {
    region.log().matches("actor is gone, rebuilding").count()
}

/// `actor` panics once at its failpoint, in the middle of writes.
fn a_panic_rebuilds_the_flow(failpoint: &'static str, actor: &str) {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .lanes(2)
        // Commits all the time: a rebuilt flow begins close behind what is finished, not at the beginning of everything.
        .extra("[kafka]\ncommit_interval = \"10ms\"")
        .us(move |us| us.env("FAILPOINTS", &format!("{failpoint}=10*off->1*panic(a test)->off")))
        .start();
    let sampler = Sampler::start(&[&pair.us]);
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    pair.us.wait_until("the flow was rebuilt", LIMIT, |status| {
        status["restarts"] == json!({ actor: 1 })
    });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    sampler.finish();
    // What the old flow held was released, and what it had finished without a commit is consumed once more: nothing was passed
    // over, by Kafka's own offsets too.
    let flow = pair.us.flow(EU);
    let released = flow.outcome(Outcome::Released);
    assert!(flow.consumed - released >= WRITES as u64, "{:#}", flow.json);
    assert_eq!(flow.consumed, flow.finished(), "{:#}", flow.json);
    assert_eq!(restarts(&pair.us), BTreeMap::from([(actor.to_string(), 1)]));
    assert_eq!(rebuilds(&pair.us), 1);
    let released = pair.us.flow(EU).outcome(Outcome::Released);
    assert!(
        released > 0,
        "the flow had nothing in its hands: the panic came too early to show anything"
    );
}

#[test]
fn a_panic_of_a_partition_consumer_rebuilds_its_flow_and_loses_nothing() {
    a_panic_rebuilds_the_flow("partition_consumer_chunk", "partition_consumer");
}

#[test]
fn a_panic_of_a_cache_reader_rebuilds_its_flow_and_loses_nothing() {
    a_panic_rebuilds_the_flow("cache_reader_read", "cache_reader");
}

#[test]
fn a_panic_of_a_batch_coalescer_rebuilds_its_flow_and_loses_nothing() {
    a_panic_rebuilds_the_flow("batch_coalescer_advance", "batch_coalescer");
}

#[test]
fn a_panic_of_a_remote_link_rebuilds_its_flow_and_loses_nothing() {
    a_panic_rebuilds_the_flow("remote_link_ship", "remote_link");
}

#[test]
fn a_panic_of_a_cache_writer_rebuilds_the_agent_and_loses_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .eu(|eu| {
            eu.set("agent.threads", "3")
                .env("FAILPOINTS", "cache_writer_apply=10*off->1*panic(a test)->off")
        })
        .start();
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    pair.eu.wait_until("the agent was rebuilt", LIMIT, |status| {
        status["restarts"] == json!({ "cache_writer": 1 })
    });
    // The flow the other way goes on.
    write_all(&pair.eu, &["from eu".to_string()], "value");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    assert_same(&pair.both(), "sessions", &["from eu"]);
    accounted(&pair.both());
    sampler.finish();
    assert_eq!(rebuilds(&pair.eu), 1);
    no_restarts(&pair.us);
    assert!(
        pair.us.flow(EU).json["reconnects"].as_u64() > Some(0),
        "its session should have ended"
    );
}

#[test]
fn a_panic_of_a_session_ends_that_session_only_and_loses_nothing() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .lanes(2)
        .eu(|eu| {
            eu.set("agent.threads", "2")
                .env("FAILPOINTS", "agent_session_batch=10*off->1*panic(a test)->off")
        })
        .start();
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    pair.us
        .wait_until("one of the links has a new session", LIMIT, |status| {
            status["flows"][0]["reconnects"] == 1
        });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    accounted(&pair.both());
    sampler.finish();
    pair.both().into_iter().for_each(no_restarts);
    assert_eq!(
        pair.us.flow(EU).json["reconnects"],
        1,
        "the other lane's session went on"
    );
    assert_eq!(pair.eu.status()["agent"]["sessions"].as_array().map(Vec::len), Some(2));
}

/// More restarts than this end the process, in the tests of giving up.
const MAX_RESTARTS: usize = 3;

/// Panics without end lead to exit code 70, after exactly so many restarts; the next process does the work.
fn panics_without_end_give_up(failpoint: &str, of: fn(&TwoRegions) -> &Region, restarts: usize) {
    let _gate = shared();
    let limit = format!("[supervision]\nmax_restarts = {MAX_RESTARTS}\nwithin = \"1m\"");
    let pair = TwoRegionsSpec::new().one_way().extra(&limit).build();
    let broken = of(&pair);
    broken.set_env("FAILPOINTS", Some(&format!("{failpoint}=panic(a test)")));
    pair.both().into_iter().for_each(Region::start);
    let keys = numbered("key", 2_000);
    write_all(&pair.us, &keys, "value");
    assert_eq!(broken.exit_code(LIMIT), Some(70), "{}", broken.log_tail(20));
    assert_eq!(rebuilds(broken), restarts);
    assert!(broken.log().contains("too many restarts, giving up"));
    broken.set_env("FAILPOINTS", None);
    broken.start();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    balanced(&pair.us.status()).unwrap();
}

#[test]
fn a_flow_that_panics_without_end_ends_the_process_with_exit_code_70() {
    // From the third on suspects are on trial, and of those every second one counts.
    panics_without_end_give_up("remote_link_ship", |pair| &pair.us, MAX_RESTARTS + 2);
}

#[test]
fn an_agent_that_panics_without_end_ends_the_process_with_exit_code_70() {
    panics_without_end_give_up("cache_writer_apply", |pair| &pair.eu, MAX_RESTARTS + 1);
}

/// Whether `/readyz?verbose` has a failed check whose line names this.
fn says_failed(region: &Region, what: &str) -> bool {
    region.get("/readyz?verbose").is_ok_and(|(_, body)| {
        body.lines()
            .any(|line| line.starts_with("[failed]") && line.contains(what))
    })
}

fn says_nothing_failed(region: &Region) -> bool {
    region
        .get("/readyz?verbose")
        .is_ok_and(|(code, body)| code == 200 && !body.contains("[failed]"))
}

#[test]
fn a_peer_a_memcached_or_a_kafka_that_is_down_for_a_while_never_counts_as_a_restart() {
    let _gate = shared();
    let own = Broker::start();
    let kafka = own.client();
    // The first restart that is counted would end the process.
    let pair = TwoRegionsSpec::new()
        .extra("[supervision]\nmax_restarts = 0")
        .us(move |us| us.kafka(&kafka))
        .start();
    let sampler = Sampler::start(&pair.both());
    let written = |round: &str| {
        let keys = numbered(round, 1_000);
        write_all(&pair.us, &keys, round);
        keys
    };
    let arrived = |keys: &[String]| {
        settle(&[&pair.us]);
        assert_same(&pair.both(), "sessions", keys);
    };
    arrived(&written("at first"));

    pair.eu.kill();
    let keys = written("without the peer");
    wait_until("us says that the peer is away", LIMIT, || {
        says_failed(&pair.us, "peer eu-west-1")
    });
    pair.eu.start();
    arrived(&keys);

    for region in [&pair.eu, &pair.us] {
        let memcached = region.cache("sessions").memcached(0);
        memcached.kill();
        if region.name() == EU {
            written("without the peer's memcached");
        } else {
            // The source is away, so there is nothing to write to: the event alone, as if the write had come just before.
            kafka_event(region, "without a value");
        }
        wait_until("the region says that its memcached is away", LIMIT, || {
            says_failed(region, &format!("memcached {}", memcached.address()))
        });
        memcached.restart();
        settle(&[&pair.us]);
    }
    arrived(&written("with both memcacheds again"));

    own.kill();
    wait_until("us says that kafka is away", LIMIT, || {
        says_failed(&pair.us, "kafka us-east-1->eu-west-1")
    });
    own.start_again();
    // Also while nobody writes anything.
    wait_until("us says that kafka is well", LIMIT, || says_nothing_failed(&pair.us));
    arrived(&written("with kafka again"));
    for region in pair.both() {
        wait_until("everything is well again", LIMIT, || says_nothing_failed(region));
        no_restarts(region);
        assert_eq!(rebuilds(region), 0);
    }
    // Not the strict sum: a broker that comes back may fence us, and what was finished but not committed is read again.
    sampler.finish();
}

/// An event for a key, whatever memcached does.
fn kafka_event(region: &Region, key: &str) {
    let event = Op::Set.event(Format::MessagePack);
    region
        .kafka()
        .produce(&region.cache("sessions").topic, None, key.as_bytes(), event, &[]);
}

/// A region whose peer is dead, with work in its hands.
fn with_work_left(grace_period: &str) -> (TwoRegions, Vec<String>) {
    let pair = TwoRegionsSpec::new()
        .one_way()
        .us({
            let grace_period = format!("\"{grace_period}\"");
            move |us| us.set("drain.grace_period", &grace_period)
        })
        .start();
    pair.eu.kill();
    let keys = numbered("key", 5_000);
    write_all(&pair.us, &keys, "value");
    pair.us.wait_until("there is work in hand", LIMIT, |status| {
        status["flows"][0]["with_permit"].as_u64() > Some(0)
    });
    (pair, keys)
}

/// What was left is replayed by the next process.
fn nothing_was_lost(pair: &TwoRegions, keys: &[String]) {
    pair.both().into_iter().for_each(Region::start);
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", keys);
    accounted(&[&pair.us]);
}

#[test]
fn with_a_dead_peer_sigterm_waits_for_the_grace_period_and_exits_with_75() {
    const GRACE: Duration = Duration::from_secs(2);
    let _gate = shared();
    let (pair, keys) = with_work_left("2s");
    let told = Instant::now();
    pair.us.signal(Signal::Terminate);
    pair.us.wait_until("it drains", LIMIT, |status| {
        status["flows"][0]["state"] == "draining" && balanced(status).is_ok()
    });
    assert_eq!(pair.us.exit_code(LIMIT), Some(75));
    let took = told.elapsed();
    // What it takes above: the last commit, leaving the group, the last export, on a machine that is busy with other tests.
    assert!(
        took >= GRACE && took < GRACE + Duration::from_secs(5),
        "it took {took:?}"
    );
    nothing_was_lost(&pair, &keys);
}

#[test]
fn a_second_sigterm_stops_at_once() {
    let _gate = shared();
    let (pair, keys) = with_work_left("60s");
    pair.us.signal(Signal::Terminate);
    pair.us
        .wait_until("it drains", LIMIT, |status| status["flows"][0]["state"] == "draining");
    let told = Instant::now();
    pair.us.signal(Signal::Terminate);
    assert_eq!(pair.us.exit_code(LIMIT), Some(75));
    let took = told.elapsed();
    assert!(took < Duration::from_secs(4), "it took {took:?}");
    nothing_was_lost(&pair, &keys);
}

#[test]
fn a_sigterm_while_idle_exits_with_0_at_once() {
    let _gate = shared();
    let pair = two_regions();
    let keys = numbered("key", 1_000);
    write_all(&pair.us, &keys, "value");
    settle(&pair.both());
    accounted(&pair.both());
    for region in pair.both() {
        let told = Instant::now();
        assert_eq!(region.terminate(), 0, "{}", region.log_tail(20));
        let took = told.elapsed();
        assert!(took < Duration::from_secs(5), "{} took {took:?}", region.name());
    }
    assert_same(&pair.both(), "sessions", &keys);
}

#[test]
fn a_relay_that_has_drained_says_goodbye_and_no_end_of_a_session_is_an_error() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().lanes(2).start();
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    // In the middle of its work, or at the end of it: it finishes what it has.
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
    pair.eu.wait_until("both sessions have ended", LIMIT, |status| {
        status["agent"]["sessions"].as_array().is_some_and(Vec::is_empty)
    });
    let log = pair.eu.log();
    let said = |what: &str| log.lines().filter(|line| line.contains(what)).count();
    assert_eq!(said("peer says goodbye"), 2, "{}", pair.eu.log_tail(20));
    assert_eq!(said("session closed by peer"), 2, "{}", pair.eu.log_tail(20));
    let failed = log
        .lines()
        .find(|line| line.contains("agent_session") && line.contains("session ended"));
    assert_eq!(failed, None);
    pair.us.start();
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
}

#[test]
fn a_mailbox_of_one_in_front_of_every_actor_is_enough() {
    let _gate = shared();
    let mailboxes = "[mailbox]\npartition_consumer = 1\ncache_reader = 1\nbatch_coalescer = 1\nremote_link = 1\n\
                     agent_session = 1\ncache_writer = 1\n[batch]\nmax_items = 50";
    let pair = TwoRegionsSpec::new()
        .cache(CacheSpec::new("sessions").servers(2))
        .lanes(2)
        .extra(mailboxes)
        .start();
    let sampler = Sampler::start(&pair.both());
    let [from_us, from_eu] = ["us", "eu"].map(|name| numbered(name, WRITES));
    std::thread::scope(|scope| {
        scope.spawn(|| write_all(&pair.us, &from_us, "value"));
        scope.spawn(|| write_all(&pair.eu, &from_eu, "value"));
    });
    settle(&pair.both());
    for keys in [from_us, from_eu] {
        assert_same(&pair.both(), "sessions", &keys);
    }
    accounted(&pair.both());
    sampler.finish();
    for region in pair.both() {
        no_restarts(region);
        let status = region.status();
        for (actor, mailbox) in status["mailboxes"].as_object().unwrap() {
            assert_eq!(mailbox["capacity"], 1, "{actor}: {mailbox}");
            assert_eq!(mailbox["high_water"], 1, "{actor}: {mailbox}");
            assert_eq!(mailbox["depth"], 0, "{actor}: {mailbox}");
        }
    }
}

#[test]
fn with_kafka_peer_and_memcached_unreachable_at_start_it_stays_up_says_which_and_works_once_they_come() {
    let _gate = shared();
    let own = Broker::start();
    let kafka = own.client();
    let pair = TwoRegionsSpec::new().one_way().us(move |us| us.kafka(&kafka)).build();
    own.kill();
    let memcached = pair.us.cache("sessions").memcached(0);
    memcached.kill();
    pair.us.start();
    let away = [
        "kafka us-east-1->eu-west-1",
        "peer eu-west-1",
        &format!("memcached {}", memcached.address()),
    ];
    for what in away {
        wait_until(&format!("it says that {what} is away"), LIMIT, || {
            assert!(pair.us.is_running(), "it ended:\n{}", pair.us.log_tail(20));
            says_failed(&pair.us, what)
        });
    }
    assert!(matches!(pair.us.get("/livez"), Ok((200, _))));
    // Without its memcached the agent can take nothing: that gates.
    assert!(matches!(pair.us.get("/readyz"), Ok((503, _))));

    memcached.restart();
    wait_until(
        "it is ready, though degraded",
        LIMIT,
        || matches!(pair.us.get("/readyz"), Ok((200, body)) if body.contains("degraded")),
    );
    pair.eu.start();
    own.start_again();
    let keys = numbered("key", 1_000);
    write_all(&pair.us, &keys, "value");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    wait_until("nothing is wrong any more", LIMIT, || says_nothing_failed(&pair.us));
    no_restarts(&pair.us);
    accounted(&[&pair.us]);
}
