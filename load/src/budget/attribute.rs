//! From functions to stages.
//!
//! An instruction belongs to the stage of the innermost function around it that a [rule](super::rules) claims, inlined ones
//! included. Where none does (the C library, Rust's own, hash tables), its function passes what it ran to its callers, each its
//! share by what its calls ran, and they to theirs. The allocator's and memcpy's go the same way, into columns of their own.

use std::collections::{BTreeMap, HashMap};

use super::callgrind::Thread;
use super::frames::{Frame, Frames, plain};
use super::rules::{OTHER, Process, Work, is_librdkafka, stage, work};

/// Rounds of passing on: in each, shares get one call further up, and calls without a rule are seldom twenty deep.
const ROUNDS: usize = 60;

/// Instructions by what they were for. What it holds may be a difference, or a mean per event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counted {
    /// By stage, and whether the stage's own code ran, the allocator for it, or memcpy.
    pub stages: BTreeMap<(&'static str, Work), f64>,
    /// By function as it was linked.
    pub itself: BTreeMap<String, f64>,
    /// The same with all that it called; of one that calls itself, too much.
    pub inclusive: BTreeMap<String, f64>,
    /// By function as it is written, with what of Rust's own library was put into it.
    pub written: BTreeMap<String, f64>,
    /// By function as it was linked: what no rule claimed.
    pub unclaimed: BTreeMap<String, f64>,
}

impl Counted {
    /// Of one process, all its threads together.
    pub fn of(process: Process, threads: &[Thread], frames: &mut Frames) -> Counted {
        let mut counted = Counted::default();
        for thread in threads {
            counted.add(process, thread, frames);
        }
        counted
    }

    pub fn total(&self) -> f64 {
        self.stages.values().sum()
    }

    /// `self - less`, divided by `events`.
    pub fn per_event(&self, less: &Counted, events: f64) -> Counted {
        fn each<K: Ord + Clone>(all: &BTreeMap<K, f64>, less: &BTreeMap<K, f64>, events: f64) -> BTreeMap<K, f64> {
            let mut keys: Vec<&K> = all.keys().chain(less.keys()).collect();
            keys.sort_unstable();
            keys.dedup();
            let of = |map: &BTreeMap<K, f64>, key: &K| map.get(key).copied().unwrap_or(0.0);
            keys.into_iter()
                .map(|key| (key.clone(), (of(all, key) - of(less, key)) / events))
                .collect()
        }
        Counted {
            stages: each(&self.stages, &less.stages, events),
            itself: each(&self.itself, &less.itself, events),
            inclusive: each(&self.inclusive, &less.inclusive, events),
            written: each(&self.written, &less.written, events),
            unclaimed: each(&self.unclaimed, &less.unclaimed, events),
        }
    }

    fn add(&mut self, process: Process, thread: &Thread, frames: &mut Frames) {
        let names: Vec<&str> = thread.functions.iter().map(|function| function.name.as_str()).collect();
        let librdkafka = is_librdkafka(names.iter().copied());
        let works: Vec<Work> = names.iter().map(|name| work(name)).collect();
        let shown: Vec<String> = names.iter().map(|name| plain(name)).collect();
        let mut claim = |function: usize, address: u64| {
            let around = frames.at(&thread.functions[function].object, address);
            let claimed = match works[function] {
                Work::Own => stage(process, librdkafka, &around, names[function]),
                Work::Allocator | Work::Copy => None,
            };
            (claimed, around)
        };
        let shares = passed_on(process, thread, |function, address| claim(function, address).0);
        for cost in &thread.costs {
            let instructions = cost.instructions as f64;
            let (function, of) = (cost.function, works[cost.function]);
            let (claimed, around) = claim(function, cost.address);
            if let Some(stage) = claimed {
                *self.stages.entry((stage, of)).or_default() += instructions;
            } else {
                for (stage, share) in process.stages().iter().zip(&shares[function]) {
                    if *share > 0.0 {
                        *self.stages.entry((stage, of)).or_default() += instructions * share;
                    }
                }
                let other = shares[function].last().copied().unwrap_or(1.0);
                add(&mut self.unclaimed, &shown[function], instructions * other);
            }
            add(&mut self.itself, &shown[function], instructions);
            add(&mut self.inclusive, &shown[function], instructions);
            add(&mut self.written, &written(&around, &shown[function]), instructions);
        }
        for call in thread.calls.iter().filter(|call| call.caller != call.callee) {
            add(&mut self.inclusive, &shown[call.caller], call.instructions as f64);
        }
    }
}

fn add(map: &mut BTreeMap<String, f64>, name: &str, instructions: f64) {
    match map.get_mut(name) {
        Some(sum) => *sum += instructions,
        None => _ = map.insert(name.into(), instructions),
    }
}

/// The innermost function that is not of Rust's own library.
fn written(around: &[Frame], symbol: &str) -> String {
    match around
        .iter()
        .find(|frame| !frame.file.starts_with("std/") && !frame.file.is_empty())
    {
        // A function that was not put into another has its name in the symbol table alone.
        Some(frame) if frame.function.is_empty() => format!("{symbol} ({})", frame.file),
        Some(frame) => format!("{} ({})", frame.function, frame.file),
        None => symbol.into(),
    }
}

/// Which share of what a function ran, and no rule claims, is whose: by function, in the order of the process's stages, of
/// which the last is `other`.
fn passed_on(
    process: Process,
    thread: &Thread,
    mut claim: impl FnMut(usize, u64) -> Option<&'static str>,
) -> Vec<Vec<f64>> {
    let stages = process.stages();
    let place = |stage: &str| stages.iter().position(|one| *one == stage);
    /// Whose a call is: a stage's, or whoever's the calling function is.
    enum From {
        Stage(usize),
        Function(usize),
    }
    let mut callers: Vec<Vec<(f64, From)>> = thread.functions.iter().map(|_| Vec::new()).collect();
    let mut known: HashMap<(usize, u64), Option<usize>> = HashMap::new();
    for call in &thread.calls {
        let claimed = *known
            .entry((call.caller, call.address))
            .or_insert_with(|| claim(call.caller, call.address).and_then(place));
        let from = claimed.map_or(From::Function(call.caller), From::Stage);
        // Calls of a function that ran nothing countable weigh something still.
        callers[call.callee].push(((call.instructions + call.count) as f64, from));
    }
    let mut shares = vec![vec![0.0; stages.len()]; thread.functions.len()];
    for _ in 0..ROUNDS {
        for (function, from) in callers.iter().enumerate() {
            let all: f64 = from.iter().map(|(weight, _)| weight).sum();
            let mut share = vec![0.0; stages.len()];
            for (weight, from) in from {
                match from {
                    From::Stage(stage) => share[*stage] += weight / all,
                    From::Function(caller) => {
                        for (share, its) in share.iter_mut().zip(&shares[*caller]) {
                            *share += its * weight / all;
                        }
                    }
                }
            }
            shares[function] = share;
        }
    }
    let other = place(OTHER).expect("every process has the row");
    for share in &mut shares {
        share[other] += 1.0 - share.iter().sum::<f64>();
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::super::callgrind::{Call, Cost, Function};
    use super::*;

    /// `names` each ran 100 instructions itself; `calls` are of whom by whom, with all that they led to.
    fn thread(names: &[&str], calls: &[(usize, usize, u64)]) -> Thread {
        let function = |name: &&str| Function {
            object: "none".into(),
            name: name.to_string(),
        };
        let cost = |function| Cost {
            function,
            address: 0,
            instructions: 100,
        };
        let call = |&(caller, callee, instructions): &(usize, usize, u64)| Call {
            caller,
            callee,
            instructions,
            address: 0,
            count: 0,
        };
        Thread {
            functions: names.iter().map(function).collect(),
            costs: (0..names.len()).map(cost).collect(),
            calls: calls.iter().map(call).collect(),
        }
    }

    fn of(thread: Thread) -> Vec<(&'static str, Work, f64)> {
        let counted = Counted::of(Process::Relay, &[thread], &mut Frames::default());
        let stages = counted
            .stages
            .into_iter()
            .filter(|(_, instructions)| *instructions > 0.01);
        stages
            .map(|((stage, work), instructions)| (stage, work, instructions.round()))
            .collect()
    }

    #[test]
    fn what_no_rule_claims_is_shared_among_those_who_called_it() {
        // librdkafka calls a helper, as ring does three times as much; the helper allocates.
        let names = ["rd_kafka_poll", "ring_core_seal", "helper", "malloc"];
        let calls = [(0, 2, 50), (1, 2, 150), (2, 3, 100)];
        let shares = of(thread(&names, &calls));
        let expected = [
            ("consume: poll thread", Work::Own, 125.0),
            ("consume: poll thread", Work::Allocator, 25.0),
            ("encrypt", Work::Own, 175.0),
            ("encrypt", Work::Allocator, 75.0),
        ];
        assert_eq!(shares, expected);
    }

    #[test]
    fn what_calls_itself_still_belongs_to_whoever_called_it_first() {
        let names = ["ring_core_seal", "helper", "deeper"];
        let calls = [(0, 1, 400), (1, 2, 300), (2, 1, 200)];
        assert_eq!(of(thread(&names, &calls)), [("encrypt", Work::Own, 300.0)]);
    }

    #[test]
    fn what_nobody_claims_is_other_and_named() {
        let counted = Counted::of(
            Process::Relay,
            &[thread(&["start", "deep"], &[(0, 1, 100)])],
            &mut Frames::default(),
        );
        assert_eq!(counted.stages[&(OTHER, Work::Own)], 200.0);
        assert_eq!((counted.unclaimed["deep"], counted.inclusive["start"]), (100.0, 200.0));
        assert_eq!(counted.total(), 200.0);
    }

    #[test]
    fn a_difference_is_per_event() {
        let short = Counted::of(Process::Relay, &[thread(&["rd_a"], &[])], &mut Frames::default());
        let mut both = thread(&["rd_a", "rd_b"], &[]);
        both.costs[0].instructions = 150;
        let long = Counted::of(Process::Relay, &[both], &mut Frames::default());
        let each = long.per_event(&short, 10.0);
        assert_eq!(
            (each.itself["rd_a"], each.itself["rd_b"], each.total()),
            (5.0, 10.0, 15.0)
        );
    }
}
