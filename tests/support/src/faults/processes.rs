//! Faults of evrepl's own processes: killed, frozen, with a wrong clock, with too much to carry, with mailboxes of one.
//!
//! Relay and agent of a region are one process; the load goes one way, so the first region's process is "the relay" and the
//! second's "the agent".

use std::time::Duration;

use super::catalogue::{Fault, Part, Sums};
use super::world::World;
use crate::wait::holds_within;

/// How long a killed process stays away.
const AWAY: Duration = Duration::from_secs(2);

/// Half an hour each way would do; an hour is what the promise names.
const HOUR_MS: i64 = 3_600_000;

pub static KILL_RELAY: Fault = Fault {
    name: "kill_relay",
    about: "the relay is killed (kill -9) and started again, over and over",
    seconds: 20,
    short_seconds: 6,
    breaks: &[Part::Relay],
    sums: Sums::Exact,
    isolated: None,
    setup: |_| {},
    play: |world, time| {
        for _ in 0..rounds(time) {
            world.hold(AWAY);
            world.kill_and_start(world.relay(), AWAY);
        }
        Ok(())
    },
};

pub static KILL_AGENT: Fault = Fault {
    name: "kill_agent",
    about: "the agent is killed (kill -9) and started again, over and over",
    breaks: &[Part::Agent],
    play: |world, time| {
        for _ in 0..rounds(time) {
            world.hold(AWAY);
            world.kill_and_start(world.agent(), AWAY);
        }
        Ok(())
    },
    ..KILL_RELAY
};

pub static KILL_BOTH: Fault = Fault {
    name: "kill_both",
    about: "relay and agent are killed (kill -9) together and started again, over and over",
    breaks: &[Part::Relay, Part::Agent],
    play: |world, time| {
        for _ in 0..rounds(time) {
            world.hold(AWAY);
            world.agent().kill();
            world.kill_and_start(world.relay(), AWAY);
            world.start_anew(world.agent());
        }
        Ok(())
    },
    ..KILL_RELAY
};

/// How often a process is killed in this time.
fn rounds(time: Duration) -> u32 {
    (time.as_secs_f64() / (2 * AWAY).as_secs_f64()).ceil() as u32
}

pub static STOP_RELAY: Fault = Fault {
    name: "stop_relay",
    about: "one of two relays is frozen (SIGSTOP) far past Kafka's session timeout, and wakes as a zombie",
    seconds: 60,
    short_seconds: 8,
    breaks: &[Part::Relay, Part::Members],
    sums: Sums::AtLeast,
    isolated: None,
    setup: |setup| setup.second_relay = true,
    play: |world, time| {
        world.relay().freeze();
        world.hold(time);
        world.relay().thaw();
        Ok(())
    },
};

pub static STOP_AGENT: Fault = Fault {
    name: "stop_agent",
    about: "the agent is frozen (SIGSTOP) and wakes",
    breaks: &[Part::Agent],
    sums: Sums::Exact,
    setup: |_| {},
    play: |world, time| {
        world.agent().freeze();
        world.hold(time);
        world.agent().thaw();
        Ok(())
    },
    ..STOP_RELAY
};

pub static POISON: Fault = Fault {
    name: "poison",
    about: "one record in a hundred is no event",
    seconds: 15,
    short_seconds: 4,
    breaks: &[Part::Load],
    sums: Sums::Exact,
    isolated: None,
    setup: |setup| setup.load.poison = 10,
    play: |world, time| {
        world.hold(time);
        Ok(())
    },
};

pub static CLOCK_ONE_RELAY: Fault = Fault {
    name: "clock_one_relay",
    about: "the clock of one of two relays jumps an hour ahead, then an hour back",
    seconds: 20,
    short_seconds: 6,
    breaks: &[Part::Clock, Part::Relay, Part::Members],
    sums: Sums::Exact,
    isolated: None,
    setup: |setup| {
        setup.second_relay = true;
        setup.clock = true;
    },
    play: |world, time| {
        for hours in [1, -1] {
            world.set_clock(world.relay(), hours);
            its_clock_has_jumped(world, hours)?;
            world.hold(time / 2);
        }
        world.set_clock(world.relay(), 0);
        Ok(())
    },
};

/// Waits until the relay's pings tell that its clock and the agent's are so far apart.
fn its_clock_has_jumped(world: &World, hours: i32) -> Result<(), String> {
    let jumped = holds_within(Duration::from_secs(5), || {
        let status = world.relay().try_status().unwrap_or_default();
        let offset = status["flows"][0]["links"][0]["clock_offset_ms"]
            .as_f64()
            .unwrap_or(0.0);
        offset.abs() > 0.9 * HOUR_MS as f64 && (offset < 0.0) == (hours > 0)
    });
    match jumped {
        true => Ok(()),
        false => Err(format!("the clock did not jump by {hours} h, or nobody noticed")),
    }
}

pub static CLOCK_REGION: Fault = Fault {
    name: "clock_region",
    about: "the clocks of a whole region, its applications' too, jump an hour ahead, then an hour back",
    breaks: &[Part::Clock, Part::Relay],
    setup: |setup| setup.clock = true,
    play: |world, time| {
        for hours in [1, -1] {
            world.set_clock(world.relay(), hours);
            world.set_writers_clock(i64::from(hours) * HOUR_MS);
            its_clock_has_jumped(world, hours)?;
            world.hold(time / 2);
        }
        world.set_clock(world.relay(), 0);
        world.set_writers_clock(0);
        Ok(())
    },
    ..CLOCK_ONE_RELAY
};

pub static BIG_VALUES: Fault = Fault {
    name: "big_values",
    about: "values of 200 kB, more than ten times the permitted bytes in flight, over a link that carries a third of them",
    seconds: 20,
    short_seconds: 8,
    breaks: &[Part::Load, Part::Link, Part::Destination, Part::Settings],
    sums: Sums::Exact,
    isolated: None,
    setup: |setup| {
        // 12 MB a second: ten times the 8 MiB that may be in flight within the short form.
        (setup.load.rate, setup.load.value_bytes, setup.load.hot_keys) = (60, 200_000, 4);
        setup.load.look_every = Duration::from_millis(50);
        setup.memcached = vec!["-m".into(), "2048".into()];
        setup.settings += "[flow]\nmax_in_flight_bytes = \"8MiB\"\n\
                           [agent]\nmax_in_flight_bytes = \"16MiB\"\nsession_window = \"8MiB\"\n";
    },
    play: |world, time| {
        world.link().limit_rate(Some(4_000_000));
        world.hold(time);
        world.link().pass();
        Ok(())
    },
};

pub static MAILBOX_ONE: Fault = Fault {
    name: "mailbox_one",
    about: "every mailbox holds one message",
    seconds: 15,
    short_seconds: 4,
    breaks: &[Part::Settings],
    sums: Sums::Exact,
    isolated: None,
    setup: |setup| {
        setup.settings += "[mailbox]\npartition_consumer = 1\ncache_reader = 1\nbatch_coalescer = 1\nremote_link = 1\n\
                           agent_session = 1\ncache_writer = 1\n";
    },
    play: |world, time| {
        world.hold(time);
        Ok(())
    },
};
