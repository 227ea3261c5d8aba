//! A stage that has work and does not move is found, named in the log, and restarted with what it belongs to. A thread that hangs
//! cannot be ended: it is abandoned, and if it ever wakes up it harms nothing.
//!
//! The failpoints block the thread inside the actor, as an endless loop or a lock would.

use std::time::Duration;

use evrepl_lab::*;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);

const WRITES: usize = 20_000;

/// Soon, for a test; far above what any stage takes on a busy machine.
const SOON: &str = "[supervision]\nstalled_after = \"2s\"\n[kafka]\ncommit_interval = \"10ms\"";

fn write_all(region: &Region, keys: &[String], value: &str) {
    region.writer("sessions").set_in_pieces(keys, value);
}

/// `stage` of one of the regions hangs for good in the middle of writes.
fn a_hung_stage_is_restarted(failpoint: &str, stage: &str, of: fn(&TwoRegions) -> &Region) {
    a_stage_is_restarted(failpoint, "pause", stage, of);
}

fn a_stage_is_restarted(failpoint: &str, what: &str, stage: &str, of: fn(&TwoRegions) -> &Region) {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().lanes(2).extra(SOON).build();
    let broken = of(&pair);
    broken.set_env("FAILPOINTS", Some(&format!("{failpoint}=10*off->1*{what}->off")));
    pair.both().into_iter().for_each(Region::start);
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    broken.wait_until("what hangs was restarted", LIMIT, |status| {
        status["restarts"] == json!({ stage: 1 })
    });
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    // It goes on as before: what comes next arrives too.
    let late: Vec<String> = (0..500).map(|n| format!("late:{n}")).collect();
    write_all(&pair.us, &late, "late");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &late);
    sampler.finish();
    let log = broken.log();
    let said = log
        .lines()
        .find(|line| line.contains("stage has work and does not move"));
    let said = said.unwrap_or_else(|| panic!("nothing is said of it:\n{}", broken.log_tail(40)));
    assert!(said.contains(&format!("stage=\"{stage}\"")), "{said}");
    assert_eq!(broken.status()["restarts"], json!({ stage: 1 }));
    // The thread that hangs keeps nobody from leaving.
    assert_eq!(broken.terminate(), 0, "{}", broken.log_tail(20));
}

#[test]
fn a_partition_consumer_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("partition_consumer_chunk", "partition_consumer", |pair| &pair.us);
}

#[test]
fn a_cache_reader_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("cache_reader_read", "cache_reader", |pair| &pair.us);
}

#[test]
fn a_batch_coalescer_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("batch_coalescer_advance", "batch_coalescer", |pair| &pair.us);
}

#[test]
fn a_stage_whose_thread_turns_but_which_forgets_its_work_is_restarted_and_nothing_is_lost() {
    // It never hands that batch on, and takes nothing more.
    a_stage_is_restarted("batch_coalescer_send", "return", "batch_coalescer", |pair| &pair.us);
}

#[test]
fn a_remote_link_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("remote_link_ship", "remote_link", |pair| &pair.us);
}

#[test]
fn an_agent_session_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("agent_session_batch", "agent_session", |pair| &pair.eu);
}

#[test]
fn a_cache_writer_that_hangs_is_restarted_and_nothing_is_lost() {
    a_hung_stage_is_restarted("cache_writer_apply", "cache_writer", |pair| &pair.eu);
}

#[test]
fn a_poll_thread_that_hangs_is_restarted_and_nothing_is_lost() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().extra(SOON).build();
    pair.us
        .set_env("FAILPOINTS", Some("poll_thread_poll=200*off->1*pause->off"));
    pair.both().into_iter().for_each(Region::start);
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", WRITES);
    write_all(&pair.us, &keys, "value");
    pair.us.wait_until("what hangs was restarted", LIMIT, |status| {
        status["restarts"] == json!({ "poll_thread": 1 })
    });
    let late: Vec<String> = (0..500).map(|n| format!("late:{n}")).collect();
    write_all(&pair.us, &late, "late");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    assert_same(&pair.both(), "sessions", &late);
    sampler.finish();
    assert_eq!(pair.us.terminate(), 0, "{}", pair.us.log_tail(20));
}

/// `stage` hangs for longer than it takes to replace it, and wakes up behind its successor's back.
fn a_woken_zombie_harms_nothing(failpoint: &str, stage: &str, of: fn(&TwoRegions) -> &Region) {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .cache(CacheSpec::new("sessions").partitions(1))
        .extra(SOON)
        .build();
    let broken = of(&pair);
    broken.set_env("FAILPOINTS", Some(&format!("{failpoint}=1*off->1*sleep(12000)->off")));
    pair.both().into_iter().for_each(Region::start);
    let sampler = Sampler::start(&pair.both());
    let keys = numbered("key", 5_000);
    write_all(&pair.us, &keys, "old");
    broken.wait_until("what hangs was restarted", LIMIT, |status| {
        status["restarts"] == json!({ stage: 1 })
    });
    settle(&pair.both());
    write_all(&pair.us, &keys, "new");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    let finished = |region: &Region| region.flow("eu-west-1").json["consumed"].clone();
    let consumed = finished(&pair.us);
    let woken = |region: &Region| region.log().contains("abandoned thread has ended");
    assert!(!woken(broken), "it woke up too early to show anything");
    wait_until("the abandoned thread has ended", LIMIT, || woken(broken));
    let new = pair.eu.cache("sessions").client().get_many(&keys).unwrap();
    let old = new
        .iter()
        .filter(|held| held.as_ref().is_none_or(|(value, _)| value != b"new"));
    assert_eq!(old.count(), 0, "keys stepped back");
    // Nor does it touch the accounts of those that came after it.
    assert_eq!(finished(&pair.us), consumed);
    write_all(&pair.us, &keys, "newest");
    settle(&pair.both());
    assert_same(&pair.both(), "sessions", &keys);
    sampler.finish();
    assert_eq!(broken.status()["restarts"], json!({ stage: 1 }));
}

#[test]
fn a_partition_consumer_that_wakes_up_behind_its_successor_harms_nothing() {
    a_woken_zombie_harms_nothing("partition_consumer_chunk", "partition_consumer", |pair| &pair.us);
}

#[test]
fn a_coalescer_that_wakes_up_behind_its_successor_harms_nothing() {
    a_woken_zombie_harms_nothing("batch_coalescer_advance", "batch_coalescer", |pair| &pair.us);
}

#[test]
fn a_remote_link_that_wakes_up_behind_its_successor_harms_nothing() {
    a_woken_zombie_harms_nothing("remote_link_ship", "remote_link", |pair| &pair.us);
}

#[test]
fn a_cache_writer_that_wakes_up_behind_its_successor_writes_nothing() {
    a_woken_zombie_harms_nothing("cache_writer_call", "cache_writer", |pair| &pair.eu);
}
