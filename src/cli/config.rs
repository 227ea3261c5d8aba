//! `evrepl config`.

use clap::Subcommand;

use super::{CliError, ConfigArg, Done};

/// The configuration's schema, or the configuration in force
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// Print the JSON Schema of the configuration file, for editors
    ///
    /// Every option with its meaning and default. Editors with a TOML plug-in complete and check
    /// the file with it: write it to evrepl.schema.json, and begin the file with
    /// `#:schema ./evrepl.schema.json`.
    #[command(verbatim_doc_comment)]
    Schema,
    /// Print the configuration in force, every default filled in
    ///
    /// The file with the environment over it, as `evrepl run` would use it; paths are absolute.
    Print {
        #[command(flatten)]
        config: ConfigArg,
        /// Print the passwords among the librdkafka properties too, otherwise shown as `…`
        #[arg(long)]
        secrets: bool,
    },
}

impl ConfigCommand {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let mut text = match self {
            ConfigCommand::Schema => crate::config::schema(),
            ConfigCommand::Print { config, secrets } => {
                let config = config.load()?;
                if secrets {
                    config.to_toml()
                } else {
                    config.without_secrets().to_toml()
                }
            }
        };
        if !text.ends_with('\n') {
            text.push('\n');
        }
        Ok(Done::ok(text))
    }
}
