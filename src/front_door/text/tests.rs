//! What clients send, right and wrong; what memcached does with the same is in tests/ (differential).

use proptest::prelude::*;

use super::*;

const LIMITS: TextLimits = TextLimits {
    line_bytes: 1 << 16,
    value_bytes: 1 << 20,
};

fn forward(bytes: &str) -> Command {
    match parse(bytes.as_bytes(), LIMITS) {
        Parsed::Forward(command) => command,
        other => panic!("{bytes:?}: {other:?}"),
    }
}

fn answered(bytes: &[u8]) -> (usize, String) {
    match parse(bytes, LIMITS) {
        Parsed::Answer { length, answer } => (length, String::from_utf8_lossy(answer).into_owned()),
        other => panic!("{:?}: {other:?}", String::from_utf8_lossy(bytes)),
    }
}

#[test]
fn a_set_takes_its_value_and_says_its_key_and_its_life() {
    let bytes = "set key:1 7 60 3\r\nabc\r\nget x\r\n";
    let command = forward(bytes);
    assert_eq!((command.verb, command.length, command.ttl), (Verb::Set, 23, Some(60)));
    assert_eq!(command.key.of_bytes(bytes.as_bytes()), b"key:1");
    assert_eq!((command.hush, command.cut, command.head), (Hush::Nothing, None, 18));
    // memcached says what is wrong with it, having taken as much.
    assert_eq!(forward("set k 0 0 3\r\nabcde").length, 18);
    assert_eq!(forward("set k 0 -1 0\r\n\r\n").ttl, None);
}

#[test]
fn noreply_is_left_out_and_remembered() {
    let bytes = "set k 0 0 1 noreply\r\nx\r\n";
    let command = forward(bytes);
    assert_eq!(command.hush, Hush::Everything);
    assert_eq!(
        command.cut.map(|cut| cut.of_bytes(bytes.as_bytes())),
        Some(&b" noreply"[..])
    );
    assert_eq!(forward("delete k noreply\r\n").hush, Hush::Everything);
    assert_eq!(forward("delete noreply\r\n").hush, Hush::Nothing);
    assert_eq!(forward("delete k 0 noreply\r\n").hush, Hush::Everything);
    assert_eq!(forward("flush_all noreply\r\n").hush, Hush::Everything);
    // What is wrong is not said either, as by memcached, but for what is wrong before it is looked for.
    assert_eq!(answered(b"set k 0 0 noreply\r\n").1, "");
    assert_eq!(answered(b"delete k x noreply\r\n").1, "");
    assert_eq!(answered(b"touch noreply\r\n").1, "ERROR\r\n");
}

#[test]
fn a_meta_command_says_what_it_means_to_do() {
    let bytes = "ms k 2 T60 q Oabc ME\r\nhi\r\n";
    let command = forward(bytes);
    assert_eq!(
        (command.verb, command.ttl, command.hush),
        (Verb::MetaSet, Some(60), Hush::Usual)
    );
    assert!(command.adds && !command.base64);
    assert_eq!(command.opaque.of_bytes(bytes.as_bytes()), b"abc");
    assert_eq!(command.cut.map(|cut| cut.of_bytes(bytes.as_bytes())), Some(&b" q"[..]));
    assert!(forward("mg k v T0\r\n").touches && !forward("mg k v t\r\n").touches);
    // Twice is wrong, and memcached says so.
    assert_eq!(
        (forward("md k q q\r\n").cut, forward("md k q q\r\n").hush),
        (None, Hush::Nothing)
    );
    assert!(forward("ma Zm9v N0 b\r\n").creates && forward("ma Zm9v N0 b\r\n").base64);
}

#[test]
fn what_is_wrong_takes_no_value_with_it() {
    for line in [
        "set k 0 0 x\r\n",
        "set k 0 0 -1\r\n",
        "set k -1 0 1\r\n",
        "set k 0 99999999999999999999 1\r\n",
        "cas k 0 0 1 x\r\n",
        "ms k\r\n",
        "ms k abc\r\n",
        "ms k -1\r\n",
    ] {
        assert_eq!(
            answered(format!("{line}abc\r\n").as_bytes()),
            (line.len(), "CLIENT_ERROR bad command line format\r\n".to_owned())
        );
    }
    let long = "k".repeat(251);
    assert_eq!(
        answered(format!("get a {long} b\r\n").as_bytes()).1,
        "CLIENT_ERROR bad command line format\r\n"
    );
    assert_eq!(
        answered(format!("set {long} 0 0 1\r\n").as_bytes()).1,
        "CLIENT_ERROR bad command line format\r\n"
    );
    for line in [
        "\r\n",
        "\n",
        "x\r\n",
        "nonsense 1 2\r\n",
        "get\r\n",
        "set k 0 0\r\n",
        "incr k\r\n",
        "mz k\r\n",
    ] {
        assert_eq!(
            answered(line.as_bytes()),
            (line.len(), "ERROR\r\n".to_owned()),
            "{line:?}"
        );
    }
    assert_eq!(answered(b"mn\r\n").1, "MN\r\n");
    assert_eq!(parse(b"GET / HTTP/1.1\r\n", LIMITS), Parsed::Nonsense);
}

#[test]
fn numbers_are_read_as_c_reads_them() {
    assert_eq!(signed(b"4294967299"), Some(3));
    assert_eq!(
        (signed(b"+5"), signed(b"-5"), signed(b"\t7"), signed(b"7\tx")),
        (Some(5), Some(-5), Some(7), Some(7))
    );
    assert_eq!(
        (
            signed(b"7x"),
            signed(b""),
            signed(b"-"),
            signed(b"99999999999999999999")
        ),
        (None, None, None, None)
    );
    assert_eq!((unsigned(b"-1"), unsigned(b"-18446744073709551615")), (None, Some(1)));
    assert_eq!(unsigned(b"18446744073709551616"), None);
}

#[test]
fn a_line_ends_for_memcached_where_a_nul_stands() {
    let bytes = b"delete foo\0bar\r\n";
    let Parsed::Forward(command) = parse(bytes, LIMITS) else {
        panic!()
    };
    assert_eq!(
        (command.key.of_bytes(bytes), command.length),
        (&b"foo"[..], bytes.len())
    );
}

#[test]
fn what_is_not_as_clients_write_it_is_known_as_odd() {
    for usual in [
        "set k 0 0 1\r\nx\r\n",
        "cas k 0 -1 1 7 noreply\r\nx\r\n",
        "get a b\r\n",
        "ms k 1 T0 q\r\nx\r\n",
        "mg k v q\r\n",
        "delete k noreply\r\n",
        "incr k 1\n",
    ] {
        assert!(!forward(usual).odd, "{usual:?}");
    }
    for odd in [
        "set k 0 0 1 0\r\nx\r\n",
        "set k 0 0 +1\r\nx\r\n",
        "set k 0 0 1\r\nxyz",
        "ms k 1\r\nxyz",
        "ms k +1\r\nx\r\n",
        "md k q q\r\n",
        "get a\0b\r\n",
        "get a\tb\r\n",
        "flush_all\r\n",
    ] {
        assert!(forward(odd).odd, "{odd:?}");
    }
    // Twice, it is wrong, and nobody is told; but a key may have this name.
    assert_eq!(answered(b"touch k noreply noreply\r\n").1, "");
    assert_eq!(answered(b"flush_all noreply noreply\r\n").1, "");
    assert_eq!(forward("delete noreply noreply\r\n").hush, Hush::Everything);
}

#[test]
fn only_a_list_of_keys_may_be_long() {
    let many = "get ".to_owned() + &"key ".repeat(1000);
    assert_eq!(parse(many.as_bytes(), LIMITS), Parsed::Incomplete { missing: 1 });
    assert_eq!(parse(&[b'x'; 2049], LIMITS), Parsed::Nonsense);
    assert_eq!(parse(&[b'x'; 2048], LIMITS), Parsed::Incomplete { missing: 1 });
    let command = forward(&format!("{many}\r\n"));
    assert_eq!(keys(format!("{many}\r\n").as_bytes(), &command).count(), 1000);
    let gats = "gats 60 a  b\r\n";
    let command = forward(gats);
    assert_eq!(head(gats.as_bytes(), &command), b"gats 60 ");
    assert_eq!(keys(gats.as_bytes(), &command).collect::<Vec<_>>(), [b"a", b"b"]);
}

#[test]
fn a_value_beyond_the_limit_is_known_by_its_line() {
    let limits = TextLimits {
        value_bytes: 2,
        ..LIMITS
    };
    assert!(matches!(parse(b"set k 0 0 3\r\n", limits), Parsed::TooLarge(command) if command.length == 18));
}

proptest! {
    #[test]
    fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = parse(&bytes, LIMITS);
    }

    #[test]
    fn what_is_cut_is_waited_for_and_then_read_the_same(
        line in "(set|add|cas|ms|mg|md|ma|get|gat|incr|touch|delete|flush_all|stats) ?[a-z0-9 ]{0,30}( noreply| q)?\r\n",
        value in "[a-z]{0,9}\r\n", cut: proptest::sample::Index,
    ) {
        let bytes = line + &value;
        let whole = parse(bytes.as_bytes(), LIMITS);
        let length = match whole {
            Parsed::Forward(command) => command.length,
            Parsed::Answer { length, .. } => length,
            _ => return Ok(()),
        };
        prop_assert!(length <= bytes.len());
        let cut = cut.index(length);
        match parse(&bytes.as_bytes()[..cut], LIMITS) {
            Parsed::Incomplete { missing } => prop_assert!((1..=length - cut).contains(&missing)),
            other => prop_assert!(false, "{other:?} of {cut} bytes"),
        }
    }
}

#[test]
fn a_key_in_which_a_line_ends_is_not_named_in_an_answer() {
    // "a\nb" and "ab".
    let (breaks, plain) = ("YQpi", "YWI=");
    let refused = "CLIENT_ERROR a key with a line break cannot be in an answer\r\n";
    for line in [
        format!("mg {breaks} v b k\r\n"),
        format!("md {breaks} k b\r\n"),
        format!("ma {breaks} bx ky\r\n"),
        format!("me {breaks} b\r\n"),
        // Its value goes with it.
        format!("ms {breaks} 2 b k\r\nvv\r\n"),
    ] {
        assert_eq!(answered(line.as_bytes()), (line.len(), refused.to_owned()), "{line}");
    }
    for line in [
        format!("mg {breaks} b v\r\n"),
        format!("mg {plain} b k\r\n"),
        // No base64: this is the key.
        format!("mg {breaks} k\r\n"),
        format!("me {breaks}\r\n"),
        format!("me {plain} b\r\n"),
    ] {
        assert_eq!(forward(&line).length, line.len());
    }
    assert!(matches!(
        parse(format!("ms {breaks} 2 b k\r\nv").as_bytes(), LIMITS),
        Parsed::Incomplete { .. }
    ));
    let listed = "CLIENT_ERROR keys are not listed at the front door\r\n";
    assert_eq!(answered(b"stats cachedump 1 2\r\n").1, listed);
    assert_eq!(answered(b"stats detail dump\r\n").1, listed);
    assert_eq!(forward("stats items\r\n").verb, Verb::Stats);
}
