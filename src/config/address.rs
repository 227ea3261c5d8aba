//! Whether two addresses are the same place, however each is spelled. No name is looked up: `localhost` is loopback, and any other
//! name is only itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Component, Path, PathBuf};

/// Where something listens.
#[derive(Debug)]
enum Where {
    Tcp(Host, u16),
    Unix(PathBuf),
}

#[derive(Debug, PartialEq, Eq)]
enum Host {
    /// With the interface of a link-local one.
    At(IpAddr, String),
    /// 127.0.0.1 or ::1, whichever the system takes first.
    Localhost,
    Named(String),
}

/// Whether only one of two addresses can be listened on at a time. Port 0 is a free one, in nobody's way.
pub(super) fn collide(one: &str, other: &str) -> bool {
    match (parse(one), parse(other)) {
        (Some(Where::Tcp(one, port)), Some(Where::Tcp(other, its))) => {
            port == its && port != 0 && overlap(&one, &other)
        }
        (Some(Where::Unix(one)), Some(Where::Unix(other))) => one == other,
        _ => false,
    }
}

/// Whether what is dialled at `server` would be found where `door` listens, or has to be in its way there. Another machine's
/// address is in the way of no door here, also of one on every address.
pub(super) fn is_in_the_way(door: &str, server: &str) -> bool {
    let (Some(Where::Tcp(door, port)), Some(Where::Tcp(server, its))) = (parse(door), parse(server)) else {
        return false;
    };
    // Who dials every address reaches this machine.
    let server = if is_any(&server) { Host::Localhost } else { server };
    let here = match &server {
        Host::At(address, _) => address.is_loopback(),
        Host::Localhost => true,
        Host::Named(_) => false,
    };
    port == its && port != 0 && overlap(&door, &server) && (here || !is_any(&door))
}

fn is_any(host: &Host) -> bool {
    matches!(host, Host::At(address, _) if address.is_unspecified())
}

fn overlap(one: &Host, other: &Host) -> bool {
    let v4 = |host: &Host| match host {
        Host::At(address, _) => address.is_ipv4(),
        Host::Localhost | Host::Named(_) => true,
    };
    let takes = |every: &Host, other: &Host| match every {
        // Every address of IPv6 is every address of IPv4 too: sockets are bound for both.
        Host::At(IpAddr::V6(address), _) => address.is_unspecified(),
        Host::At(IpAddr::V4(address), _) => address.is_unspecified() && v4(other),
        Host::Localhost => matches!(other, Host::At(address, _)
            if *address == Ipv4Addr::LOCALHOST || *address == Ipv6Addr::LOCALHOST),
        Host::Named(_) => false,
    };
    one == other || takes(one, other) || takes(other, one)
}

fn parse(text: &str) -> Option<Where> {
    if let Some(path) = text.strip_prefix("unix:") {
        return Some(Where::Unix(tidied(Path::new(path))));
    }
    let (host, port) = text.rsplit_once(':')?;
    let port = port.parse().ok()?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => {
            let (address, interface) = v6.split_once('%').unwrap_or((v6, ""));
            let address: Ipv6Addr = address.parse().ok()?;
            Host::At(address.to_canonical(), interface.to_owned())
        }
        None => match v4(host) {
            Some(address) => Host::At(address.into(), String::new()),
            None => match host.trim_end_matches('.').to_ascii_lowercase() {
                name if name == "localhost" => Host::Localhost,
                name => Host::Named(name),
            },
        },
    };
    Some(Where::Tcp(host, port))
}

/// As the system reads it: `127.1` and `0x7f000001` are 127.0.0.1 (inet_aton).
fn v4(text: &str) -> Option<Ipv4Addr> {
    let part = |part: &str| match part.strip_prefix("0x").or_else(|| part.strip_prefix("0X")) {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None if part.len() > 1 && part.starts_with('0') => u32::from_str_radix(part, 8).ok(),
        None => part.parse().ok(),
    };
    let parts: Vec<u32> = text.split('.').map(part).collect::<Option<_>>()?;
    let (last, first) = parts.split_last()?;
    // The last one fills what the others leave.
    let room = 32u32
        .checked_sub(8 * u32::try_from(first.len()).ok()?)
        .filter(|room| *room > 0)?;
    if first.iter().any(|part| *part > 255) || u64::from(*last) >> room > 0 {
        return None;
    }
    let first = first
        .iter()
        .zip([24, 16, 8])
        .fold(0, |sum, (part, shift)| sum | part << shift);
    Some(Ipv4Addr::from_bits(first | last))
}

/// Without `.` and `..`. Links are not followed: the path is perhaps of another machine.
fn tidied(path: &Path) -> PathBuf {
    let mut tidied = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => _ = tidied.pop(),
            other => tidied.push(other),
        }
    }
    tidied
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_place_collide_and_other_places_do_not() {
        for (one, other) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("127.0.0.1:80", "0.0.0.0:80"),
            ("localhost:80", "127.0.0.1:80"),
            ("LocalHost.:80", "[::1]:80"),
            ("localhost:80", "0.0.0.0:80"),
            ("localhost:80", "[::]:80"),
            ("127.1:80", "127.0.0.1:80"),
            ("0x7f000001:80", "127.0.0.1:080"),
            ("0:80", "10.0.0.7:80"),
            ("[::]:80", "127.0.0.1:80"),
            ("[::]:80", "0.0.0.0:80"),
            ("[::]:80", "[fe80::1%eth0]:80"),
            ("[::ffff:127.0.0.1]:80", "127.0.0.1:80"),
            ("[0:0::1]:80", "[::1]:80"),
            ("Cache.internal:80", "cache.internal:80"),
            ("cache.internal:80", "0.0.0.0:80"),
            ("unix:/run/./a.sock", "unix:/run//a.sock"),
            ("unix:/run/evrepl/../a.sock", "unix:/run/a.sock"),
        ] {
            assert!(collide(one, other) && collide(other, one), "{one} {other}");
        }
        for (one, other) in [
            ("127.0.0.1:80", "127.0.0.1:81"),
            ("127.0.0.1:80", "127.0.0.2:80"),
            ("127.0.0.1:80", "[::1]:80"),
            ("0.0.0.0:80", "[::1]:80"),
            ("localhost:80", "127.0.0.2:80"),
            ("localhost:80", "cache.internal:80"),
            ("[fe80::1%eth0]:80", "[fe80::1%eth1]:80"),
            ("0.0.0.0:0", "127.0.0.1:0"),
            ("1.2.3.4.5:80", "1.2.3.4:80"),
            ("256.1:80", "0.0.0.1:80"),
            ("unix:/run/a.sock", "unix:/run/b.sock"),
            ("unix:/run/a.sock", "127.0.0.1:80"),
        ] {
            assert!(!collide(one, other) && !collide(other, one), "{one} {other}");
        }
    }

    #[test]
    fn a_server_is_in_the_way_of_a_door_where_it_is_certainly_here() {
        for (door, server) in [
            ("127.0.0.1:80", "localhost:80"),
            ("10.0.0.5:80", "10.0.0.5:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "localhost:80"),
            ("127.0.0.1:80", "0.0.0.0:80"),
            ("cache:80", "cache:80"),
        ] {
            assert!(is_in_the_way(door, server), "{door} {server}");
        }
        for (door, server) in [
            ("0.0.0.0:80", "10.0.0.5:80"),
            ("[::]:80", "cache:80"),
            ("10.0.0.5:80", "0.0.0.0:80"),
            ("127.0.0.1:80", "127.0.0.2:80"),
            ("127.0.0.1:80", "127.0.0.1:81"),
            ("unix:/a:80", "a:80"),
        ] {
            assert!(!is_in_the_way(door, server), "{door} {server}");
        }
    }
}
