//! Three regions, one of the two peers dead: the flow to the other goes on as if nothing had happened.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use evrepl_lab::*;

const LIMIT: Duration = Duration::from_secs(60);

/// Pairs of a round without the fault and one with it. Each is compared with its neighbour, so that what else the machine does
/// in between matters little, and the median of the comparisons counts.
const ROUNDS: usize = 7;

/// Events of one round whose rate is measured: as many as are drained in about a second.
const BURST: usize = 30_000;

/// Writes whose lag is measured, one every two milliseconds, each among some others: well below what a flow can carry.
const PROBES: usize = 300;
const PROBE_EVERY: Duration = Duration::from_millis(2);
const COMPANY: usize = 4;

/// How often the peer is looked at for them: fine beside lags of milliseconds, and cheap.
const LOOK_EVERY: Duration = Duration::from_micros(500);

/// One round: events per second of a burst, and the 99th percentile of the time from a write to its value being readable at
/// the peer.
#[derive(Clone, Copy, Debug)]
struct Measured {
    rate: f64,
    p99: Duration,
}

fn measure(us: &Region, alive: &Region, round: usize) -> Measured {
    let finished = || us.flow(alive.name()).finished();
    let mut writer = us.writer("sessions");
    let before = finished();
    let begun = Instant::now();
    writer.set_all((0..BURST).map(|n| (format!("burst:{n}"), format!("round {round}"))));
    while finished() < before + BURST as u64 {
        assert!(begun.elapsed() < LIMIT, "the burst does not arrive");
        thread::sleep(Duration::from_millis(2));
    }
    let rate = BURST as f64 / begun.elapsed().as_secs_f64();
    Measured {
        rate,
        p99: probe(&mut writer, alive, round),
    }
}

/// Writes at a fixed rate, whatever happens, while a reader looks for each value at the peer.
fn probe(writer: &mut Writer, alive: &Region, round: usize) -> Duration {
    let key = |n: usize| format!("probe:{round}:{n}").into_bytes();
    let start = Instant::now();
    // From the intended time, not the actual: a writer that is held up must not hide it.
    let due = |n: usize| start + PROBE_EVERY * n as u32;
    let mut lags: Vec<Duration> = thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut client = alive.cache("sessions").client();
            let mut open: Vec<usize> = (0..PROBES).collect();
            let mut lags = Vec::with_capacity(PROBES);
            while !open.is_empty() {
                assert!(start.elapsed() < LIMIT, "{} probes do not arrive", open.len());
                let begun = open.iter().take_while(|&&n| due(n) <= Instant::now()).count();
                let keys: Vec<Vec<u8>> = open[..begun].iter().map(|&n| key(n)).collect();
                let mut found = client.get_many(&keys).unwrap().into_iter();
                let now = Instant::now();
                open.retain(|&n| {
                    let arrived = found.next().flatten().is_some();
                    if arrived {
                        lags.push(now - due(n));
                    }
                    !arrived
                });
                thread::sleep(LOOK_EVERY);
            }
            lags
        });
        for n in 0..PROBES {
            thread::sleep(due(n).saturating_duration_since(Instant::now()));
            writer.set(&key(n), b"probe");
            for other in 0..COMPANY {
                writer.set(format!("company:{n}:{other}").as_bytes(), b"company");
            }
        }
        reader.join().unwrap()
    });
    lags.sort_unstable();
    lags[PROBES * 99 / 100]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[test]
fn with_one_of_two_peers_dead_the_other_keeps_its_rate_and_its_lag() {
    let _gate = exclusive();
    let names = ["us-east-1", "eu-west-1", "ap-south-1"];
    let certs = Arc::new(Certs::issue(&names));
    let cache = || CacheSpec::new("sessions").memcached_args(&["-m", "256"]);
    let [us, alive, mortal] = names.map(|name| RegionBuilder::new(name).certs(&certs).cache(cache()));
    let receiver = |builder: RegionBuilder| builder.peer(PeerSpec::receive_only("us-east-1"));
    let us = us
        .peer(PeerSpec::at(alive.name(), &alive.agent_address()))
        .peer(PeerSpec::at(mortal.name(), &mortal.agent_address()));
    let [alive, mortal] = [alive, mortal].map(|builder| receiver(builder).start());
    let us = us.start();
    let all = [&us, &alive, &mortal];
    let sampler = Sampler::start(&[&us]);
    us.wait_until("both sessions are open", LIMIT, |status| {
        flows(status).is_ok_and(|flows| flows.iter().all(|flow| flow.state == "running"))
    });
    // Warm up: the first round would pay for connections, tables and prefetching.
    measure(&us, &alive, 0);
    settle(&all);

    let (mut sound, mut faulty) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        sound.push(measure(&us, &alive, 2 * round + 1));
        settle(&all);
        // Dead in turns: gone, so that dialling fails at once, and hanging, so that everything sent to it waits.
        let gone = round % 2 == 0;
        if gone {
            mortal.kill()
        } else {
            mortal.freeze()
        }
        faulty.push(measure(&us, &alive, 2 * round + 2));
        let waiting = us.flow(mortal.name());
        assert!(
            waiting.finished() < us.flow(alive.name()).finished(),
            "the dead peer got everything"
        );
        if gone {
            mortal.start()
        } else {
            mortal.thaw()
        }
        settle(&all);
    }
    println!("without the fault: {sound:?}\nwith the fault: {faulty:?}");
    let compared = |compare: fn(&Measured, &Measured) -> f64| {
        let each = sound.iter().zip(&faulty);
        median(each.map(|(sound, faulty)| compare(sound, faulty)).collect())
    };
    let rate = compared(|sound, faulty| faulty.rate / sound.rate);
    assert!(rate >= 0.8, "the rate fell to {:.0} %", 100.0 * rate);
    let p99 = compared(|sound, faulty| faulty.p99.as_secs_f64() / sound.p99.as_secs_f64());
    assert!(
        p99 <= 2.0,
        "the 99th percentile of the lag rose to {p99:.1} times what it was"
    );
    let keys: Vec<String> = (0..BURST).map(|n| format!("burst:{n}")).collect();
    assert_same(&all, "sessions", &keys);
    accounted(&[&us]);
    sampler.finish();
}
