//! Which stage of an event's way a function belongs to. Whoever adds a file to evrepl's hot path adds it here: what no rule
//! claims stands in the table as `other`, with its biggest functions.

use super::frames::Frame;

/// Whose instructions are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    /// The sending half.
    Relay,
    /// The receiving half.
    Agent,
}

impl Process {
    pub fn name(self) -> &'static str {
        match self {
            Process::Relay => "relay",
            Process::Agent => "agent",
        }
    }

    /// The rows of its table, in the order of an event's way.
    pub fn stages(self) -> &'static [&'static str] {
        match self {
            Process::Relay => &[
                CONSUME, POLL, DECODE, ACCOUNT, HASH, LOOK, LOOK_TEXT, COALESCE, ENCODE, ENCODE_LZ4, LINK, ENCRYPT,
                RUNTIME, TELEMETRY, OTHER,
            ],
            Process::Agent => &[
                DECRYPT, DECODE, DECODE_LZ4, SESSION, HASH, STAMP, WRITE, WRITE_TEXT, ACK, RUNTIME, TELEMETRY, KAFKA,
                OTHER,
            ],
        }
    }
}

const CONSUME: &str = "consume: librdkafka's threads";
const POLL: &str = "consume: poll thread";
const DECODE: &str = "decode";
const DECODE_LZ4: &str = "decode: lz4";
const ACCOUNT: &str = "account";
const HASH: &str = "hash";
const LOOK: &str = "look";
const LOOK_TEXT: &str = "look: memcached's protocol";
const COALESCE: &str = "coalesce";
const ENCODE: &str = "encode";
const ENCODE_LZ4: &str = "encode: lz4";
const LINK: &str = "link: window, acks";
const ENCRYPT: &str = "encrypt";
const DECRYPT: &str = "decrypt";
const SESSION: &str = "session: window, split";
const STAMP: &str = "stamp";
const WRITE: &str = "write";
const WRITE_TEXT: &str = "write: memcached's protocol";
const ACK: &str = "ack";
const RUNTIME: &str = "actors, tokio";
const TELEMETRY: &str = "metrics, traces, admin";
const KAFKA: &str = "kafka";
/// What no rule claims.
pub const OTHER: &str = "other";

/// evrepl's own files, for both processes. The first prefix that fits counts.
const OWN: &[(&str, &str)] = &[
    ("event", DECODE),
    ("hlc", DECODE),
    ("hashing", HASH),
    ("telemetry", TELEMETRY),
    ("admin", TELEMETRY),
    ("region.rs", TELEMETRY),
    ("canary", TELEMETRY),
    ("clock_offset", TELEMETRY),
    ("handoff", RUNTIME),
    ("pulse", RUNTIME),
    ("threads", RUNTIME),
    ("run.rs", RUNTIME),
    ("actors/region_supervisor", RUNTIME),
    ("actors/flow_supervisor", RUNTIME),
];

const OWN_RELAY: &[(&str, &str)] = &[
    ("poll_thread", POLL),
    ("kafka", POLL),
    ("retention", POLL),
    ("offsets", ACCOUNT),
    ("permits", ACCOUNT),
    ("outcome", ACCOUNT),
    ("parking", ACCOUNT),
    ("suspects", ACCOUNT),
    ("relay", ACCOUNT),
    ("actors/partition_consumer", ACCOUNT),
    ("actors/cache_reader", LOOK),
    ("memcached", LOOK_TEXT),
    ("look", LOOK),
    ("dirty", LOOK),
    ("breaker", LOOK),
    ("misses", LOOK),
    ("backoff", LOOK),
    ("coalesce", COALESCE),
    ("actors/batch_coalescer", COALESCE),
    ("wire/ack", LINK),
    ("wire", ENCODE),
    ("actors/remote_link", LINK),
    ("link", LINK),
    ("tls", ENCRYPT),
];

const OWN_AGENT: &[(&str, &str)] = &[
    ("wire/ack", ACK),
    ("wire", DECODE),
    ("tls", DECRYPT),
    ("actors/agent_session", SESSION),
    ("actors/agent_listener", SESSION),
    ("agent", SESSION),
    ("stamps", STAMP),
    ("actors/cache_writer", WRITE),
    ("memcached", WRITE_TEXT),
    ("breaker", WRITE),
    ("backoff", WRITE),
    ("kafka", KAFKA),
];

/// Crates, for both processes.
const CRATES: &[(&str, &str)] = &[
    ("actix", RUNTIME),
    ("tokio/", RUNTIME),
    ("tokio-util/", RUNTIME),
    ("mio/", RUNTIME),
    ("futures-", RUNTIME),
    ("crossbeam", RUNTIME),
    ("parking_lot", RUNTIME),
    ("md-5/", HASH),
    ("md5", HASH),
    ("digest/", HASH),
    ("block-buffer/", HASH),
    ("opentelemetry", TELEMETRY),
    ("prometheus", TELEMETRY),
    ("tracing", TELEMETRY),
    ("sharded-slab/", TELEMETRY),
    ("tonic", TELEMETRY),
    ("prost", TELEMETRY),
    ("tower", TELEMETRY),
    ("h2/", TELEMETRY),
    ("http", TELEMETRY),
    ("hyper", TELEMETRY),
    ("axum", TELEMETRY),
    ("matchit/", TELEMETRY),
    ("serde_json/", TELEMETRY),
];

const CRATES_RELAY: &[(&str, &str)] = &[
    ("rustls", ENCRYPT),
    ("tokio-rustls", ENCRYPT),
    ("ring/", ENCRYPT),
    ("rmp", DECODE),
    ("lz4_flex", ENCODE_LZ4),
    ("rdkafka/", POLL),
];

const CRATES_AGENT: &[(&str, &str)] = &[
    ("rustls", DECRYPT),
    ("tokio-rustls", DECRYPT),
    ("ring/", DECRYPT),
    ("rmp", DECODE),
    ("lz4_flex", DECODE_LZ4),
    ("rdkafka", KAFKA),
];

/// Parts of crates that only hand on what their callers want: bytes into a buffer, a read into a poll.
const PASSED: &[&str] = &["tokio/src/io/"];

/// By the start of a function's name, where there are no files: assembly and C without a line table.
const NAMES: &[(&str, &str)] = &[("ring_core", "crypto"), ("rd_", "librdkafka"), ("rdk", "librdkafka")];

/// librdkafka's code is in one place and runs on two kinds of threads.
const LIBRDKAFKA: &str = "rdkafka-sys/";

/// What of a thread's functions tells whose it is.
const LIBRDKAFKA_THREADS: &[&str] = &["rd_kafka_thread_main", "rd_kafka_broker_thread_main"];

/// Whether a thread that ran these functions is one of librdkafka's own.
pub fn is_librdkafka<'a>(mut functions: impl Iterator<Item = &'a str>) -> bool {
    functions.any(|name| LIBRDKAFKA_THREADS.contains(&name))
}

/// The stage of the innermost frame that a rule claims; where there is no line table, the function's name may tell.
pub fn stage(process: Process, librdkafka: bool, frames: &[Frame], symbol: &str) -> Option<&'static str> {
    frames
        .iter()
        .find_map(|frame| of_file(process, librdkafka, &frame.file))
        .or_else(|| of_name(process, librdkafka, symbol))
}

fn of_file(process: Process, librdkafka: bool, file: &str) -> Option<&'static str> {
    let find = |rules: &[(&str, &'static str)], name: &str| {
        rules
            .iter()
            .find(|(prefix, _)| name.starts_with(prefix))
            .map(|(_, stage)| *stage)
    };
    if PASSED.iter().any(|prefix| file.starts_with(prefix)) {
        return None;
    }
    if file.starts_with(LIBRDKAFKA) {
        return Some(of_librdkafka(process, librdkafka));
    }
    let (own, crates) = match process {
        Process::Relay => (OWN_RELAY, CRATES_RELAY),
        Process::Agent => (OWN_AGENT, CRATES_AGENT),
    };
    match file.strip_prefix("evrepl/src/") {
        Some(name) => find(OWN, name).or_else(|| find(own, name)),
        None => find(crates, file).or_else(|| find(CRATES, file)),
    }
}

fn of_name(process: Process, librdkafka: bool, symbol: &str) -> Option<&'static str> {
    let (_, what) = NAMES.iter().find(|(prefix, _)| symbol.starts_with(prefix))?;
    Some(match (*what, process) {
        ("crypto", Process::Relay) => ENCRYPT,
        ("crypto", Process::Agent) => DECRYPT,
        _ => of_librdkafka(process, librdkafka),
    })
}

fn of_librdkafka(process: Process, own_thread: bool) -> &'static str {
    match (process, own_thread) {
        (Process::Agent, _) => KAFKA,
        (Process::Relay, true) => CONSUME,
        (Process::Relay, false) => POLL,
    }
}

/// What a function does for whoever called it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// Its own.
    Own,
    /// Gives memory, or takes it back.
    Allocator,
    /// Copies, fills or compares bytes.
    Copy,
}

/// The C library's allocator, and those that a build may have instead of it.
const ALLOCATOR: &[&str] = &[
    "malloc",
    "free",
    "calloc",
    "realloc",
    "cfree",
    "memalign",
    "posix_memalign",
    "aligned_alloc",
    "_int_malloc",
    "_int_free",
    "_int_realloc",
    "_int_memalign",
    "_mid_memalign",
    "__libc_malloc",
    "__libc_free",
    "__libc_calloc",
    "__libc_realloc",
    "__libc_memalign",
    "unlink_chunk",
    "malloc_consolidate",
    "sysmalloc",
    "systrim",
    "tcache_init",
    "arena_get2",
    "alloc_perturb",
    "mremap_chunk",
    "munmap_chunk",
    "checked_request2size",
    "ptmalloc_init",
    "new_heap",
    "heap_trim",
    "grow_heap",
    "sbrk",
    "brk",
    "__default_morecore",
    "__glibc_morecore",
];
const ALLOCATOR_PREFIXES: &[&str] = &["mi_", "_mi_", "je_", "_rjem_", "tcache_"];

/// Rust's doors to the allocator, mangled by either scheme.
const ALLOCATOR_PARTS: &[&str] = &[
    "__rust_alloc",
    "__rust_dealloc",
    "__rust_realloc",
    "__rdl_alloc",
    "__rdl_dealloc",
    "__rdl_realloc",
];

const COPY_PARTS: &[&str] = &["memcpy", "memmove", "memset", "memcmp", "mempcpy", "bcmp"];

/// By the function's mangled name.
pub fn work(symbol: &str) -> Work {
    let starts = |all: &[&str]| all.iter().any(|prefix| symbol.starts_with(prefix));
    let contains = |all: &[&str]| all.iter().any(|part| symbol.contains(part));
    if ALLOCATOR.contains(&symbol) || starts(ALLOCATOR_PREFIXES) || contains(ALLOCATOR_PARTS) {
        Work::Allocator
    } else if !symbol.starts_with("_R") && !symbol.starts_with("_ZN") && contains(COPY_PARTS) {
        Work::Copy
    } else {
        Work::Own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(file: &str) -> Frame {
        Frame {
            function: String::new(),
            file: file.into(),
        }
    }

    #[test]
    fn the_innermost_frame_that_has_a_stage_counts() {
        let frames = [
            "std/core/src/slice/mod.rs",
            "evrepl/src/wire/pack.rs",
            "evrepl/src/actors/remote_link.rs",
        ];
        let frames = frames.map(frame);
        assert_eq!(stage(Process::Relay, false, &frames, ""), Some(ENCODE));
        assert_eq!(stage(Process::Agent, false, &frames, ""), Some(DECODE));
        assert_eq!(stage(Process::Relay, false, &frames[..1], "memchr"), None);
        assert_eq!(
            stage(Process::Agent, false, &[], "ring_core_0_17_14__aes_hw_ctr32"),
            Some(DECRYPT)
        );
    }

    #[test]
    fn librdkafka_is_told_apart_by_its_threads() {
        let frames = [frame("rdkafka-sys/librdkafka/src/rdkafka_msgset_reader.c")];
        assert_eq!(stage(Process::Relay, true, &frames, ""), Some(CONSUME));
        assert_eq!(stage(Process::Relay, false, &frames, ""), Some(POLL));
        assert!(is_librdkafka(["main", "rd_kafka_broker_thread_main"].into_iter()));
        assert!(!is_librdkafka(["main", "rd_kafka_poll"].into_iter()));
    }

    #[test]
    fn every_stage_that_a_rule_names_has_a_row() {
        let both = OWN.iter().chain(CRATES);
        let relay = both.clone().chain(OWN_RELAY).chain(CRATES_RELAY);
        let agent = both.chain(OWN_AGENT).chain(CRATES_AGENT);
        for (process, (prefix, stage)) in relay
            .map(|rule| (Process::Relay, rule))
            .chain(agent.map(|rule| (Process::Agent, rule)))
        {
            assert!(process.stages().contains(stage), "{}: {prefix} {stage}", process.name());
        }
    }

    #[test]
    fn memory_is_known_by_name() {
        assert_eq!(work("_int_free"), Work::Allocator);
        assert_eq!(work("__memcpy_avx_unaligned_erms"), Work::Copy);
        assert_eq!(work("_RNvCs_3std6memcpy"), Work::Own);
        assert_eq!(work("_RNvCs_7___rustc12___rust_alloc"), Work::Allocator);
    }
}
