//! Which server holds a key, which lane carries it, and which stamp slot it falls in.
//!
//! [`Ring`] places keys exactly as libmemcached does, because the applications' clients did the placing: with another
//! ring a look finds nothing. `tests/fixtures/ketama` holds placements seen through pylibmc on real servers.

use std::hash::{BuildHasher, Hasher};

use foldhash::quality::FixedState;
use md5::{Digest, Md5};

/// How keys are spread over the servers of a cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum HashKind {
    /// libmemcached's weighted MD5 ring: pylibmc `ketama_weighted: True`, php-memcached `LIBKETAMA_COMPATIBLE`; with
    /// ring names also that of Netflix's EVCache Java client.
    #[default]
    Ketama,
    /// libmemcached's one-at-a-time ring: pylibmc `ketama: True`, php-memcached `DISTRIBUTION_CONSISTENT`. As soon as one
    /// server weighs more than 1, libmemcached places the points as for `Ketama` and still hashes the keys like this.
    Consistent,
}

/// One server as the ring sees it. The *string* is hashed: `localhost` is not `127.0.0.1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingServer {
    /// `host:port`, or `[v6]:port`, as the applications' clients have it.
    pub address: String,
    /// Hashed as it is, instead of the address.
    pub ring_name: Option<String>,
    /// Share of the keys, relative to the other servers; the usual weight is 1.
    pub weight: u32,
}

/// The sorted points of all servers. Building it costs a few thousand hashes, asking it one hash and a binary search.
#[derive(Clone, Debug)]
pub struct Ring {
    kind: HashKind,
    /// Point and server index, in ascending order.
    points: Vec<(u32, u32)>,
    servers: usize,
}

/// MD5 digests of a ketama server of average weight: libmemcached's 160 points, four to a digest.
const KETAMA_POINTS: f32 = 160.0;
const POINTS_PER_DIGEST: f32 = 4.0;
/// Points of every server of the one-at-a-time ring (libmemcached's `MEMCACHED_POINTS_PER_SERVER`).
const CONSISTENT_POINTS: u32 = 100;
/// libmemcached leaves this port out of a point's name.
const DEFAULT_PORT_SUFFIX: &str = ":11211";

impl Ring {
    /// Builds the ring over `servers`, in the order of the configuration; [`Ring::server_of`] answers with indexes
    /// into it. An empty slice gives a ring that answers 0.
    pub fn new(kind: HashKind, servers: &[RingServer]) -> Ring {
        let mut points = Vec::new();
        if servers.len() > 1 {
            let total: u64 = servers.iter().map(|server| u64::from(server.weight)).sum();
            let weighted = kind == HashKind::Ketama || servers.iter().any(|server| server.weight > 1);
            for (index, server) in servers.iter().enumerate() {
                let name = server.ring_name.clone().unwrap_or_else(|| point_name(&server.address));
                let index = index as u32;
                if weighted {
                    for n in 0..ketama_digests(server.weight, total, servers.len()) {
                        let digest = Md5::digest(format!("{name}-{n}").as_bytes());
                        points.extend(digest.chunks_exact(4).map(|bytes| (first_four(bytes), index)));
                    }
                } else {
                    let names = (0..CONSISTENT_POINTS).map(|n| format!("{name}-{n}"));
                    points.extend(names.map(|name| (one_at_a_time(name.as_bytes()), index)));
                }
            }
            points.sort_unstable();
        }
        Ring {
            kind,
            points,
            servers: servers.len(),
        }
    }

    /// The index of the server that holds `key`. With one server nothing is hashed.
    pub fn server_of(&self, key: &[u8]) -> usize {
        if self.points.is_empty() {
            return 0;
        }
        let hash = match self.kind {
            HashKind::Ketama => first_four(&Md5::digest(key)),
            HashKind::Consistent => one_at_a_time(key),
        };
        let at = self.points.partition_point(|&(point, _)| point < hash);
        // Behind the last point the ring begins again.
        self.points
            .get(at)
            .or(self.points.first())
            .map_or(0, |&(_, server)| server as usize)
    }

    /// How many servers it was built from.
    pub fn servers(&self) -> usize {
        self.servers
    }
}

/// libmemcached hashes `host:port`, but only `host` on the default port, and knows no brackets around an IPv6 host.
fn point_name(address: &str) -> String {
    let name = address.strip_suffix(DEFAULT_PORT_SUFFIX).unwrap_or(address);
    match name.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((host, port)) => format!("{host}{port}"),
        None => name.to_owned(),
    }
}

/// `floor(share × 40 × servers)` in the very steps and single precision that libmemcached takes: rounding decides
/// whether a server has a digest more.
fn ketama_digests(weight: u32, total: u64, servers: usize) -> u32 {
    let share = weight as f32 / total as f32;
    let digests = share * KETAMA_POINTS / POINTS_PER_DIGEST * servers as f32;
    // The cast saturates, so weights of 0 only (0/0 is not a number) mean no points instead of a panic.
    (f64::from(digests) + 0.000_000_000_1) as f32 as u32
}

fn first_four(digest: &[u8]) -> u32 {
    digest
        .iter()
        .take(4)
        .rev()
        .fold(0, |hash, &byte| hash << 8 | u32::from(byte))
}

/// Bob Jenkins' one-at-a-time hash, with libhashkit's peculiarity (on x86-64): bytes are *signed*, so one above 0x7f
/// counts as negative.
fn one_at_a_time(bytes: &[u8]) -> u32 {
    let mut hash = 0u32;
    for &byte in bytes {
        hash = hash.wrapping_add(byte as i8 as u32);
        hash = hash.wrapping_add(hash << 10);
        hash ^= hash >> 6;
    }
    hash = hash.wrapping_add(hash << 3);
    hash ^= hash >> 11;
    hash.wrapping_add(hash << 15)
}

/// Two unlike seeds (digits of π and e), so that the keys of one lane still spread over all slots. Both hashes live and
/// die with the process: no other process relies on them.
const LANE_SEED: u64 = 0x243f_6a88_85a3_08d3;
const SLOT_SEED: u64 = 0xb7e1_5162_8aed_2a6a;

/// The lane, below `lanes`, that carries `key` of the cache numbered `cache`; 0 when there are no lanes to choose from.
pub fn lane_of(cache: u16, key: &[u8], lanes: usize) -> usize {
    if lanes <= 1 {
        return 0;
    }
    let mut hasher = FixedState::with_seed(LANE_SEED ^ u64::from(cache)).build_hasher();
    hasher.write(key);
    // The upper half of hash × lanes is evenly below `lanes`, without a division.
    ((u128::from(hasher.finish()) * lanes as u128) >> 64) as usize
}

/// The hash whose bits choose a key's stamp slot in a CacheWriter.
pub fn slot_hash(key: &[u8]) -> u64 {
    let mut hasher = FixedState::with_seed(SLOT_SEED).build_hasher();
    hasher.write(key);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLACEMENTS: &str = include_str!("../tests/fixtures/ketama/placements.txt");

    fn server(text: &str) -> RingServer {
        let mut parts = text.splitn(3, ':');
        let (host, port) = (parts.next().unwrap(), parts.next().unwrap());
        let weight = parts.next().map_or(1, |weight| weight.parse().unwrap());
        RingServer {
            address: format!("{host}:{port}"),
            ring_name: None,
            weight,
        }
    }

    fn servers(names: &[&str]) -> Vec<RingServer> {
        names.iter().map(|name| server(name)).collect()
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
            .collect()
    }

    #[test]
    fn every_key_is_where_pylibmc_put_it() {
        let keys: Vec<_> = PLACEMENTS
            .lines()
            .filter_map(|line| line.strip_prefix("key "))
            .map(unhex)
            .collect();
        assert!(keys.len() > 400);
        let mut cases = 0;
        for line in PLACEMENTS
            .lines()
            .filter(|line| !line.starts_with("key ") && !line.starts_with('#'))
        {
            let (case, placed) = line.split_once(" = ").unwrap();
            let (kind, names) = case.split_once(' ').unwrap();
            let kind = match kind {
                "ketama" => HashKind::Ketama,
                "consistent" => HashKind::Consistent,
                other => panic!("unknown hash {other}"),
            };
            let ring = Ring::new(kind, &names.split(' ').map(server).collect::<Vec<_>>());
            let found: String = keys.iter().map(|key| ring.server_of(key).to_string()).collect();
            assert_eq!(found, placed, "{case}");
            cases += 1;
        }
        assert_eq!(cases, 24);
    }

    #[test]
    fn a_ring_name_replaces_the_address_and_its_port_rule() {
        let plain = Ring::new(HashKind::Ketama, &servers(&["cache-1:11211", "cache-2:11212"]));
        let mut named = servers(&["10.0.0.1:9000", "10.0.0.2:9000"]);
        named[0].ring_name = Some("cache-1".into());
        named[1].ring_name = Some("cache-2:11212".into());
        assert_eq!(Ring::new(HashKind::Ketama, &named).points, plain.points);
        // Taken as it is: the default port stays, as EVCache's Java client has it.
        named[0].ring_name = Some("cache-1:11211".into());
        assert_ne!(Ring::new(HashKind::Ketama, &named).points, plain.points);
    }

    #[test]
    fn an_ipv6_host_is_hashed_without_its_brackets() {
        assert_eq!(point_name("[::1]:11212"), "::1:11212");
        assert_eq!(point_name("[::1]:11211"), "::1");
        assert_eq!(point_name("cache-1:11211"), "cache-1");
        assert_eq!(point_name("cache-1:112111"), "cache-1:112111");
    }

    #[test]
    fn a_hash_that_is_a_point_belongs_to_that_point() {
        // Hashed as keys, the names of the points are the points.
        let ring = Ring::new(HashKind::Consistent, &servers(&["a:1", "b:1", "c:1"]));
        for (index, name) in ["a:1", "b:1", "c:1"].iter().enumerate() {
            assert!((0..CONSISTENT_POINTS).all(|n| ring.server_of(format!("{name}-{n}").as_bytes()) == index));
        }
    }

    #[test]
    fn a_ring_without_servers_or_weights_answers_instead_of_panicking() {
        assert_eq!(Ring::new(HashKind::Ketama, &[]).server_of(b"k"), 0);
        assert_eq!(
            Ring::new(HashKind::Ketama, &servers(&["a:1:0", "b:1:0"])).server_of(b"k"),
            0
        );
    }

    #[test]
    fn lanes_share_the_keys_evenly_and_slots_do_not_follow_lanes() {
        let (lanes, keys) = (4, 40_000);
        let mut per_lane = [0; 4];
        // Of the keys of lane 0, how many fall into each eighth of the slots, by the low and by the high bits.
        let (mut low, mut high) = ([0; 8], [0; 8]);
        for n in 0..keys {
            let key = format!("user:{n}");
            let lane = lane_of(0, key.as_bytes(), lanes);
            per_lane[lane] += 1;
            if lane == 0 {
                low[(slot_hash(key.as_bytes()) & 7) as usize] += 1;
                high[(slot_hash(key.as_bytes()) >> 61) as usize] += 1;
            }
        }
        assert!(per_lane.iter().all(|&n| (9_500..10_500).contains(&n)), "{per_lane:?}");
        assert!(
            low.iter().chain(&high).all(|&n| (1_050..1_450).contains(&n)),
            "{low:?} {high:?}"
        );
    }

    proptest! {
        #[test]
        fn every_key_has_a_server_and_a_lane_and_always_the_same(
            key in proptest::collection::vec(any::<u8>(), 1..250), count in 1usize..9, cache: u16, lanes in 0usize..9,
        ) {
            let list: Vec<_> = (0..count).map(|n| server(&format!("10.0.0.{n}:11211:{}", n + 1))).collect();
            for kind in [HashKind::Ketama, HashKind::Consistent] {
                let ring = Ring::new(kind, &list);
                prop_assert!(ring.server_of(&key) < count);
                prop_assert_eq!(ring.server_of(&key), Ring::new(kind, &list).server_of(&key));
            }
            prop_assert!(lane_of(cache, &key, lanes) < lanes.max(1));
            prop_assert_eq!(lane_of(cache, &key, lanes), lane_of(cache, &key, lanes));
        }

        #[test]
        fn the_search_finds_the_first_point_not_below_the_hash(key in proptest::collection::vec(any::<u8>(), 1..60)) {
            let ring = Ring::new(HashKind::Consistent, &servers(&["a:1", "b:1", "c:1"]));
            let hash = one_at_a_time(&key);
            let slow = ring.points.iter().find(|(point, _)| *point >= hash).unwrap_or(&ring.points[0]);
            prop_assert_eq!(ring.server_of(&key), slow.1 as usize);
        }
    }
}
