//! `evrepl top`: what `/status` says, live.

mod draw;
mod model;
#[cfg(test)]
mod tests;

use std::io::{self, IsTerminal};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use tokio::time::Instant;

use super::status::{StatusError, fetch};
use super::{CliError, ConfigArg, Done};
use crate::admin::Status;
use draw::Around;
use model::View;

/// How long a key may wait for its answer, and a new look for its place on the screen.
const TURN: Duration = Duration::from_millis(50);

/// Watch a running evrepl
///
/// Asks the evrepl that runs with this configuration, at admin.listen, again and again, and shows
/// for each flow how long events take in each stage of their path, with the one to look at marked
/// (by the rule of docs/tuning.md), the fullest mailbox of each kind of actor, outcomes per second, links, and what waits for whom; then what the
/// agent receives. Shows this node only. Ends with q or Ctrl-C; arrows scroll. While nothing answers
/// it goes on asking.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct TopArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// How often to look, at least 100ms
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = every)]
    every: Duration,
}

fn every(text: &str) -> Result<Duration, String> {
    let every = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    match every {
        every if every >= Duration::from_millis(100) => Ok(every),
        _ => Err("it is at least 100ms".to_owned()),
    }
}

/// Why nothing is shown.
#[derive(Debug, thiserror::Error)]
pub(super) enum TopError {
    #[error("this is no terminal; `evrepl status` prints once")]
    NoTerminal,
    #[error("the terminal cannot be used: {0}")]
    Terminal(#[from] io::Error),
}

impl TopArgs {
    /// Draws on the terminal, unlike other subcommands.
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let config = self.config.load()?;
        if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
            return Err(TopError::NoTerminal.into());
        }
        let looks = Looks::start(config.admin.listen.clone(), self.every).map_err(TopError::Terminal)?;
        // It also takes care that a panic leaves the terminal as it was.
        let terminal = ratatui::try_init().map_err(TopError::Terminal)?;
        let seen = Seen {
            slow: config.telemetry.slow_after,
            ..Seen::default()
        };
        let ended = watch(terminal, &looks, seen, self.every);
        ratatui::restore();
        ended.map_err(TopError::Terminal)?;
        Ok(Done::ok(String::new()))
    }
}

type Look = (Instant, Result<Status, StatusError>);

/// Looks on a thread of its own: a region that does not answer must not keep the keys waiting.
struct Looks {
    taken: Receiver<Look>,
    /// Dropped, the thread ends.
    _stop: Sender<()>,
}

impl Looks {
    fn start(listen: String, every: Duration) -> io::Result<Looks> {
        let (say, taken) = mpsc::channel();
        let (stop, stopped) = mpsc::channel::<()>();
        std::thread::Builder::new().name("looks".to_owned()).spawn(move || {
            loop {
                let status = fetch(&listen).map(|(_, status)| status);
                if say.send((Instant::now(), status)).is_err() {
                    return;
                }
                if stopped.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        })?;
        Ok(Looks { taken, _stop: stop })
    }
}

/// What was seen last.
#[derive(Default)]
struct Seen {
    view: View,
    last: Option<(Instant, Status)>,
    silent: Option<String>,
    /// What the configuration calls slow.
    slow: Duration,
}

impl Seen {
    fn look(&mut self, (at, status): Look) {
        match status {
            Ok(status) => {
                let before = self.last.as_ref().map(|(earlier, before)| (before, at - *earlier));
                self.view = View::of(&status, before, self.slow);
                self.last = Some((at, status));
                self.silent = None;
            }
            Err(error) => self.silent = Some(error.to_string()),
        }
    }

    fn around(&self, every: Duration, scrolled: u16, now: Instant) -> Around {
        let old = self.last.as_ref().map_or(Duration::ZERO, |(at, _)| now - *at);
        Around {
            silent: self.silent.clone().map(|why| (why, old)),
            every,
            scrolled,
        }
    }
}

/// Until somebody has had enough.
fn watch(mut terminal: DefaultTerminal, looks: &Looks, mut seen: Seen, every: Duration) -> io::Result<()> {
    let (mut scrolled, mut hidden) = (0u16, 0);
    loop {
        let around = seen.around(every, scrolled, Instant::now());
        terminal.draw(|frame| hidden = draw::draw(frame, &seen.view, &around))?;
        scrolled = scrolled.min(hidden);
        loop {
            if let Ok(look) = looks.taken.try_recv() {
                seen.look(look);
                break;
            }
            if !event::poll(TURN)? {
                continue;
            }
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Press => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Down | KeyCode::Char('j') => scrolled = scrolled.saturating_add(1).min(hidden),
                    KeyCode::Up | KeyCode::Char('k') => scrolled = scrolled.saturating_sub(1),
                    _ => continue,
                },
                // Drawn anew, as large as it is now.
                Event::Resize(..) => {}
                _ => continue,
            }
            break;
        }
    }
}
