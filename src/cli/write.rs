//! `evrepl write`.

use std::ffi::OsString;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;

use clap::{Args, Subcommand};

use super::{CliError, ConfigArg, Done, EXIT_FAILED, runtime};
use crate::event::Op;
use crate::telemetry::{Exported, WriteTrace};
use crate::writer::{KeyState, Writer, WriterError, Written};

/// Write a key and announce it, to try things by hand
///
/// Writes this region's memcached, on the server that the cache's ring names, then produces the
/// event and waits for Kafka's acknowledgement.
#[derive(Debug, Subcommand)]
#[command(verbatim_doc_comment)]
pub(super) enum WriteCommand {
    /// Store a value in this region's memcached and announce the key
    ///
    /// The other regions' evrepls then bring the value to theirs.
    Set {
        #[command(flatten)]
        place: Place,
        /// The value; `-` reads it from standard input, byte for byte
        #[arg(value_name = "VALUE", allow_negative_numbers = true)]
        value: OsString,
        /// How long it lives: 0 for ever, up to 2592000 in seconds, above that until this Unix time
        #[arg(long, value_name = "S", default_value_t = 0, value_parser = ttl)]
        ttl: u32,
        /// The flag bits kept beside the value, by which clients know its type; below 2^32
        #[arg(long, value_name = "N", default_value_t = 0)]
        flags: u32,
    },
    /// Remove a key from this region's memcached and announce it
    ///
    /// The key is announced also when it was not there: another region may still hold it.
    Delete {
        #[command(flatten)]
        place: Place,
    },
    /// Give a key of this region's memcached a new expiry and announce it
    ///
    /// When there is no such key, nothing is announced and the exit code is 1.
    Touch {
        #[command(flatten)]
        place: Place,
        /// How long it lives: 0 for ever, up to 2592000 in seconds, above that until this Unix time
        #[arg(long, value_name = "S", default_value_t = 0, value_parser = ttl)]
        ttl: u32,
    },
}

/// Which key is written.
#[derive(Debug, Args)]
pub(super) struct Place {
    #[command(flatten)]
    config: ConfigArg,
    /// The cache, by its name in the configuration
    #[arg(value_name = "CACHE")]
    cache: String,
    /// The key as memcached sees it, a client's prefix included
    #[arg(value_name = "KEY", allow_negative_numbers = true)]
    key: OsString,
    /// Trace the write on its whole way, and print the trace's id
    #[arg(long)]
    trace: bool,
}

impl WriteCommand {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let (name, place) = match &self {
            WriteCommand::Set { place, .. } => (Op::Set.name(), place),
            WriteCommand::Delete { place } => (Op::Delete.name(), place),
            WriteCommand::Touch { place, .. } => (Op::Touch.name(), place),
        };
        let config = place.config.load()?;
        let (cache, key) = (place.cache.as_str(), place.key.as_bytes());
        // What a terminal shows of a key that is not text is not the key, but tells it from others.
        let what = format!("{name} {cache} {}", place.key.to_string_lossy());
        let trace = place.trace.then(|| WriteTrace::start(&config)).transpose()?;
        let (written, traced) = runtime()?.block_on(async {
            let writer = Writer::connect(&config).await?;
            let Some(trace) = trace else {
                return Ok((self.write(&writer, cache, key).await?, String::new()));
            };
            let topic = config.caches.iter().find(|known| known.name == cache);
            let topic = topic.map_or("", |cache| cache.topic.as_str());
            let write = |context| {
                let writer = writer.with_trace(context);
                let command = &self;
                async move { command.write(&writer, cache, key).await }
            };
            let (written, context, exported) = trace.trace((name, cache, topic), write).await;
            let note = match exported {
                Exported::Taken => "",
                Exported::NotTaken => ", but telemetry.otlp_endpoint does not take the write's span",
                Exported::Nowhere => ", but telemetry.otlp_endpoint is not set: this region's spans go nowhere",
            };
            Ok::<_, CliError>((written?, format!("trace {}{note}\n", context.trace_id_hex())))
        })?;
        Ok(match written {
            Some(Written { partition, offset, ver }) => Done::ok(format!(
                "{what}: written and announced, partition {partition} offset {offset} version {ver}\n{traced}"
            )),
            None => Done {
                text: format!("{what}: not found, nothing announced\n"),
                code: EXIT_FAILED,
            },
        })
    }

    async fn write(&self, writer: &Writer, cache: &str, key: &[u8]) -> Result<Option<Written>, CliError> {
        Ok(match self {
            WriteCommand::Set { value, ttl, flags, .. } => {
                Some(writer.set(cache, key, &bytes_of(value)?, *flags, *ttl).await?)
            }
            WriteCommand::Delete { .. } => Some(writer.delete(cache, key).await?),
            WriteCommand::Touch { ttl, .. } => writer.touch(cache, key, *ttl).await?,
        })
    }
}

/// Seconds, as memcached takes them: `10m` would have to be one of its two meanings.
fn ttl(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| "it is a whole number of seconds, such as 600".to_owned())
}

fn bytes_of(value: &OsString) -> Result<Vec<u8>, CliError> {
    if value.as_bytes() != b"-" {
        return Ok(value.as_bytes().to_vec());
    }
    let mut bytes = Vec::new();
    std::io::stdin()
        .lock()
        .read_to_end(&mut bytes)
        .map_err(CliError::Input)?;
    Ok(bytes)
}

/// The error, what it means for the key, and what to do.
pub(super) fn explain(error: &WriterError) -> String {
    let key = match error.key_state() {
        KeyState::Unchanged => "nothing was written",
        KeyState::Changed if error.must_be_announced() => {
            "memcached has changed, and the other regions do not hear of it before the command is repeated"
        }
        KeyState::Changed => "memcached may have dropped the old value; the key is announced",
        KeyState::Unknown => "whether memcached has changed is not known; repeat the command to be sure",
    };
    let hint = match error {
        // librdkafka waits for a topic that is not there as for a broker that is away, and says the same of both.
        WriterError::NotAnnounced { .. } => "\n`evrepl check --connect` tells whether kafka answers and has the topic",
        _ => "",
    };
    format!("{error}\n{key}{hint}")
}
