//! Decoding events: those of evrepl's own writer, and what other programs may write.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use evrepl::event::{Event, Op, decode_ref, encode};

pub fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("event");
    group.throughput(Throughput::Elements(1));
    let event = |event: Event| {
        let mut out = Vec::new();
        encode(&event, &mut out);
        out
    };
    let ver = Some(1_700_000_000_000 << 16);
    let kinds: [(&str, Vec<u8>); 4] = [
        ("least", event(Event::new(Op::Set))),
        (
            "of the writer",
            event(Event {
                ver,
                ..Event::new(Op::Set)
            }),
        ),
        (
            "all fields",
            event(Event {
                ver,
                ttl: Some(3_600),
                origin: Some("us-east-1".into()),
                fill: true,
                ..Event::new(Op::Touch)
            }),
        ),
        (
            "json",
            br#"{"v":1,"op":"set","ttl":3600,"origin":"us-east-1"}"#.to_vec(),
        ),
    ];
    for (name, bytes) in &kinds {
        group.bench_function(format!("decode, {name}"), |bencher| {
            bencher.iter(|| decode_ref(black_box(bytes)).map(|event| event.ver))
        });
    }
    let mut out = Vec::new();
    let event = Event {
        ver,
        ..Event::new(Op::Set)
    };
    group.bench_function("encode, of the writer", |bencher| {
        bencher.iter(|| {
            out.clear();
            encode(black_box(&event), &mut out);
            out.len()
        })
    });
    group.finish();
}
