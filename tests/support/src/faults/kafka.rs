//! Faults of Kafka and of the consumer group.

use std::time::{Duration, Instant};

use super::catalogue::{Fault, Part, Sums};
use super::world::CACHE;

pub static BROKER_RESTARTED: Fault = Fault {
    name: "broker_restarted",
    about: "the broker is shut down and started, and then killed (kill -9) and started",
    seconds: 15,
    short_seconds: 6,
    breaks: &[Part::Kafka],
    sums: Sums::AtLeast,
    isolated: None,
    setup: |setup| setup.own_broker = true,
    play: |world, time| {
        let broker = world.own_broker();
        let until = Instant::now() + time;
        broker.stop();
        broker.start_again();
        world.hold(until.saturating_duration_since(Instant::now()) / 2);
        broker.kill();
        broker.start_again();
        world.hold(until.saturating_duration_since(Instant::now()));
        Ok(())
    },
};

pub static BROKER_STOPPED: Fault = Fault {
    name: "broker_stopped",
    about: "the broker is away; what is written meanwhile waits in the applications' producers",
    seconds: 60,
    short_seconds: 8,
    play: |world, time| {
        let broker = world.own_broker();
        broker.stop();
        world.hold(time);
        broker.start_again();
        Ok(())
    },
    ..BROKER_RESTARTED
};

pub static BROKER_FROZEN: Fault = Fault {
    name: "broker_frozen",
    about: "the broker is frozen (SIGSTOP) for longer than its own session; when it wakes it names no brokers for a moment",
    seconds: 20,
    short_seconds: 7,
    play: |world, time| {
        let broker = world.own_broker();
        broker.freeze();
        world.hold(time);
        broker.thaw();
        Ok(())
    },
    ..BROKER_RESTARTED
};

pub static REBALANCE_STORM: Fault = Fault {
    name: "rebalance_storm",
    about: "a second relay joins and leaves (by turns drained and killed) each two seconds",
    seconds: 20,
    short_seconds: 8,
    breaks: &[Part::Members],
    sums: Sums::Committed,
    setup: |_| {},
    play: |world, time| {
        let until = Instant::now() + time;
        let each = Duration::from_secs(2);
        for round in 0.. {
            let next = Instant::now() + each;
            match round % 4 {
                0 | 2 => world.second.start(),
                1 => drop(world.second.terminate()),
                _ => world.second.kill(),
            }
            if Instant::now() >= until {
                break;
            }
            world.hold(next.saturating_duration_since(Instant::now()));
        }
        if !world.second.is_running() {
            world.second.start();
        }
        Ok(())
    },
    ..BROKER_RESTARTED
};

pub static REBALANCE_KILLED: Fault = Fault {
    name: "rebalance_killed",
    about: "a second relay joins, and the first is killed (kill -9) after it was told to give up partitions, before it has",
    seconds: 15,
    short_seconds: 4,
    breaks: &[Part::Members, Part::Relay, Part::Link],
    play: |world, time| {
        // What is in flight can't end, so the first relay takes the whole of `flow.revoke_timeout` (1 s) to let go.
        world.link().stall();
        world.hold(Duration::from_millis(500));
        world.second.start();
        world.hold(Duration::from_millis(500));
        // Back within its session timeout it is given what it was left with, without a rebalance.
        world.kill_and_start(world.relay(), Duration::ZERO);
        world.link().pass();
        world.hold(time.saturating_sub(Duration::from_secs(1)));
        Ok(())
    },
    ..REBALANCE_STORM
};

pub static PARTITIONS_GROW: Fault = Fault {
    name: "partitions_grow",
    about: "the topic grows from 4 to 12 and to 24 partitions, with two relays",
    seconds: 20,
    short_seconds: 6,
    breaks: &[Part::Kafka, Part::Members],
    sums: Sums::Exact,
    setup: |setup| setup.second_relay = true,
    play: |world, time| {
        let topic = &world.relay().cache(CACHE).topic;
        for partitions in [12, 24] {
            world.relay().kafka().add_partitions(topic, partitions);
            world.hold(time / 2);
        }
        let ends = world.relay().kafka().end_offsets(topic);
        match ends.iter().filter(|(_, end)| *end == 0).count() {
            0 => Ok(()),
            empty => Err(format!(
                "{empty} of 24 partitions got no event: the writer didn't see them"
            )),
        }
    },
    ..BROKER_RESTARTED
};
