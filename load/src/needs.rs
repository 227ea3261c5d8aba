//! What must be on the machine, said in plain words when it isn't.

use std::path::{Path, PathBuf};

/// Whether what both programs start is there: memcached, and the evrepl binary beside this one.
///
/// # Errors
/// What is missing and how to get it.
pub fn regions() -> Result<(), String> {
    if !on_path("memcached") {
        return Err("memcached is not installed: run `make setup`, or `apt-get install memcached`".into());
    }
    evrepl_binary()
}

/// Whether Apache Kafka can be started.
///
/// # Errors
/// What is missing and how to get it.
pub fn kafka() -> Result<(), String> {
    let home = std::env::var_os("JAVA_HOME").map(|home| Path::new(&home).join("bin/java"));
    if !on_path("java") && !home.is_some_and(|java| java.is_file()) {
        return Err("Java is not installed: run `make setup`, or `apt-get install openjdk-17-jre-headless`".into());
    }
    // The jars' place is the lab's affair; it says itself when they are missing.
    Ok(())
}

/// Whether a program of a Debian package is there.
///
/// # Errors
/// What is missing and how to get it.
pub fn program(name: &str, package: &str) -> Result<(), String> {
    match on_path(name) {
        true => Ok(()),
        false => Err(format!("{name} is not installed: run `apt-get install {package}`")),
    }
}

fn evrepl_binary() -> Result<(), String> {
    let named = std::env::var_os("EVREPL_BIN").map(PathBuf::from);
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.ancestors().skip(1).take(2).map(|folder| folder.join("evrepl"));
    if named.into_iter().chain(beside).any(|path| path.is_file()) {
        return Ok(());
    }
    Err(format!(
        "the evrepl binary is not beside {}: build it with `cargo build --bin evrepl`, with --release if this is a release \
         build, or name one in EVREPL_BIN",
        exe.display()
    ))
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_on_the_path_and_only_there() {
        assert!(on_path("sh"));
        assert!(!on_path("no-such-program-as-this"));
    }
}
