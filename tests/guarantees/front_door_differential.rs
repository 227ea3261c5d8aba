//! memcached's own behaviour is the reference: the same random commands, right and wrong, cut anywhere, go to a memcached and to
//! a front door with another one behind it, and what comes back is the same, byte for byte.
//!
//! `EVREPL_DIFFERENTIAL=1000000` sends so many commands in each protocol; `EVREPL_DIFFERENTIAL_SEED` begins elsewhere.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use evrepl_lab::place::target;
use evrepl_lab::{CacheSpec, Memcached, Region, RegionBuilder, broker, shared};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SESSIONS: &str = "sessions";
/// Commands in one connection.
const STREAM: usize = 200;

fn commands() -> usize {
    std::env::var("EVREPL_DIFFERENTIAL").map_or(20_000, |count| count.parse().expect("a number of commands"))
}

fn seed() -> u64 {
    std::env::var("EVREPL_DIFFERENTIAL_SEED").map_or(1, |seed| seed.parse().expect("a seed"))
}

struct Pair {
    reference: Memcached,
    region: Region,
}

impl Pair {
    fn start() -> Pair {
        let region = RegionBuilder::new("us-east-1")
            .kafka(&broker().client())
            .cache(CacheSpec::new(SESSIONS).front_door())
            .start();
        Pair {
            reference: Memcached::start(),
            region,
        }
    }

    /// Sends the same to both, in these pieces, and compares what they say until they have said everything.
    /// False when memcached said the same, but less.
    fn compare(&self, stream: &[u8], cuts: &[usize], what: &str) -> bool {
        let folder = target().join("differential");
        std::fs::create_dir_all(&folder).unwrap();
        let expected = exchange(&self.reference.address(), stream, cuts, what);
        let found = exchange(&self.region.cache(SESSIONS).front_door(), stream, cuts, what);
        let [expected, found] = [expected, found].map(|said| without_times(&said));
        if expected == found {
            return true;
        }
        // A memcached that closes a connection, in the middle of a command, forgets what it has not sent yet.
        if found.starts_with(&expected) {
            return false;
        }
        let at = expected.iter().zip(&found).take_while(|(a, b)| a == b).count();
        let around = |bytes: &[u8]| {
            let part = &bytes[at.saturating_sub(200).min(bytes.len())..(at + 200).min(bytes.len())];
            String::from_utf8_lossy(part).into_owned()
        };
        for (name, bytes) in [("sent", stream), ("memcached", &expected), ("front-door", &found)] {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        panic!(
            "{what}: differs at byte {at} of {} and {}; all of it is in {}\n--- memcached\n{:?}\n--- front door\n{:?}",
            expected.len(),
            found.len(),
            folder.display(),
            around(&expected),
            around(&found),
        );
    }
}

/// With ` t#` for every time to live.
fn without_times(said: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(said.len());
    let mut rest = said;
    while let Some(at) = rest
        .windows(3)
        .position(|three| three.starts_with(b" t") && three[2].is_ascii_digit())
    {
        out.extend_from_slice(&rest[..at]);
        out.extend_from_slice(b" t#");
        let digits = rest[at + 2..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        rest = &rest[at + 2 + digits..];
    }
    out.extend_from_slice(rest);
    out
}

fn exchange(address: &str, stream: &[u8], cuts: &[usize], what: &str) -> Vec<u8> {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut reader = socket.try_clone().unwrap();
    let what = format!("{what}, at {address}");
    let (whole, file) = (stream.to_vec(), target().join("differential/sent"));
    let reading = std::thread::spawn(move || {
        let mut said = Vec::new();
        // A reset comes when it closed before everything was read.
        let mut buffer = [0; 65536];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return said,
                Ok(count) => said.extend_from_slice(&buffer[..count]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return said,
                Err(error) => {
                    std::fs::write(file, &whole).unwrap();
                    let last = String::from_utf8_lossy(&said[said.len().saturating_sub(300)..]).into_owned();
                    panic!("{what}: {error}, after {} bytes: {last:?}", said.len());
                }
            }
        }
    });
    let mut rest = stream;
    for &cut in cuts.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (some, more) = rest.split_at(cut.min(rest.len()));
        if socket.write_all(some).is_err() {
            break;
        }
        rest = more;
    }
    let _ = socket.shutdown(Shutdown::Write);
    reading.join().unwrap()
}

/// Random words; a long key has so many letters.
struct Words(StdRng, usize);

impl Words {
    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.0.random_range(0..of.len())]
    }

    fn key(&mut self) -> String {
        match self.0.random_range(0..20) {
            0 => "k".repeat(self.1),
            1 => "größe".to_owned(),
            2 => "".to_owned(),
            _ => format!("key:{}", self.0.random_range(0..12)),
        }
    }

    fn number(&mut self) -> String {
        let odd = [
            "-1",
            "x",
            "",
            "1x",
            "4294967295",
            "4294967296",
            "99999999999999999999",
            "+3",
            "-",
            "\t5",
            "18446744073709551615",
        ];
        match self.0.random_range(0..8) {
            0 => self.pick(&odd).to_owned(),
            _ => self.0.random_range(0..100u32).to_string(),
        }
    }

    /// Times whose passing no test sees.
    fn time(&mut self) -> String {
        match self.0.random_range(0..6) {
            0 => "0".to_owned(),
            1 => self.pick(&["-1", "2592001", "x", "", "4000000000"]).to_owned(),
            _ => "1000".to_owned(),
        }
    }

    fn end(&mut self) -> &'static str {
        match self.0.random_range(0..12) {
            0 => "\n",
            _ => "\r\n",
        }
    }

    fn noreply(&mut self) -> &'static str {
        match self.0.random_range(0..5) {
            0 => " noreply",
            1 if self.0.random_range(0..6) == 0 => self.pick(&[" 0", " x", " noreply noreply", "  "]),
            _ => "",
        }
    }

    fn value(&mut self) -> Vec<u8> {
        match self.0.random_range(0..30) {
            0 => Vec::new(),
            // With ends of lines, for memcached ends a connection at a long one that has not come whole: by chance.
            1 => [&[b'v'; 900][..], b"\r\n"].concat().repeat(self.0.random_range(2..22)),
            2 => b"line\r\nset x 0 0 1\r\n".to_vec(),
            3..9 => self.0.random_range(0..1000u32).to_string().into_bytes(),
            _ => vec![b'v'; self.0.random_range(1..60)],
        }
    }

    /// The data of a storage command, most often as it should be.
    fn data(&mut self, out: &mut Vec<u8>, value: &[u8]) {
        out.extend_from_slice(value);
        let end = match self.0.random_range(0..40) {
            0 => "",
            1 => "x\r\n",
            _ => "\r\n",
        };
        out.extend_from_slice(end.as_bytes());
    }

    fn classic(&mut self, out: &mut Vec<u8>) {
        let (key, end) = (self.key(), self.end());
        match self.0.random_range(0..14) {
            0..4 => {
                let verb = self.pick(&["set", "set", "set", "add", "replace", "append", "prepend"]);
                let (value, flags, time) = (self.value(), self.number(), self.time());
                let length = match self.0.random_range(0..25) {
                    0 => self.number(),
                    _ => value.len().to_string(),
                };
                let noreply = self.noreply();
                out.extend_from_slice(format!("{verb} {key} {flags} {time} {length}{noreply}{end}").as_bytes());
                self.data(out, &value);
            }
            4 => {
                let (value, unique, noreply) = (self.value(), self.number(), self.noreply());
                out.extend_from_slice(format!("cas {key} 0 0 {} {unique}{noreply}{end}", value.len()).as_bytes());
                self.data(out, &value);
            }
            5..8 => {
                let verb = self.pick(&["get", "get", "gets", "gat 1000", "gats 0", "gat", "bget"]);
                let mut keys = vec![key];
                for _ in 0..self.0.random_range(0..5) {
                    keys.push(self.key());
                }
                if self.0.random_range(0..20) == 0 {
                    keys.extend((0..40).map(|n| format!("key:{n}")));
                }
                out.extend_from_slice(format!("{verb} {}{end}", keys.join(" ")).as_bytes());
            }
            8 => {
                let (verb, by, noreply) = (self.pick(&["incr", "decr"]), self.number(), self.noreply());
                // Never read: whether a number that has become shorter keeps its length depends, in memcached, on whether an
                // answer that was not sent yet holds the item.
                let key = format!("i:{}", self.0.random_range(0..4));
                if self.0.random_range(0..3) == 0 {
                    out.extend_from_slice(
                        format!("set {key} 0 0 3\r\n{}\r\n", self.0.random_range(100..999)).as_bytes(),
                    );
                }
                out.extend_from_slice(format!("{verb} {key} {by}{noreply}{end}").as_bytes());
            }
            9 => {
                let (time, noreply) = (self.time(), self.noreply());
                out.extend_from_slice(format!("touch {key} {time}{noreply}{end}").as_bytes());
            }
            10 => {
                let noreply = self.noreply();
                out.extend_from_slice(format!("delete {key}{noreply}{end}").as_bytes());
            }
            11 => {
                let what = self.pick(&[
                    "version",
                    "mn",
                    "verbosity 0",
                    "verbosity",
                    "verbosity x",
                    "flush_all",
                    "flush_all 0",
                    "flush_all x",
                    "flush_all noreply",
                    "stats reset",
                    "stats nonsense",
                ]);
                out.extend_from_slice(format!("{what}{end}").as_bytes());
            }
            _ => {
                let what = self.pick(&[
                    "",
                    "x",
                    "nonsense",
                    "get",
                    "set",
                    "set a",
                    "set a 0 0",
                    "delete",
                    "incr",
                    "touch a",
                    "mg",
                    "ms",
                    "ms a",
                    "md",
                    "ma",
                    "me",
                    "m",
                    "mx a",
                    "GET a",
                    " get key:1",
                    "get  key:1  key:2 ",
                    "gets a\0b c",
                    "cas a 0 0 1",
                    "add a 0 0 1 2 3",
                ]);
                out.extend_from_slice(format!("{what}{end}").as_bytes());
            }
        }
    }

    fn flags(&mut self, of: &[&str]) -> String {
        let count = self.0.random_range(0..5);
        let flags = (0..count).map(|_| match self.0.random_range(0..40) {
            0 => self
                .pick(&["!", "Tx", "T", "OO", "Fx", "Cx", "Mx", "MXX", "Jx", "Dx", "qq", "é"])
                .to_owned(),
            _ => self.pick(of).to_owned(),
        });
        flags.fold(String::new(), |all, flag| all + " " + &flag)
    }

    fn meta_key(&mut self) -> (String, &'static str) {
        match self.0.random_range(0..6) {
            0 => (
                self.pick(&["a2V5OjE=", "a2V5OjI=", "AAEC/w==", "!!", "a2V"]).to_owned(),
                " b",
            ),
            _ => (self.key(), ""),
        }
    }

    fn meta(&mut self, out: &mut Vec<u8>) {
        let ((key, base64), end) = (self.meta_key(), self.end());
        let opaque = format!("O{}", self.0.random_range(0..1000));
        let long = format!("O{}", "o".repeat(40));
        let opaque = if self.0.random_range(0..30) == 0 {
            long.as_str()
        } else {
            opaque.as_str()
        };
        match self.0.random_range(0..10) {
            0..3 => {
                let flags = self.flags(&[
                    "v", "f", "s", "k", "q", "T1000", "T0", "N1000", "R30", "u", "E5", opaque, "h",
                ]);
                out.extend_from_slice(format!("mg {key}{base64}{flags}{end}").as_bytes());
            }
            3..6 => {
                let value = self.value();
                let flags = self.flags(&[
                    "T1000", "T0", "F7", "q", "k", opaque, "ME", "MA", "MP", "MR", "MS", "I", "C5",
                ]);
                let length = match self.0.random_range(0..25) {
                    0 => self.number(),
                    _ => value.len().to_string(),
                };
                out.extend_from_slice(format!("ms {key} {length}{base64}{flags}{end}").as_bytes());
                self.data(out, &value);
            }
            6 => {
                let flags = self.flags(&["q", "k", opaque, "I", "T1000", "C5"]);
                out.extend_from_slice(format!("md {key}{base64}{flags}{end}").as_bytes());
            }
            7 | 8 => {
                // Keys of their own, which nobody marks as stale: memcached forgets the mark when it counts in an item that an
                // answer still holds that was not sent yet, and does not when it was.
                let key = if base64.is_empty() {
                    format!("n:{}", self.0.random_range(0..4))
                } else {
                    "bjox".to_owned()
                };
                let flags = self.flags(&[
                    "q", "k", opaque, "v", "N0", "J13", "D3", "MI", "MD", "M+", "T1000", "C5", "t",
                ]);
                out.extend_from_slice(format!("ma {key}{base64}{flags}{end}").as_bytes());
            }
            _ => {
                let flags = self.flags(&["q", "k", opaque]);
                let many = " k".repeat(30);
                let flags = if self.0.random_range(0..4) == 0 { many } else { flags };
                out.extend_from_slice(format!("mg {key}{flags}{end}").as_bytes());
            }
        }
    }

    fn binary(&mut self, out: &mut Vec<u8>, n: u32) {
        let key = self.key();
        let value = self.value();
        let opcode = match self.0.random_range(0..60) {
            0 => self.0.random_range(0x20..0x60u8),
            _ => [
                0x00, 0x00, 0x01, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x11,
                0x12, 0x13, 0x14, 0x15, 0x16, 0x19, 0x1a, 0x1c, 0x1d, 0x1e, 0x23, 0x24, 0x08, 0x18,
            ][self.0.random_range(0..31)],
        };
        let expiry = [0, 1000, u32::MAX][self.0.random_range(0..3)];
        let extras = match opcode {
            0x01..=0x03 | 0x11..=0x13 => [7u32.to_be_bytes(), expiry.to_be_bytes()].concat(),
            0x05 | 0x06 | 0x15 | 0x16 => [&3u64.to_be_bytes()[..], &9u64.to_be_bytes(), &expiry.to_be_bytes()].concat(),
            0x1c..=0x1e | 0x23 | 0x24 => 1000u32.to_be_bytes().to_vec(),
            _ => Vec::new(),
        };
        let (key, value) = match opcode {
            // memcached reads what follows an unknown command wrong if it has a body.
            0x25.. => (String::new(), Vec::new()),
            0x0a | 0x0b | 0x08 | 0x18 => (String::new(), Vec::new()),
            0x01..=0x03 | 0x11..=0x13 | 0x0e | 0x0f | 0x19 | 0x1a => (key, value),
            _ => (key, Vec::new()),
        };
        // Now and then something is not as it should be; what closes the connection ends the stream.
        let extras = if self.0.random_range(0..300) == 0 {
            vec![0; 3]
        } else {
            extras
        };
        let cas = if self.0.random_range(0..8) == 0 {
            self.0.random_range(1..40u64)
        } else {
            0
        };
        let mut header = [0; 24];
        (header[0], header[1], header[4]) = (0x80, opcode, extras.len() as u8);
        header[2..4].copy_from_slice(&(key.len() as u16).to_be_bytes());
        header[8..12].copy_from_slice(&((extras.len() + key.len() + value.len()) as u32).to_be_bytes());
        header[12..16].copy_from_slice(&n.to_be_bytes());
        header[16..24].copy_from_slice(&cas.to_be_bytes());
        out.extend_from_slice(&header);
        out.extend_from_slice(&extras);
        out.extend_from_slice(key.as_bytes());
        out.extend_from_slice(&value);
    }
}

/// Runs streams of `command` until so many were sent.
fn run(what: &str, mut command: impl FnMut(&mut Words, &mut Vec<u8>, u32)) {
    let _gate = shared();
    let pair = Pair::start();
    let streams = commands().div_ceil(STREAM);
    let mut cut_short = 0;
    for n in 0..streams {
        let seed = seed() * 1_000_000 + n as u64;
        // In broken lines two words may become one, and one that is too long in a list of keys makes memcached forget the
        // answers that it has not sent yet.
        let longest = if what == "mixed" { 120 } else { 250 };
        let mut words = Words(StdRng::seed_from_u64(seed), longest);
        let mut stream = Vec::new();
        for n in 0..STREAM {
            command(&mut words, &mut stream, n as u32);
        }
        let cuts: Vec<usize> = (0..7)
            .map(|_| match words.0.random_range(0..3) {
                0 => words.0.random_range(1..40),
                1 => words.0.random_range(1..2000),
                _ => words.0.random_range(1..200_000),
            })
            .collect();
        if what != "binary" {
            // The last command is whole, as far as can be: memcached sends nothing while it waits for a value.
            stream.extend(b"\r\nmn\r\n".repeat(300));
        }
        let all = pair.compare(&stream, &cuts, &format!("{what}, stream {n} of seed {seed}"));
        cut_short += usize::from(!all);
        std::fs::write(target().join("differential/before"), &stream).unwrap();
        if what != "binary" {
            // What both hold is the same too.
            let mut held: Vec<u8> = (0..12)
                .flat_map(|n| format!("gets key:{n}\r\nmg key:{n} t u\r\n").into_bytes())
                .collect();
            held.extend_from_slice(b"set held 0 0 1\r\nx\r\ngets held\r\n");
            assert!(pair.compare(&held, &[1000], &format!("{what}, after stream {n} of seed {seed}")));
        }
    }
    println!("{what}: {streams} streams, of which memcached cut {cut_short} short");
    assert!(cut_short <= 1 + streams / 20, "{cut_short} of {streams}");
}

/// Whether a meta command in it has a key in base64 in which a line ends: where memcached writes such a key into an answer, the front
/// door refuses the command.
fn names_a_line_break(lines: &[u8]) -> bool {
    lines.split(|&byte| byte == b'\n').any(|line| {
        let mut words = line
            .split(|byte| byte.is_ascii_whitespace())
            .filter(|word| !word.is_empty());
        let mut key = Vec::new();
        words.next().is_some_and(|word| word.starts_with(b"m"))
            && words
                .next()
                .is_some_and(|word| evrepl::front_door::base64::decode(word, &mut key))
            && key.iter().any(|byte| b"\r\n".contains(byte))
    })
}

#[test]
fn classic_commands_are_answered_as_memcached_answers_them() {
    run("classic", |words, out, _| words.classic(out));
}

#[test]
fn meta_commands_are_answered_as_memcached_answers_them() {
    run("meta", |words, out, _| words.meta(out));
}

#[test]
fn both_kinds_of_text_and_broken_lines_are_answered_as_memcached_answers_them() {
    run("mixed", |words, out, _| {
        let at = out.len();
        match words.0.random_range(0..2) {
            0 => words.classic(out),
            _ => words.meta(out),
        }
        if words.0.random_range(0..30) == 0 {
            // A byte is another one, is there twice, or is not there.
            let at = words.0.random_range(at..out.len());
            match words.0.random_range(0..3) {
                0 => out[at] = words.0.random(),
                1 => out.insert(at, out[at]),
                _ => _ = out.remove(at),
            }
        }
        if names_a_line_break(&out[at..]) {
            out.truncate(at);
        }
    });
}

#[test]
fn binary_commands_are_answered_as_memcached_answers_them() {
    run("binary", |words, out, n| words.binary(out, n));
}
