//! The `evrepl` command: arguments, configuration, run, exit code. All of it is in [`evrepl::cli`].

use std::process::ExitCode;

/// Of the whole process: librdkafka allocates a record on one thread and frees it on another, which is dear with glibc's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    evrepl::cli::main()
}
