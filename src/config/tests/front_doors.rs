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
