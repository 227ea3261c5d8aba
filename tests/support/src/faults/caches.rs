//! Faults of memcached servers: one of three, always the first, so that the others show whether they feel it.

use std::process::Command;
use std::time::Duration;

use super::catalogue::{Fault, Part, Side, Sums};
use super::world::{Setup, World};
use crate::memcached::Put;
use crate::region::evrepl;

/// The server that is broken.
pub const BROKEN: usize = 0;

/// Three servers on each side, and little patience with dirty keys: some of them are parked.
fn three_servers(setup: &mut Setup) {
    (setup.source_servers, setup.destination_servers) = (3, 3);
    setup.settings += "[flow]\nmax_dirty_keys = 2000\nretry_budget = \"3s\"\nretry_backoff_max = \"5s\"\n";
}

/// The run that the isolation of others is compared with.
pub static NOTHING: Fault = Fault {
    name: "nothing",
    about: "no fault, three servers on each side: what the others are compared with",
    seconds: 20,
    short_seconds: 4,
    breaks: &[],
    sums: Sums::Exact,
    isolated: Some(Side::Destination),
    setup: three_servers,
    play: |world, time| {
        world.hold(time);
        Ok(())
    },
};

pub static DEST_UNREACHABLE: Fault = Fault {
    name: "dest_unreachable",
    about: "one of three destination servers refuses connections",
    seconds: 30,
    short_seconds: 6,
    breaks: &[Part::Destination],
    play: |world, time| {
        let proxy = world.destination(BROKEN).proxy();
        proxy.cut();
        world.hold(time);
        proxy.pass();
        Ok(())
    },
    ..NOTHING
};

pub static DEST_FROZEN: Fault = Fault {
    name: "dest_frozen",
    about: "one of three destination servers is frozen (SIGSTOP): it takes what is sent and answers nothing",
    play: |world, time| {
        world.destination(BROKEN).memcached.freeze();
        world.hold(time);
        world.destination(BROKEN).memcached.thaw();
        Ok(())
    },
    ..DEST_UNREACHABLE
};

pub static DEST_FROZEN_KILLED: Fault = Fault {
    name: "dest_frozen_killed",
    about: "a destination server freezes with writes in its socket, agent and relay are killed (kill -9), and it thaws",
    seconds: 20,
    short_seconds: 8,
    breaks: &[Part::Destination, Part::Agent, Part::Relay],
    isolated: None,
    play: |world, time| {
        let memcached = &world.destination(BROKEN).memcached;
        let each = Duration::from_secs(4);
        for _ in 0..(time.as_secs_f64() / each.as_secs_f64()).ceil() as u32 {
            // What the dead agent had sent runs when memcached thaws, whatever its successor has written by then.
            memcached.freeze();
            world.hold(each / 4);
            world.agent().kill();
            world.kill_and_start(world.relay(), Duration::ZERO);
            world.start_anew(world.agent());
            world.hold(each / 4);
            memcached.thaw();
            world.hold(each / 2);
        }
        Ok(())
    },
    ..DEST_UNREACHABLE
};

pub static DEST_SLOW: Fault = Fault {
    name: "dest_slow",
    about: "one of three destination servers takes 500 ms for each answer",
    play: |world, time| {
        let proxy = world.destination(BROKEN).proxy();
        proxy.latency(Duration::from_millis(250));
        world.hold(time);
        proxy.pass();
        Ok(())
    },
    ..DEST_UNREACHABLE
};

pub static DEST_FULL: Fault = Fault {
    name: "dest_full",
    about: "one of three destination servers refuses writes (SERVER_ERROR out of memory)",
    setup: |setup| {
        three_servers(setup);
        // memcached -M refuses instead of evicting; small, so that it is full soon.
        setup.destination_memcached = ["-M", "-m", "16"].map(String::from).to_vec();
    },
    play: fill_up,
    ..DEST_UNREACHABLE
};

/// Fills the memcached with values of the load's size, keeps it full, and makes room again.
fn fill_up(world: &World, time: Duration) -> Result<(), String> {
    const STEP: Duration = Duration::from_millis(200);
    let mut client = world.destination(BROKEN).memcached.client();
    let (mut junk, mut refusals) = (0u32, 0);
    // What it refuses it also drops: memcached never keeps an old value whose new one it could not store.
    world.wiping(BROKEN);
    for _ in 0..time.as_millis() / STEP.as_millis() {
        loop {
            let names: Vec<String> = (junk..junk + 256).map(|number| format!("junk:{number}")).collect();
            junk += 256;
            let puts: Vec<Put<'_>> = names.iter().map(|name| junk_of_the_loads_size(name)).collect();
            if client.set_many(&puts).is_err() {
                refusals += 1;
                break;
            }
            if junk > 1_000_000 {
                return Err("the memcached takes a million values: it is not full".into());
            }
        }
        world.hold(STEP);
    }
    // Room for four times as much: quicker than taking everything away again.
    let room = client.line("cache_memlimit 64");
    room.map_err(|error| format!("making room: {error}"))?;
    world.wiped(BROKEN);
    match refusals {
        0 => Err("the memcached refused nothing".into()),
        _ => Ok(()),
    }
}

/// A value of the same slab class as the load's.
fn junk_of_the_loads_size(name: &str) -> Put<'_> {
    Put {
        key: name.as_bytes(),
        value: &[b'j'; 100],
        flags: 0,
        exptime: 0,
    }
}

pub static DEST_EMPTY: Fault = Fault {
    name: "dest_empty",
    about: "one of three destination servers is killed and comes back empty; then `evrepl replay --since 2h`",
    seconds: 15,
    short_seconds: 4,
    breaks: &[Part::Destination, Part::Kafka],
    sums: Sums::Exact,
    isolated: None,
    play: |world, time| {
        let memcached = &world.destination(BROKEN).memcached;
        world.wiping(BROKEN);
        memcached.kill();
        world.hold(time / 2);
        memcached.restart();
        world.hold(time / 2);
        world.wiped(BROKEN);
        replay(world)
    },
    ..DEST_UNREACHABLE
};

/// Brings back what a server has lost, as an operator would.
fn replay(world: &World) -> Result<(), String> {
    let output = Command::new(evrepl())
        .arg("replay")
        .arg("--config")
        .arg(world.relay().config_path())
        .args(["--peer", world.agent().name(), "--since", "2h"])
        .output()
        .map_err(|error| format!("evrepl replay: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "evrepl replay: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}

pub static SOURCE_UNREACHABLE: Fault = Fault {
    name: "source_unreachable",
    about: "the relay can't reach one of three source servers, which applications go on writing",
    seconds: 20,
    short_seconds: 6,
    breaks: &[Part::Source],
    isolated: Some(Side::Source),
    play: |world, time| {
        let proxy = world.source(BROKEN).proxy();
        proxy.cut();
        world.hold(time);
        proxy.pass();
        Ok(())
    },
    ..DEST_UNREACHABLE
};
