//! Keys in base64, as memcached reads them (its base64.c): foreign characters are passed over, what stands behind the padding too,
//! and bits that are left over are nobody's. A stricter reader would name another key in an event than the one that was written.

/// Of a character that is none of base64's.
const FOREIGN: u8 = 0x80;

fn digit(byte: u8) -> u8 {
    match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        b'=' => 0,
        _ => FOREIGN,
    }
}

/// Appends what memcached makes of this key. False when it refuses it; nothing is appended then.
pub fn decode(text: &[u8], out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let digits = || text.iter().filter(|&&byte| digit(byte) != FOREIGN);
    let count = digits().count();
    if count == 0 || !count.is_multiple_of(4) {
        return false;
    }
    let (mut block, mut held, mut padding) = (0u32, 0, 0);
    for &byte in digits() {
        padding += usize::from(byte == b'=');
        block = block << 6 | u32::from(digit(byte));
        held += 1;
        if held < 4 {
            continue;
        }
        if padding > 2 {
            out.truncate(start);
            return false;
        }
        out.extend_from_slice(&block.to_be_bytes()[1..4 - padding]);
        if padding > 0 {
            break;
        }
        (block, held) = (0, 0);
    }
    true
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    use super::*;

    fn decoded(text: &str) -> Option<Vec<u8>> {
        let mut out = b"before".to_vec();
        let good = decode(text.as_bytes(), &mut out);
        assert!(out.starts_with(b"before") && (good || out.len() == 6));
        good.then(|| out[6..].to_vec())
    }

    #[test]
    fn it_is_read_as_memcached_reads_it() {
        // Bits that are left over, foreign characters, something behind the padding.
        for text in ["YQ==", "YR==", "Y-Q=_=", "YQ==YQ==", "YQ==!"] {
            assert_eq!(decoded(text).as_deref(), Some(&b"a"[..]), "{text}");
        }
        for text in ["", "!", "YQ", "YQ=", "Y===", "===="] {
            assert_eq!(decoded(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_others_encode_is_decoded(key in proptest::collection::vec(any::<u8>(), 1..200)) {
            prop_assert_eq!(decoded(&STANDARD.encode(&key)), Some(key));
        }
    }
}
