//! `evrepl replay`.

use std::fmt::Write as _;
use std::io::{IsTerminal as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use clap::Args;

use super::{CliError, ConfigArg, Done, runtime};
use crate::replay::{self, Progress, Replayed, Request};

/// How often a terminal is told how far it is.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Bring keys of the past to a peer once more
///
/// Hands the events of a time, or the dead letters of the peer, to the peer's retry topics, from
/// where the running relay takes them: after a peer's memcached was restarted empty, or when a
/// newer evrepl can read what an older one could not. The live stream goes on meanwhile. What is
/// shipped is what the cache holds now, so it is safe to repeat.
///
/// Only what Kafka still holds can be replayed.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct ReplayArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// The peer, by its region
    #[arg(long, value_name = "REGION")]
    peer: String,
    /// Events not older than this: `2h`, `30m`; with --dead-letter, left out: all there are
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration, required_unless_present = "dead_letter")]
    since: Option<Duration>,
    /// Only this cache, by its name; else every cache that the peer gets
    #[arg(long, value_name = "CACHE")]
    cache: Option<String>,
    /// The peer's dead letters instead of the events, each as it was
    #[arg(long)]
    dead_letter: bool,
}

impl ReplayArgs {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let config = Arc::new(self.config.load()?);
        let request = Request {
            peer: self.peer,
            cache: self.cache,
            since: self.since,
            dead_letter: self.dead_letter,
        };
        let progress = Arc::new(Progress::default());
        let replayed = runtime()?.block_on(async {
            let replay = replay::run(config, request, progress.clone());
            if !std::io::stderr().is_terminal() {
                return replay.await;
            }
            tokio::pin!(replay);
            let done = loop {
                match tokio::time::timeout(TELL_EVERY, &mut replay).await {
                    Ok(done) => break done,
                    Err(_) => tell(&progress),
                }
            };
            let _ = write!(std::io::stderr(), "\r\x1b[K");
            done
        })?;
        Ok(Done::ok(told(&replayed)))
    }
}

fn tell(progress: &Progress) {
    let [read, offsets, produced] =
        [&progress.read, &progress.offsets, &progress.produced].map(|count| count.load(Relaxed));
    let _ = write!(
        std::io::stderr(),
        "\r\x1b[K{read} of about {offsets} records read, {produced} handed on"
    );
}

fn told(replayed: &[Replayed]) -> String {
    let mut text = String::new();
    for one in replayed {
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{}: {} records read from {}, {} handed to {}",
            one.cache, one.read, one.from, one.produced, one.to
        );
        for (count, what) in [
            (one.undecodable, "skipped as no event"),
            (one.not_meant, "not meant for this peer"),
        ] {
            if count > 0 {
                let _ = write!(text, ", {count} {what}");
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_done_is_one_line_for_each_topic() {
        let one = Replayed {
            cache: "sessions".to_owned(),
            from: "s".to_owned(),
            to: "s.retry.eu-west-1".to_owned(),
            read: 12,
            produced: 10,
            undecodable: 2,
            not_meant: 0,
        };
        assert_eq!(
            told(&[one]),
            "sessions: 12 records read from s, 10 handed to s.retry.eu-west-1, 2 skipped as no event\n"
        );
    }
}
