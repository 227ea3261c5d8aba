//! Which answer belongs to which write of a call, when most writes are silent unless they fail. No I/O.
//!
//! A write is sent *quiet* (flag `q`: memcached says nothing when all is well) unless it is *spoken*: then it carries its
//! number, and one answer comes in any case. Spoken are touches, whose answer says whether there was an item; large values,
//! which are the ones that are refused for their size and cost far more than their answer; and the last write of a call.
//! Behind it comes `mn`, whose answer ends the call.
//!
//! Measured on 1.6.18, and so in the sources of later versions: a quiet `ms` answers whatever is not `HD`, be it too large
//! or out of memory; a quiet `md` of a key that is not there answers a bare `NF` (later versions need not). Error lines
//! carry no number, but they keep their place. So between two spoken answers as many error lines as spoken writes without
//! an answer belong to those, one by one. If there are more, quiet writes have failed and nobody knows which: all of them
//! between the two are [`NotDone::Unknown`], and their keys are to be looked at again. Sending them again instead would be
//! wrong: a key may come twice in a call, and would go back to its older value for a moment.

use super::codec::{self, Code, Reply};
use super::{NotDone, Write, WriteOp, Writes};

/// A larger value is spoken: below, an answer would be a tenth of what the write costs memcached and us, and more.
const SPOKEN_VALUE_BYTES: usize = 16 * 1024;

/// What is heard of one call; see the module.
pub(super) struct Answers<'a> {
    writes: &'a Writes,
    /// The number of the first write; the others follow, whether they were sent or not.
    first: u32,
    /// Places of the spoken writes, in order, and how many of them are answered.
    spoken: Vec<u32>,
    answered: usize,
    /// Place of the first write that nothing is known of.
    next: usize,
    /// Quiet removals that may yet say that there was nothing.
    removals: usize,
    /// Error lines since the last spoken answer.
    errors: Vec<Reply>,
    /// How the writes ended that were not simply done, by their place.
    pub not_done: Vec<(u32, NotDone)>,
    /// Rights to refresh an item that a touch was handed, with the item's CAS.
    pub tokens: Vec<(u32, u64)>,
}

/// Whether a write gets an answer also when all is well.
pub(super) fn is_spoken(write: &Write<'_>) -> bool {
    match write.op {
        WriteOp::Set { value, .. } => value.len() > SPOKEN_VALUE_BYTES,
        WriteOp::Touch { .. } => true,
        WriteOp::Delete => false,
    }
}

impl<'a> Answers<'a> {
    /// Nothing is sent yet. `first` is the number of the first write.
    pub fn new(writes: &'a Writes, first: u32) -> Answers<'a> {
        Answers {
            writes,
            first,
            spoken: Vec::new(),
            answered: 0,
            next: 0,
            removals: 0,
            errors: Vec::new(),
            not_done: Vec::new(),
            tokens: Vec::new(),
        }
    }

    /// This write is sent, behind those that were.
    pub fn sent(&mut self, place: usize, write: &Write<'_>, spoken: bool) {
        if spoken {
            self.spoken.push(place as u32);
        } else if write.op == WriteOp::Delete {
            self.removals += 1;
        }
    }

    /// Takes the next reply; true once it was the last. The error says what is out of step: nothing is known of the call then.
    pub fn take(&mut self, reply: Reply) -> Result<bool, String> {
        match (&reply.code, reply.opaque) {
            (Code::Noop, None) => {
                self.pass(self.writes.len())?;
                return Ok(true);
            }
            (_, Some(number)) => {
                let place = number.wrapping_sub(self.first) as usize;
                if place < self.next || self.spoken[self.answered..].binary_search(&(place as u32)).is_err() {
                    return Err(format!("answer number {number} out of turn"));
                }
                self.pass(place)?;
                self.answer(place, reply)?;
                self.next = place + 1;
            }
            (Code::NotFound, None) if self.removals > 0 => self.removals -= 1,
            (Code::ServerError(_) | Code::ClientError(_) | Code::NotStored, None)
                if self.errors.len() < self.writes.len() =>
            {
                self.errors.push(reply);
            }
            _ => return Err(unexpected(&reply)),
        }
        Ok(false)
    }

    /// All writes before this place are answered now, with what was heard since the last spoken one.
    fn pass(&mut self, place: usize) -> Result<(), String> {
        let waiting = &self.spoken[self.answered..];
        let waiting = &waiting[..waiting.partition_point(|&spoken| (spoken as usize) < place)];
        let errors = std::mem::take(&mut self.errors);
        if errors.len() < waiting.len() {
            return Err(format!(
                "no answer to number {}",
                self.first.wrapping_add(waiting[errors.len()])
            ));
        }
        if errors.len() == waiting.len() {
            for error in errors {
                self.answer(self.spoken[self.answered] as usize, error)?;
            }
            return Ok(());
        }
        // A refused `ms` line has its value taken for commands: nothing behind it can be believed.
        if let Some(error) = errors.iter().find(|error| matches!(error.code, Code::ClientError(_))) {
            return Err(unexpected(error));
        }
        self.answered += waiting.len();
        let unknown = (self.next..place).filter(|place| super::key_problem(self.writes.get(*place).key).is_none());
        self.not_done
            .extend(unknown.map(|place| (place as u32, NotDone::Unknown)));
        Ok(())
    }

    /// The next spoken write has its answer.
    fn answer(&mut self, place: usize, reply: Reply) -> Result<(), String> {
        self.answered += 1;
        if reply.won {
            self.tokens.push((place as u32, reply.cas));
        }
        if let Some(how) = not_done(reply, &self.writes.get(place).op)? {
            self.not_done.push((place as u32, how));
        }
        Ok(())
    }
}

/// How a spoken write ended, if it was not simply done.
fn not_done(reply: Reply, op: &WriteOp<'_>) -> Result<Option<NotDone>, String> {
    Ok(Some(match (&reply.code, op) {
        // Never sent: its removal was.
        (Code::Done | Code::NotFound, WriteOp::Set { value, .. }) if value.len() > codec::MAX_VALUE_BYTES => {
            NotDone::TooLarge
        }
        (Code::Done, WriteOp::Touch { .. }) if reply.is_stale() => NotDone::NotFound,
        (Code::Done, _) | (Code::NotFound, WriteOp::Delete) => return Ok(None),
        (Code::NotFound, WriteOp::Touch { .. }) => NotDone::NotFound,
        (Code::NotStored, _) => NotDone::Refused("not stored".into()),
        (Code::ServerError(text), WriteOp::Set { .. }) if is_too_large(text) => NotDone::TooLarge,
        (Code::ServerError(text), _) => NotDone::Refused(text.clone()),
        // After a refused `ms` the server may be taking the value for commands. A bare `ERROR` says that the server knows no
        // meta commands at all.
        (Code::ClientError(text), WriteOp::Touch { .. } | WriteOp::Delete) if text != "ERROR" => {
            NotDone::Refused(text.clone())
        }
        _ => return Err(unexpected(&reply)),
    }))
}

/// memcached says `object too large for cache`.
pub(super) fn is_too_large(text: &str) -> bool {
    text.contains("too large")
}

/// A reply that has no place where it comes, for an error.
pub(super) fn unexpected(reply: &Reply) -> String {
    match &reply.code {
        Code::ServerError(text) | Code::ClientError(text) => text.clone(),
        code => format!("unexpected {code:?}"),
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;

    use super::super::codec::{Decoded, decode};
    use super::*;

    /// Three quiet sets around a touch, a quiet removal, and a spoken set at the end; numbers from just below where they wrap.
    const FIRST: u32 = u32::MAX - 1;

    fn writes() -> Writes {
        let set = |key| Write {
            key,
            op: WriteOp::Set {
                value: b"v",
                flags: 0,
                expiry: 0,
            },
        };
        let of = |key, op| Write { key, op };
        [
            set(b"0"),
            set(b"1"),
            of(b"2", WriteOp::Touch { expiry: 0 }),
            set(b"3"),
            of(b"4", WriteOp::Delete),
            set(b"5"),
        ]
        .into_iter()
        .collect()
    }

    /// What is not done after these lines, in the order in which it was found.
    fn heard(lines: &str) -> Result<Vec<(u32, NotDone)>, String> {
        let writes = writes();
        let mut answers = Answers::new(&writes, FIRST);
        for (place, write) in writes.iter().enumerate() {
            answers.sent(place, &write, is_spoken(&write) || place == 5);
        }
        let mut buffer = BytesMut::from(lines);
        while let Decoded::Reply(reply) = decode(&mut buffer)? {
            if answers.take(reply)? {
                assert!(buffer.is_empty());
                return Ok(answers.not_done);
            }
        }
        Err("no end".into())
    }

    fn refused(place: u32, why: &str) -> (u32, NotDone) {
        (place, NotDone::Refused(why.into()))
    }

    #[test]
    fn silence_means_done_and_a_removal_may_say_that_there_was_nothing() {
        // Numbers 0 and 3: behind the wrap.
        assert_eq!(heard("HD O0 s1\r\nHD O3\r\nMN\r\n"), Ok(vec![]));
        assert_eq!(heard("HD O0 s1\r\nNF\r\nHD O3\r\nMN\r\n"), Ok(vec![]));
        assert_eq!(heard("EN O0\r\nHD O3\r\nMN\r\n"), Ok(vec![(2, NotDone::NotFound)]));
    }

    #[test]
    fn an_error_in_the_place_of_a_spoken_answer_is_that_answer() {
        assert_eq!(heard("SERVER_ERROR a\r\nHD O3\r\nMN\r\n"), Ok(vec![refused(2, "a")]));
        assert_eq!(heard("HD O0\r\nSERVER_ERROR b\r\nMN\r\n"), Ok(vec![refused(5, "b")]));
        assert_eq!(
            heard("CLIENT_ERROR a\r\nSERVER_ERROR b\r\nMN\r\n"),
            Ok(vec![refused(2, "CLIENT_ERROR a"), refused(5, "b")])
        );
    }

    #[test]
    fn an_error_too_many_makes_everything_between_two_answers_unknown() {
        let unknown = |places: &[u32]| {
            Ok(places
                .iter()
                .map(|&place| (place, NotDone::Unknown))
                .collect::<Vec<_>>())
        };
        let error = "SERVER_ERROR out of memory\r\n";
        assert_eq!(heard(&format!("{error}HD O0\r\nHD O3\r\nMN\r\n")), unknown(&[0, 1]));
        assert_eq!(heard(&format!("HD O0\r\n{error}HD O3\r\nMN\r\n")), unknown(&[3, 4]));
        assert_eq!(
            heard(&format!("HD O0\r\nNF\r\n{error}{error}MN\r\n")),
            unknown(&[3, 4, 5])
        );
        assert_eq!(
            heard(&format!("{error}{error}HD O3\r\nMN\r\n")),
            unknown(&[0, 1, 2, 3, 4])
        );
        assert_eq!(heard("NS\r\nHD O0\r\nHD O3\r\nMN\r\n"), unknown(&[0, 1]));
        assert_eq!(
            heard(&format!("{error}{error}{error}MN\r\n")),
            unknown(&[0, 1, 2, 3, 4, 5])
        );
    }

    #[test]
    fn what_is_out_of_step_is_an_error() {
        for lines in [
            // Answers that did not come.
            "MN\r\n",
            "HD O3\r\nMN\r\n",
            "HD O0\r\nMN\r\n",
            "SERVER_ERROR a\r\nMN\r\n",
            // Answers that are not due: of another call, of quiet writes, again, in another order.
            "HD O7\r\nHD O0\r\nHD O3\r\nMN\r\n",
            "HD O1\r\nHD O0\r\nHD O3\r\nMN\r\n",
            "HD O0\r\nHD O0\r\nHD O3\r\nMN\r\n",
            "HD O3\r\nHD O0\r\nMN\r\n",
            "HD\r\nHD O3\r\nMN\r\n",
            "NF\r\nNF\r\nHD O0\r\nHD O3\r\nMN\r\n",
            "VERSION 1\r\nHD O0\r\nHD O3\r\nMN\r\n",
            // A set whose value may be taken for commands.
            "CLIENT_ERROR bad\r\nHD O0\r\nHD O3\r\nMN\r\n",
            "HD O0\r\nCLIENT_ERROR bad\r\nMN\r\n",
            "ERROR\r\nHD O3\r\nMN\r\n",
            // More errors than writes.
            &format!("{}MN\r\n", "SERVER_ERROR a\r\n".repeat(7)),
        ] {
            assert!(heard(lines).is_err_and(|error| error != "no end"), "{lines:?}");
        }
    }

    #[test]
    fn a_right_to_refresh_is_remembered_with_its_write() {
        let writes: Writes = [Write {
            key: b"k",
            op: WriteOp::Touch { expiry: 0 },
        }]
        .into_iter()
        .collect();
        let mut answers = Answers::new(&writes, 9);
        answers.sent(0, &writes.get(0), true);
        let Ok(Decoded::Reply(reply)) = decode(&mut BytesMut::from("HD O9 s1 c5 W\r\n")) else {
            panic!()
        };
        assert_eq!(answers.take(reply), Ok(false));
        assert_eq!(
            (answers.tokens, answers.not_done),
            (vec![(0, 5)], vec![(0, NotDone::NotFound)])
        );
    }
}
