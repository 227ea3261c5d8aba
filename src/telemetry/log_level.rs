//! What is logged, changed while the process runs. There is one logger a process, so there is one level.

use std::sync::{Mutex, OnceLock, PoisonError};

use tracing_subscriber::filter::{LevelFilter, ParseError};
use tracing_subscriber::{EnvFilter, Registry, reload};

/// Set once, with the logger.
static LOGGER: OnceLock<LogLevel> = OnceLock::new();

/// Longer filters are mistakes: one names each module of the crate in less.
const MAX_LENGTH: usize = 4096;

/// Why a filter was not taken. What was logged before is logged on.
#[derive(Debug, thiserror::Error)]
pub enum LogLevelError {
    /// Nothing logs in this process.
    #[error("this process has no logger")]
    NoLogger,
    /// An empty filter would say nothing at all.
    #[error("no filter was given; one is \"info\", another \"info,evrepl=debug\"")]
    Empty,
    /// Too long to be meant.
    #[error("the filter is {0} bytes long, {MAX_LENGTH} are the most")]
    TooLong(usize),
    /// A bare word that is none.
    #[error(
        "\"{0}\" is no level (off, error, warn, info, debug, trace); for one part of the program write TARGET=LEVEL, as in \
         \"info,evrepl=debug\""
    )]
    NoLevel(String),
    /// Not the filter language.
    #[error("\"{filter}\": {source}")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
}

/// The filter in force and the way to another one.
#[derive(Debug)]
struct LogLevel {
    filter: Mutex<String>,
    handle: reload::Handle<EnvFilter, Registry>,
}

/// The filter for the process's logger, which [`set`] changes from now on.
pub(super) fn reloadable(filter: EnvFilter) -> reload::Layer<EnvFilter, Registry> {
    let (layer, level) = LogLevel::new(filter);
    // A second logger is refused when it is started.
    let _ = LOGGER.set(level);
    layer
}

/// What is logged, in `tracing-subscriber`'s filter language; `None` when nothing logs here.
pub fn get() -> Option<String> {
    LOGGER.get().map(LogLevel::get)
}

/// Logs by this filter from now on; gives the one before.
///
/// # Errors
///
/// [`LogLevelError`], with the filter unchanged.
pub fn set(filter: &str) -> Result<String, LogLevelError> {
    LOGGER.get().ok_or(LogLevelError::NoLogger)?.set(filter)
}

impl LogLevel {
    fn new(filter: EnvFilter) -> (reload::Layer<EnvFilter, Registry>, LogLevel) {
        let text = Mutex::new(filter.to_string());
        let (layer, handle) = reload::Layer::new(filter);
        (layer, LogLevel { filter: text, handle })
    }

    fn get(&self) -> String {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, filter: &str) -> Result<String, LogLevelError> {
        let wanted = parse(filter)?;
        let shown = wanted.to_string();
        // Under the lock, so that what is shown is what is in force.
        let mut current = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        self.handle.reload(wanted).map_err(|_| LogLevelError::NoLogger)?;
        Ok(std::mem::replace(&mut current, shown))
    }
}

/// A filter, where a word that is no level is a mistake: as the name of a target it would silence everything else.
pub(super) fn parse(filter: &str) -> Result<EnvFilter, LogLevelError> {
    let filter = filter.trim();
    if filter.len() > MAX_LENGTH {
        return Err(LogLevelError::TooLong(filter.len()));
    }
    let mut directives = filter
        .split(',')
        .map(str::trim)
        .filter(|one| !one.is_empty())
        .peekable();
    if directives.peek().is_none() {
        return Err(LogLevelError::Empty);
    }
    if let Some(word) = directives.find(|one| !one.contains(['=', '[']) && one.parse::<LevelFilter>().is_err()) {
        return Err(LogLevelError::NoLevel(word.to_owned()));
    }
    EnvFilter::try_new(filter).map_err(|source| LogLevelError::Filter {
        filter: filter.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_level_counts_from_the_next_line_on_and_a_wrong_one_changes_nothing() {
        let (filter, level) = LogLevel::new(EnvFilter::new("info"));
        let lines = Lines::default();
        let written = lines.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_writer(move || written.clone());
        let subscriber = tracing_subscriber::registry().with(layer.with_filter(filter));
        tracing::subscriber::with_default(subscriber, || {
            let say = |n: u32| tracing::debug!(n, "said");
            say(1);
            assert_eq!(level.set(" debug ").unwrap(), "info");
            say(2);
            level.set("inof").unwrap_err();
            assert_eq!(level.get(), "debug");
            say(3);
            assert_eq!(level.set("warn").unwrap(), "debug");
            say(4);
        });
        let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let said: Vec<_> = (1..=4).filter(|n| text.contains(&format!("n={n}"))).collect();
        assert_eq!(said, [2, 3], "{text}");
    }

    #[test]
    fn a_filter_that_is_none_is_told_what_is_wrong() {
        for (filter, says) in [
            ("", "no filter was given"),
            (" , ", "no filter was given"),
            ("inof", "\"inof\" is no level (off, error, warn, info, debug, trace)"),
            ("info,evrepl", "\"evrepl\" is no level"),
            ("evrepl=loud", "\"evrepl=loud\": "),
        ] {
            let error = parse(filter).unwrap_err().to_string();
            assert!(error.starts_with(says), "{filter}: {error}");
        }
        assert!(matches!(
            parse(&"a=info,".repeat(1000)),
            Err(LogLevelError::TooLong(7000))
        ));
        for filter in [
            "off",
            "INFO",
            "info,evrepl=debug,rdkafka=warn",
            "warn,evrepl[event]=trace",
        ] {
            parse(filter).unwrap_or_else(|error| panic!("{filter}: {error}"));
        }
    }
}
