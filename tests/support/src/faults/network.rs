//! Faults of the network between relay and agent.

use std::time::{Duration, Instant};

use super::catalogue::{Fault, Part, Sums};
use crate::proxy::FaultProxy;

/// A fault of the link that lasts 20 s, ended by `pass`.
pub static LINK_CUT: Fault = Fault {
    name: "link_cut",
    about: "the link is cut: connections closed, new ones refused",
    seconds: 20,
    short_seconds: 6,
    breaks: &[Part::Link],
    sums: Sums::Exact,
    isolated: None,
    setup: |_| {},
    play: |world, time| {
        world.link().cut();
        world.hold(time);
        world.link().pass();
        Ok(())
    },
};

pub static LINK_STALLED: Fault = Fault {
    name: "link_stalled",
    about: "the link stalls: connections stay open and carry nothing",
    seconds: 60,
    short_seconds: 8,
    play: |world, time| {
        world.link().stall();
        world.hold(time);
        world.link().pass();
        Ok(())
    },
    ..LINK_CUT
};

pub static LINK_FLAPPING: Fault = Fault {
    name: "link_flapping",
    about: "the link is cut and whole again each second",
    play: |world, time| {
        let flap = |link: &FaultProxy| {
            link.cut();
            std::thread::sleep(Duration::from_millis(500));
            link.pass();
        };
        every(time, Duration::from_secs(1), flap, world.link());
        Ok(())
    },
    ..LINK_CUT
};

pub static LINK_LOSSY: Fault = Fault {
    name: "link_lossy",
    about: "200 ms of latency, and one piece in a hundred resets its connection",
    play: |world, time| {
        world.link().latency(Duration::from_millis(200));
        world.link().resets(10);
        world.hold(time);
        world.link().pass();
        match world.link().were_reset() {
            0 => Err("no connection was reset".into()),
            _ => Ok(()),
        }
    },
    ..LINK_CUT
};

pub static LINK_HALF_CLOSED: Fault = Fault {
    name: "link_half_closed",
    about: "each two seconds the agent is told that the relay will send no more, while answers still pass",
    seconds: 15,
    play: |world, time| {
        every(time, Duration::from_secs(2), FaultProxy::half_close, world.link());
        Ok(())
    },
    ..LINK_CUT
};

pub static LINK_CORRUPT: Fault = Fault {
    name: "link_corrupt",
    about: "each second one bit on the link is flipped, which TLS must notice",
    seconds: 15,
    play: |world, time| {
        let before = world.link().corrupted();
        every(time, Duration::from_secs(1), FaultProxy::corrupt_one_byte, world.link());
        match world.link().corrupted() {
            after if after > before => Ok(()),
            _ => Err("nothing was sent that could be corrupted".into()),
        }
    },
    ..LINK_CUT
};

/// Does something to the link at the beginning of each interval, until the time is over.
fn every(time: Duration, interval: Duration, act: impl Fn(&FaultProxy), link: &FaultProxy) {
    let until = Instant::now() + time;
    while Instant::now() < until {
        let next = Instant::now() + interval;
        act(link);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}
