//! The writer's trace, from the record header `traceparent` (W3C Trace Context, level 1 and 2).

use std::fmt;

/// Length in bytes of a version-00 `traceparent`: `00-<32 hex>-<16 hex>-<2 hex>`.
const LENGTH: usize = 55;

/// The identity of a span in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// Names the whole trace; never all zeros.
    pub trace_id: [u8; 16],
    /// Names the parent span; never all zeros.
    pub span_id: [u8; 8],
    /// Bit 0: sampled. Bit 1: the trace id is random (level 2). The others are reserved.
    pub flags: u8,
}

impl TraceContext {
    /// The flag of a trace whose writer records it.
    pub const SAMPLED: u8 = 0x01;

    /// Reads a header's value. `None` when it is not a valid `traceparent`: the standard wants such a header ignored and a
    /// trace of one's own begun, so it is no error.
    ///
    /// A later version than 00 is read by the rules of 00, as the standard asks; only then may more follow, behind a `-`.
    pub fn parse(header: &[u8]) -> Option<TraceContext> {
        let (fixed, rest) = header.split_at_checked(LENGTH)?;
        if fixed[2] != b'-' || fixed[35] != b'-' || fixed[52] != b'-' {
            return None;
        }
        let [version] = unhex::<1>(&fixed[..2])?;
        let more_allowed = version > 0 && rest.first().is_none_or(|byte| *byte == b'-');
        // ff is reserved to be never valid.
        if version == 0xff || !(rest.is_empty() || more_allowed) {
            return None;
        }
        let trace_id = unhex(&fixed[3..35])?;
        let span_id = unhex(&fixed[36..52])?;
        let [flags] = unhex(&fixed[53..])?;
        if trace_id == [0; 16] || span_id == [0; 8] {
            return None;
        }
        Some(TraceContext {
            trace_id,
            span_id,
            flags,
        })
    }

    /// The header's value in version 00, without allocation. Flags that version 00 does not define are not passed on.
    pub fn format(&self) -> [u8; LENGTH] {
        let mut out = *b"00-00000000000000000000000000000000-0000000000000000-00";
        hex(&self.trace_id, &mut out[3..35]);
        hex(&self.span_id, &mut out[36..52]);
        hex(&[self.flags & 0x03], &mut out[53..]);
        out
    }

    /// The trace id as people write it.
    pub fn trace_id_hex(&self) -> String {
        let mut digits = [0; 32];
        hex(&self.trace_id, &mut digits);
        digits.map(char::from).iter().collect()
    }

    /// Whether the writer decided to record this trace.
    pub fn sampled(&self) -> bool {
        self.flags & TraceContext::SAMPLED != 0
    }

    /// The same trace with another span: what goes on to the peer.
    pub fn with_span(self, span_id: [u8; 8]) -> TraceContext {
        TraceContext { span_id, ..self }
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.format()
            .iter()
            .try_for_each(|byte| fmt::Write::write_char(f, char::from(*byte)))
    }
}

/// Lower-case hex only: the standard makes upper case invalid.
fn unhex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(out)
}

fn nibble(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    }
}

fn hex(bytes: &[u8], out: &mut [u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for (byte, pair) in bytes.iter().zip(out.chunks_exact_mut(2)) {
        pair[0] = DIGITS[usize::from(byte >> 4)];
        pair[1] = DIGITS[usize::from(byte & 0x0f)];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const EXAMPLE: &[u8] = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_example_of_the_standard_is_read_and_written_back() {
        let context = TraceContext::parse(EXAMPLE).unwrap();
        assert_eq!(context.trace_id[..4], [0x0a, 0xf7, 0x65, 0x19]);
        assert_eq!(context.span_id, [0xb7, 0xad, 0x6b, 0x71, 0x69, 0x20, 0x33, 0x31]);
        assert!(context.sampled());
        assert_eq!(context.format(), EXAMPLE);
        assert_eq!(context.to_string().as_bytes(), EXAMPLE);
    }

    #[test]
    fn a_header_that_the_standard_calls_invalid_is_ignored() {
        let invalid: [&[u8]; 10] = [
            b"",
            b"00",
            b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            b"00-00000000000000000000000000000000-b7ad6b7169203331-01",
            b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-",
            b"00-0af7651916cd43dd8448eb211c80319c_b7ad6b7169203331-01",
            b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0g",
            b"01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01.more",
        ];
        for header in invalid {
            assert_eq!(TraceContext::parse(header), None, "{}", String::from_utf8_lossy(header));
        }
    }

    #[test]
    fn a_later_version_is_read_by_the_rules_of_this_one() {
        let context = TraceContext::parse(b"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more").unwrap();
        assert_eq!(context.format(), EXAMPLE);
    }

    #[test]
    fn flags_that_nobody_defined_are_not_passed_on() {
        let context = TraceContext::parse(b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-ff").unwrap();
        assert!(context.to_string().ends_with("-03"));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(trace_id: [u8; 16], span_id: [u8; 8], flags in 0u8..4) {
            prop_assume!(trace_id != [0; 16] && span_id != [0; 8]);
            let context = TraceContext { trace_id, span_id, flags };
            prop_assert_eq!(TraceContext::parse(&context.format()), Some(context));
        }

        #[test]
        fn no_bytes_make_the_parser_panic(header: Vec<u8>) {
            let _ = TraceContext::parse(&header);
        }
    }
}
