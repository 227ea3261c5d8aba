//! What names, addresses and librdkafka properties may be.

use std::path::Path;

/// Longest name of a topic, and of a group's member, that Kafka accepts (`Topic.MAX_NAME_LENGTH`).
const LONGEST_TOPIC: usize = 249;

/// A DNS label (RFC 1123), in lower case because names are compared as they are.
pub(super) fn is_label(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=63).contains(&text.len()) && text.bytes().all(legal) && !text.starts_with('-') && !text.ends_with('-')
}

/// A DNS name: at most 253 bytes of labels (RFC 1035).
pub(super) fn is_dns_name(text: &str) -> bool {
    text.len() <= 253 && text.split('.').all(is_label)
}

pub(super) fn is_topic(text: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=LONGEST_TOPIC).contains(&text.len()) && text.bytes().all(legal) && text != "." && text != ".."
}

/// A topic's name once each of `holes`, all of which it has, is filled.
pub(super) fn is_template(text: &str, holes: &[&str]) -> bool {
    let filled = holes
        .iter()
        .fold(text.to_owned(), |filled, hole| filled.replace(hole, "x"));
    holes.iter().all(|hole| text.contains(hole)) && is_topic(&filled)
}

/// The port of `host:port`; an IPv6 host stands in brackets.
pub(super) fn port_of(text: &str) -> Option<u16> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = match host.strip_prefix('[') {
        // A link-local address names its interface behind a `%`.
        Some(v6) => v6
            .strip_suffix(']')?
            .split('%')
            .next()?
            .parse::<std::net::Ipv6Addr>()
            .is_ok(),
        None => {
            !host.is_empty() && !host.contains(|c: char| c.is_whitespace() || c.is_control() || "/:[]@".contains(c))
        }
    };
    let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    if bare && digits { port.parse().ok() } else { None }
}

/// The most bytes that the system takes for a socket's path (`sun_path` of unix(7), without its end).
pub(super) const LONGEST_SOCKET_PATH: usize = 107;

/// The path of a socket, relative to the configuration's folder as any path in it.
///
/// # Errors
/// Why it can be none.
pub(super) fn socket_path(text: &str, folder: &Path) -> Result<String, String> {
    if text.is_empty() || text.contains('\0') {
        return Err("that is no path;".to_owned());
    }
    if text.starts_with('@') {
        return Err(format!(
            "abstract sockets are not supported (a file of that name is `unix:./{text}`);"
        ));
    }
    let path = folder.join(text);
    let path = std::path::absolute(&path).unwrap_or(path);
    match path.to_string_lossy().into_owned() {
        path if path.len() > LONGEST_SOCKET_PATH => Err(format!(
            "the path {path:?} has {} bytes, and a socket's has {LONGEST_SOCKET_PATH} at most;",
            path.len()
        )),
        path => Ok(path),
    }
}

/// Whether only this machine can connect to a door.
pub(super) fn is_local(door: &str) -> bool {
    let host = match door.strip_prefix("unix:") {
        Some(_) => return true,
        None => door.rsplit_once(':').map_or(door, |(host, _)| host),
    };
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare == "localhost"
        || bare
            .parse::<std::net::IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

/// The URL of a gRPC service, whose paths are not the configuration's.
pub(super) fn is_url(text: &str) -> bool {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"));
    let host = rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest));
    host.is_some_and(|host| !host.is_empty() && !host.contains('/') && !host.contains(char::is_whitespace))
}

/// The part of a host's name that can be in [`crate::config::Config::node`].
pub(super) fn as_node(host: &str, port: u16) -> Option<String> {
    let legal: String = host
        .trim()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "._-".contains(*c))
        .collect();
    let node = format!("{legal}-{port}");
    (!legal.is_empty() && is_topic(&node)).then_some(node)
}

/// Of both names of one property.
const EVENT_TIMEOUT: &str = "how long a record may take is known to who waits for it; set `front_door.event_timeout` for events of \
                             front doors";

/// The librdkafka properties that evrepl sets itself, and what to use instead or why there is nothing.
const OWNED: &[(&str, &str)] = &[
    (
        "acks",
        "a parked event is finished only when every replica in sync holds it; leave it out",
    ),
    (
        "auto.commit.enable",
        "offsets are committed only behind finished events; leave it out",
    ),
    (
        "auto.commit.interval.ms",
        "offsets are committed only behind finished events; set `kafka.commit_interval`",
    ),
    (
        "auto.offset.reset",
        "it would also govern partitions added later; set `kafka.start_at`",
    ),
    ("bootstrap.servers", "set `kafka.brokers`"),
    ("client.id", "it names this process; set `node`"),
    ("delivery.timeout.ms", EVENT_TIMEOUT),
    (
        "enable.auto.commit",
        "offsets are committed only behind finished events; leave it out",
    ),
    (
        "enable.auto.offset.store",
        "offsets are committed only behind finished events; leave it out",
    ),
    (
        "enable.partition.eof",
        "it puts what is no event between the events; leave it out",
    ),
    ("group.id", "every flow has its own group; set `kafka.group_prefix`"),
    ("group.instance.id", "it names this process in its group; set `node`"),
    (
        "group.protocol",
        "rebalances are handled as the classic protocol does them; leave it out",
    ),
    ("message.timeout.ms", EVENT_TIMEOUT),
    ("metadata.broker.list", "set `kafka.brokers`"),
    (
        "partition.assignment.strategy",
        "all members of a group must agree on it; leave it out",
    ),
    (
        "queue.buffering.max.messages",
        "it would drop what evrepl counts on; set `front_door.max_queued_events` for events of front doors",
    ),
    (
        "request.required.acks",
        "a parked event is finished only when every replica in sync holds it; leave it out",
    ),
    ("session.timeout.ms", "set `kafka.session_timeout`"),
    ("transactional.id", "evrepl produces without transactions; leave it out"),
];

/// Why a property is evrepl's own, and what to do instead.
pub(super) fn owned(property: &str) -> Option<&'static str> {
    OWNED.iter().find(|(name, _)| *name == property).map(|(_, why)| *why)
}

/// A property that names a file is relative to the configuration's folder as any path in it.
pub(super) fn located(property: &str, value: String, folder: &Path) -> String {
    // `probe` tells librdkafka to look for the system's certificates.
    let is_path = property.ends_with(".location") || property == "sasl.kerberos.keytab";
    if is_path && !value.is_empty() && value != "probe" {
        folder.join(value).to_string_lossy().into_owned()
    } else {
        value
    }
}

/// Whether nobody but librdkafka should see the property's value.
pub(super) fn is_secret(property: &str) -> bool {
    ["password", "secret", "passphrase", "key.pem", "oauthbearer.config"]
        .iter()
        .any(|part| property.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_dns_and_kafka_accept() {
        for label in ["a", "us-east-1", "1", &"a".repeat(63)] {
            assert!(is_label(label), "{label}");
        }
        for not in ["", "US", "a.b", "-a", "a-", "a_b", "ä", &"a".repeat(64)] {
            assert!(!is_label(not), "{not}");
        }
        assert!(is_dns_name("eu.prod.example"));
        assert!(!is_dns_name("eu..example") && !is_dns_name("*.example") && !is_dns_name(""));
        assert!(is_topic("evrepl.sessions") && is_topic("A_b-c.9"));
        for not in ["", ".", "..", "a b", "a/b", "{topic}", &"a".repeat(250)] {
            assert!(!is_topic(not), "{not}");
        }
        assert!(is_template("{topic}.retry.{peer}", &["{topic}", "{peer}"]));
        assert!(!is_template("{topic}.retry", &["{topic}", "{peer}"]));
        assert!(!is_template("{topic}.{cache}", &["{topic}"]));
    }

    #[test]
    fn an_address_is_a_host_and_a_port() {
        for (text, port) in [
            ("127.0.0.1:11211", 11211),
            ("cache-1.local:1", 1),
            ("[::1]:80", 80),
            ("[fe80::1%eth0]:0", 0),
        ] {
            assert_eq!(port_of(text), Some(port), "{text}");
        }
        for text in [
            "",
            ":1",
            "a",
            "a:",
            "a:b",
            "a:65536",
            "::1:80",
            "http://a:80",
            "a b:1",
            "[a]:1",
            "[]:1",
            "a:+1",
            "u@a:1",
        ] {
            assert_eq!(port_of(text), None, "{text}");
        }
    }

    #[test]
    fn a_sockets_path_is_of_the_folder_and_as_long_as_the_system_takes() {
        let path = |text: &str| socket_path(text, "/etc/evrepl".as_ref());
        assert_eq!(path("a.sock").unwrap(), "/etc/evrepl/a.sock");
        assert_eq!(path("./a.sock").unwrap(), "/etc/evrepl/a.sock");
        assert_eq!(path("./@a").unwrap(), "/etc/evrepl/@a");
        assert_eq!(path("/run/a.sock").unwrap(), "/run/a.sock");
        let of = |length: usize| format!("/{}", "x".repeat(length - 1));
        assert!(path(&of(107)).is_ok());
        // What is counted is what the system gets.
        for (text, length) in [(of(108), "108"), ("x".repeat(100), "112")] {
            let why = path(&text).unwrap_err();
            assert!(
                why.contains(&format!(" has {length} bytes")) && why.contains("107"),
                "{why}"
            );
        }
        assert!(path("@a").unwrap_err().contains("abstract sockets"));
        assert!(path("").is_err() && path("a\0b").is_err());
    }

    #[test]
    fn a_host_name_becomes_a_node_that_kafka_accepts() {
        assert_eq!(as_node("relay-1.local\n", 7101).as_deref(), Some("relay-1.local-7101"));
        assert_eq!(as_node("mein gerät", 1).as_deref(), Some("meingert-1"));
        assert_eq!(as_node(" \n", 1), None);
    }
}
