use proptest::prelude::*;
use serde::Serialize;

use super::*;

fn unhex(hex: &str) -> Vec<u8> {
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

type Entry = (&'static str, &'static [u8]);

/// A MessagePack map of the given entries, each already encoded.
fn map(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = vec![0x80 | u8::try_from(entries.len()).unwrap()];
    for (name, value) in entries {
        out.push(0xa0 | u8::try_from(name.len()).unwrap());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value);
    }
    out
}

const V1: Entry = ("v", b"\x01");
const SET: Entry = ("op", b"\xa3set");

#[test]
fn the_shortest_event_is_a_set_with_every_default() {
    assert_eq!(decode(br#"{"v":1,"op":"set"}"#), Ok(Event::new(Op::Set)));
    // msgpack.packb({"v":1,"op":"set"}), Python's msgpack 1.2.4 like all the bytes below.
    let python = unhex("82a17601a26f70a3736574");
    assert_eq!(decode(&python), Ok(Event::new(Op::Set)));
    let mut ours = Vec::new();
    encode(&Event::new(Op::Set), &mut ours);
    assert_eq!(ours, python);
}

#[test]
fn bytes_made_by_python_are_read_in_any_field_order() {
    // {"v":1,"op":"delete","ttl":0,"ver":1732291200000<<16,"origin":"us-east-1","fill":False}
    let python = "86a17601a26f70a664656c657465a374746c00a3766572cf0193549a04000000a66f726967696ea975732d656173742d31\
                  a466696c6cc2";
    let expected = Event {
        op: Op::Delete,
        ttl: Some(0),
        ver: Some(1_732_291_200_000 << 16),
        origin: Some("us-east-1".into()),
        fill: false,
    };
    assert_eq!(decode(&unhex(python)), Ok(expected));

    // {"fill":True,"origin":"eu-west-1","ver":(1732291200000<<16)+7,"ttl":2592001,"op":"touch","v":1}
    let python = "86a466696c6cc3a66f726967696ea965752d776573742d31a3766572cf0193549a04000007a374746cce00278d01\
                  a26f70a5746f756368a17601";
    let expected = Event {
        op: Op::Touch,
        ttl: Some(2_592_001),
        ver: Some((1_732_291_200_000 << 16) + 7),
        origin: Some("eu-west-1".into()),
        fill: true,
    };
    assert_eq!(decode(&unhex(python)), Ok(expected));
}

#[test]
fn unknown_fields_of_every_type_are_ignored() {
    // {"tags":["a",{"b":[1.5,None,-3]}],"v":1,7:b"\x00\x01","op":"set","blob":b"x"*300,
    //  "when":ExtType(5,b"abcd"),"ttl":None}
    let python = format!(
        "87a47461677392a16181a16293cb3ff8000000000000c0fda1760107c4020001a26f70a3736574a4626c6f62c5012c{}\
         a47768656ed60561626364a374746cc0",
        "78".repeat(300)
    );
    assert_eq!(decode(&unhex(&python)), Ok(Event::new(Op::Set)));
    let json = br#"{"tags":["a",{"b":[1.5,null,-3]}],"v":1,"7":"x","op":"set","ttl":null}"#;
    assert_eq!(decode(json), Ok(Event::new(Op::Set)));
}

#[test]
fn every_form_of_value_is_passed_over_whole() {
    // The forms that Python does not choose for small values: each holds what would be misread if its length were.
    let forms: [&[u8]; 23] = [
        b"\xd9\x02\xc1\xc1",
        b"\xda\x00\x02\xc1\xc1",
        b"\xdb\x00\x00\x00\x02\xc1\xc1",
        b"\xc4\x02\xc1\xc1",
        b"\xc5\x00\x02\xc1\xc1",
        b"\xc6\x00\x00\x00\x02\xc1\xc1",
        b"\xc7\x02\x05\xc1\xc1",
        b"\xc8\x00\x02\x05\xc1\xc1",
        b"\xc9\x00\x00\x00\x02\x05\xc1\xc1",
        b"\xd4\x05\xc1",
        b"\xd5\x05\xc1\xc1",
        b"\xd6\x05\xc1\xc1\xc1\xc1",
        b"\xd7\x05\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1",
        b"\xd8\x05\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1",
        b"\xdc\x00\x02\x01\x90",
        b"\xdd\x00\x00\x00\x02\x01\x80",
        b"\x82\x01\x91\xc0\xa0\xa1v",
        b"\xde\x00\x02\x01\x02\x03\x04",
        b"\xdf\x00\x00\x00\x02\x01\x02\x03\x04",
        b"\xca\xc1\xc1\xc1\xc1",
        b"\xcb\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1",
        b"\x98\xcc\xc1\xcd\xc1\xc1\xce\xc1\xc1\xc1\xc1\xcf\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xd0\xc1\xd1\xc1\xc1\
          \xd2\xc1\xc1\xc1\xc1\xd3\xc1\xc1\xc1\xc1\xc1\xc1\xc1\xc1",
        b"\x95\xc0\xc2\xc3\x7f\xe0",
    ];
    for form in forms {
        assert_eq!(
            decode(&map(&[V1, ("x", form), SET])),
            Ok(Event::new(Op::Set)),
            "{form:02x?}"
        );
        // As a name, a value that is no string is an unknown field; a string is one too, for none of these is known.
        let mut odd = b"\x83\xa1v\x01".to_vec();
        odd.extend_from_slice(form);
        odd.extend_from_slice(b"\x07\xa2op\xa3set");
        assert_eq!(decode(&odd), Ok(Event::new(Op::Set)), "{form:02x?}");
        // A known field that holds it is at fault, and only that field.
        let fault = decode(&map(&[V1, ("fill", form), SET]));
        assert_eq!(fault, Err(EventError::WrongType { field: "fill" }), "{form:02x?}");
    }
}

#[test]
fn an_unknown_field_may_nest_as_deep_as_it_likes() {
    let mut deep = vec![0x91; 1_000_000];
    deep.push(0xc0);
    assert_eq!(decode(&map(&[("deep", &deep), V1, SET])), Ok(Event::new(Op::Set)));
    let json = format!(
        r#"{{"deep":{}{},"v":1,"op":"set"}}"#,
        "[".repeat(100_000),
        "]".repeat(100_000)
    );
    assert_eq!(decode(json.as_bytes()), Ok(Event::new(Op::Set)));
}

#[test]
fn an_integer_may_have_any_width_that_holds_it() {
    let sevens: [&[u8]; 9] = [
        b"\x07",
        b"\xcc\x07",
        b"\xcd\x00\x07",
        b"\xce\x00\x00\x00\x07",
        b"\xcf\x00\x00\x00\x00\x00\x00\x00\x07",
        b"\xd0\x07",
        b"\xd1\x00\x07",
        b"\xd2\x00\x00\x00\x07",
        b"\xd3\x00\x00\x00\x00\x00\x00\x00\x07",
    ];
    for seven in sevens {
        let event = decode(&map(&[V1, SET, ("ttl", seven), ("ver", seven)])).unwrap();
        assert_eq!((event.ttl, event.ver), (Some(7), Some(7)), "{seven:02x?}");
    }
    let largest = map(&[
        V1,
        SET,
        ("ttl", b"\xce\xff\xff\xff\xff"),
        ("ver", &[0xcf, 255, 255, 255, 255, 255, 255, 255, 255]),
    ]);
    let event = decode(&largest).unwrap();
    assert_eq!((event.ttl, event.ver), (Some(u32::MAX), Some(u64::MAX)));
}

#[test]
fn what_is_wrong_with_a_field_is_named() {
    let cases: [(&[Entry], EventError); 15] = [
        (&[], EventError::MissingField { field: "v" }),
        (&[SET], EventError::MissingField { field: "v" }),
        (&[V1], EventError::MissingField { field: "op" }),
        (&[("v", b"\xc0"), SET], EventError::MissingField { field: "v" }),
        (&[("v", b"\xa11"), SET], EventError::WrongType { field: "v" }),
        (&[("v", b"\xff"), SET], EventError::OutOfRange { field: "v" }),
        (&[V1, ("op", b"\x01")], EventError::WrongType { field: "op" }),
        (&[V1, ("op", b"\xa3get")], EventError::UnknownOp { op: "get".into() }),
        (&[V1, SET, ("ttl", b"\xff")], EventError::OutOfRange { field: "ttl" }),
        (
            &[V1, SET, ("ttl", b"\xcf\0\0\0\x01\0\0\0\0")],
            EventError::OutOfRange { field: "ttl" },
        ),
        (
            &[V1, SET, ("ttl", b"\xca\0\0\0\0")],
            EventError::WrongType { field: "ttl" },
        ),
        (
            &[V1, SET, ("ver", b"\xd3\xff\0\0\0\0\0\0\0")],
            EventError::OutOfRange { field: "ver" },
        ),
        (
            &[V1, SET, ("origin", b"\xa2\xc3\x28")],
            EventError::NotUtf8 { field: "origin" },
        ),
        (&[V1, SET, ("fill", b"\x01")], EventError::WrongType { field: "fill" }),
        (
            &[V1, SET, ("fill", b"\xc2"), ("fill", b"\xc3")],
            EventError::DuplicateField,
        ),
    ];
    for (entries, expected) in cases {
        assert_eq!(decode(&map(entries)), Err(expected), "{entries:02x?}");
    }
}

#[test]
fn json_is_held_to_the_same_rules() {
    let cases: [(&str, EventError); 16] = [
        ("{}", EventError::MissingField { field: "v" }),
        (r#"{"v":1}"#, EventError::MissingField { field: "op" }),
        (r#"{"v":"1","op":"set"}"#, EventError::WrongType { field: "v" }),
        (r#"{"v":1,"op":"get"}"#, EventError::UnknownOp { op: "get".into() }),
        (r#"{"v":1,"op":7}"#, EventError::WrongType { field: "op" }),
        (
            r#"{"v":1,"op":"set","ttl":-1}"#,
            EventError::OutOfRange { field: "ttl" },
        ),
        (
            r#"{"v":1,"op":"set","ttl":4294967296}"#,
            EventError::OutOfRange { field: "ttl" },
        ),
        (
            r#"{"v":1,"op":"set","ttl":1.5}"#,
            EventError::WrongType { field: "ttl" },
        ),
        (
            r#"{"v":1,"op":"set","ver":"+1"}"#,
            EventError::WrongType { field: "ver" },
        ),
        (r#"{"v":1,"op":"set","ver":""}"#, EventError::WrongType { field: "ver" }),
        (
            r#"{"v":1,"op":"set","ver":"18446744073709551616"}"#,
            EventError::OutOfRange { field: "ver" },
        ),
        (
            r#"{"v":1,"op":"set","origin":1}"#,
            EventError::WrongType { field: "origin" },
        ),
        (
            r#"{"v":1,"op":"set","fill":"yes"}"#,
            EventError::WrongType { field: "fill" },
        ),
        (r#"{"v":1,"op":"set","op":"set"}"#, EventError::DuplicateField),
        (r#"{"v":1,"op":"set""#, EventError::NotJson { line: 1, column: 17 }),
        (r#"{"v":1,"op":"set"} x"#, EventError::NotJson { line: 1, column: 20 }),
    ];
    for (json, expected) in cases {
        assert_eq!(decode(json.as_bytes()), Err(expected), "{json}");
    }
}

#[test]
fn in_json_the_version_clock_may_be_a_decimal_string() {
    for ver in ["18446744073709551615", "\"18446744073709551615\""] {
        let json = format!(r#"{{"v":1,"op":"set","ver":{ver}}}"#);
        assert_eq!(decode(json.as_bytes()).unwrap().ver, Some(u64::MAX));
    }
    assert_eq!(
        decode(&map(&[V1, SET, ("ver", b"\xa11")])),
        Err(EventError::WrongType { field: "ver" })
    );
}

#[test]
fn an_origin_with_escapes_is_the_region_it_spells() {
    let json = br#"{"v":1,"op":"set","origin":"\u0065u-west-1"}"#;
    assert_eq!(decode_ref(json).unwrap().origin(), Some("eu-west-1"));
}

#[test]
fn the_origin_is_borrowed_from_the_record() {
    let record = map(&[V1, SET, ("origin", b"\xa2eu")]);
    let event = decode_ref(&record).unwrap();
    assert!(matches!(event.origin, Some(Cow::Borrowed("eu"))));
}

#[test]
fn a_version_to_come_is_reported_as_such_whatever_else_it_holds() {
    let later = map(&[("op", b"\xa5merge"), ("ttl", b"\xa3two"), ("v", b"\x02")]);
    assert_eq!(decode(&later), Err(EventError::UnknownVersion(2)));
    assert_eq!(
        decode(br#"{"op":"merge","ttl":"two","v":2}"#),
        Err(EventError::UnknownVersion(2))
    );
    assert_eq!(
        decode(&map(&[SET, ("v", b"\xcd\x01\x2c")])),
        Err(EventError::UnknownVersion(300))
    );
    assert_eq!(decode(&map(&[SET, ("v", b"\x00")])), Err(EventError::UnknownVersion(0)));
}

#[test]
fn what_is_no_event_at_all_is_told_apart() {
    assert_eq!(decode(b""), Err(EventError::Empty));
    assert_eq!(decode(b"hello"), Err(EventError::NotMessagePack { at: 0 }));
    assert_eq!(decode(b" {}"), Err(EventError::NotMessagePack { at: 0 }));
    assert_eq!(decode(b"\x93\x01\x02\x03"), Err(EventError::NotMessagePack { at: 0 }));
    assert_eq!(
        decode(&map(&[("x", b"\xc1"), V1, SET])),
        Err(EventError::NotMessagePack { at: 3 })
    );
    let mut longer = map(&[V1, SET]);
    longer.push(0);
    assert_eq!(decode(&longer), Err(EventError::TrailingBytes { count: 1 }));
}

#[test]
fn lengths_that_lie_end_with_the_input() {
    let liars: [&[u8]; 8] = [
        b"\xdf\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff\xa1v\x01",
        b"\x81\xdb\xff\xff\xff\xffv",
        b"\x81\xa1v\xdb\xff\xff\xff\xff",
        b"\x81\xa1x\xdd\xff\xff\xff\xff\xc0",
        b"\x81\xa1x\xdf\xff\xff\xff\xff\xc0",
        b"\x81\xa1x\xc6\xff\xff\xff\xff\xc0",
        b"\x81\xa1x\xc9\xff\xff\xff\xff\xc0",
    ];
    for liar in liars {
        assert_eq!(
            decode(liar),
            Err(EventError::Truncated { length: liar.len() }),
            "{liar:02x?}"
        );
    }
}

#[test]
fn every_reason_is_a_stable_word_that_carries_no_data() {
    let errors = [
        EventError::Empty,
        EventError::NotMessagePack { at: 7 },
        EventError::Truncated { length: 7 },
        EventError::TrailingBytes { count: 7 },
        EventError::NotJson { line: 1, column: 7 },
        EventError::UnknownVersion(7),
        EventError::unknown_op(&[b'x'; 1000]),
        EventError::MissingField { field: "v" },
        EventError::DuplicateField,
        EventError::WrongType { field: "v" },
        EventError::OutOfRange { field: "v" },
        EventError::NotUtf8 { field: "origin" },
    ];
    let reasons: std::collections::BTreeSet<_> = errors.iter().map(EventError::reason).collect();
    assert_eq!(reasons.len(), errors.len());
    for error in errors {
        assert!(
            error
                .reason()
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_' || byte == b'8')
        );
        assert!(error.to_string().len() < 100, "{error}");
    }
}

/// The event as a Rust client would write it with `rmp_serde`, with or without leaving defaults out.
#[derive(Serialize)]
struct Client<'a> {
    fill: bool,
    ver: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<&'a str>,
    extra: Vec<(u8, String)>,
    op: &'a str,
    ttl: Option<u32>,
    v: u8,
}

fn any_event() -> impl Strategy<Value = Event> {
    let op = prop::sample::select(Op::ALL.to_vec());
    // Long enough to need every form of string.
    let origin = prop_oneof!["[a-z0-9-]{0,40}", "\\PC{0,300}", Just("x".repeat(70_000))];
    (
        op,
        any::<Option<u32>>(),
        any::<Option<u64>>(),
        prop::option::of(origin),
        any::<bool>(),
    )
        .prop_map(|(op, ttl, ver, origin, fill)| Event {
            op,
            ttl,
            ver,
            origin: origin.map(String::into_boxed_str),
            fill,
        })
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(event in any_event(), before: Vec<u8>) {
        let mut out = before.clone();
        encode(&event, &mut out);
        prop_assert_eq!(&out[..before.len()], &before[..]);
        prop_assert_eq!(decode(&out[before.len()..]), Ok(event));
    }

    #[test]
    fn small_integers_take_the_shortest_form(ttl in prop_oneof![0u32..300, any::<u32>()], ver: u64) {
        let mut ours = Vec::new();
        encode(&Event { ttl: Some(ttl), ver: Some(ver), ..Event::new(Op::Set) }, &mut ours);
        #[derive(Serialize)]
        struct Full { v: u8, op: &'static str, ttl: u32, ver: u64 }
        let theirs = rmp_serde::to_vec_named(&Full { v: 1, op: "set", ttl, ver }).unwrap();
        prop_assert_eq!(ours, theirs);
    }

    #[test]
    fn events_written_with_rmp_serde_and_serde_json_are_decoded(event in any_event(), extra: Vec<(u8, String)>) {
        let client = Client {
            fill: event.fill,
            ver: event.ver,
            origin: event.origin.as_deref(),
            extra,
            op: event.op.name(),
            ttl: event.ttl,
            v: 1,
        };
        prop_assert_eq!(decode(&rmp_serde::to_vec_named(&client).unwrap()), Ok(event.clone()));
        prop_assert_eq!(decode(&serde_json::to_vec(&client).unwrap()), Ok(event));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(value: Vec<u8>) {
        let _ = decode(&value);
    }

    #[test]
    fn no_damage_to_an_event_makes_the_decoder_panic(event in any_event(), at: prop::sample::Index, byte: u8) {
        let mut value = Vec::new();
        encode(&event, &mut value);
        let at = at.index(value.len());
        value[at] = byte;
        let _ = decode(&value);
    }

    #[test]
    fn an_event_that_was_cut_is_never_taken_for_a_whole_one(event in any_event(), cut: prop::sample::Index) {
        let mut value = Vec::new();
        encode(&event, &mut value);
        value.truncate(cut.index(value.len()));
        let reason = decode(&value).map_err(|error| error.reason());
        prop_assert_eq!(reason, Err(if value.is_empty() { "empty" } else { "truncated" }));
    }

    #[test]
    fn no_text_makes_the_json_decoder_panic(text in "\\{[\\[\\]{}\":,a-z0-9\\\\]{0,60}") {
        let _ = decode(text.as_bytes());
    }
}

#[test]
fn events_of_a_key_are_a_touch_only_if_all_of_them_are() {
    assert_eq!(Op::merged(Op::Touch, Op::Touch), Op::Touch);
    assert_eq!(Op::merged(Op::Set, Op::Touch), Op::Set);
    assert_eq!(Op::merged(Op::Delete, Op::Touch), Op::Set);
    assert_eq!(Op::merged(Op::Touch, Op::Delete), Op::Delete);
    assert_eq!(Op::merged(Op::Delete, Op::Set), Op::Set);
}
