//! The command line (DESIGN section 10): one file per subcommand.
//!
//! A subcommand gives back what it has to say and the exit code; only this file writes to the terminal. Exit codes:
//! 0 done or drained, 1 something could not be reached or done, 2 usage, 70 gave up after too many restarts, 75 the grace
//! period ran out with work left, 78 configuration.

mod certs;
mod check;
mod config;
mod probe;
mod replay;
mod run;
mod status;
mod tap;
mod top;
mod write;

use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::certs::CertsError;
use crate::config::{Config, ConfigError};
use crate::kafka::Refused;
use crate::replay::ReplayError;
use crate::telemetry::TelemetryError;
use crate::writer::WriterError;

/// Something could not be reached or done.
const EXIT_FAILED: u8 = 1;
/// Arguments that do not fit the configuration; clap's own code for wrong ones.
const EXIT_USAGE: u8 = 2;
/// The configuration is wrong, or does not fit what is out there (`EX_CONFIG` of sysexits.h).
const EXIT_CONFIG: u8 = 78;

const AFTER_HELP: &str = "\
Exit codes:
  0   done, or drained after SIGTERM or SIGINT
  1   something could not be reached or done
  2   wrong arguments
  70  gave up after too many restarts
  75  the grace period ran out with work left: events of flows are replayed by the next start, events of
      a front door that Kafka did not take are lost, and said in the log
  78  the configuration is wrong, or does not fit what is out there

Any setting of the file may also come from the environment, which then counts:
  EVREPL__BATCH__LINGER=5ms evrepl run --config evrepl.toml";

/// Replicates memcached writes between regions through Kafka.
///
/// One evrepl runs in each region. It reads from the region's Kafka which keys have changed,
/// looks at them in the region's memcached, and brings what it sees to the evrepl of each other
/// region, which writes it to its own memcached.
#[derive(Debug, Parser)]
#[command(name = "evrepl", version, after_help = AFTER_HELP, verbatim_doc_comment)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Each has its help beside its arguments.
#[derive(Debug, Subcommand)]
enum Command {
    Run(run::RunArgs),
    Check(check::CheckArgs),
    #[command(subcommand)]
    Config(config::ConfigCommand),
    Certs(certs::CertsArgs),
    #[command(subcommand)]
    Write(write::WriteCommand),
    Status(status::StatusArgs),
    Tap(tap::TapArgs),
    Top(top::TopArgs),
    Replay(replay::ReplayArgs),
}

/// `--config`, which most subcommands take.
#[derive(Debug, Args)]
struct ConfigArg {
    /// The configuration, a TOML file
    #[arg(long, value_name = "FILE", env = "EVREPL_CONFIG")]
    config: PathBuf,
}

impl ConfigArg {
    /// The file, and over it the environment.
    fn load(&self) -> Result<Config, CliError> {
        Ok(crate::config::load(&self.config, crate::config::environment())?)
    }
}

/// What a subcommand has to say when it is done.
#[derive(Debug, PartialEq, Eq)]
struct Done {
    /// For standard output, with its last line's end.
    text: String,
    /// The exit code.
    code: u8,
}

impl Done {
    fn ok(text: String) -> Done {
        Done { text, code: 0 }
    }
}

/// Why a subcommand did not do what it should. None of it is tried again here: whoever called may.
#[derive(Debug, thiserror::Error)]
enum CliError {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("{}", one_a_line(file, refused))]
    Kafka { file: PathBuf, refused: Vec<Refused> },
    #[error("{0}")]
    Certs(#[from] CertsError),
    #[error("{0}")]
    Status(#[from] status::StatusError),
    #[error("{0}")]
    Tap(#[from] tap::TapError),
    #[error("{0}")]
    Top(#[from] top::TopError),
    #[error("{}", write::explain(.0))]
    Write(#[from] WriterError),
    #[error("{0}")]
    Replay(#[from] ReplayError),
    #[error("{0}")]
    Telemetry(#[from] TelemetryError),
    #[error("standard input cannot be read: {0}")]
    Input(io::Error),
    #[error("cannot start a runtime: {0}")]
    Runtime(io::Error),
}

/// As the problems of a file stand.
fn one_a_line(file: &Path, refused: &[Refused]) -> String {
    let lines = refused.iter().map(|one| format!("{}: {one}", file.display()));
    lines.collect::<Vec<_>>().join("\n")
}

impl CliError {
    fn code(&self) -> u8 {
        match self {
            CliError::Config(_) | CliError::Kafka { .. } | CliError::Write(WriterError::Settings(_)) => EXIT_CONFIG,
            CliError::Replay(error) if error.is_usage() => EXIT_USAGE,
            CliError::Tap(tap::TapError::NoCache { .. }) | CliError::Write(WriterError::UnknownCache { .. }) => {
                EXIT_USAGE
            }
            _ => EXIT_FAILED,
        }
    }
}

/// Reads the arguments of this process, does what they say, and gives the exit code.
pub fn main() -> ExitCode {
    // Ends with code 2 when the arguments are wrong.
    let cli = Cli::parse();
    match cli.command.execute() {
        Ok(done) => print(&done),
        Err(error) => {
            // Problems of a configuration stand as they are: their place first, as compilers say it.
            let name = if matches!(error, CliError::Config(_) | CliError::Kafka { .. }) {
                ""
            } else {
                "evrepl: "
            };
            let _ = writeln!(io::stderr(), "{name}{error}");
            ExitCode::from(error.code())
        }
    }
}

impl Command {
    fn execute(self) -> Result<Done, CliError> {
        match self {
            Command::Run(args) => args.execute(),
            Command::Check(args) => args.execute(),
            Command::Config(command) => command.execute(),
            Command::Certs(args) => args.execute(),
            Command::Write(command) => command.execute(),
            Command::Status(args) => args.execute(),
            Command::Tap(args) => args.execute(),
            Command::Top(args) => args.execute(),
            Command::Replay(args) => args.execute(),
        }
    }
}

fn print(done: &Done) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(done.text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::from(done.code),
        // Whoever reads has read enough, as `head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::from(done.code),
        Err(error) => {
            let _ = writeln!(io::stderr(), "evrepl: standard output cannot be written: {error}");
            ExitCode::from(EXIT_FAILED)
        }
    }
}

/// A runtime for the few calls of one command.
fn runtime() -> Result<tokio::runtime::Runtime, CliError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(CliError::Runtime)
}

/// Columns padded to their widest cell, two spaces between them; the last one is left as it is.
fn table<const N: usize>(rows: &[[String; N]], out: &mut String) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let mut line = String::new();
        for (n, (width, cell)) in widths.iter().zip(row).enumerate() {
            line.push_str(cell);
            if n + 1 < N {
                line.extend(std::iter::repeat_n(' ', width + 2 - cell.chars().count()));
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests;
