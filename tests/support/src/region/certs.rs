//! Development certificates for the regions of one test, and where the `evrepl` binary is.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::place::Dir;

/// One development CA and a certificate per name, made by `evrepl certs`.
#[derive(Debug)]
pub struct Certs {
    dir: Dir,
}

impl Certs {
    /// Issues certificates for these regions (or other identities).
    ///
    /// # Panics
    /// When `evrepl certs` fails.
    pub fn issue(names: &[&str]) -> Certs {
        let certs = Certs { dir: Dir::new("certs") };
        certs.add(names);
        certs
    }

    /// Issues more certificates under the same CA.
    ///
    /// # Panics
    /// When `evrepl certs` fails, also because a name has one already.
    pub fn add(&self, names: &[&str]) {
        let output = Command::new(evrepl())
            .arg("certs")
            .arg("--out")
            .arg(self.dir.path())
            .args(names)
            .output();
        let output = output.unwrap_or_else(|error| panic!("cannot run evrepl certs: {error}"));
        assert!(
            output.status.success(),
            "evrepl certs failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// The folder with `ca.pem`, `<name>.pem` and `<name>.key`.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// The `evrepl` binary: `EVREPL_BIN`, or what cargo names to integration tests, or the one beside the running program
/// (or beside the folder `deps` it runs from).
///
/// # Panics
/// When there is none.
pub fn evrepl() -> PathBuf {
    let named = ["EVREPL_BIN", "CARGO_BIN_EXE_evrepl"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(PathBuf::from);
    let exe = std::env::current_exe().unwrap_or_default();
    let beside = exe.ancestors().skip(1).take(2).map(|folder| folder.join("evrepl"));
    named.chain(beside).find(|path| path.is_file()).unwrap_or_else(|| {
        panic!(
            "no evrepl binary near {}: run `cargo build --bin evrepl`",
            exe.display()
        )
    })
}
