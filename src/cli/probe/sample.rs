//! A few of the keys that a memcached server holds, to be compared with the ring.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::hashing::Ring;

use super::{Finding, Verdict};

/// Keys asked for: by chance a share of them is then off by 4 percentage points at most, two times of three.
const KEYS: usize = 200;
/// Fewer keys say nothing.
const ENOUGH: usize = 20;
/// For all of them. A server that is busy with its crawler answers at once too.
const WITHIN: Duration = Duration::from_secs(2);
/// The longest that lines of so many keys can be: a key of 250 bytes, each written as three, and its numbers.
const MOST_BYTES: usize = KEYS * 1024;

/// Compares a server's keys with the ring; nothing when it holds too few, or does not answer, which is said elsewhere.
/// `share` is its part of all weights.
pub(super) async fn compare(cache: &str, address: &str, ring: &Ring, server: usize, share: f64) -> Option<Finding> {
    let what = format!("ring {cache} {address}");
    match timeout(WITHIN, keys(address)).await {
        Ok(Ok(keys)) => {
            let here = keys.iter().filter(|key| ring.server_of(key) == server).count();
            judge(&what, here, keys.len(), share)
        }
        Ok(Err(Some(refusal))) => Some(Finding::new(
            Verdict::Ok,
            what,
            format!("not compared, its keys cannot be listed: {refusal}"),
        )),
        Ok(Err(None)) | Err(_) => None,
    }
}

fn judge(what: &str, here: usize, keys: usize, share: f64) -> Option<Finding> {
    if keys < ENOUGH {
        return None;
    }
    // With a wrong ring a key belongs here by chance. Much more than that is a ring that has changed and keys of before.
    let least = share + (1.0 - share) / 3.0;
    let counts = format!("{here} of {keys} sampled keys belong here by the ring");
    Some(match here as f64 >= least * keys as f64 {
        true => Finding::new(Verdict::Ok, what, counts),
        false => Finding::new(
            Verdict::Failed,
            what,
            format!("{counts}: `hash`, `servers` or a ring_name is probably not what the clients use"),
        ),
    })
}

/// Up to [`KEYS`] keys. An error is what memcached says, or `None` when it says nothing.
async fn keys(address: &str) -> Result<Vec<Vec<u8>>, Option<String>> {
    let mut stream = TcpStream::connect(address).await.map_err(|_| None)?;
    // It walks the LRU a slab at a time and holds nobody up; whoever hangs up ends it.
    stream
        .write_all(b"lru_crawler metadump all\r\n")
        .await
        .map_err(|_| None)?;
    let mut text = Vec::new();
    let mut keys = Vec::new();
    let mut read = 0;
    loop {
        while let Some(end) = text[read..].iter().position(|byte| *byte == b'\n') {
            let line = text[read..read + end].trim_ascii_end();
            read += end + 1;
            match line.strip_prefix(b"key=") {
                Some(rest) => {
                    let key = rest.split(|byte| *byte == b' ').next().unwrap_or_default();
                    keys.push(decoded(key));
                }
                None if line == b"END" => return Ok(keys),
                None => return Err(Some(String::from_utf8_lossy(line).into_owned())),
            }
            if keys.len() == KEYS {
                return Ok(keys);
            }
        }
        if text.len() > MOST_BYTES || stream.read_buf(&mut text).await.map_err(|_| None)? == 0 {
            return Ok(keys);
        }
    }
}

/// A key as metadump writes it, in which bytes may stand as `%` and two hexadecimal digits.
fn decoded(key: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(key.len());
    let mut rest = key;
    while let [first, tail @ ..] = rest {
        let digit = |byte: u8| (byte as char).to_digit(16);
        match rest {
            [b'%', high, low, tail @ ..] => match (digit(*high), digit(*low)) {
                (Some(high), Some(low)) => {
                    out.push((high * 16 + low) as u8);
                    rest = tail;
                    continue;
                }
                _ => out.push(*first),
            },
            _ => out.push(*first),
        }
        rest = tail;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_read_as_it_was_before_memcached_wrote_it() {
        assert_eq!(decoded(b"plain:key"), b"plain:key");
        assert_eq!(decoded(b"a%20b%ff%00"), b"a b\xff\x00");
        assert_eq!(decoded(b"100%"), b"100%");
        assert_eq!(decoded(b"%zz%4"), b"%zz%4");
    }

    #[test]
    fn a_share_that_chance_would_give_is_a_wrong_ring_and_few_keys_say_nothing() {
        let verdict = |here, keys, share| judge("ring", here, keys, share).map(|found| found.verdict);
        assert_eq!(verdict(0, 19, 0.5), None);
        assert_eq!(verdict(200, 200, 0.5), Some(Verdict::Ok));
        assert_eq!(verdict(100, 200, 0.5), Some(Verdict::Failed));
        assert_eq!(verdict(66, 200, 1.0 / 3.0), Some(Verdict::Failed));
        assert_eq!(verdict(20, 200, 0.1), Some(Verdict::Failed));
        // A third server was added: a third of what each of the two holds belongs there now.
        assert_eq!(verdict(133, 200, 1.0 / 3.0), Some(Verdict::Ok));
        let detail = judge("ring", 12, 200, 0.5).unwrap().detail;
        assert!(
            detail.starts_with("12 of 200 sampled keys belong here by the ring: "),
            "{detail}"
        );
    }

    async fn answering(text: &'static [u8]) -> (tokio::net::TcpListener, String, &'static [u8]) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        (listener, address, text)
    }

    #[tokio::test]
    async fn keys_are_listed_until_the_end_and_a_refusal_is_told() {
        for (text, wanted) in [
            (
                &b"key=a%20b exp=-1 la=1 cas=2 fetch=no cls=1 size=63\nkey=c exp=-1\nEND\r\n"[..],
                Ok(vec![b"a b".to_vec(), b"c".to_vec()]),
            ),
            (b"END\r\n", Ok(Vec::new())),
            (
                b"CLIENT_ERROR lru crawler disabled\r\n",
                Err(Some("CLIENT_ERROR lru crawler disabled".to_owned())),
            ),
            (b"key=cut", Ok(Vec::new())),
        ] {
            let (listener, address, text) = answering(text).await;
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 26];
                stream.read_exact(&mut asked).await.unwrap();
                assert_eq!(&asked, b"lru_crawler metadump all\r\n");
                stream.write_all(text).await.unwrap();
            };
            let (found, ()) = tokio::join!(keys(&address), server);
            assert_eq!(found, wanted);
        }
    }
}
