//! The demo's Jaeger page as a person sees it: in a real browser.
//!
//! Not in `make test`, because Chromium is 120 MB that nothing else needs: `make browser` installs it and runs this, and CI
//! has it as a step of its own.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use evrepl_lab::place::target;
use evrepl_lab::{Dir, Process, Signal, wait_until};

/// Two regions start, write for a few seconds, drain and are compared.
const SUMMARY_WITHIN: Duration = Duration::from_secs(120);

/// Chromium's first start on a busy machine.
const PAGE_WITHIN: Duration = Duration::from_secs(60);

/// A span as a row of Jaeger's page shows it.
#[derive(Debug, PartialEq)]
struct Row {
    service: String,
    operation: String,
    /// Whether Jaeger's critical path, the black line, goes through it.
    critical: bool,
}

/// The rows of a trace's page, top to bottom.
fn rows(page: &str) -> Vec<Row> {
    // What stands between the end of the tag with this class and the next tag.
    let text = |piece: &str| {
        let text = piece.split_once('>').and_then(|(_, rest)| rest.split_once('<'));
        text.map(|(text, _)| text.trim().to_owned()).unwrap_or_default()
    };
    let pieces = page.split("class=\"span-svc-name").skip(1);
    let row = |piece: &str| {
        let (_, operation) = piece.split_once("class=\"endpoint-name")?;
        Some(Row {
            service: text(piece),
            operation: text(operation),
            critical: piece.contains("class=\"SpanBar--criticalPath"),
        })
    };
    pieces.filter_map(row).collect()
}

/// Runs Chromium without a screen until it has `done` what it was asked for with a page, and returns what it printed.
fn chromium(dir: &Dir, done: &str, page: &str) -> String {
    let log = dir.path().join("chromium.log");
    let mut command = Command::new("chromium");
    // Its sandbox refuses root, and containers seldom let it have one; the only page it sees is ours.
    command.args([
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--window-size=1280,560",
    ]);
    command.arg(format!("--user-data-dir={}", dir.path().join("chromium").display()));
    // Time of the page's own clock, which stands still while it loads something.
    command.args(["--virtual-time-budget=10000", done, page]);
    // What would show it on a screen that happens to be there.
    command.env_remove("DISPLAY");
    let browser = Process::spawn("chromium", command, &log);
    assert_eq!(browser.exit_code(PAGE_WITHIN), Some(0), "chromium {done} {page}");
    fs::read_to_string(&log).unwrap()
}

fn trace_link(log: &Path) -> Option<String> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let link = text.split_whitespace().find(|word| word.contains("/trace/"))?;
    Some(link.to_owned())
}

#[test]
#[ignore = "needs Chromium: make browser"]
fn a_browser_shows_the_way_of_one_write_with_the_spans_of_both_regions() {
    let dir = Dir::new("browser");
    let log = dir.path().join("demo.log");
    let mut demo = Command::new(env!("CARGO_BIN_EXE_evrepl-demo"));
    demo.args(["--seconds", "3", "--rate", "200", "--stay"]);
    let demo = Process::spawn("demo", demo, &log);
    wait_until("the demo's page stays up", SUMMARY_WITHIN, || {
        assert!(demo.is_running(), "the demo has ended");
        demo.log_tail(1).contains("stays up")
    });
    let link = trace_link(&log).expect("a link to a trace that crossed both regions");

    let page = chromium(&dir, "--dump-dom", &link);
    let rows = rows(&page);
    let from = |service: &str, operation: &str| {
        rows.iter()
            .any(|row| row.service == service && row.operation == operation)
    };
    let ways = [
        ("evrepl-us-east-1", "evrepl-eu-west-1"),
        ("evrepl-eu-west-1", "evrepl-us-east-1"),
    ];
    assert!(
        ways.iter()
            .any(|(relay, agent)| from(relay, "process sessions") && from(agent, "apply sessions")),
        "{link} shows {rows:#?}"
    );

    // The stages follow one another, and Jaeger sees that none of them could have been left out.
    for stage in ["queue", "look", "coalesce", "agent queue"] {
        let critical = rows.iter().any(|row| row.operation == stage && row.critical);
        assert!(critical, "{stage} is not on the critical path of {link}: {rows:#?}");
    }

    // For whoever wants to see it; README's is taken this way.
    let shot = target().join("browser/trace.png");
    fs::create_dir_all(shot.parent().unwrap()).unwrap();
    chromium(&dir, &format!("--screenshot={}", shot.display()), &link);
    assert!(fs::metadata(&shot).unwrap().len() > 10_000, "an empty picture");

    demo.signal(Signal::Interrupt);
    assert_eq!(demo.exit_code(Duration::from_secs(10)), Some(0));
}

#[test]
fn rows_of_a_page_are_found_by_the_classes_that_jaeger_gives_them() {
    let page = r#"<a class="span-name "><span class="span-svc-name ">evrepl </span><small class="endpoint-name">ship</small></a>
        <div class="SpanBar--criticalPath" style="background: black"></div>
        <span class="span-svc-name is-children-collapsed">other </span><small class="endpoint-name">apply x</small>"#;
    let row = |service: &str, operation: &str, critical| Row {
        service: service.into(),
        operation: operation.into(),
        critical,
    };
    assert_eq!(
        rows(page),
        [row("evrepl", "ship", true), row("other", "apply x", false)]
    );
    assert_eq!(rows("<p>Trace not found</p>"), []);
}
