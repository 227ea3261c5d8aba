//! When replication has caught up, and whether the copies are the same.

use std::collections::BTreeMap;
use std::time::Duration;

use evrepl::outcome::Outcome;

use super::{FlowStatus, Region, flows};
use crate::memcached::Value;
use crate::wait::holds_within;

/// The limit of [`settle`]: generous, since two cores may be busy with other tests.
const SETTLED_WITHIN: Duration = Duration::from_secs(60);

/// All nodes of one region that carry the flow to one peer, seen together.
struct Group<'a> {
    /// Any of the nodes: they share topics, group and Kafka.
    region: &'a Region,
    peer: String,
    /// What each node that answers says of this flow.
    flows: Vec<FlowStatus>,
    silent: usize,
}

impl Group<'_> {
    fn sum(&self, of: impl Fn(&FlowStatus) -> u64) -> u64 {
        self.flows.iter().map(of).sum()
    }

    /// The flow's topics, and the retry topics that exist.
    fn topics(&self) -> Vec<String> {
        let retry = |topic: &String| format!("{topic}.retry.{}", self.peer);
        let sources = self.region.topics_to(&self.peer);
        let retries = sources.iter().map(retry);
        let there = |topic: &String| !self.region.kafka().partitions(topic).is_empty();
        let retries: Vec<String> = retries.filter(there).collect();
        [sources, retries].concat()
    }

    /// Records in all of the flow's topics: parked events are consumed once more from the retry topics.
    fn produced(&self) -> u64 {
        let ends = |topic: &String| self.region.kafka().end_offsets(topic);
        self.topics().iter().flat_map(ends).map(|(_, end)| end as u64).sum()
    }

    /// The group that reads this topic for the flow.
    fn group(&self, topic: &str) -> String {
        let retry = topic.ends_with(&format!(".retry.{}", self.peer));
        self.region.group(&self.peer) + if retry { ".retry" } else { "" }
    }

    /// The sum of the offsets that the flow has committed.
    fn committed(&self) -> u64 {
        let committed = |topic: &String| self.region.kafka().committed(&self.group(topic), topic);
        let offsets = self.topics().iter().flat_map(committed).collect::<Vec<_>>();
        offsets.into_iter().map(|(_, offset)| offset.unwrap_or(0) as u64).sum()
    }

    /// Consumed, without what was given back and is consumed again.
    fn consumed(&self) -> u64 {
        self.sum(|flow| flow.consumed)
            .saturating_sub(self.sum(|flow| flow.outcome(Outcome::Released)))
    }

    fn committed_to_the_end(&self) -> bool {
        self.topics().iter().all(|topic| {
            // Commits first: what is produced between the two calls makes it "not yet", never "settled" by mistake.
            let committed = self.region.kafka().committed(&self.group(topic), topic);
            let ends = self.region.kafka().end_offsets(topic);
            committed.len() == ends.len()
                && committed
                    .iter()
                    .zip(&ends)
                    .all(|((_, committed), (_, end))| committed.unwrap_or(0) == *end)
        })
    }

    fn settled(&self) -> bool {
        self.silent == 0
            && self.sum(|flow| flow.in_flight) == 0
            // The sums hold as long as no process was replaced; after that, what is committed tells.
            && (self.consumed() == self.produced() || self.committed_to_the_end())
    }

    fn describe(&self) -> String {
        let offsets: Vec<String> = (self.topics().iter())
            .map(|topic| {
                let kafka = self.region.kafka();
                format!(
                    "{topic}: ends {:?}, committed {:?}",
                    kafka.end_offsets(topic),
                    kafka.committed(&self.group(topic), topic)
                )
            })
            .collect();
        let flows: Vec<String> = self.flows.iter().map(|flow| format!("{:#}", flow.json)).collect();
        format!(
            "{}->{}: consumed {} of {}, {} nodes silent\n{}\n{}",
            self.region.name(),
            self.peer,
            self.sum(|flow| flow.consumed),
            self.produced(),
            self.silent,
            offsets.join("\n"),
            flows.join("\n")
        )
    }
}

fn groups<'a>(regions: &[&'a Region]) -> Vec<Group<'a>> {
    let mut groups = BTreeMap::new();
    for &region in regions {
        let said = region.try_status().and_then(|status| flows(&status).ok());
        for peer in region.destinations() {
            let group = groups
                .entry((region.name().to_string(), peer.clone()))
                .or_insert_with(|| Group {
                    region,
                    peer: peer.clone(),
                    flows: Vec::new(),
                    silent: 0,
                });
            match said
                .as_ref()
                .and_then(|flows| flows.iter().find(|flow| flow.peer == peer))
            {
                Some(flow) => group.flows.push(flow.clone()),
                None => group.silent += 1,
            }
        }
    }
    groups.into_values().collect()
}

/// Waits until every flow of these regions has caught up: nothing in flight, and everything that another client finds in
/// the topics is consumed. Name all running nodes of a region, or its sums are wrong.
///
/// # Panics
/// When that takes more than a minute; the message says where each flow stands.
#[track_caller]
pub fn settle(regions: &[&Region]) {
    settle_within(regions, SETTLED_WITHIN);
}

/// [`settle`] with another limit.
#[track_caller]
pub fn settle_within(regions: &[&Region], limit: Duration) {
    settled_within(regions, limit).unwrap_or_else(|error| panic!("{error}"));
}

/// [`settle_within`] for those who go on when it fails.
///
/// # Errors
/// Where each flow stands.
pub fn settled_within(regions: &[&Region], limit: Duration) -> Result<(), String> {
    if holds_within(limit, || groups(regions).iter().all(Group::settled)) {
        return Ok(());
    }
    let text: Vec<String> = groups(regions).iter().map(Group::describe).collect();
    Err(format!("not settled after {limit:?}:\n{}", text.join("\n")))
}

/// What the processes of one flow say, and what Kafka says of it.
#[derive(Clone, Debug)]
pub struct FlowSums {
    /// `<region>-><peer>`.
    pub flow: String,
    /// By the processes that run now, without what they gave back.
    pub consumed: u64,
    /// Records in all of its topics, retry topics included.
    pub produced: u64,
    /// The sum of its committed offsets in the same topics.
    pub committed: u64,
}

/// The sums of every flow of these regions. Name all running nodes of a region.
pub fn flow_sums(regions: &[&Region]) -> Vec<FlowSums> {
    let sums = |group: &Group<'_>| FlowSums {
        flow: format!("{}->{}", group.region.name(), group.peer),
        consumed: group.consumed(),
        produced: group.produced(),
        committed: group.committed(),
    };
    groups(regions).iter().map(sums).collect()
}

/// Every record in the topics was consumed exactly once by the processes that run now, apart from what was released:
/// for tests in which no process was replaced. Settle first.
///
/// # Panics
/// When a number is off.
#[track_caller]
pub fn accounted(regions: &[&Region]) {
    for region in regions {
        super::balanced(&region.status()).unwrap_or_else(|error| panic!("{}: {error}", region.name()));
    }
    for group in groups(regions) {
        assert_eq!(
            group.consumed(),
            group.produced(),
            "consumed and produced differ\n{}",
            group.describe()
        );
    }
}

/// A key whose copies differ: what each region of a comparison holds, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    pub key: Vec<u8>,
    pub held: Vec<Option<Value>>,
}

/// Values and flags of `keys` in a cache, in all of these regions: those keys that are not the same everywhere. Expiry
/// is not compared.
///
/// # Panics
/// When a memcached doesn't answer.
pub fn compare(regions: &[&Region], cache: &str, keys: &[impl AsRef<[u8]>]) -> Vec<Mismatch> {
    let mut mismatches = Vec::new();
    // In pieces, so that a million keys don't lie in memory once per region.
    for keys in keys.chunks(50_000) {
        let held: Vec<Vec<Option<Value>>> = regions
            .iter()
            .map(|region| {
                let found = region.cache(cache).client().get_many(keys);
                found.unwrap_or_else(|error| panic!("reading {cache} of {}: {error}", region.name()))
            })
            .collect();
        for (index, key) in keys.iter().enumerate() {
            if held.iter().any(|values| values[index] != held[0][index]) {
                let held = held.iter().map(|values| values[index].clone()).collect();
                mismatches.push(Mismatch {
                    key: key.as_ref().to_vec(),
                    held,
                });
            }
        }
    }
    mismatches
}

/// Panics, with the first few, when [`compare`] finds mismatches.
#[track_caller]
pub fn assert_same(regions: &[&Region], cache: &str, keys: &[impl AsRef<[u8]>]) {
    let mismatches = compare(regions, cache, keys);
    let first: Vec<String> = mismatches.iter().take(10).map(describe).collect();
    let names: Vec<&str> = regions.iter().map(|region| region.name()).collect();
    assert!(
        mismatches.is_empty(),
        "{} of {} keys differ between {names:?}:\n{}",
        mismatches.len(),
        keys.len(),
        first.join("\n")
    );
}

fn describe(mismatch: &Mismatch) -> String {
    let held = mismatch.held.iter().map(|held| match held {
        None => "nothing".to_string(),
        Some((value, flags)) => {
            let start = value[..value.len().min(40)].escape_ascii();
            format!("\"{start}\" ({} bytes, flags {flags})", value.len())
        }
    });
    format!(
        "{}: {}",
        mismatch.key.escape_ascii(),
        held.collect::<Vec<_>>().join(" | ")
    )
}
