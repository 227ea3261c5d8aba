//! memcached's answers: where one ends, what it says happened, and what of it the client is shown.

use memchr::memchr;

use crate::event::Op;

use super::binary::{self, Opcode};
use super::text::{self, Hush, Verb};

/// What was asked, in either protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// In text.
    Text(Verb),
    /// In binary.
    Binary(Opcode),
}

/// A part of a command that went out as several, to one server or to many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// It is the whole command.
    Whole,
    /// Others follow: what ends an answer is left out.
    More,
    /// The last one.
    Last,
}

/// How the answer to a command looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One line.
    Line,
    /// Values, and `END`; or one line.
    List,
    /// A line, behind which a value may stand.
    Meta,
    /// What may be silent, and `MN` behind it.
    Barrier,
    /// Lines, and `END`; or one line of another kind.
    Stats,
    /// One response.
    Binary,
    /// Responses until one without a key.
    BinaryStats,
}

impl Asked {
    /// How its answer looks. `barrier` was sent behind it.
    pub const fn shape(self, barrier: bool) -> Shape {
        match self {
            _ if barrier => Shape::Barrier,
            Asked::Text(Verb::Get | Verb::Gets | Verb::Gat | Verb::Gats) => Shape::List,
            Asked::Text(Verb::MetaGet | Verb::MetaArithmetic) => Shape::Meta,
            Asked::Text(Verb::Stats) => Shape::Stats,
            Asked::Text(_) => Shape::Line,
            Asked::Binary(Opcode::Stat) => Shape::BinaryStats,
            Asked::Binary(_) => Shape::Binary,
        }
    }

    /// What its event says, if it has one.
    pub const fn op(self) -> Op {
        match self {
            Asked::Text(Verb::Delete | Verb::MetaDelete) | Asked::Binary(Opcode::Delete) => Op::Delete,
            Asked::Text(Verb::Touch | Verb::Gat | Verb::Gats | Verb::MetaGet)
            | Asked::Binary(Opcode::Touch | Opcode::GetAndTouch | Opcode::GetKeyAndTouch) => Op::Touch,
            _ => Op::Set,
        }
    }
}

/// How far an answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// It is there, and so long.
    Whole(usize),
    /// So many bytes more are needed at least.
    Missing(usize),
}

const LONGEST_LINE: usize = 8192;

/// How long the answer at the beginning of `bytes` is. `seen` is how much of it is known to be there from calls before;
/// 0 for a new answer.
///
/// # Errors
/// What is wrong with it, when it is no answer of this shape.
pub fn extent(bytes: &[u8], shape: Shape, seen: &mut usize) -> Result<Extent, String> {
    match shape {
        Shape::Binary | Shape::BinaryStats => return responses(bytes, shape, seen),
        _ => {}
    }
    loop {
        let rest = &bytes[(*seen).min(bytes.len())..];
        let Some(newline) = memchr(b'\n', rest) else {
            if rest.len() > LONGEST_LINE {
                return Err(format!("a line of more than {LONGEST_LINE} bytes"));
            }
            return Ok(Extent::Missing((*seen + 1).saturating_sub(bytes.len()).max(1)));
        };
        let (line, end) = (&rest[..newline], *seen + newline + 1);
        let value = match shape {
            Shape::List | Shape::Barrier if line.starts_with(b"VALUE ") => Some(value_length(line, 3)?),
            Shape::Meta | Shape::Barrier if line.starts_with(b"VA ") => Some(value_length(line, 1)?),
            _ => None,
        };
        if let Some(value) = value {
            let behind = end + value + 2;
            if behind > bytes.len() {
                // What is there of a list stays known; the value's line is read again.
                return Ok(Extent::Missing(behind - bytes.len()));
            }
            *seen = behind;
            if shape == Shape::Meta {
                return Ok(Extent::Whole(behind));
            }
            continue;
        }
        *seen = end;
        let goes_on = match shape {
            Shape::Barrier => line != b"MN\r" && line != b"MN",
            Shape::Stats => [&b"STAT "[..], b"ITEM ", b"PREFIX "]
                .iter()
                .any(|start| line.starts_with(start)),
            _ => false,
        };
        if !goes_on {
            return Ok(Extent::Whole(end));
        }
    }
}

fn responses(bytes: &[u8], shape: Shape, seen: &mut usize) -> Result<Extent, String> {
    loop {
        let rest = &bytes[(*seen).min(bytes.len())..];
        let Some(length) = binary::response_length(rest)? else {
            return Ok(Extent::Missing(binary::HEADER_BYTES - rest.len()));
        };
        if length > rest.len() {
            return Ok(Extent::Missing(length - rest.len()));
        }
        *seen += length;
        if shape == Shape::Binary || binary::ends_stats(rest) {
            return Ok(Extent::Whole(*seen));
        }
    }
}

fn word(line: &[u8], n: usize) -> Option<&[u8]> {
    line.split(|&byte| byte == b' ').nth(n)
}

fn value_length(line: &[u8], n: usize) -> Result<usize, String> {
    word(line, n)
        .map(|word| word.strip_suffix(b"\r").unwrap_or(word))
        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<u32>().ok())
        .map(|length| length as usize)
        .ok_or_else(|| format!("no length in {:?}", String::from_utf8_lossy(line)))
}

/// The key, and how long the value is, if this line stands above one; without its newline.
///
/// # Errors
/// When it does not say how long.
pub fn value_line(line: &[u8]) -> Result<Option<(&[u8], usize)>, String> {
    let Some(rest) = line.strip_prefix(b"VALUE ") else {
        return Ok(None);
    };
    let key = rest.split(|&byte| byte == b' ').next().unwrap_or_default();
    Ok(Some((key, value_length(line, 3)?)))
}

/// Whether memcached refuses something with this line.
pub fn is_error(line: &[u8]) -> bool {
    [&b"ERROR"[..], b"CLIENT_ERROR", b"SERVER_ERROR"]
        .iter()
        .any(|start| line.starts_with(start))
}

/// The keys of the values in an answer to `gat`.
pub fn keys_of_values(mut answer: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let newline = memchr(b'\n', answer)?;
        let (key, value) = value_line(&answer[..newline]).ok()??;
        answer = answer.get(newline + 1 + value + 2..)?;
        Some(key)
    })
}

/// How memcached's versions differ in what they keep silent about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Silence {
    /// `md` with `q`: a miss.
    pub delete_misses: bool,
    /// `ma` with `q`: a miss.
    pub arithmetic_misses: bool,
}

/// What of an answer concerns whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The first so many bytes are for the client.
    pub shown: usize,
    /// memcached said that the key has changed, or that it may have.
    pub changed: bool,
    /// A piece that ends the whole command: nothing of the others is shown.
    pub failed: bool,
}

/// What an answer to one text command says. `touches` is [`text::Command::touches`].
pub fn judge(answer: &[u8], verb: Verb, hush: Hush, piece: Piece, touches: bool, silence: Silence) -> Verdict {
    let is = |start: &[u8]| answer.starts_with(start);
    let done = match verb {
        Verb::Set | Verb::Add | Verb::Replace | Verb::Append | Verb::Prepend | Verb::Cas => is(b"STORED"),
        Verb::Incr | Verb::Decr => answer.first().is_some_and(u8::is_ascii_digit),
        Verb::Touch => is(b"TOUCHED"),
        Verb::Delete => is(b"DELETED"),
        Verb::Gat | Verb::Gats => is(b"VALUE "),
        Verb::MetaGet => touches && (is(b"HD") || is(b"VA")),
        Verb::MetaSet | Verb::MetaDelete => is(b"HD"),
        Verb::MetaArithmetic => is(b"HD") || is(b"VA"),
        _ => false,
    };
    let changed = done || (verb.drops_when_refused() && is(b"SERVER_ERROR"));
    let usual = match verb {
        Verb::MetaGet => is(b"EN"),
        Verb::MetaSet => is(b"HD"),
        Verb::MetaDelete => is(b"HD") || (silence.delete_misses && is(b"NF")),
        Verb::MetaArithmetic => is(b"HD") || is(b"VA") || (silence.arithmetic_misses && is(b"NF")),
        _ => false,
    };
    let good = match verb {
        Verb::Get | Verb::Gets | Verb::Gat | Verb::Gats => answer.ends_with(b"END\r\n"),
        _ => is(b"OK"),
    };
    let shown = match (hush, piece) {
        (Hush::Everything, _) => 0,
        (Hush::Usual, _) if usual => 0,
        (_, Piece::More) if good => text::last_line(answer),
        _ => answer.len(),
    };
    Verdict {
        shown,
        changed,
        failed: piece != Piece::Whole && !good,
    }
}

/// What an answer to one command behind which a barrier was sent says: everything but the barrier. Where memcached was silent,
/// it was asked to be, and may have written.
pub fn judge_barrier(answer: &[u8], verb: Verb, hush: Hush, piece: Piece, touches: bool, silence: Silence) -> Verdict {
    let said = &answer[..text::last_line(answer)];
    let verdict = judge(said, verb, hush, piece, touches, silence);
    Verdict {
        changed: verdict.changed || (said.is_empty() && verb.writes()),
        ..verdict
    }
}

/// Whether memcached can have answered this to such a command: if not, its answers and the commands no longer belong together.
pub fn is_plausible(answer: &[u8], verb: Verb) -> bool {
    let any = |starts: &[&[u8]]| starts.iter().any(|start| answer.starts_with(start));
    let fits = match verb {
        Verb::Get | Verb::Gets | Verb::Gat | Verb::Gats => any(&[b"VALUE ", b"END"]),
        Verb::Set | Verb::Add | Verb::Replace | Verb::Append | Verb::Prepend | Verb::Cas => {
            any(&[b"STORED", b"NOT_STORED", b"EXISTS", b"NOT_FOUND"])
        }
        Verb::Incr | Verb::Decr => answer.first().is_some_and(u8::is_ascii_digit) || any(&[b"NOT_FOUND"]),
        Verb::Touch => any(&[b"TOUCHED", b"NOT_FOUND"]),
        Verb::Delete => any(&[b"DELETED", b"NOT_FOUND"]),
        Verb::MetaGet => any(&[b"VA ", b"HD", b"EN"]),
        Verb::MetaSet => any(&[b"HD", b"NS", b"EX", b"NF"]),
        Verb::MetaDelete => any(&[b"HD", b"NF", b"EX"]),
        Verb::MetaArithmetic => any(&[b"VA ", b"HD", b"NF", b"NS", b"EX"]),
        Verb::MetaDebug => any(&[b"ME ", b"EN"]),
        Verb::Version => any(&[b"VERSION"]),
        Verb::FlushAll | Verb::Verbosity | Verb::Stats => true,
    };
    fits || is_error(answer)
}

/// What an answer to one binary command says.
pub fn judge_binary(answer: &[u8], opcode: Opcode, quiet: bool, piece: Piece) -> Verdict {
    let status = binary::status(answer);
    let dropped = opcode == Opcode::Set && matches!(status, binary::TOO_LARGE | binary::NO_MEMORY);
    let usual = if opcode.reads() { binary::NOT_FOUND } else { binary::OK };
    let good = status == binary::OK;
    Verdict {
        shown: match (quiet, piece) {
            (true, _) if status == usual => 0,
            (_, Piece::More) if good => 0,
            _ => answer.len(),
        },
        changed: (opcode.writes() && good) || dropped,
        failed: piece != Piece::Whole && !good,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(bytes: &[u8], shape: Shape) -> usize {
        let mut seen = 0;
        match extent(bytes, shape, &mut seen) {
            Ok(Extent::Whole(length)) => length,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn answers_end_where_they_end() {
        assert_eq!(whole(b"STORED\r\nEND\r\n", Shape::Line), 8);
        assert_eq!(whole(b"VALUE k 0 5 9\r\nEND\r\n\r\nEND\r\nEND\r\n", Shape::List), 27);
        assert_eq!(whole(b"SERVER_ERROR x\r\nEND\r\n", Shape::List), 16);
        assert_eq!(whole(b"VA 4 f0\r\nHD\r\n\r\nHD\r\n", Shape::Meta), 15);
        assert_eq!(whole(b"HD O1\r\nMN\r\n", Shape::Barrier), 11);
        assert_eq!(whole(b"MN\r\nMN\r\n", Shape::Barrier), 4);
        assert_eq!(whole(b"STAT a 1\r\nSTAT b 2\r\nEND\r\nx", Shape::Stats), 25);
        assert_eq!(whole(b"RESET\r\nSTAT", Shape::Stats), 7);
    }

    proptest! {
        #[test]
        fn what_is_missing_never_is_more_than_what_is(lengths in proptest::collection::vec(0usize..40, 0..6), cut: proptest::sample::Index) {
            let mut answer = Vec::new();
            for (n, &length) in lengths.iter().enumerate() {
                answer.extend(format!("VALUE key{n} 7 {length}\r\n").bytes());
                answer.extend(std::iter::repeat_n(b'\n', length));
                answer.extend(b"\r\n");
            }
            answer.extend(b"END\r\n");
            let found: Vec<Vec<u8>> = keys_of_values(&answer).map(<[u8]>::to_vec).collect();
            let expected: Vec<Vec<u8>> = (0..lengths.len()).map(|n| format!("key{n}").into_bytes()).collect();
            prop_assert_eq!(found, expected);
            let (cut, mut seen) = (cut.index(answer.len()), 0);
            match extent(&answer[..cut], Shape::List, &mut seen).unwrap() {
                Extent::Missing(missing) => prop_assert!((1..=answer.len() - cut).contains(&missing)),
                Extent::Whole(_) => prop_assert!(false),
            }
            // Goes on from there.
            prop_assert_eq!(extent(&answer, Shape::List, &mut seen), Ok(Extent::Whole(answer.len())));
        }
    }

    #[test]
    fn an_answer_to_something_else_is_known() {
        assert!(is_plausible(b"END\r\n", Verb::Get) && is_plausible(b"SERVER_ERROR x\r\n", Verb::Get));
        assert!(!is_plausible(b"STORED\r\n", Verb::Get) && !is_plausible(b"END\r\n", Verb::Set));
        assert!(!is_plausible(b"HD\r\n", Verb::Delete) && !is_plausible(b"7\r\n", Verb::Touch));
    }

    #[test]
    fn what_happened_and_what_is_shown() {
        let judged = |answer: &[u8], verb, hush| {
            let verdict = judge(answer, verb, hush, Piece::Whole, true, Silence::default());
            (verdict.shown, verdict.changed)
        };
        assert_eq!(judged(b"STORED\r\n", Verb::Set, Hush::Everything), (0, true));
        assert_eq!(judged(b"NOT_STORED\r\n", Verb::Add, Hush::Nothing), (12, false));
        assert_eq!(
            judged(b"SERVER_ERROR object too large for cache\r\n", Verb::Set, Hush::Nothing),
            (41, true)
        );
        assert_eq!(
            judged(
                b"SERVER_ERROR object too large for cache\r\n",
                Verb::Append,
                Hush::Nothing
            ),
            (41, false)
        );
        assert_eq!(judged(b"12\r\n", Verb::Incr, Hush::Nothing), (4, true));
        assert_eq!(judged(b"EN\r\n", Verb::MetaGet, Hush::Usual), (0, false));
        assert_eq!(judged(b"HD\r\n", Verb::MetaGet, Hush::Usual), (4, true));
        assert_eq!(judged(b"NF\r\n", Verb::MetaDelete, Hush::Usual), (4, false));
        assert_eq!(judged(b"EX\r\n", Verb::MetaSet, Hush::Usual), (4, false));
        assert_eq!(
            judge_barrier(
                b"MN\r\n",
                Verb::MetaArithmetic,
                Hush::Nothing,
                Piece::Whole,
                false,
                Silence::default()
            )
            .shown,
            0
        );
        let more = judge(
            b"VALUE k 0 1\r\nx\r\nEND\r\n",
            Verb::Get,
            Hush::Nothing,
            Piece::More,
            false,
            Silence::default(),
        );
        assert_eq!((more.shown, more.failed), (16, false));
        let failed = judge(
            b"SERVER_ERROR x\r\n",
            Verb::Get,
            Hush::Nothing,
            Piece::More,
            false,
            Silence::default(),
        );
        assert_eq!((failed.shown, failed.failed), (16, true));
    }
}
