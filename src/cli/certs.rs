//! `evrepl certs`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{CliError, Done};

/// Make a development CA and a certificate per region
///
/// Writes ca.pem and ca.key, and for each region <region>.pem and <region>.key, and prints the
/// lines to put into its configuration. A CA that is in the directory already is used again, so
/// that regions can be added later; nothing is ever overwritten.
///
/// For trying things out. In earnest take certificates from a CA of your own: each with its
/// region's identity as a DNS name, for client and server use.
#[derive(Debug, Args)]
#[command(verbatim_doc_comment)]
pub(super) struct CertsArgs {
    /// The directory to write to; made when absent
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The regions, each a DNS label such as us-east-1
    #[arg(value_name = "REGION", required = true)]
    regions: Vec<String>,
}

impl CertsArgs {
    pub(super) fn execute(self) -> Result<Done, CliError> {
        let written = crate::certs::issue(&self.out, &self.regions)?;
        Ok(Done::ok(report(&self.out, &self.regions, &written)))
    }
}

fn report(out: &Path, regions: &[String], written: &[PathBuf]) -> String {
    // Paths in a configuration are relative to its file, which may be anywhere.
    let folder = std::path::absolute(out).unwrap_or_else(|_| out.to_owned());
    let mut text = String::new();
    // Writing to a String cannot fail.
    for path in written {
        let _ = writeln!(text, "wrote {}", path.display());
    }
    for region in regions {
        let file = |name: String| toml_string(&folder.join(name).display().to_string());
        let _ = write!(
            text,
            "\nfor region {region}:\n\n[tls]\ncertificate = {}\nprivate_key = {}\nca = {}\n",
            file(format!("{region}.pem")),
            file(format!("{region}.key")),
            file("ca.pem".to_owned()),
        );
    }
    text
}

/// A TOML basic string: quotes, backslashes and control characters escaped.
fn toml_string(text: &str) -> String {
    let mut out = String::from('"');
    for letter in text.chars() {
        match letter {
            '"' | '\\' => out.extend(['\\', letter]),
            letter if letter.is_control() => {
                let _ = write!(out, "\\u{:04X}", u32::from(letter));
            }
            letter => out.push(letter),
        }
    }
    out.push('"');
    out
}
