//! When a certificate expires, read from its DER: neither rustls nor webpki tells.

use std::time::{Duration, SystemTime};

use time::{Date, Month, PrimitiveDateTime, Time};

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTC_TIME: u8 = 0x17;
const GENERALIZED_TIME: u8 = 0x18;
/// The explicit tag around the version, which a certificate of version 1 leaves out.
const VERSION: u8 = 0xa0;

/// The certificate's `notAfter` (RFC 5280, section 4.1.2.5); none if it cannot be read.
pub(super) fn not_after(certificate: &[u8]) -> Option<SystemTime> {
    let (certificate, _) = expect(certificate, SEQUENCE)?;
    let (body, _) = expect(certificate, SEQUENCE)?;
    let rest = expect(body, VERSION).map_or(body, |(_, rest)| rest);
    let (_, rest) = expect(rest, INTEGER)?; // serial number
    let (_, rest) = expect(rest, SEQUENCE)?; // signature algorithm
    let (_, rest) = expect(rest, SEQUENCE)?; // issuer
    let (validity, _) = expect(rest, SEQUENCE)?;
    let (_, _, not_after) = element(validity)?;
    let (tag, text, _) = element(not_after)?;
    time(tag, std::str::from_utf8(text).ok()?)
}

fn expect(input: &[u8], wanted: u8) -> Option<(&[u8], &[u8])> {
    let (tag, content, rest) = element(input)?;
    (tag == wanted).then_some((content, rest))
}

/// Tag, content and what follows.
fn element(input: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (&[tag, short], rest) = input.split_first_chunk()?;
    let (len, rest) = match short {
        0..=0x7f => (usize::from(short), rest),
        // The length's own length. Certificates are shorter than 64 KiB.
        0x81 => rest.split_first_chunk().map(|(&[a], rest)| (usize::from(a), rest))?,
        0x82 => rest
            .split_first_chunk()
            .map(|(&bytes, rest)| (usize::from(u16::from_be_bytes(bytes)), rest))?,
        _ => return None,
    };
    let (content, rest) = rest.split_at_checked(len)?;
    Some((tag, content, rest))
}

/// `YYMMDDHHMMSSZ` or `YYYYMMDDHHMMSSZ`.
fn time(tag: u8, text: &str) -> Option<SystemTime> {
    let digits = text
        .strip_suffix('Z')
        .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))?;
    let (year, rest) = match (tag, digits.len()) {
        // RFC 5280: from 50 on it is the last century.
        (UTC_TIME, 12) => (
            digits[..2]
                .parse()
                .map(|year: i32| if year < 50 { 2000 + year } else { 1900 + year }),
            &digits[2..],
        ),
        (GENERALIZED_TIME, 14) => (digits[..4].parse(), &digits[4..]),
        _ => return None,
    };
    let part = |at: usize| rest[at..at + 2].parse::<u8>().ok();
    let date = Date::from_calendar_date(year.ok()?, Month::try_from(part(0)?).ok()?, part(2)?).ok()?;
    let time = Time::from_hms(part(4)?, part(6)?, part(8)?).ok()?;
    let seconds = PrimitiveDateTime::new(date, time).assume_utc().unix_timestamp();
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn the_expiry_is_the_one_that_was_issued() {
        let key = KeyPair::generate().unwrap();
        // Years before 2050 and after it are written in different ways.
        for (year, month, day) in [(1999, 12, 31), (2031, 2, 3), (2049, 12, 31), (2050, 1, 1), (4096, 1, 1)] {
            let mut params = CertificateParams::new(vec!["us-east-1".to_owned()]).unwrap();
            params.not_after = date_time_ymd(year, month, day);
            let expected = Duration::from_secs(params.not_after.unix_timestamp() as u64);
            let certificate = params.self_signed(&key).unwrap();
            assert_eq!(not_after(certificate.der()), Some(SystemTime::UNIX_EPOCH + expected));
        }
    }

    #[test]
    fn a_damaged_certificate_has_no_expiry_and_harms_nothing() {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::default().self_signed(&key).unwrap();
        let der = certificate.der();
        for end in 0..der.len() {
            assert_eq!(not_after(&der[..end]), None);
        }
        for at in 0..der.len() {
            for byte in [0, 0x7f, 0x80, 0x82, 0xff] {
                let mut damaged = der.to_vec();
                damaged[at] = byte;
                let _ = not_after(&damaged);
            }
        }
    }
}
