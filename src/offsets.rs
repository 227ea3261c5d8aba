//! Which offset may be committed: the watermark behind which every event of one partition is finished, and the
//! accounts of where its events are.
//!
//! A plain type, one per partition and assignment. Only *open* events take memory: 64 at a time share a block, and a
//! block whose events are all finished is dropped at once, so that one dirty key that holds the watermark for an hour
//! costs eight bytes per 64 events that pass it, not an entry each.

use std::collections::VecDeque;

use crate::outcome::Outcome;

/// The number of an event within its [`Tracker`], from 0, in offset order.
pub type Seq = u64;

/// Where an open event is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// Consumed, not yet forwarded: no permit.
    Waiting,
    /// On its way, with a permit.
    InFlight,
    /// Its key is dirty: no permit.
    Dirty,
}

/// One snapshot of where a flow's or a partition's events are. Totals since the tracker was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accounts {
    /// Events consumed.
    pub consumed: u64,
    /// Events ended, by [`Outcome::index`].
    pub outcomes: [u64; Outcome::COUNT],
    /// Open events that wait to be forwarded.
    pub waiting: u64,
    /// Open events with a permit.
    pub in_flight: u64,
    /// Open events whose key is dirty.
    pub dirty: u64,
}

impl Accounts {
    /// Adds another partition's or an earlier assignment's accounts to these.
    pub fn merge(&mut self, other: &Accounts) {
        self.consumed += other.consumed;
        self.outcomes
            .iter_mut()
            .zip(other.outcomes)
            .for_each(|(mine, more)| *mine += more);
        self.waiting += other.waiting;
        self.in_flight += other.in_flight;
        self.dirty += other.dirty;
    }

    /// Everything that is held ends as released: for accounts whose holder is gone.
    pub fn release_held(&mut self) {
        self.outcomes[Outcome::Released.index()] += self.in_flight_total();
        (self.waiting, self.in_flight, self.dirty) = (0, 0, 0);
    }

    /// All open events: waiting, in flight and dirty.
    pub fn in_flight_total(&self) -> u64 {
        self.waiting + self.in_flight + self.dirty
    }

    /// Events that ended like this.
    pub fn ended(&self, outcome: Outcome) -> u64 {
        self.outcomes[outcome.index()]
    }

    /// Is every consumed event either ended in one outcome or held somewhere?
    pub fn balanced(&self) -> bool {
        self.consumed == self.outcomes.iter().sum::<u64>() + self.in_flight_total()
    }

    /// These events of a block are not held any more where they were.
    fn leave(&mut self, block: &Block, events: u64) {
        let in_flight = u64::from((events & block.in_flight).count_ones());
        let dirty = u64::from((events & block.dirty).count_ones());
        self.in_flight -= in_flight;
        self.dirty -= dirty;
        self.waiting -= u64::from(events.count_ones()) - in_flight - dirty;
    }

    fn held(&mut self, hold: Hold) -> &mut u64 {
        match hold {
            Hold::Waiting => &mut self.waiting,
            Hold::InFlight => &mut self.in_flight,
            Hold::Dirty => &mut self.dirty,
        }
    }
}

/// Events per block: as many as a word has bits.
const BLOCK: u64 = u64::BITS as u64;

/// A watermark before any event; no offset of Kafka's.
const NOTHING: i64 = i64::MIN;

/// Open events among 64 neighbours: one bit each in `open`, at most one in `in_flight` or `dirty`, and what the
/// watermark is when all before it are finished.
#[derive(Default)]
struct Block {
    open: u64,
    in_flight: u64,
    dirty: u64,
    /// The watermark before its first event, had it been opened: of the others as many more as they come later, unless
    /// offsets have holes.
    base: i64,
    /// Each event's own, once one of them stands behind a hole.
    holes: Option<Box<[i64; BLOCK as usize]>>,
}

// The budget of the design: at most 16 bytes per open event, in a full block.
const _: () = assert!(size_of::<Block>() + 8 * BLOCK as usize <= 16 * BLOCK as usize);

impl Block {
    /// The watermark when all before its event `n` are finished.
    fn before(&self, n: u64) -> i64 {
        match &self.holes {
            None => self.base.wrapping_add(n as i64),
            Some(holes) => holes[n as usize],
        }
    }

    /// The same of an event that is opened now, the newest of the block.
    fn open(&mut self, n: u64, before: i64) {
        if self.open == 0 && self.holes.is_none() {
            // Those before it are finished, and nobody asks about them any more.
            self.base = before.wrapping_sub(n as i64);
        } else if self.before(n) != before {
            let base = self.base;
            let holes = self
                .holes
                .get_or_insert_with(|| Box::new(std::array::from_fn(|at| base.wrapping_add(at as i64))));
            holes[n as usize] = before;
        }
        self.open |= 1 << n;
    }

    /// Where the events of these bits are held from now on.
    fn set_hold(&mut self, bits: u64, hold: Hold) {
        self.in_flight &= !bits;
        self.dirty &= !bits;
        match hold {
            Hold::Waiting => {}
            Hold::InFlight => self.in_flight |= bits,
            Hold::Dirty => self.dirty |= bits,
        }
    }
}

/// The open events of one partition during one assignment.
///
/// Offsets come in rising order; gaps are fine. O(1) amortised per call.
pub struct Tracker {
    generation: u64,
    /// Blocks from number `first` on; `None` where none is open. The front, if there is one, has an open event.
    blocks: VecDeque<Option<Box<Block>>>,
    first: u64,
    next_seq: Seq,
    /// The watermark when all that came is finished.
    end: i64,
    /// Where released events stop the watermark for good.
    ceiling: i64,
    released: bool,
    taken: i64,
    late: u64,
    accounts: Accounts,
    /// One block kept for reuse: a partition with little traffic empties its only block with every event.
    spare: Option<Box<Block>>,
}

impl Tracker {
    /// A tracker that has seen nothing, for the given generation of the partition's assignment.
    pub fn new(generation: u64) -> Self {
        Self {
            generation,
            blocks: VecDeque::new(),
            first: 0,
            next_seq: 0,
            end: NOTHING,
            ceiling: i64::MAX,
            released: false,
            taken: NOTHING,
            late: 0,
            accounts: Accounts::default(),
            spare: None,
        }
    }

    /// The assignment this tracker belongs to: what carries another generation is not for it.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Counts a consumed event and holds it as waiting. After [`release_open`](Self::release_open) it ends as released
    /// at once.
    pub fn open(&mut self, offset: i64) -> Seq {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.accounts.consumed += 1;
        if self.released {
            self.accounts.outcomes[Outcome::Released.index()] += 1;
            return seq;
        }
        let before = self.end;
        self.pass(offset);

        let (number, _) = place(seq);
        if self.blocks.is_empty() {
            self.first = number;
        }
        if self.first + self.blocks.len() as u64 == number {
            self.blocks.push_back(None);
        }
        let spare = &mut self.spare;
        if let Some(place) = self.blocks.back_mut() {
            let block = place.get_or_insert_with(|| spare.take().unwrap_or_default());
            block.open(seq % BLOCK, before);
        }
        self.accounts.waiting += 1;
        seq
    }

    /// A record that is no event (a canary): not counted, but the watermark moves past it.
    pub fn pass(&mut self, offset: i64) {
        // A record read again must not pull the watermark back.
        self.end = self.end.max(offset.saturating_add(1));
    }

    /// An open event is now held there. False, counted in [`late`](Self::late), when it is not open (any more).
    pub fn hold(&mut self, seq: Seq, hold: Hold) -> bool {
        self.hold_run(seq, 1, hold) == 1
    }

    /// The same for `count` events that follow one another; returns how many of them were open.
    pub fn hold_run(&mut self, first: Seq, count: u64, hold: Hold) -> u64 {
        self.run(first, count, |accounts, block, open| {
            accounts.leave(block, open);
            *accounts.held(hold) += u64::from(open.count_ones());
            block.set_hold(open, hold);
        })
    }

    /// Ends an open event. False, changing nothing but [`late`](Self::late), when it was not open: late or twice.
    ///
    /// [`Outcome::Released`] ends it too, but the watermark stays below it from then on.
    pub fn finish(&mut self, seq: Seq, outcome: Outcome) -> bool {
        self.finish_run(seq, 1, outcome) == 1
    }

    /// The same for `count` events that follow one another; returns how many of them were open.
    pub fn finish_run(&mut self, first: Seq, count: u64, outcome: Outcome) -> u64 {
        let mut ceiling = self.ceiling;
        let finished = self.run(first, count, |accounts, block, open| {
            accounts.leave(block, open);
            accounts.outcomes[outcome.index()] += u64::from(open.count_ones());
            if outcome == Outcome::Released && open != 0 {
                ceiling = ceiling.min(block.before(u64::from(open.trailing_zeros())));
            }
            block.set_hold(open, Hold::Waiting);
            block.open &= !open;
        });
        self.ceiling = ceiling;
        finished
    }

    /// Does something to those of `count` events that are open, block by block: `work` gets a block and their bits in it.
    /// Returns how many they are; the others are late.
    fn run(&mut self, first: Seq, count: u64, mut work: impl FnMut(&mut Accounts, &mut Block, u64)) -> u64 {
        let (mut seq, end) = (first, first.saturating_add(count));
        let mut found = 0;
        while seq < end {
            let (number, _) = place(seq);
            let at = seq % BLOCK;
            let here = (BLOCK - at).min(end - seq);
            let bits = (u64::MAX >> (BLOCK - here)) << at;
            seq += here;
            let index = number.checked_sub(self.first).map(|index| index as usize);
            let place = index.and_then(|index| self.blocks.get_mut(index));
            let Some(slot) = place.filter(|slot| slot.is_some()) else {
                continue;
            };
            let Some(block) = slot else { continue };
            let open = block.open & bits;
            found += u64::from(open.count_ones());
            work(&mut self.accounts, block, open);
            if block.open == 0 {
                block.holes = None;
                self.spare = slot.take();
            }
        }
        while let Some(None) = self.blocks.front() {
            self.blocks.pop_front();
            self.first += 1;
        }
        self.late += count - found;
        found
    }

    /// Every open event ends as released; returns how many. The watermark stays where it is from now on, and whatever
    /// is reported about them afterwards is late.
    pub fn release_open(&mut self) -> u64 {
        self.ceiling = self.position();
        self.released = true;
        self.blocks = VecDeque::new();
        self.spare = None;
        let open = self.accounts.in_flight_total();
        self.accounts.outcomes[Outcome::Released.index()] += open;
        (self.accounts.waiting, self.accounts.in_flight, self.accounts.dirty) = (0, 0, 0);
        open
    }

    /// Is this event open and in flight?
    pub fn is_in_flight(&self, seq: Seq) -> bool {
        let (number, bit) = place(seq);
        let index = number
            .checked_sub(self.first)
            .and_then(|index| usize::try_from(index).ok());
        let block = index.and_then(|index| self.blocks.get(index)?.as_deref());
        block.is_some_and(|block| block.open & block.in_flight & bit != 0)
    }

    /// The offsets of the events in flight, each span from the first to one above the last; neighbours share one. Where
    /// offsets have gaps a span begins or ends in the gap, but covers no other event.
    pub fn in_flight_spans(&self) -> Vec<(i64, i64)> {
        let mut spans: Vec<(i64, i64)> = Vec::new();
        for (number, block) in (self.first..).zip(&self.blocks) {
            let Some(block) = block else { continue };
            for n in (0..BLOCK).filter(|n| block.open & block.in_flight & (1 << n) != 0) {
                let from = block.before(n);
                let next = number * BLOCK + n + 1;
                // Opened while this block lived, if it was opened at all; of another block that is not known.
                let to = match n + 1 {
                    _ if next == self.next_seq => self.end,
                    BLOCK => from.saturating_add(1),
                    next => block.before(next),
                };
                match spans.last_mut() {
                    Some(last) if last.1 >= from => last.1 = to,
                    _ => spans.push((from, to)),
                }
            }
        }
        spans
    }

    /// The offset to commit: one above the last of the finished events that no open or released one precedes. `None`
    /// before anything is finished.
    pub fn watermark(&self) -> Option<i64> {
        Some(self.position()).filter(|offset| *offset != NOTHING)
    }

    /// The watermark, if it has moved since this was last asked.
    pub fn commit_due(&mut self) -> Option<i64> {
        let offset = self.watermark().filter(|offset| *offset > self.taken)?;
        self.taken = offset;
        Some(offset)
    }

    /// Reports about events that were not open: late (after a release) or made twice.
    pub fn late(&self) -> u64 {
        self.late
    }

    /// Where the events of this assignment are: one snapshot.
    pub fn accounts(&self) -> Accounts {
        self.accounts.clone()
    }

    fn position(&self) -> i64 {
        let reached = match self.blocks.front() {
            Some(Some(block)) => block.before(u64::from(block.open.trailing_zeros()) % BLOCK),
            _ => self.end,
        };
        reached.min(self.ceiling)
    }
}

/// The number of an event's block and its bit in there.
fn place(seq: Seq) -> (u64, u64) {
    (seq / BLOCK, 1 << (seq % BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;
    use Outcome::*;
    use proptest::prelude::*;

    fn tracker(offsets: impl IntoIterator<Item = i64>) -> Tracker {
        let mut tracker = Tracker::new(7);
        offsets.into_iter().for_each(|offset| _ = tracker.open(offset));
        tracker
    }

    #[test]
    fn the_watermark_waits_for_the_oldest_open_event() {
        let mut it = tracker([10, 11, 15]);
        assert!(it.finish(1, Applied) && it.finish(2, Deleted));
        assert_eq!((it.watermark(), it.commit_due()), (None, None));
        assert!(it.finish(0, Superseded));
        assert_eq!(
            (it.watermark(), it.commit_due(), it.commit_due()),
            (Some(16), Some(16), None)
        );
        assert_eq!((it.generation(), it.late()), (7, 0));
    }

    #[test]
    fn a_record_that_is_no_event_is_passed_but_not_counted() {
        let mut it = tracker([]);
        it.pass(4);
        assert_eq!((it.watermark(), it.accounts().consumed), (Some(5), 0));
        let seq = it.open(5);
        it.pass(9);
        assert_eq!(it.watermark(), Some(5));
        assert!(it.finish(seq, Filtered));
        assert_eq!(it.commit_due(), Some(10));
    }

    #[test]
    fn a_released_event_stops_the_watermark_for_good() {
        let mut it = tracker(0..200);
        assert!(it.finish(150, Released));
        (0..200).for_each(|seq| _ = it.finish(seq, Applied));
        assert_eq!((it.watermark(), it.late()), (Some(150), 1));
        assert!(it.accounts().balanced());
    }

    #[test]
    fn a_release_ends_all_that_is_open_and_what_comes_then_is_late() {
        let mut it = tracker(0..100);
        (0..50).for_each(|seq| assert!(it.finish(seq, Applied)));
        assert!(it.hold(60, Hold::InFlight) && it.hold(61, Hold::Dirty));
        assert_eq!((it.release_open(), it.release_open()), (50, 0));
        assert!(!it.finish(60, Applied) && !it.hold(61, Hold::InFlight) && !it.finish(1000, Applied));
        let seq = it.open(100);
        it.pass(101);
        assert!(!it.finish(seq, Applied));
        let accounts = it.accounts();
        assert_eq!(
            (accounts.ended(Released), accounts.in_flight_total(), it.late()),
            (51, 0, 4)
        );
        assert_eq!(
            (it.commit_due(), accounts.balanced()),
            (Some(50), true),
            "what was finished before may be committed"
        );
    }

    #[test]
    fn events_that_pass_a_dirty_one_take_next_to_no_memory() {
        let mut it = tracker([0]);
        assert!(it.hold(0, Hold::Dirty));
        for offset in 1..=1_000_000 {
            let seq = it.open(offset);
            assert!(it.finish(seq, Applied));
        }
        assert_eq!((it.watermark(), it.blocks.iter().flatten().count()), (None, 1));
        assert!(it.blocks.len() <= 1_000_000 / 64 + 1);
        assert!(it.finish(0, Applied));
        assert_eq!((it.watermark(), it.blocks.len()), (Some(1_000_001), 0));
    }

    #[test]
    fn an_event_starts_as_waiting_also_where_others_were_held_before() {
        let mut it = tracker([]);
        for offset in 0..200 {
            let seq = it.open(offset);
            assert_eq!((it.accounts().waiting, it.accounts().in_flight_total()), (1, 1));
            assert!(it.hold(seq, Hold::InFlight) && it.finish(seq, Applied));
        }
    }

    #[test]
    fn the_events_in_flight_are_known_by_their_offsets() {
        let mut it = tracker(100..300);
        assert!(it.in_flight_spans().is_empty());
        for seq in [3, 4, 5, 63, 64, 199] {
            assert!(it.hold(seq, Hold::InFlight) && it.is_in_flight(seq));
        }
        assert!(it.hold(70, Hold::Dirty) && !it.is_in_flight(70) && !it.is_in_flight(71) && !it.is_in_flight(1000));
        let spans = vec![(103, 106), (163, 165), (299, 300)];
        assert_eq!(it.in_flight_spans(), spans);
        // What is finished around them changes nothing, also when its blocks are dropped and made again.
        (0..200).for_each(|seq| _ = !it.is_in_flight(seq) && it.finish(seq, Applied));
        assert_eq!(it.in_flight_spans(), spans);
        assert!(it.finish(199, Applied) && !it.is_in_flight(199));
        let seq = it.open(310);
        assert!(it.hold(seq, Hold::InFlight));
        assert_eq!(it.in_flight_spans(), [(103, 106), (163, 165), (300, 311)]);
    }

    #[test]
    fn merged_accounts_are_the_sums() {
        let (mut a, mut b) = (tracker(0..3), tracker(0..5));
        assert!(a.finish(0, Applied) && b.finish(1, Applied) && b.hold(2, Hold::Dirty) && b.hold(3, Hold::InFlight));
        let mut sum = a.accounts();
        sum.merge(&b.accounts());
        assert_eq!(
            (sum.consumed, sum.ended(Applied), sum.waiting, sum.in_flight, sum.dirty),
            (8, 2, 4, 1, 1)
        );
        assert!(sum.balanced() && sum.in_flight_total() == 6);
        sum.dirty -= 1;
        assert!(!sum.balanced());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open(i64),
        Pass(i64),
        Hold(u64, u64, Hold),
        Finish(u64, u64, Outcome),
        Release,
    }

    fn run() -> impl Strategy<Value = u64> {
        prop_oneof![8 => Just(1u64), 1 => 0u64..150]
    }

    fn step() -> impl Strategy<Value = Step> {
        let hold = prop_oneof![Just(Hold::Waiting), Just(Hold::InFlight), Just(Hold::Dirty)];
        prop_oneof![
            40 => (1i64..4).prop_map(Step::Open),
            4 => (1i64..4).prop_map(Step::Pass),
            // Without holes, as most topics are; then whole blocks are one run.
            40 => Just(Step::Open(1)),
            // How far back from the newest event, and how many: late, double and unknown ones come about by themselves.
            20 => (0u64..200, run(), hold).prop_map(|(back, count, hold)| Step::Hold(back, count, hold)),
            60 => (0u64..200, run(), prop::sample::select(&Outcome::ALL[..10]))
                .prop_map(|(back, count, how)| Step::Finish(back, count, how)),
            1 => (0u64..90).prop_map(|back| Step::Finish(back, 1, Released)),
            1 => (0u64..90, run()).prop_map(|(back, count)| Step::Finish(back, count, Released)),
            1 => Just(Step::Release),
        ]
    }

    /// The tracker as one would draw it: every event with its offset and where it is.
    #[derive(Default)]
    struct Naive {
        events: Vec<(i64, Result<Hold, Outcome>)>,
        passed: Vec<i64>,
        frozen: Option<Option<i64>>,
        late: u64,
    }

    impl Naive {
        fn watermark(&self) -> Option<i64> {
            if let Some(watermark) = self.frozen {
                return watermark;
            }
            let blocks = |state: &Result<Hold, Outcome>| matches!(state, Ok(_) | Err(Released));
            let limit = self
                .events
                .iter()
                .find(|(_, state)| blocks(state))
                .map_or(i64::MAX, |(offset, _)| *offset);
            let seen = self
                .events
                .iter()
                .map(|(offset, _)| *offset)
                .chain(self.passed.iter().copied());
            seen.filter(|offset| *offset < limit).max().map(|offset| offset + 1)
        }

        /// Puts those of a run that are open there; how many they are.
        fn change(&mut self, first: u64, count: u64, to: Result<Hold, Outcome>) -> u64 {
            let mut changed = 0;
            for seq in (0..count).map(|n| first.saturating_add(n)) {
                match self.events.get_mut(seq as usize).filter(|(_, state)| state.is_ok()) {
                    Some((_, state)) => {
                        *state = to;
                        changed += 1;
                    }
                    None => self.late += 1,
                }
            }
            changed
        }

        fn count(&self, wanted: Result<Hold, Outcome>) -> u64 {
            self.events.iter().filter(|(_, state)| *state == wanted).count() as u64
        }
    }

    /// What may happen to one partition over several assignments.
    #[derive(Clone, Debug)]
    enum Life {
        /// The consumer takes so many records.
        Take(u64),
        /// One of the events that are out, of this or an earlier assignment, ends.
        End(usize),
        /// The watermark is written to Kafka.
        Commit,
        /// The partition is revoked in order: the last watermark is written, what is out stays out, late.
        Revoke,
        /// The process dies: nothing more is written.
        Die,
    }

    fn life() -> impl Strategy<Value = Life> {
        prop_oneof![
            10 => (1u64..9).prop_map(Life::Take),
            30 => any::<usize>().prop_map(Life::End),
            6 => Just(Life::Commit),
            1 => Just(Life::Revoke),
            1 => Just(Life::Die),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn whatever_is_finished_revoked_and_restarted_no_commit_passes_an_event_that_never_finished(
            steps in prop::collection::vec(life(), 1..300), gaps in prop::collection::vec(1i64..4, 64)
        ) {
            // The partition's records, and those that have ended in some assignment.
            let mut offsets = vec![0i64];
            for gap in gaps.iter().cycle().take(5_000) {
                offsets.push(offsets.last().unwrap() + gap);
            }
            let mut ended = std::collections::HashSet::new();
            let (mut generation, mut committed) = (1, 0i64);
            let (mut it, mut next) = (Tracker::new(generation), 0usize);
            // (generation, number, offset) of events that somebody downstream holds.
            let mut out: Vec<(u64, Seq, i64)> = Vec::new();
            for step in steps {
                match step {
                    Life::Take(count) => for _ in 0..count {
                        let offset = offsets[next];
                        next += 1;
                        out.push((it.generation(), it.open(offset), offset));
                    },
                    Life::End(which) if !out.is_empty() => {
                        let (of, seq, offset) = out.swap_remove(which % out.len());
                        ended.insert(offset);
                        let late = it.late();
                        // What carries another generation is not this tracker's: its caller ignores and counts it.
                        if of == it.generation() {
                            prop_assert!(it.finish(seq, Applied));
                            prop_assert_eq!(it.late(), late);
                        }
                    }
                    Life::End(_) => {}
                    Life::Commit => committed = it.commit_due().unwrap_or(committed),
                    Life::Revoke | Life::Die => {
                        if matches!(step, Life::Revoke) {
                            it.release_open();
                            committed = it.watermark().unwrap_or(committed);
                        }
                        generation += 1;
                        it = Tracker::new(generation);
                        next = offsets.partition_point(|offset| *offset < committed);
                    }
                }
                prop_assert!(it.accounts().balanced());
                let unfinished = offsets.iter().find(|offset| !ended.contains(*offset)).unwrap();
                prop_assert!(committed <= *unfinished, "committed {committed}, but {unfinished} never ended");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]
        #[test]
        fn any_interleaving_commits_only_what_is_finished_and_accounts_for_all(steps in prop::collection::vec(step(), 1..400)) {
            let (mut it, mut naive, mut offset, mut last) = (Tracker::new(1), Naive::default(), 0, None);
            for step in steps {
                match step {
                    Step::Open(gap) => {
                        offset += gap;
                        prop_assert_eq!(it.open(offset), naive.events.len() as u64);
                        naive.events.push((offset, if naive.frozen.is_some() { Err(Released) } else { Ok(Hold::Waiting) }));
                    }
                    Step::Pass(gap) => {
                        offset += gap;
                        it.pass(offset);
                        naive.passed.push(offset);
                    }
                    Step::Hold(back, count, hold) => {
                        let seq = (naive.events.len() as u64).wrapping_sub(back);
                        let open = naive.change(seq, count, Ok(hold));
                        prop_assert_eq!(it.hold_run(seq, count, hold), open);
                    }
                    Step::Finish(back, count, outcome) => {
                        let seq = (naive.events.len() as u64).wrapping_sub(back);
                        let open = naive.change(seq, count, Err(outcome));
                        prop_assert_eq!(it.finish_run(seq, count, outcome), open);
                    }
                    Step::Release => {
                        let watermark = naive.watermark();
                        let open = naive.events.iter_mut().filter(|(_, state)| state.is_ok());
                        prop_assert_eq!(it.release_open(), open.map(|(_, state)| *state = Err(Released)).count() as u64);
                        naive.frozen = Some(watermark);
                    }
                }
                prop_assert_eq!(it.watermark(), naive.watermark());
                prop_assert!(it.watermark() >= last, "the watermark stepped back");
                prop_assert_eq!(it.commit_due(), it.watermark().filter(|_| it.watermark() > last));
                last = it.watermark();

                let accounts = it.accounts();
                prop_assert!(accounts.balanced());
                prop_assert_eq!(
                    (accounts.consumed, accounts.waiting, accounts.in_flight, accounts.dirty, it.late()),
                    (naive.events.len() as u64, naive.count(Ok(Hold::Waiting)), naive.count(Ok(Hold::InFlight)),
                        naive.count(Ok(Hold::Dirty)), naive.late)
                );
                for outcome in Outcome::ALL {
                    prop_assert_eq!(accounts.ended(outcome), naive.count(Err(outcome)));
                }
            }
        }
    }
}
