//! `evrepl run`.

use clap::Args;

use super::{CliError, ConfigArg, Done};

/// Run this region: send to its peers, receive from them
///
/// Runs until SIGTERM or SIGINT, then drains: finishes what is in flight within
/// drain.grace_period (default: 25s) and exits with 0, or with 75 when work was left. A second
/// signal stops at once. Either way nothing of the flows is lost: the next start replays what they
/// had left. Events of a front door that Kafka has not taken are lost, and counted in the log.
/// Exits with 70 when restarting its parts no longer helps.
///
/// EVREPL_LOG sets how much is logged: `debug`, or `info,evrepl::wire=trace` (default: info).
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct RunArgs {
    #[command(flatten)]
    config: ConfigArg,
}

impl RunArgs {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let code = crate::run::run(self.config.load()?, &self.config.config);
        // Every code that there is fits; another one would be a failure that must not look like success.
        let code = u8::try_from(code).unwrap_or(super::EXIT_FAILED);
        Ok(Done {
            text: String::new(),
            code,
        })
    }
}
