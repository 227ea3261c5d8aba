//! What operators look with, against regions that run: the tap, the log level, what a broken system says of itself, and the live
//! view.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::num::NonZero;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use evrepl_lab::*;
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(60);

/// Killed when the test ends, however it does.
struct Tool(Child);

impl Tool {
    fn start(command: &mut Command) -> Tool {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        Tool(child.expect("it can be started"))
    }

    fn ended(&mut self) -> Option<i32> {
        self.0
            .try_wait()
            .expect("our own child")
            .and_then(|status| status.code())
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn command(name: &str, region: &Region) -> Command {
    let mut command = Command::new(evrepl());
    command.arg(name).arg("--config").arg(region.config_path());
    command
}

fn client() -> ureq::Agent {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    config.timeout_per_read(Some(LIMIT)).build().into()
}

/// The events of a tap, from when this returns.
fn tap(region: &Region, query: &str) -> impl Iterator<Item = Value> + use<> {
    let answer = client()
        .get(format!("{}/tap?{query}", region.admin_url()))
        .call()
        .unwrap();
    assert_eq!(answer.status(), 200);
    let lines = BufReader::new(answer.into_body().into_reader())
        .lines()
        .map(Result::unwrap);
    lines
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_str(&line).unwrap())
}

#[test]
fn a_tap_shows_exactly_the_events_of_its_key_with_outcome_and_stages() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let mut writer = pair.us.writer("sessions");
    writer.set(b"user:1", b"before anybody looks");
    writer.flush();
    settle(&pair.both());
    let mut tapped = tap(&pair.us, "key=user:1&cache=sessions");
    let mut others = tap(&pair.us, "key=user:2");
    let why = "there is no cache \"nowhere\"; there is sessions\n";
    assert_eq!(pair.us.get("/tap?key=user:1&cache=nowhere"), Ok((400, why.to_owned())));

    writer.set(b"user:2", b"another");
    writer.set(b"user:1", b"value");
    let set = tapped.next().unwrap();
    writer.delete(b"user:1");
    let deleted = tapped.next().unwrap();
    for (event, op, outcome) in [(&set, "set", "applied"), (&deleted, "delete", "deleted")] {
        let expected = ["us-east-1->eu-west-1", "sessions", "user:1", op, outcome].map(Value::from);
        let shown = ["flow", "cache", "key", "op", "outcome"].map(|name| event[name].clone());
        assert_eq!(shown, expected, "{event:#}");
        // It came through every stage, and they make up its lag.
        let stages = event["stages_us"].as_object().unwrap();
        for stage in ["kafka", "queue", "look", "coalesce", "link", "agent_queue", "apply"] {
            assert!(stages.contains_key(stage), "no {stage} in {event:#}");
        }
        let sum: u64 = stages.values().map(|us| us.as_u64().unwrap()).sum();
        let total = event["total_us"].as_u64().unwrap();
        assert!(sum.abs_diff(total) <= total / 10 + 2_000, "{sum} of {total}: {event:#}");
    }
    assert_eq!(others.next().unwrap()["key"], "user:2");
    writer.set(b"user:2", b"once more");
    assert_eq!(others.next().unwrap()["key"], "user:2", "nothing of user:1 in between");

    settle(&pair.both());
    assert_eq!(
        pair.us.terminate(),
        0,
        "a tap must not keep it: {}",
        pair.us.log_tail(20)
    );
    assert_eq!(tapped.next(), None);
}

#[test]
fn the_tap_of_the_command_line_prints_a_line_an_event() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let mut tool = Tool::start(command("tap", &pair.us).args(["--ratio", "1", "--count", "2"]));
    let mut writer = pair.us.writer("sessions");
    // When it has begun to look is its own affair.
    wait_until("two events were shown", LIMIT, || {
        writer.set(b"user 1", b"value");
        tool.ended().is_some()
    });
    let (mut text, mut said) = (String::new(), String::new());
    tool.0.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    tool.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(
        said.starts_with("listening to us-east-1 at 127.0.0.1:") && said.ends_with(", Ctrl-C ends\n"),
        "{said}"
    );
    assert_eq!((tool.ended(), text.lines().count()), (Some(0), 2), "{text}");
    let shown = " us-east-1->eu-west-1 sessions user%201 set ";
    assert!(text.lines().all(|line| line.contains(shown)), "{text}");
}

#[test]
fn the_log_level_changes_while_the_region_runs_and_a_wrong_one_says_why() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let url = format!("{}/log-level", pair.us.admin_url());
    let put = |filter: &str| {
        let mut answer = client().put(&url).send(filter).unwrap();
        (answer.status().as_u16(), answer.body_mut().read_to_string().unwrap())
    };
    assert_eq!(pair.us.get("/log-level"), Ok((200, "info\n".to_owned())));
    let (code, why) = put("inof");
    assert_eq!(code, 400);
    assert!(why.starts_with("log level not changed: \"inof\" is no level"), "{why}");
    let from_a_page = client().put(&url).header("origin", "http://evil.example").send("off");
    assert_eq!(from_a_page.unwrap().status(), 403);

    assert_eq!(put("error"), (200, "error\n".to_owned()));
    let away = |status: &Value| status["flows"][0]["state"] == "waiting_for_peer";
    pair.eu.kill();
    pair.us.wait_until("the peer is away", LIMIT, away);
    assert_eq!(put("info"), (200, "info\n".to_owned()));
    pair.eu.start();
    pair.us.wait_until("the peer is back", LIMIT, |status| !away(status));
    let log = pair.us.log();
    assert!(
        !log.contains("session ended"),
        "a warning while only errors were to be logged"
    );
    assert!(log.contains("log level changed"), "{}", pair.us.log_tail(20));
    wait_until("what happens now is logged", LIMIT, || {
        let log = pair.us.log();
        log.rsplit("log level changed")
            .next()
            .is_some_and(|now| now.contains("session open"))
    });
}

/// What `evrepl status` prints.
fn status_of(region: &Region) -> String {
    let output = command("status", region).output().expect("evrepl can be started");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

#[test]
fn a_broken_system_says_what_is_wrong_and_since_when() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().start();
    wait_until("all is well", LIMIT, || {
        status_of(&pair.us).starts_with("evrepl 0.1.0, region us-east-1: all is well\n\npeer ")
    });
    pair.eu.kill();
    let away = "! peer eu-west-1 is away: ";
    wait_until("it says that the peer is away, and for how long", LIMIT, || {
        let text = status_of(&pair.us);
        let line = text.lines().find(|line| line.starts_with(away)).map(str::to_owned);
        line.is_some_and(|line| line.contains(", for ") && line.ends_with("it is dialled without end"))
    });
    let memcached = pair.us.cache("sessions").memcached(0);
    memcached.kill();
    let gone = format!(
        "! memcached {} of cache sessions takes no writes, for ",
        memcached.address()
    );
    wait_until("it says that memcached is away", LIMIT, || {
        let text = status_of(&pair.us);
        text.contains("2 things are wrong\n") && text.contains(&gone)
    });
    let troubles = pair.us.status()["troubles"].clone();
    assert!(troubles[0]["since_seconds"].as_f64() >= Some(1.0), "{troubles:#}");

    memcached.restart();
    pair.eu.start();
    wait_until("all is well again", LIMIT, || {
        status_of(&pair.us).contains(": all is well\n")
    });
}

#[test]
fn a_topic_that_is_not_there_is_named_and_who_has_to_make_it() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().build();
    let topic = pair.us.cache("sessions").topic.clone();
    pair.us.kafka().delete_topic(&topic);
    pair.eu.start();
    pair.us.start();
    let wanted = format!("! Kafka cannot be read for eu-west-1: topic {topic} is not there, create it, for ");
    wait_until("the topic is named", LIMIT, || {
        status_of(&pair.us).lines().any(|line| line.starts_with(&wanted))
    });
    pair.us.kafka().create_topic(&topic, 1, &[]);
    wait_until("all is well", LIMIT, || status_of(&pair.us).contains(": all is well\n"));
}

#[test]
fn a_process_whose_root_hangs_is_not_alive_and_says_why() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new()
        .one_way()
        .extra("[supervision]\nstalled_after = \"3s\"")
        .build();
    pair.us
        .set_env("FAILPOINTS", Some("region_supervisor_watch=30*off->pause"));
    pair.us.start();
    assert_eq!(pair.us.get("/livez"), Ok((200, "ok\n".to_owned())));
    let mut last = String::new();
    let failed = holds_within(LIMIT, || match pair.us.get("/livez") {
        Ok((503, why)) => {
            last = why;
            true
        }
        _ => false,
    });
    assert!(failed, "{}", pair.us.log_tail(20));
    assert!(
        last.starts_with("not working\n[failed] root thread: has not turned for "),
        "{last}"
    );
    // Nobody has to restart it: it gives up itself some time later.
    assert_eq!(pair.us.exit_code(LIMIT), Some(70), "{}", pair.us.log_tail(20));
}

#[test]
fn top_shows_a_running_region_live_and_one_that_is_gone_as_gone() {
    let _gate = shared();
    let pair = TwoRegionsSpec::new().one_way().start();
    let top = format!(
        "stty cols 120 rows 50; exec '{}' top --config '{}' --every 200ms",
        evrepl().display(),
        pair.us.config_path().display()
    );
    let mut script = Command::new("script");
    script
        .args(["-qfec", &top, "/dev/null"])
        .env("TERM", "xterm")
        .stdin(Stdio::piped());
    let mut tool = Tool::start(&mut script);
    // Only what changes on the screen is written, so it takes a terminal to read it.
    let (rows, columns) = (NonZero::new(50).unwrap(), NonZero::new(120).unwrap());
    let screen = Arc::new(Mutex::new(vt100::Parser::new(rows, columns, 0)));
    let (seen, mut terminal) = (screen.clone(), tool.0.stdout.take().unwrap());
    let reading = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(read @ 1..) = terminal.read(&mut bytes) {
            seen.lock().unwrap().process(&bytes[..read]);
        }
    });
    let text = || screen.lock().unwrap().screen().contents();
    let mut writer = pair.us.writer("sessions");
    wait_until("the flow and its rates are shown", LIMIT, || {
        writer.set(b"key", b"value");
        let text = text();
        let shown = [
            "us-east-1->eu-west-1  running",
            "  outcomes/s  applied ",
            "  apply ",
            ", round trip ",
        ];
        shown.into_iter().all(|one| text.contains(one))
    });
    pair.us.kill();
    wait_until("it is shown as gone", LIMIT, || {
        text().contains("! no evrepl answers at ")
    });
    assert!(
        text().contains("us-east-1->eu-west-1  running"),
        "what was seen last stays"
    );
    pair.us.start();
    wait_until("it is shown again", LIMIT, || {
        let text = text();
        !text.contains("no evrepl answers") && text.contains("us-east-1->eu-west-1  running")
    });
    tool.0.stdin.as_mut().unwrap().write_all(b"q").unwrap();
    wait_until("it ends", LIMIT, || tool.ended().is_some());
    assert_eq!(tool.ended(), Some(0), "{}", text());
    reading.join().unwrap();
}
