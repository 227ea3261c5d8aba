//! What `cargo fuzz` and the plain tests do with any bytes: they are read without a panic, always going on, and what is cut is
//! waited for.

use super::answers::{self, Extent, Shape};
use super::{binary, text};

const LIMITS: text::TextLimits = text::TextLimits {
    line_bytes: 1 << 16,
    value_bytes: 1 << 12,
};

/// Reads bytes as a client's text.
///
/// # Panics
/// When they are misread.
pub fn client_text(bytes: &[u8]) {
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = match text::parse(rest, LIMITS) {
            text::Parsed::Forward(command) => {
                let line = command.line.of_bytes(rest);
                assert!(command.head <= command.length && command.length <= rest.len() && line.len() < command.head);
                assert!(command.key.range().end <= line.len() && command.opaque.range().end <= line.len());
                assert!(
                    command
                        .cut
                        .is_none_or(|cut| cut.range().end <= line.len() && line[cut.range().start] == b' ')
                );
                if command.verb.takes_keys() {
                    assert!(text::keys(rest, &command).all(|key| key.len() <= text::MAX_KEY_BYTES));
                    assert!(text::head(rest, &command).len() <= line.len());
                }
                // No part of it is a command.
                for cut in [1, command.length / 2, command.length - 1] {
                    let part = &rest[..cut];
                    let waits = matches!(text::parse(part, LIMITS), text::Parsed::Incomplete { missing } if missing <= command.length - cut);
                    assert!(cut == 0 || waits, "{cut} of {command:?}");
                }
                command.length
            }
            text::Parsed::TooLarge(command) => command.length,
            text::Parsed::Answer { length, .. } => length,
            text::Parsed::Incomplete { missing } => {
                assert!(missing > 0);
                return;
            }
            text::Parsed::Quit | text::Parsed::Nonsense => return,
        };
        assert!(length > 0);
        at += length;
    }
}

/// Reads bytes as a client's binary commands.
///
/// # Panics
/// When they are misread.
pub fn client_binary(bytes: &[u8]) {
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        at += match binary::parse(rest, LIMITS.value_bytes) {
            binary::Parsed::Forward(command) => {
                assert!(command.length <= rest.len() && command.key.1 <= command.length);
                command.length
            }
            binary::Parsed::TooLarge(command) => command.length,
            binary::Parsed::Answer {
                length, close: false, ..
            } => {
                assert!(length >= binary::HEADER_BYTES);
                length
            }
            binary::Parsed::Incomplete { missing } => {
                assert!(missing > 0);
                return;
            }
            binary::Parsed::Answer { .. } | binary::Parsed::Nonsense => return,
        };
    }
}

/// Reads bytes as a server's answers, of every shape, whole and in two parts.
///
/// # Panics
/// When they are misread.
pub fn answers(bytes: &[u8]) {
    use Shape::*;
    for shape in [Line, List, Meta, Barrier, Stats, Binary, BinaryStats] {
        let whole = answers::extent(bytes, shape, &mut 0);
        if let Ok(Extent::Whole(length)) = whole {
            assert!(length > 0 && length <= bytes.len());
            let mut seen = 0;
            let cut = length / 2;
            if let Ok(Extent::Missing(missing)) = answers::extent(&bytes[..cut], shape, &mut seen) {
                assert!((1..=length - cut).contains(&missing), "{missing} of {shape:?}");
                assert_eq!(
                    answers::extent(bytes, shape, &mut seen),
                    Ok(Extent::Whole(length)),
                    "{shape:?}"
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The corpus of `cargo fuzz`, as plain tests.
    fn each(target: &str, read: fn(&[u8])) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/").to_owned() + target;
        let files: Vec<_> = std::fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{folder}: {error}"))
            .collect();
        assert!(!files.is_empty(), "{folder} is empty");
        for file in files {
            read(&std::fs::read(file.unwrap().path()).unwrap());
        }
    }

    #[test]
    fn the_corpus_of_client_text_is_read() {
        each("client_text", client_text);
    }

    #[test]
    fn the_corpus_of_client_binary_is_read() {
        each("client_binary", client_binary);
    }

    #[test]
    fn the_corpus_of_answers_is_read() {
        each("answers", answers);
    }
}
