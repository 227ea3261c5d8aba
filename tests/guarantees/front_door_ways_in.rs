//! Ways to the front door, and how many may come: a unix socket, TLS with and without a client's certificate, ten thousand idle
//! clients; and a trace that begins there.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use evrepl_lab::otlp::{OtlpSink, SpanKind};
use evrepl_lab::{CacheSpec, RegionBuilder, TwoRegionsSpec, broker, shared};
use serde_json::{Value, json};

use crate::front_door::{Client, door};
use crate::other_programs_write_events::python;

const SESSIONS: &str = "sessions";
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_unix_socket_is_a_way_in_also_after_a_process_that_was_killed() {
    let _gate = shared();
    let path = std::env::temp_dir().join(format!("evrepl-{}.sock", std::process::id()));
    let region = RegionBuilder::new("us-east-1")
        .kafka(&broker().client())
        .cache(CacheSpec::new(SESSIONS).option("listen", &format!("\"unix:{}\"", path.display())))
        .start();
    for _ in 0..2 {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"set key 0 0 5\r\nvalue\r\nquit\r\n").unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "STORED\r\n");
        // The socket is left behind, and taken over.
        region.kill();
        region.start();
    }
    std::fs::remove_file(&path).unwrap();
}

/// Sets a key through TLS; says what was answered, or that the handshake failed.
const TLS: &str = r#"
import json, socket, ssl, sys

given = json.load(sys.stdin)
host, port = given["address"].split(":")
context = ssl.create_default_context(cafile=given["ca"])
if given["certificate"]:
    context.load_cert_chain(given["certificate"], given["key"])
try:
    with socket.create_connection((host, int(port)), timeout=30) as plain:
        with context.wrap_socket(plain, server_hostname="us-east-1") as stream:
            stream.sendall(b"set key 0 0 5\r\nvalue\r\n")
            said = stream.recv(100).decode()
except (ssl.SSLError, ConnectionError) as error:
    said = "refused"
json.dump(said, sys.stdout)
"#;

#[test]
fn tls_is_a_way_in_and_a_certificate_is_asked_for_where_that_is_wanted() {
    let _gate = shared();
    for (tls, certificate, expected) in [
        ("server", false, "STORED\r\n"),
        ("mutual", true, "STORED\r\n"),
        ("mutual", false, "refused"),
    ] {
        let spec = CacheSpec::new(SESSIONS)
            .front_door()
            .option("listen_tls", &format!("\"{tls}\""));
        let region = RegionBuilder::new("us-east-1")
            .kafka(&broker().client())
            .cache(spec)
            .start();
        let file = |name: &str| region.certs().path().join(name).display().to_string();
        let said: Value = python(
            TLS,
            &json!({
                "address": region.cache(SESSIONS).front_door(),
                "ca": file("ca.pem"),
                "certificate": certificate.then(|| file("us-east-1.pem")),
                "key": file("us-east-1.key"),
            }),
        );
        // A closed connection ends without an answer.
        let said = said.as_str().filter(|said| !said.is_empty()).unwrap_or("refused");
        assert_eq!(said, expected, "{tls}, with a certificate: {certificate}");
        // Nobody speaks to it in the clear.
        let mut plain = TcpStream::connect(region.cache(SESSIONS).front_door()).unwrap();
        plain.set_read_timeout(Some(LIMIT)).unwrap();
        plain.write_all(b"set key 0 0 1\r\nx\r\n").unwrap();
        let mut said = Vec::new();
        let _ = plain.read_to_end(&mut said);
        assert!(!said.starts_with(b"STORED"));
    }
}

/// What a program says that is given a front door with TLS, `address`, and its `ca`.
fn through_tls(program: &str) -> Value {
    let spec = CacheSpec::new(SESSIONS).front_door().option("listen_tls", "\"server\"");
    let region = RegionBuilder::new("us-east-1")
        .kafka(&broker().client())
        .cache(spec)
        .start();
    python(
        program,
        &json!({
            "address": region.cache(SESSIONS).front_door(),
            "ca": region.certs().path().join("ca.pem").display().to_string(),
        }),
    )
}

/// Gets large values through TLS with hardly any room to receive them; says how many bytes came, and how the connection ended.
const TLS_LARGE: &str = r#"
import json, socket, ssl, sys

given = json.load(sys.stdin)
host, port = given["address"].split(":")
context = ssl.create_default_context(cafile=given["ca"])
plain = socket.socket()
plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
plain.settimeout(30)
plain.connect((host, int(port)))
with context.wrap_socket(plain, server_hostname="us-east-1") as stream:
    stream.sendall(b"set large 0 0 300001\r\n" + b"v" * 300001 + b"\r\n")
    said = stream.recv(100)
    count = 0
    for round in range(2):
        # More than the sockets hold.
        stream.sendall(b"get large\r\n" * 30 + (b"quit\r\n" if round == 1 else b""))
        wanted = 30 * (len(b"VALUE large 0 300001\r\n") + 300003 + 5)
        while wanted > 0:
            some = stream.recv(10000)
            if not some:
                break
            wanted -= len(some)
            count += len(some)
    left = stream.recv(100)
json.dump([said.decode(), count, left.decode()], sys.stdout)
"#;

#[test]
fn the_end_of_an_answer_comes_through_tls_whatever_the_socket_takes() {
    let _gate = shared();
    let said = through_tls(TLS_LARGE);
    assert_eq!(said, json!(["STORED\r\n", 60 * (22 + 300_003 + 5), ""]));
}

/// Says its last as many clients do: it ends what it sends without a word of TLS, and reads on.
const TLS_HALF_CLOSED: &str = r#"
import json, socket, ssl, sys

given = json.load(sys.stdin)
host, port = given["address"].split(":")
context = ssl.create_default_context(cafile=given["ca"])
told = []
for count in [1, 300]:
    plain = socket.create_connection((host, int(port)), 30)
    with context.wrap_socket(plain, server_hostname="us-east-1") as stream:
        stream.sendall(b"".join(b"set key:%d 0 0 1\r\nx\r\n" % n for n in range(count)))
        # Not the method of its own, which would forget that this is TLS.
        socket.socket.shutdown(stream, socket.SHUT_WR)
        said = b""
        while some := stream.recv(10000):
            said += some
        told.append(said == b"STORED\r\n" * count)
json.dump(told, sys.stdout)
"#;

#[test]
fn a_client_of_tls_that_has_said_its_last_gets_its_answers() {
    let _gate = shared();
    let told = through_tls(TLS_HALF_CLOSED);
    assert_eq!(told, json!([true, true]));
}

#[test]
fn ten_thousand_idle_clients_fit_and_one_more_is_told_so() {
    let _gate = shared();
    // Where this very process may not have as many files open, as many as it may.
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
    let most = limit.maximum.map_or(10_000, |most| (most as usize - 1_000).min(10_000));
    let region = RegionBuilder::new("us-east-1")
        .kafka(&broker().client())
        .cache(CacheSpec::new(SESSIONS).front_door())
        .set("front_door.max_connections", &most.to_string())
        .start();
    let before = region.rss_bytes();
    let address = region.cache(SESSIONS).front_door();
    let mut clients = Vec::new();
    for n in 0..most {
        let mut client = TcpStream::connect(&address).unwrap_or_else(|error| panic!("client {n}: {error}"));
        client.set_read_timeout(Some(LIMIT)).unwrap();
        // Each has been used: what it needed is given back.
        client.write_all(b"set key 0 0 100\r\n").unwrap();
        client.write_all(&[b'v'; 100]).unwrap();
        client.write_all(b"\r\nget key\r\n").unwrap();
        let mut said = [0; 8 + 17 + 102 + 5];
        client.read_exact(&mut said).unwrap();
        clients.push(client);
    }
    region.wait_until("all are there", LIMIT, |status| {
        status["front_doors"][0]["connections"] == most
    });
    let rss = region.rss_bytes();
    assert!(rss < 200_000_000, "{rss} bytes with {most} clients, {before} without");
    let mut more = Client::of(&address);
    assert_eq!(more.line(), "ERROR Too many open connections");
    assert_eq!(more.line(), "");
    drop(clients);
    region.wait_until("all have left", LIMIT, |status| {
        status["front_doors"][0]["connections"] == 0
    });
    assert_eq!(Client::of(&address).ask("get nothing"), "END");
}

#[test]
fn a_write_is_followed_from_the_clients_command_to_the_peers_memcached() {
    let _gate = shared();
    let sink = OtlpSink::start();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .us(|us| {
            us.cache(CacheSpec::new(SESSIONS).front_door())
                .set("front_door.trace_opaque", "\"trace-\"")
        })
        .eu(|eu| eu.cache(CacheSpec::new(SESSIONS)))
        .telemetry(&sink.endpoint(), 0.0)
        .start();
    let mut client = Client::at(&pair.us);
    assert_eq!(client.ask("ms other 1 Oabc\r\nx"), "HD Oabc");
    assert_eq!(client.ask("ms key 1 Otrace-1\r\nx"), "HD Otrace-1");
    let spans = sink.wait_for("the whole trace", LIMIT, |spans| {
        let root = spans.iter().find(|span| span.name == "set sessions")?;
        let all: Vec<_> = spans
            .iter()
            .filter(|span| span.trace_id == root.trace_id)
            .cloned()
            .collect();
        let has = |name: &str| all.iter().any(|span| span.name.starts_with(name));
        (has("process ") && has("apply ")).then_some(all)
    });
    let root = spans.iter().find(|span| span.name == "set sessions").unwrap();
    assert_eq!(
        (root.kind, root.region(), &root.parent_span_id),
        (SpanKind::Producer, "us-east-1", &None)
    );
    let below = |name: &str| {
        spans
            .iter()
            .any(|span| span.name == name && span.parent_span_id.as_ref() == Some(&root.span_id))
    };
    // memcached's part of it, and the relay's.
    assert!(below("set") && below("process sessions"), "{spans:#?}");
    assert_eq!(door(&pair.us)["events"], 2);
    assert_eq!(
        sink.spans().iter().filter(|span| span.name == "set sessions").count(),
        1
    );
}
