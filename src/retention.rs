//! Retention that passed our offset: events that Kafka has removed before this flow took them. It is never silent.
//!
//! Offsets in a log have legal holes: transactions and compaction leave them. A hole is a gap only when the log has since
//! begun behind it. Two signs are known, and either is enough: librdkafka's notice that it asked for an offset which is not
//! there any more, and a log that begins at or before the first record behind the hole. No I/O and no clock here.

/// Events that are gone, as far as offsets tell: at most so many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// The first offset that is gone.
    pub from: i64,
    /// The first one that is there again.
    pub to: i64,
}

impl Gap {
    /// How many events are gone, at most.
    pub fn events(self) -> u64 {
        self.to.saturating_sub(self.from).max(0) as u64
    }
}

/// What a partition's reading has come upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Events are gone, and so many milliseconds lie between the last event taken and the first one there is, if both are
    /// known.
    Gap(Gap, Option<i64>),
    /// So many lie around a gap that was found before its first record came.
    Span(i64),
}

/// One partition's reading, in offsets.
#[derive(Clone, Debug, Default)]
pub struct Reading {
    /// What comes next, unless there is a hole; unknown before the first record of a partition whose start is unknown.
    next: Option<i64>,
    /// Produced-at of the last record taken, or of what was committed, milliseconds since the epoch.
    taken_ms: Option<i64>,
    /// librdkafka has asked for this offset, and it was not there.
    missed: Option<i64>,
    /// A gap was found whose span of time is not known yet.
    open: bool,
}

impl Reading {
    /// A reading that begins at an offset; `taken_ms` is produced-at of what was last committed.
    pub fn starts(next: Option<i64>, taken_ms: Option<i64>) -> Reading {
        Reading {
            next,
            taken_ms,
            ..Reading::default()
        }
    }

    /// A gap lies before the start: it was found when the partition was assigned.
    pub fn after_gap(mut self) -> Reading {
        self.open = true;
        self
    }

    /// librdkafka found that this offset is not in the log, and begins anew where the log begins.
    pub fn missed(&mut self, offset: i64) {
        self.missed = Some(offset);
    }

    /// Whether this record stands where the last one left off: the usual case, about which nothing is asked.
    pub fn expects(&self, offset: i64) -> bool {
        self.next == Some(offset) && self.missed.is_none() && !self.open
    }

    /// Takes a record; `log_start` is where the log begins, as far as it is known.
    pub fn take(&mut self, offset: i64, produced_at_ms: i64, log_start: Option<i64>) -> Option<Found> {
        let from = self.behind(offset, log_start).filter(|from| *from < offset);
        let span = self.taken_ms.map(|taken| (produced_at_ms - taken).max(0));
        let found = match from {
            Some(from) => {
                // What is known of the log may be old, or newer than the record.
                let to = log_start
                    .filter(|start| (from + 1..offset).contains(start))
                    .unwrap_or(offset);
                Some(Found::Gap(Gap { from, to }, span))
            }
            None if self.open => span.map(Found::Span),
            None => None,
        };
        self.open = false;
        self.taken_ms = Some(produced_at_ms);
        self.next = Some(offset + 1);
        found
    }

    /// Where a gap before this record begins, if there is one.
    fn behind(&mut self, offset: i64, log_start: Option<i64>) -> Option<i64> {
        if let Some(missed) = self.missed {
            let after = self.next.is_none_or(|next| next <= missed);
            if after && missed <= offset {
                self.missed = None;
                return Some(missed);
            }
            if self.next.is_some_and(|next| offset < next) {
                // It begins anew before where we were: the topic was made anew, or cut. What is there is all read again.
                self.missed = None;
            }
            return None;
        }
        let next = self.next?;
        let start = log_start?;
        (next < start && start <= offset).then_some(next)
    }

    /// Called now and then, for a partition in which nothing is left to read that would show the gap.
    pub fn look(&mut self, log_start: Option<i64>) -> Option<Found> {
        let (missed, start) = (self.missed?, log_start?);
        // While records before it are still to come the gap is found when the first one behind it does.
        if self.next.is_some_and(|next| next != missed) || start <= missed {
            return None;
        }
        self.missed = None;
        self.next = Some(start);
        self.open = true;
        let gap = Gap {
            from: missed,
            to: start,
        };
        Some(Found::Gap(gap, None))
    }
}

/// Topic, partition and the offset that was not there, out of librdkafka's log line about a reset.
pub fn reset_in(line: &str) -> Option<(&str, i32, i64)> {
    let (place, what) = line.split_once("]: offset reset (at offset ")?;
    let (before, partition) = place.rsplit_once(" [")?;
    // The line may begin with the name of a thread.
    let topic = before.rsplit(' ').next()?;
    let digits = what.split(|letter: char| !letter.is_ascii_digit()).next()?;
    Some((topic, partition.parse().ok()?, digits.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gap(from: i64, to: i64, span: Option<i64>) -> Option<Found> {
        Some(Found::Gap(Gap { from, to }, span))
    }

    #[test]
    fn holes_that_transactions_and_compaction_leave_are_no_gaps() {
        let mut reading = Reading::starts(Some(100), None);
        assert_eq!(reading.take(100, 1, Some(0)), None);
        assert_eq!(reading.take(105, 2, Some(0)), None);
        assert_eq!(reading.take(106, 3, Some(106 - 6)), None);
        assert_eq!(reading.take(200, 4, None), None);
        // Retention comes close behind, and passes what was fetched before: still none.
        assert_eq!(reading.take(205, 5, Some(201)), None);
        assert_eq!(reading.take(210, 6, Some(900)), None);
        assert!(reading.expects(211) && !reading.expects(212));
    }

    #[test]
    fn a_log_that_begins_behind_our_position_is_a_gap() {
        let mut reading = Reading::starts(Some(100), Some(1_000));
        assert_eq!(reading.take(500, 61_000, Some(500)), gap(100, 500, Some(60_000)));
        assert!(reading.expects(501));
        // A hole behind the beginning of the log is no loss.
        let mut reading = Reading::starts(Some(100), None);
        assert_eq!(reading.take(510, 1, Some(500)), gap(100, 500, None));
    }

    #[test]
    fn a_notice_is_enough_even_when_the_log_has_moved_on_meanwhile() {
        let mut reading = Reading::starts(Some(100), None);
        reading.missed(150);
        for offset in [100, 101, 149] {
            assert_eq!(reading.take(offset, 0, Some(900)), None, "fetched before");
        }
        assert_eq!(reading.take(300, 7, Some(900)), gap(150, 300, Some(7)));
        assert_eq!(reading.take(301, 8, Some(900)), None, "once");
    }

    #[test]
    fn a_partition_with_nothing_left_shows_its_gap_too() {
        let mut reading = Reading::starts(Some(100), Some(5));
        assert_eq!(reading.look(Some(400)), None, "nothing was missed");
        reading.missed(100);
        assert_eq!(reading.look(None), None);
        assert_eq!(reading.look(Some(0)), None, "what is known of the log is old");
        assert_eq!(reading.look(Some(400)), gap(100, 400, None));
        assert_eq!(reading.look(Some(400)), None, "once");
        assert_eq!(reading.take(400, 9, Some(400)), Some(Found::Span(4)));
        assert_eq!(reading.take(401, 9, Some(400)), None);
    }

    #[test]
    fn an_unknown_start_needs_a_notice() {
        let mut reading = Reading::starts(None, None);
        assert_eq!(reading.look(Some(7)), None);
        assert_eq!(reading.take(500, 1, Some(500)), None);
        let mut reading = Reading::starts(None, None);
        reading.missed(20);
        assert_eq!(reading.take(500, 1, None), gap(20, 500, None));
        let mut reading = Reading::starts(None, None);
        reading.missed(20);
        assert_eq!(reading.look(Some(500)), gap(20, 500, None));
    }

    #[test]
    fn a_topic_that_was_made_anew_is_read_from_its_beginning_without_a_gap() {
        let mut reading = Reading::starts(Some(1_000), None);
        reading.missed(1_000);
        assert_eq!(reading.look(Some(0)), None);
        assert_eq!(reading.take(0, 1, Some(0)), None);
        assert!(reading.expects(1));
    }

    #[test]
    fn a_gap_found_at_the_assignment_gets_its_span_from_the_first_record() {
        let mut reading = Reading::starts(Some(500), Some(10)).after_gap();
        assert!(!reading.expects(500));
        assert_eq!(reading.take(500, 30, Some(500)), Some(Found::Span(20)));
        let mut unknown = Reading::starts(Some(500), None).after_gap();
        assert_eq!(unknown.take(500, 30, Some(500)), None);
        assert!(unknown.expects(501));
    }

    #[test]
    fn a_notice_is_read_out_of_librdkafkas_line() {
        let line = "[thrd:main]: evrepl.sessions [5]: offset reset (at offset 151 (leader epoch 3), broker 1) to \
                    offset BEGINNING (leader epoch -1): fetch failed due to requested offset not available on the \
                    broker: Broker: Offset out of range";
        assert_eq!(reset_in(line), Some(("evrepl.sessions", 5, 151)));
        assert_eq!(
            reset_in(&line["[thrd:main]: ".len()..]),
            Some(("evrepl.sessions", 5, 151))
        );
        assert_eq!(reset_in("t [x]: offset reset (at offset 1)"), None);
        assert_eq!(
            reset_in("t [0]: offset reset (at offset INVALID (leader epoch -1))"),
            None
        );
        assert_eq!(reset_in("something else"), None);
    }
}
