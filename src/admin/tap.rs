//! `GET /tap?key=K`, `?key_base64=K` or `?ratio=R`, each with `&cache=C` if wanted: events as they end, a line of JSON each,
//! until whoever asks goes away.
//!
//! A key is percent-encoded, as the lines show it. `{"lost": N}` says that so many events passed for which there was no room.
//! An empty line comes now and then while nothing passes: it shows that the region is there, and finds a reader that is not.

use std::convert::Infallible;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::watch;

use super::Shared;
use crate::telemetry::tap::{Heard, Pick, Tap, TapFilter};

/// How often an idle tap shows that it is there.
pub const BREATHES_EVERY: Duration = Duration::from_secs(2);

/// memcached's own limit.
const MAX_KEY_BYTES: usize = 250;

pub(super) async fn tap(State(shared): State<Shared>, RawQuery(query): RawQuery) -> Response {
    let filter = match filter(query.as_deref().unwrap_or_default(), || shared.source.caches()) {
        Ok(filter) => filter,
        Err(why) => return (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
    };
    match shared.taps.subscribe(filter) {
        Ok(tap) => {
            let lines = stream::unfold((tap, shared.ending), |(mut tap, mut ending)| async {
                let line = next_line(&mut tap, &mut ending).await?;
                Some((Ok::<_, Infallible>(line), (tap, ending)))
            });
            let kind = [(header::CONTENT_TYPE, "application/x-ndjson")];
            (kind, Body::from_stream(lines)).into_response()
        }
        Err(error) => (StatusCode::TOO_MANY_REQUESTS, format!("{error}\n")).into_response(),
    }
}

/// The next line, or `None` when the admin interface ends.
async fn next_line(tap: &mut Tap, ending: &mut watch::Receiver<()>) -> Option<Bytes> {
    let heard = tokio::select! {
        _ = ending.changed() => return None,
        heard = tokio::time::timeout(BREATHES_EVERY, tap.next()) => heard,
    };
    let mut line = match heard {
        Ok(Heard::Passed(passed)) => serde_json::to_string(&*passed).ok()?,
        Ok(Heard::Lost(lost)) => format!("{{\"lost\":{lost}}}"),
        Err(_) => String::new(),
    };
    line.push('\n');
    Some(line.into())
}

/// What the query asks for, or what is wrong with it. A cache that is not one of `known` would show nothing for ever.
fn filter(query: &str, known: impl FnOnce() -> Vec<String>) -> Result<TapFilter, String> {
    let (mut cache, mut pick) = (None, None);
    for part in query.split('&').filter(|part| !part.is_empty()) {
        let (name, value) = part.split_once('=').unwrap_or((part, ""));
        let value = decoded(value).ok_or_else(|| format!("{name}: \"{value}\" is not percent-encoded"))?;
        let picked = match name {
            "cache" => {
                cache = Some(text(name, value)?);
                continue;
            }
            "key" => key(value)?,
            "key_base64" => {
                let text = text(name, value)?;
                let bytes = STANDARD.decode(&text).or_else(|_| URL_SAFE_NO_PAD.decode(&text));
                key(bytes.map_err(|error| format!("key_base64: {error}"))?)?
            }
            "ratio" => {
                let text = text(name, value)?;
                let ratio = text.parse().ok().filter(|ratio| *ratio > 0.0 && *ratio <= 1.0);
                Pick::Ratio(ratio.ok_or_else(|| format!("ratio: \"{text}\" is not above 0 and up to 1"))?)
            }
            _ => return Err(format!("\"{name}\" is none of key, key_base64, ratio and cache")),
        };
        if pick.replace(picked).is_some() {
            return Err("one of key, key_base64 and ratio at a time".to_owned());
        }
    }
    if let Some(cache) = &cache {
        let known = known();
        if !known.contains(cache) {
            return Err(format!("there is no cache \"{cache}\"; there is {}", known.join(", ")));
        }
    }
    let pick = pick.ok_or("say which events: ?key=K, ?key_base64=K or ?ratio=R, from all caches or with &cache=C")?;
    Ok(TapFilter { cache, pick })
}

fn key(bytes: Vec<u8>) -> Result<Pick, String> {
    match bytes.len() {
        1..=MAX_KEY_BYTES => Ok(Pick::Key(bytes.into())),
        length => Err(format!("a key has 1 to {MAX_KEY_BYTES} bytes, not {length}")),
    }
}

fn text(name: &str, bytes: Vec<u8>) -> Result<String, String> {
    String::from_utf8(bytes).map_err(|_| format!("{name} is not utf-8"))
}

/// Percent-encoding undone; a plus is a plus, which keys may have.
fn decoded(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let digit = |at: usize| char::from(*rest.get(at)?).to_digit(16);
        bytes.push((digit(0)? * 16 + digit(1)?) as u8);
        rest = &rest[2..];
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::tap::escaped;

    fn known() -> Vec<String> {
        ["s", "pages"].map(str::to_owned).into()
    }

    #[test]
    fn a_query_picks_a_key_or_a_ratio() {
        let picked = |query: &str| filter(query, known).unwrap();
        let key = |key: &'static [u8]| Pick::Key(Bytes::from_static(key));
        assert_eq!(picked("key=a+b%20%FF").pick, key(b"a+b \xff"));
        assert_eq!(picked("key_base64=YSti%2BA==&cache=s").pick, key(b"a+b\xf8"));
        assert_eq!(picked("key_base64=_w").pick, key(b"\xff"), "as clients encode in urls");
        assert_eq!(picked("ratio=0.25").pick, Pick::Ratio(0.25));
        assert_eq!(picked("cache=s&ratio=1").cache.as_deref(), Some("s"));
    }

    #[test]
    fn a_query_that_picks_nothing_is_told_what_is_wrong() {
        for (query, says) in [
            ("", "say which events"),
            ("cache=s", "say which events"),
            ("key=", "a key has 1 to 250 bytes, not 0"),
            ("key=%2", "key: \"%2\" is not percent-encoded"),
            ("key=%zz", "key: "),
            ("key_base64=!", "key_base64: "),
            ("ratio=0", "ratio: \"0\" is not above 0"),
            ("ratio=nan", "ratio: "),
            ("ratio=2", "ratio: "),
            ("key=a&ratio=1", "one of key"),
            ("kye=a", "\"kye\" is none of"),
            ("cache=%FF&key=a", "cache is not utf-8"),
            ("cache=nope&key=a", "there is no cache \"nope\"; there is s, pages"),
        ] {
            let error = filter(query, known).unwrap_err();
            assert!(error.starts_with(says), "{query}: {error}");
        }
    }

    #[test]
    fn a_key_as_lines_show_it_is_a_key_as_queries_take_it() {
        let key: Vec<u8> = (0..=255).collect();
        for part in key.chunks(64) {
            let query = escaped(part).replace('&', "%26");
            assert_eq!(decoded(&query).unwrap(), part);
        }
    }
}
