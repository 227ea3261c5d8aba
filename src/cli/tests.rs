//! What the command line promises: arguments as documented, exit codes, help that names the defaults.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::*;

fn parse(line: &str) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(line.split(' '))
}

fn refused(line: &str) -> ErrorKind {
    match parse(line) {
        Ok(cli) => panic!("taken: {cli:?}"),
        // clap's exit codes: 0 for help and version, 2 for every mistake.
        Err(error) => {
            assert_eq!(
                error.exit_code() == 0,
                error.kind() == ErrorKind::DisplayVersion,
                "{error}"
            );
            error.kind()
        }
    }
}

#[test]
fn the_command_line_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_documented_command_is_understood() {
    for line in [
        "evrepl run --config evrepl.toml",
        "evrepl check --config evrepl.toml",
        "evrepl check --config evrepl.toml --connect",
        "evrepl config schema",
        "evrepl config print --config evrepl.toml",
        "evrepl certs --out certs us-east-1",
        "evrepl certs --out certs us-east-1 eu-west-1",
        "evrepl write set --config evrepl.toml sessions key value",
        "evrepl write set --config evrepl.toml sessions key value --ttl 60 --flags 4294967295",
        "evrepl write delete --config evrepl.toml sessions key",
        "evrepl write touch --config evrepl.toml sessions key --ttl 60",
        "evrepl status --config evrepl.toml",
        "evrepl status --config evrepl.toml --json",
        "evrepl status --config evrepl.toml --over 1s",
        "evrepl top --config evrepl.toml --every 200ms",
        "evrepl tap --config evrepl.toml --key user:1",
        "evrepl tap --config evrepl.toml --key -1 --cache sessions --count 3",
        "evrepl tap --config evrepl.toml --ratio 0.01 --json",
        "evrepl write touch --config evrepl.toml sessions key --ttl 4294967295",
        "evrepl replay --config evrepl.toml --peer eu-west-1 --since 2h",
        "evrepl replay --config evrepl.toml --peer eu-west-1 --since 1h30m --cache sessions",
        "evrepl replay --config evrepl.toml --peer eu-west-1 --dead-letter",
        "evrepl replay --config evrepl.toml --peer eu-west-1 --dead-letter --since 30m --cache sessions",
    ] {
        parse(line).unwrap_or_else(|error| panic!("{line}: {error}"));
    }
}

#[test]
fn mistakes_are_usage_errors() {
    assert_eq!(refused("evrepl replicate"), ErrorKind::InvalidSubcommand);
    assert_eq!(
        refused("evrepl write set --config c sessions key"),
        ErrorKind::MissingRequiredArgument
    );
    assert_eq!(
        refused("evrepl write set --config c sessions key v --ttl -1"),
        ErrorKind::UnknownArgument
    );
    assert_eq!(
        refused("evrepl write set --config c sessions key v --flags 4294967296"),
        ErrorKind::ValueValidation
    );
    assert_eq!(refused("evrepl certs --out certs"), ErrorKind::MissingRequiredArgument);
    assert_eq!(
        refused("evrepl replay --config c --peer eu-west-1"),
        ErrorKind::MissingRequiredArgument
    );
    assert_eq!(
        refused("evrepl replay --config c --peer eu-west-1 --since yesterday"),
        ErrorKind::ValueValidation
    );
    assert_eq!(refused("evrepl tap --config c"), ErrorKind::MissingRequiredArgument);
    assert_eq!(
        refused("evrepl tap --config c --key k --ratio 1"),
        ErrorKind::ArgumentConflict
    );
    assert_eq!(refused("evrepl top --config c --every 1ms"), ErrorKind::ValueValidation);
    for ttl in ["10m", "-", "1.5", "4294967296"] {
        let line = format!("evrepl write set --config c sessions key v --ttl {ttl}");
        let said = parse(&line).unwrap_err().to_string();
        assert!(said.contains("it is a whole number of seconds, such as 600"), "{said}");
    }
    for wrong in ["--ratio 0", "--ratio 1.5", "--key k --count 0"] {
        let line = format!("evrepl tap --config c {wrong}");
        assert_eq!(refused(&line), ErrorKind::ValueValidation, "{wrong}");
    }
    assert_eq!(refused("evrepl --version"), ErrorKind::DisplayVersion);
}

#[test]
fn a_value_may_look_like_a_number_below_zero_and_keeps_its_bytes() {
    use std::os::unix::ffi::OsStringExt as _;
    let value_of = |last: OsString| {
        let line = ["evrepl", "write", "set", "--config", "c", "sessions", "key"].map(OsString::from);
        let cli = Cli::try_parse_from(line.into_iter().chain([last])).unwrap();
        let Command::Write(write::WriteCommand::Set {
            value,
            ttl: 0,
            flags: 0,
            ..
        }) = cli.command
        else {
            panic!("not a set: {:?}", cli.command)
        };
        value
    };
    assert_eq!(value_of("-5".into()), "-5");
    let bytes = OsString::from_vec(vec![0xff, 0x01, b' ']);
    assert_eq!(value_of(bytes.clone()), bytes);
}

#[test]
fn the_help_of_every_command_says_what_it_does_and_its_defaults() {
    fn each(command: &mut clap::Command, seen: &mut usize) {
        let help = command.render_long_help().to_string();
        assert!(
            command.get_about().is_some_and(|about| about.to_string().len() > 10),
            "{help}"
        );
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{} of {help}", argument.get_id());
        }
        if command.get_arguments().any(|argument| argument.get_id() == "ttl") {
            assert!(help.contains("[default: 0]"), "{help}");
        }
        *seen += 1;
        // clap's own `help` is no command of ours.
        command
            .get_subcommands_mut()
            .filter(|command| command.get_name() != "help")
            .for_each(|command| each(command, seen));
    }
    let mut command = Cli::command();
    let mut seen = 0;
    each(&mut command, &mut seen);
    assert_eq!(seen, 15);
}

#[test]
fn a_configuration_that_is_wrong_ends_with_78_and_every_problem() {
    let file = std::env::temp_dir().join(format!("evrepl-cli-{}.toml", std::process::id()));
    std::fs::write(&file, "region = \"us-east-1\"\nregoin = 1\n").unwrap();
    let cli = Cli::try_parse_from([
        "evrepl".as_ref(),
        "check".as_ref(),
        "--config".as_ref(),
        file.as_os_str(),
    ])
    .unwrap();
    let error = cli.command.execute().unwrap_err();
    std::fs::remove_file(&file).unwrap();
    assert_eq!(error.code(), 78);
    let text = error.to_string();
    assert!(text.contains(":2:1: ") && text.lines().count() > 1, "{text}");
}

/// A configuration that is right, with this admin address and two caches; its file is gone when it is dropped.
struct ConfigFile(std::path::PathBuf);

impl ConfigFile {
    fn with_admin(name: &str, admin: &str) -> ConfigFile {
        let file = std::env::temp_dir().join(format!("evrepl-cli-{name}-{}.toml", std::process::id()));
        let text = format!(
            r#"
            region = "us-east-1"
            [kafka]
            brokers = ["127.0.0.1:1"]
            [[cache]]
            name = "sessions"
            topic = "s"
            servers = ["127.0.0.1:1"]
            [[cache]]
            name = "pages"
            topic = "p"
            servers = ["127.0.0.1:2"]
            [[peer]]
            region = "eu-west-1"
            address = "127.0.0.1:1"
            [tls]
            certificate = "us.pem"
            private_key = "us.key"
            ca = "ca.pem"
            [admin]
            listen = "{admin}"
            "#
        );
        std::fs::write(&file, text).unwrap();
        ConfigFile(file)
    }

    /// What becomes of `evrepl COMMAND --config THIS REST`.
    fn execute(&self, command: &str, rest: &str) -> Result<Done, CliError> {
        let line = format!("evrepl {command} --config {} {rest}", self.0.display());
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        cli.command.execute()
    }
}

impl Drop for ConfigFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn what_librdkafka_refuses_is_said_by_check_with_the_property_and_whose_it_is() {
    let sees = |name: &str, more: &str| {
        let file = ConfigFile::with_admin(name, "127.0.0.1:4");
        let text = std::fs::read_to_string(&file.0).unwrap();
        let text = text.replace("topic = \"s\"", "topic = \"s\"\nlisten = \"127.0.0.1:5\"");
        std::fs::write(&file.0, format!("{text}\n{more}")).unwrap();
        file.execute("check", "")
    };
    assert_eq!(sees("whole", "").unwrap().code, 0);
    // Certificates are perhaps on another machine.
    let tls = "[kafka.properties]\n\"ssl.ca.location\" = \"/nowhere.pem\"\n\"security.protocol\" = \"ssl\"";
    assert_eq!(sees("files", tls).unwrap().code, 0);
    for (name, more, told) in [
        (
            "unknown",
            "\"linger.mss\" = \"1\"",
            ["kafka.properties.linger.mss", "linger.mss\"; change or remove it"],
        ),
        (
            "value",
            "\"linger.ms\" = \"often\"",
            ["refuses `kafka.properties.linger.ms`:", "change or remove it"],
        ),
        // Each is right by itself: an event of the front door is given up after five seconds.
        (
            "pair",
            "\"linger.ms\" = \"6000\"",
            ["linger.ms", "the front door's producer"],
        ),
        (
            "fetch",
            "\"fetch.max.bytes\" = \"1000\"",
            ["fetch.max.bytes", "a flow's consumer"],
        ),
    ] {
        let error = sees(name, &format!("[kafka.properties]\n{more}")).unwrap_err();
        let text = error.to_string();
        assert_eq!(error.code(), 78, "{text}");
        assert!(told.iter().all(|word| text.contains(word)), "{text}");
        assert!(text.contains(".toml: librdkafka refuses `"), "{text}");
        assert!(!text.contains("looks for topics"), "{text}");
    }
}

#[test]
fn a_cache_or_a_peer_that_there_is_none_of_is_a_usage_error_that_names_those_there_are() {
    let file = ConfigFile::with_admin("unknown", "127.0.0.1:1");
    for (command, rest, known) in [
        ("tap", "--key k --cache nope", "sessions, pages"),
        ("write set", "nope key value", "sessions, pages"),
        ("write delete", "nope key", "sessions, pages"),
        ("write touch", "nope key", "sessions, pages"),
        ("replay", "--peer eu-west-1 --since 1h --cache nope", "sessions, pages"),
        ("replay", "--peer nope --since 1h", "eu-west-1"),
    ] {
        let error = file.execute(command, rest).unwrap_err();
        assert_eq!(error.code(), 2, "{command} {rest}: {error}");
        let said = error.to_string();
        let names = ["nope"].into_iter().chain(known.split(", "));
        assert!(
            names.into_iter().all(|name| said.contains(name)),
            "{command} {rest}: {said}"
        );
    }
}

/// Answers one request for `/status` with each of these: a head without its length, and a body. Gives the address.
pub(super) fn answering(answers: Vec<(&'static str, String)>) -> String {
    use std::io::Read as _;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for (head, body) in answers {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                request.extend(byte);
            }
            assert!(request.starts_with(b"GET /status HTTP/1.1\r\n"));
            let length = body.len();
            write!(
                stream,
                "{head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )
            .unwrap();
        }
    });
    address
}

#[test]
fn a_status_over_some_time_is_two_looks_and_shows_the_rate_between_them() {
    let status = |consumed| crate::admin::Status {
        region: "us-east-1".to_owned(),
        flows: vec![crate::admin::FlowStatus {
            peer: "eu-west-1".to_owned(),
            consumed,
            ..crate::admin::FlowStatus::default()
        }],
        ..crate::admin::Status::default()
    };
    let answers = [status(1_000), status(1_025)].map(|status| {
        let body = serde_json::to_string(&status).unwrap();
        ("HTTP/1.1 200 OK", body)
    });
    let admin = answering(answers.into());
    let done = ConfigFile::with_admin("over", &admin)
        .execute("status", "--over 50ms")
        .unwrap();
    assert_eq!(done.code, 0);
    let row = done.text.lines().find(|line| line.starts_with("eu-west-1 ")).unwrap();
    assert!(row.contains(" 500"), "25 events in 50 ms: {row}");
}

#[test]
fn a_file_that_is_not_there_is_a_configuration_problem_too() {
    let error = parse("evrepl config print --config /nowhere/evrepl.toml")
        .unwrap()
        .command
        .execute()
        .unwrap_err();
    assert_eq!(error.code(), 78);
}

#[test]
fn the_printed_schema_is_json() {
    let done = parse("evrepl config schema").unwrap().command.execute().unwrap();
    assert_eq!(done.code, 0);
    assert!(serde_json::from_str::<serde_json::Value>(&done.text).is_ok());
}

#[test]
fn columns_line_up_whatever_their_letters() {
    let mut out = String::new();
    let row = |cells: [&str; 3]| cells.map(str::to_owned);
    table(
        &[
            row(["ok", "größer", "x"]),
            row(["missing", "a", "y y"]),
            row(["ok", "b", ""]),
        ],
        &mut out,
    );
    assert_eq!(out, "ok       größer  x\nmissing  a       y y\nok       b\n");
}
