//! What the connection and the simple client promise, against a real memcached, or against a server that misbehaves.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures_util::FutureExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::test_server::TestServer;
use super::*;
use crate::hashing::{HashKind, RingServer};

fn read(key: impl Into<Bytes>) -> LookRequest {
    LookRequest {
        key: key.into(),
        value: true,
    }
}

fn set<'a>(
    key: &'a (impl AsRef<[u8]> + ?Sized),
    value: &'a (impl AsRef<[u8]> + ?Sized),
    flags: u32,
    expiry: u32,
) -> Write<'a> {
    let value = value.as_ref();
    Write {
        key: key.as_ref(),
        op: WriteOp::Set { value, flags, expiry },
    }
}

fn touch(key: &str, expiry: u32) -> Write<'_> {
    Write {
        key: key.as_bytes(),
        op: WriteOp::Touch { expiry },
    }
}

fn delete(key: &str) -> Write<'_> {
    Write {
        key: key.as_bytes(),
        op: WriteOp::Delete,
    }
}

fn hit(value: impl Into<Bytes>, flags: u32, ttl: RemainingTtl) -> Looked {
    Looked::Hit {
        value: value.into(),
        flags,
        ttl,
    }
}

async fn look(connection: &mut Connection, reads: &[LookRequest]) -> Vec<Looked> {
    let mut out = vec![Looked::Miss];
    connection.look(reads, &mut out).await.unwrap();
    out
}

/// The writes that were not simply done.
async fn apply(connection: &mut Connection, writes: &[Write<'_>]) -> Vec<(u32, NotDone)> {
    connection.apply(&writes.iter().copied().collect()).await.unwrap()
}

/// Whether what is left is `seconds`, or a few less because the test machine was busy.
fn about(ttl: RemainingTtl, seconds: u32) -> bool {
    matches!(ttl, RemainingTtl::Seconds(left) if left <= seconds && left + 30 > seconds)
}

#[tokio::test]
async fn values_flags_and_keys_arrive_unchanged() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let binary: Vec<u8> = (0..186).map(|n| n as u8).collect();
    let large = Bytes::from(vec![0x0a; 1_000_000]);
    let writes = [
        set("empty", "", 0, 0),
        set(&binary, "flush_all\r\n", u32::MAX, 0),
        set("large", &large, 1, 0),
        set(&[b'k'; 250], &[0xff; 1025], 2, 0),
        set("größe", &[0; 1024], 3, 0),
    ];
    assert_eq!(apply(&mut connection, &writes).await, []);
    let reads: Vec<_> = writes.iter().map(|write| read(write.key.to_vec())).collect();
    let never = RemainingTtl::Never;
    assert_eq!(
        look(&mut connection, &reads).await,
        [
            hit("", 0, never),
            hit("flush_all\r\n", u32::MAX, never),
            hit(large, 1, never),
            hit(vec![0xff; 1025], 2, never),
            hit(vec![0; 1024], 3, never),
        ]
    );
}

#[tokio::test]
async fn a_key_sent_in_base64_is_the_key_that_other_clients_use() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    server.say("set a\x01b 0 0 3\r\nold").await;
    assert_eq!(
        look(&mut connection, &[read("a\x01b")]).await,
        [hit("old", 0, RemainingTtl::Never)]
    );
}

#[tokio::test]
async fn a_ttl_of_sixty_days_survives_as_unix_time() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let days = 60 * 24 * 60 * 60;
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as u32 + days;
    apply(
        &mut connection,
        &[
            set("k", "v", 0, at),
            set("t", "v", 0, 100),
            touch("t", at),
            set("far", "v", 0, u32::MAX),
        ],
    )
    .await;
    let reads = [
        read("k"),
        LookRequest {
            key: "t".into(),
            value: false,
        },
        read("far"),
        LookRequest {
            key: "none".into(),
            value: false,
        },
    ];
    let found = look(&mut connection, &reads).await;
    assert!(
        matches!(&found[0], Looked::Hit { ttl, .. } if about(*ttl, days)),
        "{found:?}"
    );
    assert!(
        matches!(&found[1], Looked::Hit { ttl, value, .. } if about(*ttl, days) && value.is_empty()),
        "{found:?}"
    );
    assert!(
        matches!(
            &found[2],
            Looked::Hit {
                ttl: RemainingTtl::Seconds(_),
                ..
            }
        ),
        "{found:?}"
    );
    assert_eq!(found[3], Looked::Miss);
}

#[tokio::test]
async fn a_touch_says_whether_there_was_an_item_and_a_removal_need_not() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let writes = [
        touch("k", 60),
        delete("k"),
        set("k", "v", 0, 0),
        touch("k", 60),
        delete("k"),
        delete("k"),
    ];
    assert_eq!(apply(&mut connection, &writes).await, [(0, NotDone::NotFound)]);
    assert_eq!(look(&mut connection, &[read("k")]).await, [Looked::Miss]);
}

#[tokio::test]
async fn a_look_leaves_no_trace_in_the_lru() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    apply(&mut connection, &[set("k", "v", 0, 0)]).await;
    look(
        &mut connection,
        &[
            read("k"),
            LookRequest {
                key: "k".into(),
                value: false,
            },
        ],
    )
    .await;
    assert!(server.say("me k").await.contains("fetch=no"));
    // That the mark would show it: a look as applications do it sets it.
    server.say("mg k v").await;
    assert!(server.say("me k").await.contains("fetch=yes"));
}

#[tokio::test]
async fn a_stale_item_is_reported_and_its_token_given_back() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    apply(&mut connection, &[set("k", "old", 0, 0), set("other", "v", 0, 0)]).await;
    assert_eq!(server.say("md k I T30").await, "HD");
    let found = look(&mut connection, &[read("k"), read("other")]).await;
    assert!(matches!(found[0], Looked::Stale { won: true, .. }), "{found:?}");
    assert_eq!(found[1], hit("v", 0, RemainingTtl::Never));
    let found = look(
        &mut connection,
        &[LookRequest {
            key: "k".into(),
            value: false,
        }],
    )
    .await;
    assert!(matches!(found[0], Looked::Stale { won: true, .. }), "{found:?}");
    assert_eq!(
        apply(&mut connection, &[touch("k", 60)]).await,
        [(0, NotDone::NotFound)]
    );
    // The application that reads it next wins the token, as if nobody had looked.
    assert_eq!(server.say("mg k v").await, "VA 3 X W\r\nold");
    let found = look(&mut connection, &[read("k")]).await;
    assert!(matches!(found[0], Looked::Stale { won: false, .. }), "{found:?}");
}

#[tokio::test]
async fn a_placeholder_is_stale_and_an_early_refresh_is_not() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    apply(&mut connection, &[set("early", "v", 0, 30)]).await;
    assert!(server.say("mg early v R60").await.starts_with("VA 1 W"));
    assert!(server.say("mg placeholder v N30").await.starts_with("VA 0 W"));
    for value in [true, false] {
        let reads = ["early", "placeholder"].map(|key| LookRequest { key: key.into(), value });
        let found = look(&mut connection, &reads).await;
        assert!(matches!(found[0], Looked::Hit { .. }), "{found:?}");
        assert!(matches!(found[1], Looked::Stale { won: false, .. }), "{found:?}");
    }
    assert_eq!(
        apply(&mut connection, &[touch("placeholder", 60)]).await,
        [(0, NotDone::NotFound)]
    );
}

#[tokio::test]
async fn a_value_too_large_harms_no_other_and_removes_its_old_item() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    // If memcached took a value's bytes for commands, this would empty it.
    let large = Bytes::from(b"flush_all\r\n".repeat(2 << 20).split_off(20 << 20));
    assert!(large.len() > 2_000_000);
    apply(&mut connection, &[set("big", "old", 0, 0)]).await;
    let writes = [
        set("a", "1", 0, 0),
        set("big", &large, 0, 0),
        set("b", "2", 0, 0),
        delete("none"),
    ];
    assert_eq!(apply(&mut connection, &writes).await, [(1, NotDone::TooLarge)]);
    let never = RemainingTtl::Never;
    assert_eq!(
        look(&mut connection, &[read("a"), read("big"), read("b")]).await,
        [hit("1", 0, never), Looked::Miss, hit("2", 0, never)]
    );
}

/// So many sets of values of this size, one behind the other.
fn sets(count: usize, value: &[u8]) -> Writes {
    let keys: Vec<_> = (0..count).map(|n| format!("k{n}")).collect();
    keys.iter().map(|key| set(key, value, 0, 0)).collect()
}

#[tokio::test]
async fn quiet_writes_that_are_refused_are_unknown_at_first_and_then_known_by_name() {
    // Takes no item above a kilobyte, and evicts nothing.
    let server = TestServer::start_with(&["-I", "1024", "-o", "slab_chunk_max=512", "-M"]);
    let mut connection = server.connect().await;
    let writes: Writes = [
        set("a", "1", 0, 0),
        set("big", &[b'x'; 2000], 0, 0),
        touch("none", 60),
        set("b", "2", 0, 0),
        set("c", "3", 0, 0),
    ]
    .into_iter()
    .collect();
    let touched = (2, NotDone::NotFound);
    assert_eq!(
        connection.apply(&writes).await.unwrap(),
        [(0, NotDone::Unknown), (1, NotDone::Unknown), touched.clone()],
        "the touch had its answer, and behind it all is well"
    );
    for _ in 0..2 {
        assert_eq!(
            connection.apply(&writes).await.unwrap(),
            [(1, NotDone::TooLarge), touched.clone()]
        );
    }
    let reads = ["a", "big", "b", "c"].map(read);
    let never = RemainingTtl::Never;
    assert_eq!(
        look(&mut connection, &reads).await,
        [hit("1", 0, never), Looked::Miss, hit("2", 0, never), hit("3", 0, never)]
    );
}

#[tokio::test]
async fn a_server_without_memory_refuses_what_it_did_not_take_and_nothing_else() {
    let server = TestServer::start_with(&["-m", "4", "-M"]);
    let mut connection = server.connect().await;
    let writes = sets(20_000, &[b'v'; 1000]);
    let first = connection.apply(&writes).await.unwrap();
    assert!(
        first.iter().all(|(_, how)| *how == NotDone::Unknown),
        "{:?}",
        first.first()
    );
    assert_eq!(first.len(), writes.len(), "nobody knows which");
    let refused = connection.apply(&writes).await.unwrap();
    assert!((1..20_000).contains(&refused.len()), "{}", refused.len());
    let out_of_memory = NotDone::Refused("out of memory storing object".into());
    assert!(refused.iter().all(|(_, how)| *how == out_of_memory), "{:?}", refused[0]);
    let reads: Vec<_> = writes.iter().map(|write| read(write.key.to_vec())).collect();
    let found = look(&mut connection, &reads).await;
    let missing: Vec<_> = (0..)
        .zip(&found)
        .filter(|(_, looked)| **looked == Looked::Miss)
        .map(|(n, _)| n)
        .collect();
    assert_eq!(missing, refused.iter().map(|(place, _)| *place).collect::<Vec<u32>>());
}

#[tokio::test]
async fn a_call_larger_than_every_buffer_does_not_dead_lock() {
    // Each of the touches says that there was nothing: 10 MB of answers, which nobody reads while 60 MB of values go.
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let mut writes = Writes::default();
    for n in 0..700_000u32 {
        writes.push(touch("none", 60));
        if n % 1400 == 0 {
            writes.push(set("k", &[b'v'; 120_000], 0, 0));
        }
    }
    // The limit only turns a dead-lock into a failure.
    let call = tokio::time::timeout(Duration::from_secs(60), connection.apply(&writes));
    let not_done = call.await.unwrap().unwrap();
    assert!(not_done.len() == 700_000 && not_done.iter().all(|(_, how)| *how == NotDone::NotFound));
}

#[tokio::test]
async fn a_key_that_is_no_key_is_refused_alone() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let bad = Bytes::from(vec![b'k'; 251]);
    let writes = [set(&bad, "v", 0, 0), set("k", "v", 0, 0), set("", "v", 0, 0)];
    let not_done = apply(&mut connection, &writes).await;
    assert!(
        matches!(&not_done[..], [(0, NotDone::Refused(_)), (2, NotDone::Refused(_))]),
        "{not_done:?}"
    );
    assert!(matches!(
        apply(&mut connection, &writes[..1]).await[..],
        [(0, NotDone::Refused(_))]
    ));
    let found = look(&mut connection, &[read(""), read(bad), read("k"), read("")]).await;
    assert!(
        matches!(
            &found[..],
            [
                Looked::Refused(_),
                Looked::Refused(_),
                Looked::Hit { .. },
                Looked::Refused(_)
            ]
        ),
        "{found:?}"
    );
    assert!(matches!(
        look(&mut connection, &[read("")]).await[..],
        [Looked::Refused(_)]
    ));
    assert_eq!(look(&mut connection, &[]).await, []);
}

#[tokio::test]
async fn a_thousand_mixed_writes_answer_in_order() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let mut model = std::collections::HashMap::new();
    let (mut writes, mut expected) = (Writes::default(), Vec::new());
    for n in 0u32..1000 {
        let key = format!("key {}", n * 7 % 97).into_bytes();
        let value = vec![n as u8; (n * 13 % 4000) as usize];
        let op = match n % 4 {
            0 | 1 => WriteOp::Set {
                value: &value,
                flags: n,
                expiry: 0,
            },
            2 => WriteOp::Touch { expiry: 0 },
            _ => WriteOp::Delete,
        };
        if matches!(op, WriteOp::Touch { .. }) && !model.contains_key(&key) {
            expected.push((n, NotDone::NotFound));
        }
        writes.push(Write { key: &key, op });
        match n % 4 {
            0 | 1 => drop(model.insert(key, (value, n))),
            2 => {}
            _ => drop(model.remove(&key)),
        }
    }
    assert!(expected.len() > 10);
    assert_eq!(connection.apply(&writes).await.unwrap(), expected);
    let reads: Vec<_> = writes.iter().map(|write| read(write.key.to_vec())).collect();
    let found = look(&mut connection, &reads).await;
    for (read, looked) in reads.iter().zip(found) {
        let expected = model.get(&read.key[..]);
        let expected = expected.map_or(Looked::Miss, |(value, flags)| {
            hit(value.clone(), *flags, RemainingTtl::Never)
        });
        assert_eq!(looked, expected);
    }
}

#[tokio::test]
async fn fifty_values_of_a_megabyte_come_in_one_batch() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let value = |n: usize| Bytes::from(vec![n as u8; 1_000_000]);
    // Ten different ones, to stay within the server's 64 MB; each is read five times.
    let items: Vec<_> = (0..10).map(|n| (format!("k{n}"), value(n), n as u32)).collect();
    let writes: Vec<_> = items
        .iter()
        .map(|(key, value, flags)| set(key, value, *flags, 0))
        .collect();
    assert_eq!(apply(&mut connection, &writes).await, []);
    let reads: Vec<_> = (0..50).map(|n| read(format!("k{}", n % 10))).collect();
    let found = look(&mut connection, &reads).await;
    assert_eq!(found.len(), 50);
    for (n, looked) in found.into_iter().enumerate() {
        assert_eq!(looked, hit(value(n % 10), (n % 10) as u32, RemainingTtl::Never));
    }
}

#[tokio::test]
async fn a_batch_larger_than_every_buffer_does_not_dead_lock() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let key = Bytes::from(vec![b'k'; 250]);
    apply(&mut connection, &[set(&key, &vec![1; 1000], 0, 0)]).await;
    // 16 MB of requests, 60 MB of replies: the server stops reading until somebody reads its replies.
    let reads = vec![read(key); 60_000];
    let mut out = Vec::new();
    // The limit only turns a dead-lock into a failure.
    tokio::time::timeout(Duration::from_secs(20), connection.look(&reads, &mut out))
        .await
        .unwrap()
        .unwrap();
    assert!(out.len() == 60_000 && out.iter().all(|looked| matches!(looked, Looked::Hit { .. })));
}

#[tokio::test]
async fn noop_and_version_answer() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    connection.noop().await.unwrap();
    assert!(connection.version().await.unwrap().starts_with("1."));
    connection.noop().await.unwrap();
    assert_eq!(connection.address(), server.address());
}

#[tokio::test]
async fn a_server_that_is_gone_is_an_error_that_may_be_retried() {
    let server = TestServer::start();
    let mut connection = server.connect().await;
    let address = server.address().to_owned();
    drop(server);
    let error = connection.noop().await.unwrap_err();
    assert!(
        matches!(error, MemcachedError::Closed { .. } | MemcachedError::Io { .. }),
        "{error}"
    );
    assert!(error.is_retryable());
    assert!(!connection.is_usable());
    let error = Connection::connect(&address, Duration::from_secs(5))
        .await
        .err()
        .unwrap();
    assert!(matches!(error, MemcachedError::Connect { .. }), "{error}");
}

/// A server that takes one connection, waits for the first byte, says `reply`, and keeps the connection open.
async fn says(reply: &'static str) -> (Connection, tokio::task::JoinHandle<tokio::net::TcpStream>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        let _ = stream.read_u8().await;
        stream.write_all(reply.as_bytes()).await.unwrap();
        stream
    });
    (
        Connection::connect(&address, Duration::from_secs(5)).await.unwrap(),
        server,
    )
}

#[tokio::test]
async fn a_reply_out_of_step_ends_the_connection_and_keeps_what_was_known() {
    for (reply, known) in [
        ("EN O0\r\nEN O2\r\n", 1),
        ("EN O1\r\nEN O0\r\n", 0),
        ("EN\r\n", 0),
        ("EN O0\r\nEN O1\r\nEN O2\r\n", 2),
        ("EN O0\r\nVA 1 O1\r\nx\r\n", 1),
        ("HD t5 O0\r\n", 0),
        ("MN\r\n", 0),
        ("ERROR\r\n", 0),
        ("EN O0\r\nnonsense\r\n", 1),
    ] {
        let (mut connection, _server) = says(reply).await;
        let mut out = Vec::new();
        let error = connection.look(&[read("a"), read("b")], &mut out).await.unwrap_err();
        assert!(matches!(error, MemcachedError::Protocol { .. }), "{reply:?} {error}");
        assert_eq!(out, vec![Looked::Miss; known], "{reply:?}");
        assert!(matches!(connection.noop().await, Err(MemcachedError::Unusable { .. })));
    }
}

#[tokio::test]
async fn an_error_line_for_one_key_leaves_the_others_their_results() {
    let (mut connection, _server) = says("EN O0\r\nSERVER_ERROR out of memory writing\r\nEN O2\r\n").await;
    let found = look(&mut connection, &[read("a"), read("b"), read("c")]).await;
    assert_eq!(
        found,
        [
            Looked::Miss,
            Looked::Refused("out of memory writing".into()),
            Looked::Miss
        ]
    );

    let (mut connection, _server) = says("HD O0\r\nSERVER_ERROR out of memory\r\nHD O2\r\nMN\r\n").await;
    let not_done = apply(&mut connection, &[touch("a", 1), touch("b", 1), set("c", "", 0, 0)]).await;
    assert_eq!(not_done, [(1, NotDone::Refused("out of memory".into()))]);
}

#[tokio::test]
async fn after_a_client_error_to_a_set_nothing_is_believed() {
    for answers in [
        "CLIENT_ERROR bad data chunk\r\nHD O1\r\nMN\r\n",
        "HD O0\r\nCLIENT_ERROR bad data chunk\r\nMN\r\n",
    ] {
        let (mut connection, _server) = says(answers).await;
        let writes = [set("a", "x", 0, 0), set("b", "", 0, 0)].into_iter().collect();
        let error = connection.apply(&writes).await.unwrap_err();
        assert!(matches!(error, MemcachedError::Protocol { .. }), "{error}");
        assert!(!connection.is_usable());
    }
}

#[tokio::test]
async fn a_connection_closed_half_way_keeps_the_answers_that_came() {
    let (mut connection, server) = says("EN O0\r\nVA 5 f0 t-1 c1 O1\r\nab").await;
    let reads = [read("a"), read("b")];
    let mut out = Vec::new();
    let call = async {
        let error = connection.look(&reads, &mut out).await.unwrap_err();
        assert!(
            matches!(error, MemcachedError::Closed { .. } | MemcachedError::Io { .. }),
            "{error}"
        );
    };
    // The server's stream is dropped as soon as it has said its words.
    tokio::join!(call, async { drop(server.await.unwrap()) });
    assert_eq!(out, [Looked::Miss]);
}

#[tokio::test]
async fn a_call_dropped_half_way_leaves_the_connection_unusable() {
    let (mut connection, _server) = says("").await;
    let writes = [set("k", "v", 0, 0)].into_iter().collect();
    assert!(connection.apply(&writes).now_or_never().is_none());
    assert!(!connection.is_usable());
    assert!(matches!(
        connection.apply(&writes).await,
        Err(MemcachedError::Unusable { .. })
    ));
    assert!(matches!(connection.noop().await, Err(MemcachedError::Unusable { .. })));
}

async fn simple(servers: &[&TestServer]) -> SimpleClient {
    let servers: Vec<_> = servers
        .iter()
        .map(|server| RingServer {
            address: server.address().to_owned(),
            ring_name: None,
            weight: 1,
        })
        .collect();
    SimpleClient::connect(HashKind::Ketama, &servers, Duration::from_secs(5))
        .await
        .unwrap()
}

#[tokio::test]
async fn the_simple_client_writes_and_reads_what_the_connection_does() {
    let server = TestServer::start();
    let client = simple(&[&server]).await;
    assert!(!client.touch(b"k", 60).await.unwrap());
    client.set(b"k", b"", u32::MAX, 0).await.unwrap();
    assert_eq!(client.get(b"k").await.unwrap(), hit("", u32::MAX, RemainingTtl::Never));
    client.set(b"a b", b"v", 0, 100).await.unwrap();
    assert!(client.touch(b"a b", 1000).await.unwrap());
    assert!(matches!(client.get(b"a b").await.unwrap(), Looked::Hit { ttl, .. } if about(ttl, 1000)));
    assert!(client.delete(b"k").await.unwrap());
    assert!(!client.delete(b"k").await.unwrap());
    assert_eq!(client.get(b"k").await.unwrap(), Looked::Miss);
    assert!(matches!(
        client.get(&[b' '; 187]).await,
        Err(MemcachedError::Refused { .. })
    ));
    let error = client.set(b"k", &vec![0; 2 << 20], 0, 0).await.unwrap_err();
    assert!(matches!(error, MemcachedError::TooLarge), "{error:?}");

    client.set(b"k", b"old", 0, 0).await.unwrap();
    server.say("md k I T30").await;
    assert!(matches!(
        client.get(b"k").await.unwrap(),
        Looked::Stale { won: true, .. }
    ));
    assert!(!client.touch(b"k", 60).await.unwrap());
    assert_eq!(server.say("mg k v").await, "VA 3 X W\r\nold");

    drop(server);
    let error = client.set(b"k", b"v", 0, 0).await.unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn the_simple_client_puts_keys_where_the_ring_says() {
    let servers = [TestServer::start(), TestServer::start(), TestServer::start()];
    let client = simple(&servers.iter().collect::<Vec<_>>()).await;
    let list: Vec<_> = servers
        .iter()
        .map(|server| RingServer {
            address: server.address().to_owned(),
            ring_name: None,
            weight: 1,
        })
        .collect();
    let ring = crate::hashing::Ring::new(HashKind::Ketama, &list);
    for n in 0..60 {
        let key = format!("key-{n}");
        client.set(key.as_bytes(), b"v", 0, 0).await.unwrap();
        let mut connection = servers[ring.server_of(key.as_bytes())].connect().await;
        assert_eq!(
            look(&mut connection, &[read(key)]).await,
            [hit("v", 0, RemainingTtl::Never)]
        );
    }
}
