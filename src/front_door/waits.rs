//! Answers that wait until Kafka has acknowledged their events.

use std::collections::hash_map::{Entry, HashMap};
use std::time::Duration;

use tokio::time::Instant;

use super::order::Receipt;

/// Events, and whether Kafka has acknowledged them.
pub type Letters = Vec<(Receipt, bool)>;

struct Waiting<S> {
    session: S,
    events: u32,
    acknowledged: bool,
    since: Instant,
}

/// See the module. `S` is whose they are.
pub struct Waits<S> {
    waiting: HashMap<Receipt, Waiting<S>>,
}

impl<S> Default for Waits<S> {
    fn default() -> Self {
        Waits {
            waiting: HashMap::new(),
        }
    }
}

impl<S: PartialEq> Waits<S> {
    /// An answer of this session's waits for so many events since `now`; `lost`: there was one more, of which nothing will be heard.
    pub fn add(&mut self, receipt: Receipt, session: S, events: u32, lost: bool, now: Instant) {
        let waiting = Waiting {
            session,
            events,
            acknowledged: !lost,
            since: now,
        };
        self.waiting.insert(receipt, waiting);
    }

    /// These have come from Kafka; gives what sessions are to be told. Of one that is late it was told before.
    pub fn arrived(&mut self, letters: Letters) -> Vec<(S, Letters)> {
        let mut told = Vec::new();
        for (receipt, acknowledged) in letters {
            let Entry::Occupied(mut entry) = self.waiting.entry(receipt) else {
                continue;
            };
            let waiting = entry.get_mut();
            waiting.events -= 1;
            waiting.acknowledged &= acknowledged;
            if waiting.events == 0 {
                let Waiting {
                    session, acknowledged, ..
                } = entry.remove();
                tell(&mut told, session, (receipt, acknowledged));
            }
        }
        told
    }

    /// Those that have waited for `limit` wait no longer; nor does any, if nobody waits (`none_waits`). Their events count as not
    /// acknowledged: librdkafka itself says so up to a second late.
    pub fn end(&mut self, now: Instant, limit: Duration, none_waits: bool) -> Vec<(S, Letters)> {
        let late = |waiting: &Waiting<S>| none_waits || now - waiting.since >= limit;
        let mut late: Vec<_> = self.waiting.extract_if(|_, waiting| late(waiting)).collect();
        // In the order in which their clients hear of them.
        late.sort_unstable_by_key(|(receipt, _)| *receipt);
        let mut told = Vec::new();
        for (receipt, waiting) in late {
            tell(&mut told, waiting.session, (receipt, false));
        }
        told
    }
}

fn tell<S: PartialEq>(told: &mut Vec<(S, Letters)>, session: S, letter: (Receipt, bool)) {
    match told.last_mut() {
        Some((last, letters)) if *last == session => letters.push(letter),
        _ => told.push((session, vec![letter])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(3);

    #[test]
    fn an_answer_is_told_when_all_its_events_are_known_and_then_only() {
        let (mut waits, now) = (Waits::default(), Instant::now());
        waits.add(1, 'a', 1, false, now);
        waits.add(2, 'a', 2, false, now);
        waits.add(3, 'b', 1, true, now);
        waits.add(4, 'b', 2, false, now);
        assert_eq!(waits.arrived(vec![(2, true), (4, false)]), vec![]);
        let told = waits.arrived(vec![(1, true), (2, true), (3, true), (4, true), (4, true)]);
        assert_eq!(
            told,
            vec![('a', vec![(1, true), (2, true)]), ('b', vec![(3, false), (4, false)])]
        );
        assert_eq!(waits.end(now + LIMIT, LIMIT, true), vec![]);
    }

    #[test]
    fn no_answer_waits_longer_than_it_may() {
        let (mut waits, now) = (Waits::default(), Instant::now());
        let later = now + LIMIT / 2;
        for receipt in (1..=20).rev() {
            let (session, since) = if receipt <= 10 { ('a', now) } else { ('b', later) };
            waits.add(receipt, session, 2, false, since);
        }
        assert_eq!(waits.arrived(vec![(1, true)]), vec![]);
        assert_eq!(waits.end(now + LIMIT - Duration::from_millis(1), LIMIT, false), vec![]);
        let letters = |receipts: std::ops::RangeInclusive<Receipt>| receipts.map(|receipt| (receipt, false)).collect();
        assert_eq!(waits.end(now + LIMIT, LIMIT, false), vec![('a', letters(1..=10))]);
        // They have been told.
        assert_eq!(waits.arrived(vec![(1, true), (2, false), (2, false)]), vec![]);
        assert_eq!(waits.end(later, LIMIT, true), vec![('b', letters(11..=20))]);
    }
}
