//! Where front doors may listen.

use super::*;

/// The least, whose cache has these too.
fn cache_with(more: &str, behind: &str) -> String {
    LEAST.replace(
        "servers = [\"127.0.0.1:11211\"]",
        &format!("servers = [\"127.0.0.1:11211\"], {more}"),
    ) + behind
}

#[test]
fn a_door_listens_on_this_machine_or_with_tls_or_where_that_is_said_on_purpose() {
    for local in [
        "127.0.0.1:11311",
        "[::1]:11311",
        "localhost:11311",
        "unix:/run/evrepl.sock",
    ] {
        read(&cache_with(
            &format!("listen = {local:?}, listen_fills = \"127.0.0.1:11411\""),
            "",
        ));
    }
    for key in ["listen", "listen_fills"] {
        for wide in ["0.0.0.0:11311", "[::]:11311", "10.0.0.7:11311", "cache.internal:11311"] {
            let listen = format!("{key} = {wide:?}");
            let parts = [
                &format!("`cache[0].{key}`")[..],
                wide,
                "listen_tls = \"server\"",
                "allow_plaintext",
            ];
            refused_text(&cache_with(&listen, ""), &parts);
            read(&cache_with(&format!("{listen}, listen_tls = \"mutual\""), ""));
            read(&cache_with(&listen, "[front_door]\nallow_plaintext = true\n"));
        }
    }
}

#[test]
fn a_door_is_nobody_elses_address() {
    for key in ["listen", "listen_fills"] {
        let refused = |door: &str, more: &str, part: &str| {
            let text = cache_with(&format!("{key} = {door:?}{more}"), "");
            refused_text(&text, &[&format!("cache[0].{key}"), part]);
        };
        refused("127.0.0.1:11211", "", "which is one of its servers");
        refused("127.0.0.1:7100", "", "admin.listen");
        refused("127.0.0.1:7101", "", "agent.listen");
        refused("nowhere", "", "nowhere");
    }
    let both = "listen = \"127.0.0.1:1\", listen_fills = \"127.0.0.1:1\"";
    refused_text(&cache_with(both, ""), &["cache[0].listen", "cache[0].listen_fills"]);
    // The system chooses.
    read(&cache_with(&both.replace(":1\"", ":0\""), ""));
}

/// Two caches, of which the second has these too.
fn second_cache_with(first: &str, second: &str) -> String {
    cache_with(first, "").replace(
        "}]\n",
        &format!("}}, {{ name = \"b\", topic = \"b\", servers = [\"127.0.0.1:2\"], {second} }}]\n"),
    )
}

#[test]
fn a_door_is_nobody_elses_address_however_it_is_spelled() {
    let listen = |door: &str| format!("listen = {door:?}");
    for (one, other) in [
        ("127.0.0.1:9", "localhost:9"),
        ("[::1]:9", "[0::1]:9"),
        ("127.0.0.1:9", "127.1:9"),
        ("unix:./a.sock", "unix:a.sock"),
        ("unix:a.sock", "unix:/etc/evrepl/a.sock"),
        ("unix:/run/../etc/evrepl//a.sock", "unix:a.sock"),
    ] {
        let parts = [
            "`cache[1].listen` is ",
            " and `cache[0].listen` is ",
            "only one of them can listen",
            "write another p",
        ];
        for (one, other) in [(one, other), (other, one)] {
            let text = second_cache_with(&listen(one), &listen(other)) + "[front_door]\nallow_plaintext = true\n";
            let problems = problems(&text);
            assert_eq!(problems.len(), 1, "{one} {other}: {problems:#?}");
            // What was written as one path is the same by now.
            let same = problems[0].contains("`cache[1].listen` and `cache[0].listen` are the same");
            assert!(
                same || parts.iter().all(|part| problems[0].contains(part)),
                "{problems:#?}"
            );
        }
    }
    let fills = "listen = \"127.0.0.1:9\", listen_fills = \"localhost:9\"";
    refused_text(
        &cache_with(fills, ""),
        &["`cache[0].listen_fills` is", "`cache[0].listen` is"],
    );
    for (door, section) in [
        ("127.0.0.1:7101", "[agent]\nlisten = \"0.0.0.0:7101\""),
        ("127.0.0.1:7101", "[agent]\nlisten = \"[::]:7101\""),
        ("localhost:7100", ""),
        ("127.0.0.1:9", "[admin]\nlisten = \"localhost:9\""),
    ] {
        let text = cache_with(&listen(door), section);
        refused_text(&text, &["`cache[0].listen` is", ".listen` is ", "write another port"]);
    }
    // A default is not where to look.
    refused_text(&cache_with(&listen("localhost:7100"), ""), &["4:98: `admin.listen`"]);
    // Without any front door too.
    refused(
        "[admin]\nlisten = \"0.0.0.0:7101\"",
        &[
            "6:10: `admin.listen` is \"0.0.0.0:7101\" and `agent.listen` is \"127.0.0.1:7101\", where only one of them can listen",
        ],
    );
    read(&second_cache_with(&listen("127.0.0.1:9"), &listen("127.0.0.2:9")));
    read(&second_cache_with(&listen("127.0.0.1:9"), &listen("[::1]:9")));
    read(&second_cache_with(&listen("unix:a.sock"), &listen("unix:b.sock")));
}

#[test]
fn a_door_is_no_server_however_it_is_spelled() {
    refused_text(
        &cache_with("listen = \"localhost:11211\"", ""),
        &[
            "`cache[0].listen` is \"localhost:11211\", which is one of its servers (`cache[0].servers[0]`, \"127.0.0.1:11211\")",
        ],
    );
    refused_text(
        &cache_with("listen = \"0.0.0.0:11211\"", "[front_door]\nallow_plaintext = true"),
        &["which is one of its servers"],
    );
    refused_text(
        &second_cache_with("listen = \"localhost:2\"", ""),
        &[
            "`cache[0].listen` is",
            "which is a server (`cache[1].servers[0]`, \"127.0.0.1:2\")",
        ],
    );
    // Another machine's.
    let elsewhere = LEAST.replace(
        "[\"127.0.0.1:11211\"]",
        "[\"10.0.0.5:11211\"], listen = \"0.0.0.0:11211\", listen_tls = \"server\"",
    );
    read(&elsewhere);
}

#[test]
fn a_sockets_path_is_relative_to_the_file_and_short() {
    let config = read(&cache_with("listen = \"unix:./a.sock\"", ""));
    assert_eq!(config.caches[0].listen.as_deref(), Some("unix:/etc/evrepl/a.sock"));
    let long = format!("unix:/{}", "x".repeat(107));
    refused_text(
        &cache_with(&format!("listen = {long:?}"), ""),
        &[
            "`cache[0].listen` is",
            " has 108 bytes, and a socket's has 107 at most; write a host",
        ],
    );
    refused_text(
        &cache_with("listen = \"unix:@abc\"", ""),
        &[
            "`cache[0].listen` is \"unix:@abc\"; abstract sockets are not supported",
            "; write a host",
        ],
    );
    refused_text(
        &cache_with("listen = \"unix:\"", ""),
        &["that is no path; write a host"],
    );
}

#[test]
fn what_is_said_of_a_door_that_is_not_there_is_refused() {
    for tls in ["server", "mutual"] {
        let tls = format!("listen_tls = {tls:?}");
        refused_text(
            &cache_with(&tls, ""),
            &["`cache[0].listen_tls` is", "the cache has no front door; write where"],
        );
        for unix in ["listen = \"unix:a\"", "listen = \"unix:a\", listen_fills = \"unix:b\""] {
            refused_text(
                &cache_with(&format!("{unix}, {tls}"), ""),
                &[
                    "`cache[0].listen_tls` is",
                    "a unix socket never speaks TLS; write a host and a port",
                ],
            );
        }
        // It means the one that can.
        read(&cache_with(
            &format!("listen = \"unix:a\", listen_fills = \"127.0.0.1:9\", {tls}"),
            "",
        ));
        // One that cannot be read is there.
        refused_text(
            &cache_with(&format!("listen = \"nowhere\", {tls}"), ""),
            &["`cache[0].listen` is \"nowhere\""],
        );
    }
    read(&cache_with("listen_tls = \"off\"", ""));
    let commands = "fill_commands = [\"add\"]";
    for doors in ["", "listen_fills = \"127.0.0.1:9\", "] {
        refused_text(
            &cache_with(&format!("{doors}{commands}"), ""),
            &["`cache[0].fill_commands` names commands of clients at `cache[0].listen`, which is not there"],
        );
    }
    // `on_set` may be switched: then they count.
    read(&cache_with(
        &format!("listen = \"127.0.0.1:9\", listen_fills = \"127.0.0.1:10\", {commands}"),
        "",
    ));
}

#[test]
fn a_value_fits_in_what_is_held_for_clients() {
    let small = "[front_door]\nmax_buffered_bytes = \"64KiB\"";
    refused_text(
        &cache_with("listen = \"127.0.0.1:9\"", small),
        &[
            "6:22: `front_door.max_buffered_bytes` is 65536 B, less than one value (`cache[0].max_value_bytes`, 1048576 B)",
        ],
    );
    read(&cache_with(
        "listen = \"127.0.0.1:9\", max_value_bytes = \"64KiB\"",
        small,
    ));
    // Nobody comes.
    read(&with(small));
}

#[test]
fn the_beginning_of_an_opaque_is_one_that_a_command_can_have() {
    for text in ["", "a b", "is longer than any opaque may be"] {
        refused(
            &format!("[front_door]\ntrace_opaque = \"{text}\""),
            &[
                "`front_door.trace_opaque`",
                "1 to 31 printable ASCII characters without blanks",
            ],
        );
    }
    read(&with("[front_door]\ntrace_opaque = \"trace-\""));
}

#[test]
fn a_number_too_large_is_told_the_most() {
    for (key, most) in [
        ("max_queued_events", "write a whole number from 1 to 2147483647"),
        (
            "max_unsent_keys",
            "is 99999999999; 4294967295 is the most; write a whole number of at least 1",
        ),
        ("threads", "write a whole number from 1 to 256"),
    ] {
        refused(
            &format!("[front_door]\n{key} = 99999999999"),
            &[&format!("`front_door.{key}` is 99999999999; "), most],
        );
    }
    read(&with("[front_door]\nmax_queued_events = 2147483647"));
    let by_variable = problems_with(
        LEAST,
        &[("EVREPL__FRONT_DOOR__MAX_UNSENT_KEYS", "99999999999999999999")],
    );
    assert!(by_variable[0].contains("4294967295 is the most"), "{by_variable:?}");
}
