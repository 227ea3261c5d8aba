//! Which server holds a key: the lab's own `ketama`, so that a mistake in evrepl's shows as a missing value.

use md5::{Digest, Md5};

/// libmemcached's MD5 ring (DESIGN: facts, Ketama) for servers of equal weight: 40 digests of four points each.
#[derive(Clone, Debug)]
pub struct Ring {
    /// (point, server index), sorted.
    points: Vec<(u32, usize)>,
}

impl Ring {
    /// A ring over the servers as the configuration names them, `host:port`; the strings themselves are hashed.
    pub fn new(servers: &[String]) -> Ring {
        let mut points = Vec::with_capacity(servers.len() * 160);
        for (index, server) in servers.iter().enumerate() {
            // libmemcached leaves the default port out of the name.
            let name = server.strip_suffix(":11211").unwrap_or(server);
            for digest in 0..40 {
                let hash = Md5::digest(format!("{name}-{digest}").as_bytes());
                points.extend(
                    hash.chunks_exact(4)
                        .map(|four| (u32::from_le_bytes([four[0], four[1], four[2], four[3]]), index)),
                );
            }
        }
        points.sort_unstable();
        Ring { points }
    }

    /// The index of the server that holds `key`; 0 when there are none.
    pub fn server_of(&self, key: &[u8]) -> usize {
        let hash = Md5::digest(key);
        let hash = u32::from_le_bytes([hash[0], hash[1], hash[2], hash[3]]);
        let next = self.points.partition_point(|&(point, _)| point < hash);
        // Behind the last point the ring begins anew.
        self.points
            .get(next)
            .or(self.points.first())
            .map_or(0, |&(_, server)| server)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_spread_over_all_servers_and_stay_when_one_leaves() {
        let servers: Vec<String> = (0..4).map(|n| format!("127.0.0.1:{}", 20_000 + n)).collect();
        let (four, three) = (Ring::new(&servers), Ring::new(&servers[..3]));
        let mut counts = [0; 4];
        for n in 0..10_000 {
            let key = format!("key:{n}");
            let server = four.server_of(key.as_bytes());
            counts[server] += 1;
            if server < 3 {
                assert_eq!(three.server_of(key.as_bytes()), server);
            }
        }
        assert!(counts.iter().all(|&count| count > 1_000), "{counts:?}");
    }
}
