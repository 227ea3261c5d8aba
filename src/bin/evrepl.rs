//! The `evrepl` command: arguments, configuration, run, exit code. All of it is in [`evrepl::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    evrepl::cli::main()
}
